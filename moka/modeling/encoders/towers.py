"""Encoders of `transformers`: the towers of published checkpoints, frozen unless told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about

from .base import Encoder


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
