"""Encoders: one decoded medium, as numbers, to a few feature vectors ("tokens").

    values [items, *input_shape]  ->  encoder  ->  features [items, num_tokens, width]

Three small ones are trained together with the adapter (`conv-image`, `patch-image`, `conv-audio`). The others are the
encoders of published checkpoints, frozen unless the configuration says otherwise: `clip`, `siglip`, `dinov2`, `efficientnet` for pictures, `whisper`,
`ast`, `hubert`, `wav2vec2` and `beats` for sound. None uses batch statistics: an item's features are the same whatever
else is in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moka.demo.encoders import ConvAudioEncoder, ConvImageEncoder, PatchImageEncoder
from moka.modeling.fields import read_config
from moka.type_checks import from_mapping

from .audio import AstEncoder, HubertEncoder, Wav2Vec2Encoder, WhisperEncoder
from .base import Encoder, FrontEnd, features_name
from .beats import BeatsEncoder
from .cached import CachedEncoder, bring_back, set_aside
from .efficientnet import EfficientNetEncoder
from .images import ClipEncoder, Dinov2Encoder, SiglipEncoder
from .qwen2_5_vl import QwenVlEncoder
from .towers import TowerEncoder

__all__ = [
    "ENCODERS",
    "CachedEncoder",
    "Encoder",
    "FrontEnd",
    "TowerEncoder",
    "bring_back",
    "build_encoder",
    "build_front_end",
    "features_name",
    "set_aside",
    "tiny_encoder",
]

ENCODERS: dict[str, type[Encoder]] = {
    cls.name: cls
    for cls in (
        *(ConvImageEncoder, PatchImageEncoder, ConvAudioEncoder),
        *(ClipEncoder, SiglipEncoder, Dinov2Encoder, EfficientNetEncoder, QwenVlEncoder),
        *(WhisperEncoder, AstEncoder, HubertEncoder, Wav2Vec2Encoder, BeatsEncoder),
    )
}


def build_encoder(config: Mapping[str, Any], pretrained: bool = True) -> Encoder:
    """The encoder that `config` describes: its "type" and the fields of that class's `Config`.

    `pretrained=False` never loads weights: for rebuilding a saved model, whose state dict brings them. With the
    `model_config` that `Encoder.to_dict` stores, that needs no network. Raises `MokaError` for an unknown type or
    field, a bad value, or a `name_or_path` that cannot be loaded.
    """
    cls, parsed = read_config(config, ENCODERS, "encoder")
    return cls(parsed, pretrained)


def build_front_end(config: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> FrontEnd:
    """Return the front end of the encoder that `config` describes (as for `build_encoder`, or from `Encoder.to_dict`).

    `settings` are those of a `FrontEnd.to_dict`, which needs no network; default: see `Encoder.front_end`. Raises
    `MokaError` for a bad configuration.
    """
    cls, parsed = read_config(config, ENCODERS, "encoder")
    if settings is None:
        return cls.front_end(parsed)
    own = {key: value for key, value in settings.items() if key != "type"}
    return from_mapping(cls.front_end_class, own, f"front_end of encoder {cls.name!r}")


def tiny_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A small random encoder of the architecture that `config` describes, as a configuration for `build_encoder`.

    Raises `MokaError` for an unknown type or field, and a bad value. Nothing is loaded.
    """
    cls, _ = read_config(config, ENCODERS, "encoder")
    return cls.tiny(config)
