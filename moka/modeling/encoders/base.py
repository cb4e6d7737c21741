"""Base of all encoders: checked values in, features out, frozen if the configuration says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about
from moka.modeling.media import AudioFeatures, Waveform


def local_path(name_or_path: str) -> str:
    """Return the file of an embedded encoder, fetched on first use; any other name or path unchanged."""
    if not name_or_path.startswith("embedded:"):
        return name_or_path
    from moka.demo.stamps import resolve_encoder_file  # the embedded assets are known by name only

    return resolve_encoder_file(name_or_path)


@contextmanager
def same_weights() -> Iterator[None]:
    """Random weights made inside are the same every time: a frozen encoder's are saved nowhere, and runs must agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def features_name(encoder: Any) -> str:
    """Return the name of the model's input for features of an encoder (or of its class), given instead of its values."""
    return f"{encoder.kind}_features"


class FrontEnd:
    """Base of the front ends, dataclasses of settings: one decoded medium to the float32 array that its encoder takes.

        PIL.Image | Waveform | AudioFeatures  ->  front_end(medium)  ->  values [*encoder.input_shape]

    Raises `MokaError` for a medium of another kind.
    """

    name: ClassVar[str]
    sampling_rate: int | None = None  # Hz that sound is brought to

    def __call__(self, medium: Any) -> np.ndarray:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return its settings, fit for JSON; `build_front_end` takes them."""
        return {"type": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def wrong_medium(medium: Any, expected: str) -> MokaError:
    """Build the error for a medium of the wrong kind; `expected` says what the encoder takes."""
    given = {
        Waveform: "a recording (Waveform)",
        AudioFeatures: f"audio features of kind {getattr(medium, 'kind', None)!r}",
    }.get(type(medium), "an image" if isinstance(medium, Image.Image) else f"a {type(medium).__name__}")
    return MokaError(
        f"given {given}, but this encoder takes {expected}. Check which modality the file is listed under."
    )


class Encoder(nn.Module):
    """Base of all encoders: `forward` checks, casts and keeps frozen; subclasses write `build` and `encode`."""

    @dataclass
    class Config:
        trainable: bool = field(
            default=True, metadata=about("train this encoder's weights; False freezes it, in evaluation mode")
        )

    name: ClassVar[str]  # the `type` in a configuration
    front_end_class: ClassVar[type[FrontEnd]]
    kind: ClassVar[str]  # "image" or "audio"
    input_name: ClassVar[str]  # what transformers calls the values: "pixel_values" or "input_features"
    input_shape: tuple[int, ...]  # of one item
    width: int  # of one feature vector
    num_tokens: int  # feature vectors per item
    marks: ClassVar[tuple[str, ...]] = ()  # special tokens before and after an item, if its language model knows any
    length_in_seconds: float | None = None  # the longest sound that is not cut; None: no limit, or no sound

    def __init__(self, config: Any, pretrained: bool = True):
        super().__init__()
        self.config = config
        self.build(pretrained)
        self.freeze()
        self.train()

    def build(self, pretrained: bool) -> None:
        """Creates the modules and sets `input_shape`, `width` and `num_tokens`, for sound also `length_in_seconds`."""
        raise NotImplementedError

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        """Return what makes the values of one medium, for a `Config`; needs no weights.

        The preprocessing of a published encoder is read from `name_or_path` if one is named and has one; else it is the
        published one at the model's size.
        """
        raise NotImplementedError

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` ("type" and fields) with the sizes of a model that is built and run in milliseconds.

        For trying a recipe without its checkpoints: the architecture and every other field stay. A tiny configuration
        comes back as it is.
        """
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
        # Autocast of the trainer would compute in a lower precision than float32.
        grad = self.is_trained and torch.is_grad_enabled()
        with torch.set_grad_enabled(grad), torch.autocast(values.device.type, enabled=False):
            return self.encode(values.to(dtype))

    @property
    def is_trained(self) -> bool:
        """Return whether any parameter requires a gradient; `modules_to_save` of peft trains copies of frozen encoders."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> Encoder:
        """Switch the mode as `nn.Module.train` does; an encoder of which nothing is trained stays in evaluation mode."""
        return super().train(mode and self.is_trained)

    def freeze(self) -> None:
        """Freeze every parameter if the configuration says so, else those that can never have a gradient.

        Call it again after something else made new parameters, which all require gradients (`from_pretrained`).
        """
        if self.config.trainable:
            self.freeze_unused()
        else:
            self.requires_grad_(False)

    def freeze_unused(self) -> None:
        """Freeze what can never have a gradient: DDP waits for one of every parameter that requires it."""

    def dummy_input(self, items: int = 1) -> torch.Tensor:
        """Zeros [items, *input_shape]: lets a batch without this modality still touch every parameter."""
        return torch.zeros(items, *self.input_shape, device=next(self.parameters()).device)

    def to_dict(self) -> dict[str, Any]:
        """The configuration, fit for JSON: `build_encoder(that, pretrained=False)` rebuilds the modules."""
        return {"type": self.name, **dataclasses.asdict(self.config)}
