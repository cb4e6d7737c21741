"""Published encoders of sound in `transformers`: Whisper, AST, HuBERT and wav2vec 2.0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about

from .towers import TowerEncoder
from .vision import TINY_TRANSFORMER

RATE = 16_000  # Hz, of all of these encoders


class WhisperEncoder(TowerEncoder):
    """The encoder half of Whisper: log-mel frames of a clip of fixed length to one feature vector per 20 ms.

    Layer -1 is the model's output, after its final layer norm.
    """

    name, kind, input_name = "whisper", "audio", "input_features"
    model_types = ("whisper",)
    tiny_model = {
        **{"d_model": 32, "num_mel_bins": 80, "max_source_positions": 50, "vocab_size": 20, "max_target_positions": 8},
        **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
        **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0},
    }

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import WhisperConfig, WhisperModel

        return WhisperConfig, WhisperModel

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.encoder_layers)
        self.width, self.num_tokens = model_config.d_model, model_config.max_source_positions
        self.input_shape = (model_config.num_mel_bins, 2 * self.num_tokens)
        self.length_in_seconds = 2 * self.num_tokens / 100

    def part(self, model: Any) -> tuple[nn.Module, str]:
        return model.encoder, "encoder."

    def create(self, model_config: Any) -> nn.Module:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Tower

        return Tower(model_config)


class AstEncoder(TowerEncoder):
    """Audio Spectrogram Transformer: one feature vector per patch of the spectrogram, before the final layer norm.

    Patches overlap; they are in order of frequency, and within one frequency of time. The class and distillation
    tokens are dropped.

    Source: Gong et al., AST: Audio Spectrogram Transformer (2021).
    """

    name, kind, input_name = "ast", "audio", "input_features"
    model_types = ("audio-spectrogram-transformer",)
    tiny_model = {**TINY_TRANSFORMER, "intermediate_size": 64, "num_mel_bins": 32, "max_length": 64}
    special_tokens = 2

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import ASTConfig, ASTModel

        return ASTConfig, ASTModel

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        frames, bins, patch = model_config.max_length, model_config.num_mel_bins, model_config.patch_size
        self.input_shape = (frames, bins)
        self.width = model_config.hidden_size
        rows = (bins - patch) // model_config.frequency_stride + 1
        self.num_tokens = rows * ((frames - patch) // model_config.time_stride + 1)
        # a frame of 25 ms every 10 ms
        self.length_in_seconds = (400 + 160 * (frames - 1)) / RATE


class HubertEncoder(TowerEncoder):
    """HuBERT: the waveform of a clip of `seconds`, at 16 kHz, to one feature vector per 20 ms.

    A checkpoint with `feat_extract_norm: layer` was trained with padding masked: its input has a second row, 1 for
    sound and 0 for padding, and the features past the end of the sound are zeros. One with `group` was trained on
    padding of zeros, and takes the waveform only.

    With `do_stable_layer_norm` (the large models) layer -1 is before the final layer norm. Layer drop and the masking
    of training inputs (SpecAugment) are off.

    Source: Hsu et al., HuBERT (2021); Baevski et al., wav2vec 2.0 (2020).
    """

    @dataclass
    class Config(TowerEncoder.Config):
        seconds: float = field(
            default=10.0,
            metadata=about("length that recordings are cut or padded to, in seconds", minimum=0.025, weightless=True),
        )

    name, kind, input_name = "hubert", "audio", "input_features"
    model_types = ("hubert",)
    tiny_model = {
        **{**TINY_TRANSFORMER, "intermediate_size": 64, "conv_dim": [8] * 7, "vocab_size": 20},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    }
    kept_in_tiny = ("feat_extract_norm", "do_stable_layer_norm", "conv_bias", "feat_proj_layer_norm")

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().tiny(config), "seconds": min(2.0, config.get("seconds", 10.0))}

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import HubertConfig, HubertModel

        return HubertConfig, HubertModel

    @classmethod
    def adjust(cls, model_config: Any) -> Any:
        # A dropped layer would shift `hidden_states`; without masking its vector would never have a gradient.
        model_config.layerdrop = model_config.mask_time_prob = model_config.mask_feature_prob = 0.0
        return model_config

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        self.strides = list(zip(model_config.conv_kernel, model_config.conv_stride, strict=True))
        self.masked = model_config.feat_extract_norm == "layer"
        self.samples = round(self.config.seconds * RATE)
        self.input_shape = (2, self.samples) if self.masked else (self.samples,)
        self.width, self.num_tokens = model_config.hidden_size, self.features_of(self.samples)
        self.length_in_seconds = self.samples / RATE
        if self.num_tokens < 1:
            raise MokaError(
                f"encoder {self.name!r}: given seconds {self.config.seconds}; its convolutions need at least "
                f"{self.least_samples() / RATE:g} s."
            )

    def features_of(self, samples: Any) -> Any:
        """Feature vectors that come of so many samples; a number or a tensor of them."""
        for kernel, stride in self.strides:
            samples = (samples - kernel) // stride + 1
        return samples

    def least_samples(self) -> int:
        """Samples of one feature vector."""
        samples = 1
        for kernel, stride in reversed(self.strides):
            samples = (samples - 1) * stride + kernel
        return samples

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        if not self.masked:
            return super().encode(values)
        places = torch.arange(self.samples, device=values.device)
        lengths = values[:, 1].sum(1).round().long().clamp(min=self.least_samples())  # [items]
        mask = (places < lengths[:, None]).long()  # [items, samples]
        output = self.model(values[:, 0] * mask, attention_mask=mask, output_hidden_states=True)
        features = output.hidden_states[self.config.layer]  # [items, num_tokens, width]
        ends = self.features_of(lengths)[:, None]  # [items, 1]
        sound = torch.arange(self.num_tokens, device=values.device) < ends  # [items, num_tokens]
        return features * sound[..., None].to(features.dtype)


class Wav2Vec2Encoder(HubertEncoder):
    """wav2vec 2.0: as HuBERT, of which it is the predecessor; the same input and the same kinds of checkpoints."""

    name = "wav2vec2"
    model_types = ("wav2vec2",)

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        return Wav2Vec2Config, Wav2Vec2Model
