"""Small encoders that are trained together with the adapter; the embedded quickstarts use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moka.errors import MokaError
from moka.modeling.encoders.base import Encoder
from moka.modeling.fields import about


@dataclass
class PictureConfig(Encoder.Config):
    """The settings that the small image encoders and their front end share."""

    image_size: int = field(default=28, metadata=about("height and width of the picture, in pixels", minimum=1))
    grey: bool = field(default=True, metadata=about("one grey channel; False: red, green, blue"))
    polarity: str | None = field(
        default=None,
        metadata=about(
            "'light-on-dark': pictures are drawings; the front end inverts dark ink on a light ground, crops to the "
            "ink and centres it as MNIST does. None: pictures are only fitted to the size",
            choices=("light-on-dark",),
        ),
    )
    dropout: float = field(default=0.1, metadata=about("share of features dropped in training", minimum=0, maximum=1))


class ConvImageEncoder(Encoder):
    """Small convolutional network for pictures such as 28 x 28 drawings; about 98,000 parameters by default.

    Each stage halves height and width. The last map is pooled to a grid of `num_tokens` cells of 3 x 3 features; a cell
    keeps its nine places apart, as where a stroke is says digits apart.
    """

    @dataclass
    class Config(PictureConfig):
        channels: list[int] = field(
            default_factory=lambda: [16, 32, 64], metadata=about("channels of each stage", minimum=1)
        )
        width: int = field(default=128, metadata=about("width of a feature vector", minimum=1))
        num_tokens: int = field(
            default=1,
            metadata=about("feature vectors per picture: cells of a grid as square as the number allows", minimum=1),
        )

    name, kind, input_name = "conv-image", "image", "pixel_values"

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "channels": [8, 8], "width": 32}

    def build(self, pretrained: bool) -> None:
        config = self.config
        if config.image_size < 2 ** len(config.channels):
            raise MokaError(
                f"encoder 'conv-image': image_size {config.image_size} is too small for {len(config.channels)} stages, "
                f"which need at least {2 ** len(config.channels)}. Give a larger image_size or fewer channels."
            )
        self.input_shape = (1 if config.grey else 3, config.image_size, config.image_size)
        self.width, self.num_tokens = config.width, config.num_tokens
        # rows: the largest divisor not above the square root
        self.rows = max(n for n in range(1, math.isqrt(self.num_tokens) + 1) if self.num_tokens % n == 0)
        channels = [self.input_shape[0], *config.channels]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1),
                    nn.GroupNorm(math.gcd(8, after), after),
                    nn.GELU(),
                    nn.MaxPool2d(2),
                )
                for before, after in itertools.pairwise(channels)
            )
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(9 * channels[-1], self.width)
        self.norm = nn.LayerNorm(self.width)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        features = self.stages(values)  # [items, channels, height, width]
        features = F.adaptive_avg_pool2d(features, (3 * self.rows, 3 * (self.num_tokens // self.rows)))
        cells = F.unfold(features, kernel_size=3, stride=3).transpose(1, 2)  # [items, num_tokens, 9 * channels]
        return self.norm(self.head(self.dropout(cells)))


class PatchImageEncoder(Encoder):
    """Small vision transformer: square patches, learned positions, a few pre-norm layers; one feature vector per patch.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), without the class token.
    """

    @dataclass
    class Config(PictureConfig):
        image_size: int = field(default=64, metadata=about("height and width of the picture, in pixels", minimum=1))
        grey: bool = field(default=False, metadata=about("one grey channel; False: red, green, blue"))
        patch_size: int = field(default=8, metadata=about("height and width of a patch, in pixels", minimum=1))
        width: int = field(default=128, metadata=about("width of a feature vector", minimum=1))
        layers: int = field(default=2, metadata=about("transformer layers", minimum=1))
        heads: int = field(default=4, metadata=about("attention heads", minimum=1))

    name, kind, input_name = "patch-image", "image", "pixel_values"

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "heads": 2}

    def build(self, pretrained: bool) -> None:
        config = self.config
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            if getattr(config, whole) % getattr(config, part):
                raise MokaError(
                    f"encoder 'patch-image': {whole} {getattr(config, whole)} is not a multiple of "
                    f"{part} {getattr(config, part)}."
                )
        self.input_shape = (1 if config.grey else 3, config.image_size, config.image_size)
        self.width, self.num_tokens = config.width, (config.image_size // config.patch_size) ** 2
        self.patches = nn.Conv2d(self.input_shape[0], self.width, config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.num_tokens, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, config.heads, 2 * self.width, config.dropout, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        patches = self.patches(values).flatten(2).transpose(1, 2)  # [items, num_tokens, width]
        return self.layers(patches + self.positions)


class ConvAudioEncoder(Encoder):
    """Small convolutional network over feature frames, blind to padding; about 88,000 parameters by default.

    The last input row is the mask: 1 for a frame of sound, 0 for padding. The recording, however long, is read through
    3 x `num_tokens` soft windows laid evenly over its own length, so what is said first and last stay apart.
    """

    @dataclass
    class Config(Encoder.Config):
        bins: int = field(default=13, metadata=about("numbers per frame", minimum=1))
        frames: int = field(
            default=48,
            metadata=about(
                "length that recordings are cut or padded to, in frames (of 25 ms for MFCC)", minimum=1, weightless=True
            ),
        )
        channels: list[int] = field(
            default_factory=lambda: [64, 96, 96], metadata=about("channels of each convolution", minimum=1)
        )
        width: int = field(default=128, metadata=about("width of a feature vector", minimum=1))
        num_tokens: int = field(default=1, metadata=about("feature vectors per recording, in order of time", minimum=1))
        dropout: float = field(
            default=0.1, metadata=about("share of features dropped in training", minimum=0, maximum=1)
        )

    name, kind, input_name = "conv-audio", "audio", "input_features"
    windows_per_token: ClassVar[int] = 3

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "channels": [8, 8], "width": 32}

    def build(self, pretrained: bool) -> None:
        config = self.config
        self.length_in_seconds = config.frames / 40
        self.input_shape = (config.bins + 1, config.frames)
        self.width, self.num_tokens = config.width, config.num_tokens
        channels = [config.bins, *config.channels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, 5 if i == 0 else 3, padding="same")
            for i, (before, after) in enumerate(itertools.pairwise(channels))
        )
        # over the channels of one frame: statistics over time would see the padding
        self.norms = nn.ModuleList(nn.LayerNorm(after) for after in config.channels)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.windows_per_token * channels[-1], self.width)
        self.norm = nn.LayerNorm(self.width)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        mask = values[:, -1:]  # [items, 1, frames]
        features = values[:, :-1] * mask  # [items, bins, frames]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = norm(convolution(features).transpose(1, 2)).transpose(1, 2)
            features = F.gelu(features) * mask  # [items, channels, frames]
        weights = self.window_weights(mask.float()).to(features.dtype)
        pooled = weights @ features.transpose(1, 2)  # [items, windows, channels]
        pooled = pooled.unflatten(1, (self.num_tokens, -1)).flatten(2)  # [items, num_tokens, 3 * channels]
        return self.norm(self.head(self.dropout(pooled)))

    def window_weights(self, mask: torch.Tensor) -> torch.Tensor:
        """[items, 1, frames] -> [items, windows, frames]: each window's weights over the frames; they sum to 1."""
        windows = self.windows_per_token * self.num_tokens
        length = mask.sum(-1, keepdim=True).clamp(min=1)
        place = (mask.cumsum(-1) - 0.5) * windows / length  # [items, 1, frames], from 0 to `windows`
        centre = torch.arange(windows, device=mask.device)[:, None] + 0.5  # [windows, 1]
        # finite, so that an item without any frame gives numbers
        scores = (-2 * (place - centre) ** 2).masked_fill(mask == 0, -1e4)
        return scores.softmax(-1)
