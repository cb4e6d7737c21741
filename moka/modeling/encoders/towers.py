"""Encoders of published checkpoints: loading their weights with every one accounted for, frozen unless the configuration says otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about
from moka.modeling.language_models import loading_errors

from .base import Encoder, same_weights

_SOURCES = "a folder with such a model, or the name of one on a hub that this machine can reach"


class TowerEncoder(Encoder):
    """Base of the encoders of `transformers`: weights from `name_or_path`, or random ones from `model_config`.

    Features are `hidden_states[layer]` of the plain model without its first `special_tokens`: of every layer but what
    the class says otherwise, before the model's final layer norm.
    """

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

    # `model_type` of the checkpoints that hold this encoder -> configuration and model in `transformers`
    model_types: ClassVar[Mapping[str, tuple[str, str]]]
    tiny_model: ClassVar[dict[str, Any]]  # a small `model_config` of the same architecture, of two layers
    kept_in_tiny: ClassVar[tuple[str, ...]] = ()  # keys of `model_config` that are of the architecture, not of its size
    special_tokens: int = 0  # leading hidden states that mean no part of the medium
    model: nn.Module
    unused: frozenset[str] | None = None  # names of parameters that the features do not depend on

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        """Return the `transformers` configuration and model whose checkpoints are read; of None the first ones."""
        config, model = cls.model_types.get(model_type or "") or next(iter(cls.model_types.values()))
        return getattr(transformers, config), getattr(transformers, model)

    @classmethod
    def adjust(cls, model_config: Any) -> Any:
        """The configuration with what this encoder does not need turned off."""
        return model_config

    @classmethod
    def resolve_model_config(cls, config: Any, use_name: bool) -> Any:
        """The `transformers` configuration: of `name_or_path` when `use_name` or without `model_config`, else that."""
        if config.name_or_path and (use_name or config.model_config is None):
            source = str(config.name_or_path)
            with loading_errors(f"encoder {cls.name!r}", source, _SOURCES):
                model_type = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
                if model_type not in cls.model_types:
                    raise MokaError(
                        f"encoder {cls.name!r}: {source!r} has a model of type {model_type!r}; "
                        f"expected {' or '.join(map(repr, cls.model_types))}."
                    )
                model_config = cls.adjust(cls.classes(model_type)[0].from_pretrained(source))
            if config.model_config:
                check_same_sizes(cls.name, source, model_config.to_dict(), config.model_config)
            return model_config
        if config.model_config is None:
            raise MokaError(
                f"encoder {cls.name!r}: give name_or_path (the model whose weights to load) or model_config "
                "(random weights)."
            )
        model_config_class = cls.classes(config.model_config.get("model_type"))[0]
        return cls.adjust(model_config_class.from_dict(config.model_config))

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        given = config.get("model_config") or {}
        small = {**cls.tiny_model, **{key: given[key] for key in cls.kept_in_tiny if key in given}}
        layer = max(-3, min(config.get("layer", -1), 2))  # 0 and two layers
        rest = {key: value for key, value in config.items() if key != "name_or_path"}
        return {**rest, "model_config": small, **({"layer": layer} if "layer" in config else {})}

    def build(self, pretrained: bool) -> None:
        model_config = self.resolve_model_config(self.config, use_name=pretrained)
        self.config = dataclasses.replace(self.config, model_config=model_config.to_dict())
        self.read_sizes(model_config)
        if pretrained and self.config.name_or_path:
            self.model = self.load(str(self.config.name_or_path), model_config)
        else:
            self.model = self.create_alike(model_config)

    def read_sizes(self, model_config: Any) -> None:
        """Sets `input_shape`, `width` and `num_tokens`, and checks `layer`."""
        raise NotImplementedError

    def check_layer(self, layers: int) -> None:
        if not -layers - 1 <= self.config.layer <= layers:
            raise MokaError(
                f"encoder {self.name!r}: given layer {self.config.layer}; the model has {layers} layers, so "
                f"-{layers + 1} to {layers} are allowed (0 is the embeddings, -1 the last layer)."
            )

    def part(self, model: Any) -> tuple[nn.Module, str]:
        """The encoder within the model of the checkpoint, and the prefix of its weights' names there."""
        return model, ""

    def load(self, source: str, model_config: Any) -> nn.Module:
        """The module with the checkpoint's weights; `MokaError` where one is missing or of another shape."""
        with loading_errors(f"encoder {self.name!r}", source, _SOURCES):
            loaded: Any = self.classes(model_config.model_type)[1].from_pretrained(
                source, config=model_config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        model, info = loaded
        module, prefix = self.part(model)
        for key, theirs, ours in sorted(info["mismatched_keys"]):
            if key.startswith(prefix):
                raise wrong_shape(self.name, source, key, theirs, ours)
        check_missing(self.name, source, [key for key in info["missing_keys"] if key.startswith(prefix)])
        return module

    def create(self, model_config: Any) -> nn.Module:
        """The module with random weights."""
        return self.classes(model_config.model_type)[1](model_config)

    def create_alike(self, model_config: Any) -> nn.Module:
        """`create`, with the same weights every time."""
        with same_weights():
            return self.create(model_config)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.model(values, output_hidden_states=True).hidden_states
        return hidden_states[self.config.layer][:, self.special_tokens :]

    def freeze_unused(self) -> None:
        if self.unused is None:
            if any(parameter.is_meta for parameter in self.parameters()):
                return  # a skeleton
            self.unused = unused_parameters(self)
        for name in self.unused:
            self.get_parameter(name).requires_grad_(False)


def unused_parameters(encoder: TowerEncoder) -> frozenset[str]:
    """Names of parameters that no feature depends on: of layers past the one taken, of a last norm. Costs a forward."""
    encoder.model.eval()
    values = encoder.dummy_input().to(next(encoder.parameters()).dtype)
    with torch.enable_grad():
        nodes: list[Any] = [encoder.encode(values).grad_fn]
    seen, used = set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))  # leaves of the graph only have one
            nodes += [inner for inner, _ in node.next_functions]
    return frozenset(name for name, p in encoder.named_parameters() if p.requires_grad and id(p) not in used)


def check_missing(name: str, source: str, missing: list[str]) -> None:
    if missing:
        raise MokaError(
            f"encoder {name!r}: {source!r} lacks weights of the encoder, such as {min(missing)!r}. Give a checkpoint "
            "that has all of them."
        )


def wrong_shape(name: str, source: str, key: str, theirs: Any, ours: Any) -> MokaError:
    """The error for a weight that is not as large as the configuration says."""
    return MokaError(
        f"encoder {name!r}: {source!r} is a checkpoint of another encoder size: its {key!r} has shape {list(theirs)}, "
        f"and the configuration asks for {list(ours)}. Give the checkpoint that belongs to this configuration."
    )


def check_same_sizes(name: str, source: str, theirs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `MokaError` where a size of the given `model_config` is not the checkpoint's."""
    for key, value in given.items():
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if key not in theirs or not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
            continue
        own = theirs[key]
        if (list(own) if isinstance(own, (list, tuple)) else [own]) != list(sizes):
            raise MokaError(
                f"encoder {name!r}: {source!r} is a checkpoint of another encoder size: its {key} is {own}, and "
                f"model_config asks for {value}. Take model_config out, or name a checkpoint of that size."
            )
