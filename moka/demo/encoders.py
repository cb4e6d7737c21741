"""Small encoders, with their front ends, that are trained together with the adapter; the embedded quickstarts use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from moka.errors import MokaError
from moka.modeling.encoders.base import Encoder, FrontEnd, wrong_medium
from moka.modeling.encoders.images import border_colour, fit_square, picture
from moka.modeling.fields import about
from moka.modeling.media import AudioFeatures, Waveform

from .mfcc import COEFFICIENTS, RATE, mfcc


@dataclass
class ImageFrontEnd(FrontEnd):
    """Pictures of any size and mode for the small image encoders: float32 [1 or 3, image_size, image_size] in -1 ... 1.

    The picture keeps its aspect ratio; what is left of the square takes the colour of its border. With polarity
    "light-on-dark" it is a drawing, and becomes one in MNIST's manner (`centre_ink`).
    """

    image_size: int
    grey: bool = True
    polarity: str | None = None

    name: ClassVar[str] = "image"

    def __call__(self, medium: Any) -> np.ndarray:
        if self.polarity:
            pixels = centre_ink(np.asarray(picture(medium, "L")), self.image_size)[:, :, None]
            pixels = np.repeat(pixels, 1 if self.grey else 3, axis=2)
        else:
            pixels = fit_square(picture(medium, "L" if self.grey else "RGB"), self.image_size)
        return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)


def centre_ink(pixels: np.ndarray, size: int) -> np.ndarray:
    """A drawing of any size, dark on light or light on dark, as MNIST's makers would have stored it.

    Light ink on black; cropped to the ink, the longer side scaled to 20 of 28 pixels, the centre of mass moved to the
    middle. A drawing that already is of that form comes back unchanged. Thin strokes stay thin: their brightness is
    restored, not their width.

    Args:
        pixels: uint8 [height, width], grey.
        size: height and width of the result, in pixels.

    Returns:
        uint8 [size, size]; zeros for an empty page.

    Source: LeCun and Cortes, The MNIST database (2010), on how the digits were normalised.
    """
    box = round(size * 20 / 28)
    if _is_centred(pixels, size, box):
        return pixels
    ground = float(border_colour(pixels[:, :, None])[0])
    ink = (pixels - ground) * (1 if pixels.mean() > ground else -1)
    if ink.max() < 16:  # grain of the paper, not a drawing
        return np.zeros((size, size), np.uint8)
    ink = ink / ink.max()
    ink[ink < 0.2] = 0  # shadows and grain would widen the box
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = box / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    ink = np.asarray(small) / np.asarray(small).max()
    top, left = (
        int(np.clip(round(size / 2 - centre), 0, size - side))
        for centre, side in zip(_centre_of_mass(ink), ink.shape, strict=True)
    )
    page = np.zeros((size, size), np.uint8)
    page[top : top + height, left : left + width] = (ink * 255).round()
    return page


def _centre_of_mass(ink: np.ndarray) -> tuple[float, float]:
    """Row and column, counted in pixels from the first."""
    mass = ink.sum()
    return float(ink.sum(1) @ np.arange(ink.shape[0]) / mass), float(ink.sum(0) @ np.arange(ink.shape[1]) / mass)


def _is_centred(pixels: np.ndarray, size: int, box: int) -> bool:
    """Return whether a drawing has MNIST's form: its size, a black ground, ink within the box and centred to half a pixel."""
    if pixels.shape != (size, size) or not pixels.any() or border_colour(pixels[:, :, None])[0] > 0:
        return False
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    longest = 1 + max(rows[-1] - rows[0], columns[-1] - columns[0])
    off = max(abs(centre - size / 2) for centre in _centre_of_mass(pixels.astype(np.float64)))
    return box - 1 <= longest <= box and off <= 0.51


# Mean and standard deviation of each coefficient over all frames of the 2160 training recordings of the embedded spoken
# digits (`moka.demo.embedded.split_indices("recordings", "train")`).
MFCC_MEAN = np.array(
    [-304.31, 26.84, -4.01, -18.78, -37.12, -19.17, -17.41, -9.86, -13.90, -7.62, -12.05, -11.06, -12.15], np.float32
)
MFCC_STD = np.array(
    [145.05, 50.56, 38.71, 29.46, 30.02, 25.27, 18.86, 15.36, 15.45, 14.77, 14.25, 12.49, 12.49], np.float32
)


@dataclass
class MfccFrontEnd(FrontEnd):
    """Recordings, or their stored MFCC, for `conv-audio`: float32 [14, frames], 13 coefficients and the mask.

    Coefficients are normalised. A longer recording is cut to its loudest stretch of `frames`; a shorter one is followed
    by zeros, where the mask is 0 too.
    """

    frames: int

    name: ClassVar[str] = "mfcc"
    sampling_rate = RATE

    def __call__(self, medium: Any) -> np.ndarray:
        if isinstance(medium, Waveform):
            values = mfcc(medium.samples, medium.rate)
        elif isinstance(medium, AudioFeatures) and medium.kind == "mfcc":
            values = np.asarray(medium.values, np.float32)
        else:
            raise wrong_medium(medium, "recordings, or audio features of kind 'mfcc'")
        bins = len(MFCC_MEAN)
        if values.ndim != 2 or not len(values) or values.shape[1] != bins:
            raise MokaError(
                f"MFCC of shape {list(values.shape)} given; expected [frames, {bins}] with at least one frame."
            )
        values = (values - MFCC_MEAN) / MFCC_STD
        if len(values) > self.frames:
            # the first coefficient is the loudness
            loudness = np.convolve(values[:, 0], np.ones(self.frames), mode="valid")
            start = int(loudness.argmax())
            values = values[start : start + self.frames]
        item = np.zeros((bins + 1, self.frames), np.float32)
        item[:bins, : len(values)] = values.T
        item[bins, : len(values)] = 1
        return item


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
    front_end_class = ImageFrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        return ImageFrontEnd(config.image_size, config.grey, config.polarity)

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
    front_end_class = ImageFrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        return ImageFrontEnd(config.image_size, config.grey, config.polarity)

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
    front_end_class = MfccFrontEnd
    windows_per_token: ClassVar[int] = 3

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        if config.bins != COEFFICIENTS:
            raise MokaError(
                f"encoder 'conv-audio': given bins {config.bins}; its front end gives {COEFFICIENTS} MFCC. Leave bins out."
            )
        return MfccFrontEnd(config.frames)

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
