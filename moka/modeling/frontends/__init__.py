"""Front ends: one decoded medium to the float32 array that its encoder takes.

    PIL.Image | Waveform | AudioFeatures  ->  front_end(medium)  ->  values [*encoder.input_shape]

`build_front_end` makes the one that fits an encoder's configuration; `front_end_from_dict` rebuilds it from `to_dict()`
without the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moka.errors import MokaError
from moka.modeling.encoders import ENCODERS, TowerEncoder
from moka.modeling.fields import read_config

from .base import FrontEnd, wrong_medium
from .efficientnet import EfficientNetFrontEnd
from .pictures import ClipFrontEnd, Dinov2FrontEnd, ImageFrontEnd, SiglipFrontEnd, border_colour, centre_ink, to_8_bit
from .qwen2_5_vl import QwenVlFrontEnd
from .sound import (
    MFCC_MEAN,
    MFCC_STD,
    AstFrontEnd,
    BeatsFrontEnd,
    MfccFrontEnd,
    WaveformFrontEnd,
    WhisperFrontEnd,
    kaldi_fbank,
)

__all__ = [
    "FRONT_ENDS",
    "MFCC_MEAN",
    "MFCC_STD",
    "AstFrontEnd",
    "BeatsFrontEnd",
    "ClipFrontEnd",
    "Dinov2FrontEnd",
    "EfficientNetFrontEnd",
    "FrontEnd",
    "ImageFrontEnd",
    "MfccFrontEnd",
    "QwenVlFrontEnd",
    "SiglipFrontEnd",
    "WaveformFrontEnd",
    "WhisperFrontEnd",
    "border_colour",
    "build_front_end",
    "centre_ink",
    "front_end_from_dict",
    "kaldi_fbank",
    "to_8_bit",
    "wrong_medium",
]

FRONT_ENDS: dict[str, type[FrontEnd]] = {
    cls.name: cls
    for cls in (
        *(ImageFrontEnd, ClipFrontEnd, SiglipFrontEnd, Dinov2FrontEnd, EfficientNetFrontEnd, QwenVlFrontEnd),
        *(MfccFrontEnd, WhisperFrontEnd, AstFrontEnd, WaveformFrontEnd, BeatsFrontEnd),
    )
}


def build_front_end(encoder_config: Mapping[str, Any]) -> FrontEnd:
    """The front end of the encoder that `encoder_config` describes (as for `build_encoder`, or from `Encoder.to_dict`).

    The preprocessing of a published encoder is read from `name_or_path` where one is named and has one; else it is the
    published one at the model's size. Raises `MokaError` for a bad configuration.
    """
    cls, config = read_config(encoder_config, ENCODERS, "encoder")
    if cls.name == "efficientnet":
        return EfficientNetFrontEnd(config.image_size)
    if cls.name == "conv-audio":
        if config.bins != len(MFCC_MEAN):
            raise MokaError(
                f"encoder 'conv-audio': given bins {config.bins}; its front end gives {len(MFCC_MEAN)} MFCC. "
                "Leave bins out."
            )
        return MfccFrontEnd(config.frames)
    if not issubclass(cls, TowerEncoder):
        return ImageFrontEnd(config.image_size, config.grey, config.polarity)
    if cls.name == "beats":  # the filter bank is the same for all checkpoints
        return BeatsFrontEnd(round(config.seconds * BeatsFrontEnd.rate))
    model_config = cls.resolve_model_config(config, use_name=False)
    source = config.name_or_path
    if cls.name == "qwen2.5-vl":
        return QwenVlFrontEnd.read(source, config.image_size)
    if cls.name == "dinov2":
        return Dinov2FrontEnd.read(source, config.image_size)
    if cls.name == "whisper":
        return WhisperFrontEnd(model_config.num_mel_bins, 2 * model_config.max_source_positions)
    if cls.name == "ast":
        return AstFrontEnd.read(source, model_config.max_length, model_config.num_mel_bins)
    if cls.name in ("hubert", "wav2vec2"):
        samples = round(config.seconds * WaveformFrontEnd.rate)
        return WaveformFrontEnd.read(source, samples, masked=model_config.feat_extract_norm == "layer")
    return {"clip": ClipFrontEnd, "siglip": SiglipFrontEnd}[cls.name].read(source, model_config.image_size)


def front_end_from_dict(saved: Mapping[str, Any]) -> FrontEnd:
    """The front end whose `to_dict` gave `saved`; needs no network."""
    settings = dict(saved)
    return FRONT_ENDS[settings.pop("type")](**settings)
