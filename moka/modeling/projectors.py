"""Projectors: an encoder's features to tokens as wide as the language model's embeddings.

    features [items, in_tokens, in_width]  ->  projector  ->  tokens [items, num_tokens, out_width]

`linear` and `mlp` are LLaVA's, and can take its weights (`import_llava`); `qformer` is the one of BLIP-2, which gives a
fixed number of tokens whatever comes in, and can take the weights that the MokA authors published (`import_official`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about, read_config
from moka.modeling.importers import import_llava, import_official

__all__ = ["PROJECTORS", "Projector", "build_projector", "import_llava", "import_official", "tiny_projector"]


class Projector(nn.Module):
    """Base of all projectors: `forward` checks and casts; subclasses write `build` and `project`.

    `output` is the last linear layer of each: scale its weights to give new tokens the scale of the model's embeddings.
    It is None where a projector has no parameters.
    """

    @dataclass
    class Config:
        pass

    name: ClassVar[str]  # the `type` in a configuration
    num_tokens: int  # tokens per item
    output: nn.Linear

    def __init__(self, config: Any, in_tokens: int, in_width: int, out_width: int):
        super().__init__()
        self.config = config
        self.in_tokens, self.in_width, self.out_width = in_tokens, in_width, out_width
        self.build()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)
            nn.init.zeros_(self.output.bias)

    def build(self) -> None:
        """Creates the modules and sets `num_tokens`."""
        raise NotImplementedError

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """[items, in_tokens, in_width] -> [items, num_tokens, out_width]."""
        raise NotImplementedError

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[items, in_tokens, in_width] -> [items, num_tokens, out_width], in the type of the projector's parameters.

        Raises `MokaError` for features of another shape.
        """
        if tuple(features.shape[1:]) != (self.in_tokens, self.in_width):
            raise MokaError(
                f"projector {self.name!r}: given features of shape {list(features.shape)}; expected "
                f"[items, {self.in_tokens}, {self.in_width}]. It was built for another encoder."
            )
        dtype = features.dtype if self.output is None else self.output.weight.dtype
        if not len(features):  # a batch without this modality
            return features.new_zeros(0, self.num_tokens, self.out_width, dtype=dtype)
        return self.project(features.to(dtype))

    @property
    def takes_any_number(self) -> bool:
        """Return whether the weights fit any number of features per item; each is then read only, averaged or attended to."""
        return True

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` ("type" and fields) with the sizes of a small model; one that is tiny already comes back as it is."""
        return dict(config)

    def to_dict(self) -> dict[str, Any]:
        """The configuration, fit for JSON, as `build_projector` takes it."""
        return {"type": self.name, **dataclasses.asdict(self.config)}


class IdentityProjector(Projector):
    """The features as they are, without parameters: for an encoder that ends in the language model's own connector."""

    name = "identity"

    def build(self) -> None:
        if self.in_width != self.out_width:
            raise MokaError(
                f"projector 'identity': the encoder gives features of width {self.in_width}, and the language model's "
                f"embeddings have {self.out_width}. Choose the encoder of that very model, or projector 'linear' or 'mlp'."
            )
        self.num_tokens = self.in_tokens
        self.output = None  # type: ignore[assignment]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return features


class LinearProjector(Projector):
    """One linear layer: over each feature vector by itself, or from all of an item's features to `tokens` tokens."""

    @dataclass
    class Config(Projector.Config):
        tokens: int | None = field(
            default=None,
            metadata=about("tokens per item, each made from all features; none: one from each feature", minimum=1),
        )

    name = "linear"

    @property
    def takes_any_number(self) -> bool:
        return self.config.tokens is None

    def build(self) -> None:
        tokens = self.config.tokens
        self.num_tokens = tokens or self.in_tokens
        if tokens:
            self.output = nn.Linear(self.in_tokens * self.in_width, tokens * self.out_width)
        else:
            self.output = nn.Linear(self.in_width, self.out_width)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        if self.config.tokens:
            features = features.flatten(1)  # [items, in_tokens * in_width]
        return self.output(features).reshape(len(features), self.num_tokens, self.out_width)


class MlpProjector(Projector):
    """Two linear layers with GELU between, over each feature vector; optionally averages the features to fewer first.

    Source: Liu et al., Improved Baselines with Visual Instruction Tuning (2023), `mlp2x_gelu`.
    """

    @dataclass
    class Config(Projector.Config):
        tokens: int | None = field(
            default=None,
            metadata=about("average the features, in their order, to this many; none: one token each", minimum=1),
        )

    name = "mlp"

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # No tiny encoder of a published type gives fewer features than 4.
        tokens = config.get("tokens")
        return {**config, **({"tokens": min(tokens, 4)} if tokens else {})}

    def build(self) -> None:
        self.num_tokens = self.config.tokens or self.in_tokens
        if self.num_tokens > self.in_tokens:
            raise MokaError(
                f"projector 'mlp': given tokens {self.num_tokens}; the encoder gives {self.in_tokens} feature vectors "
                f"per item, so at most {self.in_tokens} are allowed. For more, use projector 'linear' or 'qformer'."
            )
        self.hidden = nn.Linear(self.in_width, self.out_width)
        self.output = nn.Linear(self.out_width, self.out_width)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        if self.num_tokens < self.in_tokens:
            features = F.adaptive_avg_pool1d(features.transpose(1, 2), self.num_tokens).transpose(1, 2)
        return self.output(F.gelu(self.hidden(features)))


class QFormerProjector(Projector):
    """Learned queries read the features by cross-attention; a two-layer MLP widens what they found.

        features -> layer norm -> | queries: self-attention, cross-attention, MLP |  x layers -> MLP with GELU -> tokens

    For several frames of one video, or windows of one recording, give them as items, as the MokA authors do: `queries`
    tokens for each frame or window, which reads that one only.

    Source: Li et al., BLIP-2 (2023); `transformers`' `Blip2QFormerModel`.
    """

    @dataclass
    class Config(Projector.Config):
        queries: int = field(default=32, metadata=about("learned queries: tokens per item", minimum=1))
        hidden_size: int = field(default=768, metadata=about("width of the queries", minimum=1))
        layers: int = field(default=2, metadata=about("transformer layers", minimum=1))
        heads: int = field(default=12, metadata=about("attention heads", minimum=1))
        intermediate_size: int = field(default=3072, metadata=about("width inside the layers' MLPs", minimum=1))
        cross_attention_frequency: int = field(
            default=1, metadata=about("cross-attention in every n-th layer, from the first", minimum=1)
        )
        dropout: float = field(
            default=0.1, metadata=about("share dropped of attention and features in training", minimum=0, maximum=1)
        )

    name = "qformer"

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "queries": 4, "hidden_size": 32, "heads": 2, "intermediate_size": 64}

    def build(self) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = self.config
        if config.hidden_size % config.heads:
            raise MokaError(
                f"projector 'qformer': hidden_size {config.hidden_size} is not a multiple of heads {config.heads}."
            )
        self.num_tokens = config.queries
        self.norm = nn.LayerNorm(self.in_width)
        self.queries = nn.Parameter(0.02 * torch.randn(1, config.queries, config.hidden_size))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=self.in_width,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            )
        )
        self.hidden = nn.Linear(config.hidden_size, self.out_width)
        self.output = nn.Linear(self.out_width, self.out_width)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        features = self.norm(features.to(self.norm.weight.dtype))
        queries = self.queries.expand(len(features), -1, -1)  # [items, queries, hidden_size]
        found = self.qformer(queries, encoder_hidden_states=features).last_hidden_state
        # transformers may keep the Q-Former itself in float32
        found = found.to(self.output.weight.dtype)
        return self.output(F.gelu(self.hidden(found)))


PROJECTORS: dict[str, type[Projector]] = {
    cls.name: cls for cls in (IdentityProjector, LinearProjector, MlpProjector, QFormerProjector)
}


def build_projector(config: Mapping[str, Any], in_tokens: int, in_width: int, out_width: int) -> Projector:
    """The projector that `config` describes: its "type" and the fields of that class's `Config`.

    `in_tokens` and `in_width` are the encoder's `num_tokens` and `width`; `out_width` is the width of the language
    model's embeddings. Raises `MokaError` for an unknown type or field, or a value that does not fit the encoder.
    """
    cls, parsed = read_config(config, PROJECTORS, "projector")
    return cls(parsed, in_tokens, in_width, out_width)


def tiny_projector(config: Mapping[str, Any]) -> dict[str, Any]:
    """A small projector of the kind that `config` describes, as a configuration for `build_projector`.

    Raises `MokaError` for an unknown type or field, and a bad value.
    """
    cls, _ = read_config(config, PROJECTORS, "projector")
    return cls.tiny(config)
