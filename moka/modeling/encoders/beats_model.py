"""BEATs, the model: a transformer over patches of a spectrogram.

    filter bank -> 16 x 16 patches -> layer norm -> linear -> + convolution over positions -> layer norm -> layers

A layer is post-norm, with its residual scaled by (2 x layers) ** 0.25 ("deep norm"). Attention adds a bias by relative
position, which only the first layer has, times a gate that each layer computes from its queries.

Names of weights are those of the published checkpoints. Source: Chen et al., BEATs: Audio Pre-Training with Acoustic
Tokenizers (2022); the gated bias: Chen et al., WavLM (2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from moka.errors import MokaError, nearest

MEL_BINS = 128


@dataclass
class BeatsModelConfig:
    """The "cfg" of a published checkpoint; defaults are those of BEATs iter3+.

    The dropouts and the layer drop are 0 there and not applied; what belongs to the predictor is not used.
    """

    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    dropout_input: float = 0.0
    layer_norm_first: bool = False
    deep_norm: bool = True
    input_patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position_embedding: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    gru_rel_pos: bool = True
    finetuned_model: bool = False
    predictor_dropout: float = 0.0
    predictor_class: int = 527
    layer_wise_gradient_decay_ratio: float = 0.6

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> BeatsModelConfig:
        """Raises `MokaError` for an unknown name, sizes that do not divide, and what is not built."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                raise MokaError(f"encoder 'beats': model_config has no {key!r}.{nearest(key, known)}")
        config = cls(**settings)
        width = config.encoder_embed_dim
        for part in ("encoder_attention_heads", "conv_pos_groups"):
            if width % getattr(config, part):
                raise MokaError(
                    f"encoder 'beats': encoder_embed_dim {width} is not a multiple of {part} {getattr(config, part)}."
                )
        if config.activation_fn not in ("gelu", "relu") or config.layer_norm_first:
            raise MokaError(
                f"encoder 'beats': activation_fn {config.activation_fn!r} with layer_norm_first "
                f"{config.layer_norm_first} is not built; allowed: 'gelu' or 'relu', with layer_norm_first False, as in "
                "the published checkpoints."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class BeatsModel(nn.Module):
    """Normalised filter bank [items, frames, 128] to hidden states [items, patches, width], as many as layers + 1."""

    def __init__(self, config: BeatsModelConfig):
        super().__init__()
        width, patch = config.encoder_embed_dim, config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, stride=patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        # the published model has this layer only where the widths differ
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if config.embed_dim != width else nn.Identity()
        self.encoder = BeatsTransformer(config)

    def forward(self, fbank: torch.Tensor) -> list[torch.Tensor]:
        patches = self.patch_embedding(fbank[:, None])  # [items, embed_dim, frames // 16, 8]
        patches = patches.flatten(2).transpose(1, 2)  # [items, patches, embed_dim]; all bands of a time, then the next
        return self.encoder(self.post_extract_proj(self.layer_norm(patches)))


class BeatsTransformer(nn.Module):
    """Positions by convolution, then the layers: [items, patches, width] to all hidden states, the input's first."""

    def __init__(self, config: BeatsModelConfig):
        super().__init__()
        width, kernel = config.encoder_embed_dim, config.conv_pos
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
        nn.init.normal_(convolution.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        # Loading takes the published names too: weight_g and weight_v.
        self.pos_conv = nn.Sequential(weight_norm(convolution, dim=2), nn.GELU())
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BeatsLayer(config, first=i == 0) for i in range(config.encoder_layers))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        positions = self.pos_conv(x.transpose(1, 2))[:, :, : x.shape[1]]  # an even kernel gives one too many
        states = [self.layer_norm(x + positions.transpose(1, 2))]
        first: Any = self.layers[0]
        bias = first.self_attn.position_bias(x.shape[1], x.device)
        for layer in self.layers:
            states.append(layer(states[-1], bias))
        return states


class BeatsLayer(nn.Module):
    def __init__(self, config: BeatsModelConfig, first: bool):
        super().__init__()
        width = config.encoder_embed_dim
        self.self_attn = BeatsAttention(config, first)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.activation = F.gelu if config.activation_fn == "gelu" else F.relu
        self.residual = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = self.self_attn_layer_norm(self.residual * x + self.self_attn(x, bias))
        return self.final_layer_norm(self.residual * x + self.fc2(self.activation(self.fc1(x))))


class BeatsAttention(nn.Module):
    """Self-attention whose scores gain a bias by relative position, gated by the query."""

    def __init__(self, config: BeatsModelConfig, first: bool):
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.buckets, self.max_distance = config.num_buckets, config.max_distance
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        biased = config.relative_position_embedding
        self.relative_attention_bias = nn.Embedding(config.num_buckets, self.heads) if biased and first else None
        self.gated = biased and config.gru_rel_pos
        if self.gated:
            self.grep_linear = nn.Linear(width // self.heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [items, heads, patches, width / heads]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if bias is not None and self.gated:
            bias = self.gate(query) * bias  # [items, heads, patches, patches]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def gate(self, query: torch.Tensor) -> torch.Tensor:
        """[items, heads, patches, width / heads] -> [items, heads, patches, 1], about 1 to 3."""
        gates = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid()  # [items, heads, patches, 2]
        update, reset = gates.chunk(2, dim=-1)
        return update * (reset * self.grep_a - 1) + 2

    def position_bias(self, length: int, device: torch.device) -> torch.Tensor | None:
        """[1, heads, length, length], by the bucket of key place minus query place."""
        if self.relative_attention_bias is None:
            return None
        places = torch.arange(length, device=device)
        buckets = relative_buckets(places[None] - places[:, None], self.buckets, self.max_distance)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]


def relative_buckets(distance: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """Bucket of each signed distance: half of them forward; near ones have their own, far ones share by logarithm.

    Source: Raffel et al., T5 (2020).
    """
    buckets //= 2
    exact = buckets // 2
    size = distance.abs()
    far = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
    return (distance > 0).long() * buckets + torch.where(size < exact, size, far)
