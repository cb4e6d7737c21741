"""Encoders: one decoded medium, as numbers, to a few feature vectors ("tokens").

    values [items, *input_shape]  ->  encoder  ->  features [items, num_tokens, width]

Three small ones are trained together with the adapter (`conv-image`, `patch-image`, `conv-audio`); `clip` and
`whisper` are the encoder halves of the Hugging Face models, frozen unless told otherwise. None uses batch statistics:
an item's features are the same whatever else is in its batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about, read_config


class Encoder(nn.Module):
    """Base of all encoders: `forward` checks, casts and keeps frozen; subclasses write `build` and `encode`."""

    @dataclass
    class Config:
        trainable: bool = field(
            default=True, metadata=about("train this encoder's weights; False freezes it, in evaluation mode")
        )

    name: ClassVar[str]  # the `type` in a configuration
    kind: ClassVar[str]  # "image" or "audio"
    input_name: ClassVar[str]  # what transformers calls the values: "pixel_values" or "input_features"
    input_shape: tuple[int, ...]  # of one item
    width: int  # of one feature vector
    num_tokens: int  # feature vectors per item

    def __init__(self, config: Any, pretrained: bool = True):
        super().__init__()
        self.config = config
        self.build(pretrained)
        self.train()

    def build(self, pretrained: bool) -> None:
        """Creates the modules and sets `input_shape`, `width` and `num_tokens`."""
        raise NotImplementedError

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """[items, *input_shape] in the parameters' type -> [items, num_tokens, width]."""
        raise NotImplementedError

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[items, *input_shape] -> [items, num_tokens, width], in the type of the parameters (float32 by default).

        Raises `MokaError` for values of another shape.
        """
        if tuple(values.shape[1:]) != self.input_shape:
            raise MokaError(
                f"encoder {self.name!r}: given {self.input_name} of shape {list(values.shape)}; "
                f"expected [items, {', '.join(map(str, self.input_shape))}]. Use the front end of this encoder."
            )
        dtype = next(self.parameters()).dtype
        if not len(values):  # a batch without this modality; not every tower takes it
            return values.new_zeros(0, self.num_tokens, self.width, dtype=dtype)
        # The trainer's autocast would lower the precision behind the back of "float32 by default".
        grad = self.config.trainable and torch.is_grad_enabled()
        with torch.set_grad_enabled(grad), torch.autocast(values.device.type, enabled=False):
            return self.encode(values.to(dtype))

    def train(self, mode: bool = True) -> Encoder:
        """As `nn.Module.train`, but a frozen encoder stays in evaluation mode and frozen."""
        # Here and not only at the start: `PreTrainedModel.from_pretrained` makes weights anew, which require gradients,
        # and ends in `eval()`.
        if not self.config.trainable:
            self.requires_grad_(False)
        return super().train(mode and self.config.trainable)

    def dummy_input(self, items: int = 1) -> torch.Tensor:
        """Zeros [items, *input_shape]: lets a batch without this modality still touch every parameter."""
        return torch.zeros(items, *self.input_shape, device=next(self.parameters()).device)

    def to_dict(self) -> dict[str, Any]:
        """The configuration, fit for JSON: `build_encoder(that, pretrained=False)` rebuilds the modules."""
        return {"type": self.name, **dataclasses.asdict(self.config)}


@dataclass
class PictureConfig(Encoder.Config):
    """What the small image encoders and their front end share."""

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
    keeps its nine places apart, as where a stroke lies tells digits apart.
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
            metadata=about("length that recordings are cut or padded to, in frames (of 25 ms for MFCC)", minimum=1),
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

    def build(self, pretrained: bool) -> None:
        config = self.config
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


class TowerEncoder(Encoder):
    """Base of the encoders of `transformers`: weights from `name_or_path`, or random ones from `model_config`."""

    @dataclass
    class Config(Encoder.Config):
        trainable: bool = field(
            default=False, metadata=about("train this encoder's weights; False freezes it, in evaluation mode")
        )
        name_or_path: str | None = field(
            default=None, metadata=about("model on the hub, or folder, that the weights come from")
        )
        model_config: dict | None = field(
            default=None, metadata=about("the model's own configuration; filled in from name_or_path")
        )
        layer: int = field(
            default=-1,
            metadata=about("hidden state taken as features: -1 the last, -2 the one before, 0 the embeddings"),
        )

    model_types: ClassVar[tuple[str, ...]]  # `model_type` of the checkpoints that hold this encoder
    model: nn.Module

    @classmethod
    def model_config_class(cls) -> Any:
        raise NotImplementedError

    @classmethod
    def resolve_model_config(cls, config: Any, use_name: bool) -> Any:
        """The `transformers` configuration: of `name_or_path` when `use_name` or without `model_config`, else that."""
        if config.name_or_path and (use_name or config.model_config is None):
            source = str(config.name_or_path)
            with _loading(cls.name, source):
                from transformers import AutoConfig

                model_type = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
                if model_type not in cls.model_types:
                    raise MokaError(
                        f"encoder {cls.name!r}: {source!r} holds a model of type {model_type!r}; "
                        f"expected {' or '.join(map(repr, cls.model_types))}."
                    )
                return cls.model_config_class().from_pretrained(source)
        if config.model_config is None:
            raise MokaError(
                f"encoder {cls.name!r}: give name_or_path (the model whose weights to load) or model_config "
                "(random weights)."
            )
        return cls.model_config_class().from_dict(config.model_config)

    def build(self, pretrained: bool) -> None:
        model_config = self.resolve_model_config(self.config, use_name=pretrained)
        self.config = dataclasses.replace(self.config, model_config=model_config.to_dict())
        self.read_sizes(model_config)
        if pretrained and self.config.name_or_path:
            with _loading(self.name, self.config.name_or_path):
                self.model, missing = self.load(self.config.name_or_path)
            if missing:
                raise MokaError(
                    f"encoder {self.name!r}: {self.config.name_or_path!r} lacks weights of the encoder, such as "
                    f"{min(missing)!r}. Give a checkpoint that holds all of them."
                )
        else:
            self.model = self.create(model_config)

    def read_sizes(self, model_config: Any) -> None:
        """Sets `input_shape`, `width` and `num_tokens`, and checks `layer`."""
        raise NotImplementedError

    def check_layer(self, layers: int) -> None:
        if not -layers - 1 <= self.config.layer <= layers:
            raise MokaError(
                f"encoder {self.name!r}: given layer {self.config.layer}; the model has {layers} layers, so "
                f"-{layers + 1} to {layers} are allowed (0 is the embeddings, -1 the last layer)."
            )

    def load(self, name_or_path: str) -> tuple[nn.Module, set[str]]:
        """The module with the checkpoint's weights, and the names of weights that the checkpoint lacks."""
        raise NotImplementedError

    def create(self, model_config: Any) -> nn.Module:
        """The module with random weights."""
        raise NotImplementedError

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return self.model(values, output_hidden_states=True).hidden_states[self.config.layer]


class ClipEncoder(TowerEncoder):
    """CLIP's vision tower: one feature vector per patch, without the class token, before the final layer norm.

    LLaVA takes layer -2; the class token and the pooled output are never used.
    """

    name, kind, input_name = "clip", "image", "pixel_values"
    model_types = ("clip", "clip_vision_model")

    @classmethod
    def model_config_class(cls) -> Any:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        self.input_shape = (model_config.num_channels, model_config.image_size, model_config.image_size)
        self.width = model_config.hidden_size
        self.num_tokens = (model_config.image_size // model_config.patch_size) ** 2

    def load(self, name_or_path: str) -> tuple[nn.Module, set[str]]:
        from transformers import CLIPVisionModel

        loaded: Any = CLIPVisionModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        return model, set(info["missing_keys"])

    def create(self, model_config: Any) -> nn.Module:
        from transformers import CLIPVisionModel

        return CLIPVisionModel(model_config)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return super().encode(values)[:, 1:]  # the first is the class token


class WhisperEncoder(TowerEncoder):
    """The encoder half of Whisper: log-mel frames of a clip of fixed length to one feature vector per 20 ms.

    Layer -1 is the model's output, after its final layer norm.
    """

    name, kind, input_name = "whisper", "audio", "input_features"
    model_types = ("whisper",)

    @classmethod
    def model_config_class(cls) -> Any:
        from transformers import WhisperConfig

        return WhisperConfig

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.encoder_layers)
        self.width, self.num_tokens = model_config.d_model, model_config.max_source_positions
        self.input_shape = (model_config.num_mel_bins, 2 * self.num_tokens)

    def load(self, name_or_path: str) -> tuple[nn.Module, set[str]]:
        from transformers import WhisperModel

        loaded: Any = WhisperModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        return model.encoder, {key for key in info["missing_keys"] if key.startswith("encoder.")}

    def create(self, model_config: Any) -> nn.Module:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Tower

        return Tower(model_config)


@contextmanager
def _loading(name: str, source: str) -> Iterator[None]:
    """Turns what `transformers` raises for a source that is not there into a `MokaError` that names it."""
    try:
        yield
    except MokaError:
        raise
    except (OSError, ValueError) as error:
        raise MokaError(
            f"encoder {name!r}: cannot load {source!r}: neither a folder with a model nor a model on the hub that can "
            f"be reached. Check the name, or download it first. ({str(error).strip().splitlines()[0]})"
        ) from error


ENCODERS: dict[str, type[Encoder]] = {
    cls.name: cls for cls in (ConvImageEncoder, PatchImageEncoder, ConvAudioEncoder, ClipEncoder, WhisperEncoder)
}


def build_encoder(config: Mapping[str, Any], pretrained: bool = True) -> Encoder:
    """The encoder that `config` describes: its "type" and the fields of that class's `Config`.

    `pretrained=False` never loads weights: for rebuilding a saved model, whose state dict brings them. With the
    `model_config` that `Encoder.to_dict` stores, that needs no network. Raises `MokaError` for an unknown type or
    field, a bad value, or a `name_or_path` that cannot be loaded.
    """
    cls, parsed = read_config(config, ENCODERS, "encoder")
    return cls(parsed, pretrained)
