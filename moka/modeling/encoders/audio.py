"""Published encoders of sound in `transformers` and their front ends: Whisper, AST, HuBERT and wav2vec 2.0."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from moka.errors import MokaError
from moka.modeling.fields import about
from moka.modeling.media import Waveform

from .base import FrontEnd, wrong_medium
from .images import TINY_TRANSFORMER
from .towers import TowerEncoder

RATE = 16_000  # Hz, of all of these encoders


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Mono sound at another rate, by FFmpeg's resampler (PyAV), which filters out what the new rate cannot carry.

    Args:
        samples: float32 [n].
        from_rate, to_rate: samples a second (Hz).

    Returns:
        float32 [about n * to_rate / from_rate], possibly empty; the same array when the rates are equal.

    Raises:
        MokaError: no samples, not one-dimensional, not finite, a rate below 1, or PyAV is not installed.
    """
    samples = np.asarray(samples, dtype=np.float32)
    problem = ""
    if samples.ndim != 1 or not samples.size:
        problem = f"its shape is {list(samples.shape)}; mono sound of shape [samples], with samples, is expected"
    elif not np.isfinite(samples).all():
        problem = "it has samples that are not finite (nan or infinity); decode the recording again"
    elif min(from_rate, to_rate) < 1:
        problem = f"its sample rate is {from_rate} Hz, to become {to_rate} Hz; at least 1 is expected"
    if problem:
        raise MokaError(f"sound: {problem}.")
    if from_rate == to_rate:
        return samples
    try:
        from av import AudioFrame, AudioResampler
    except ImportError as error:
        raise MokaError(
            f"resampling sound from {from_rate} to {to_rate} Hz needs PyAV, which is not installed: "
            'pip install "moka-peft[media]", or give sound that is already at that rate'
        ) from error
    resampler = AudioResampler(format="flt", layout="mono", rate=to_rate)
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="flt", layout="mono")
    frame.sample_rate = from_rate
    # The second call, with None, empties what the filter still has.
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    # A handful of samples may give none at a lower rate, hence the empty array to begin with.
    return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


def samples_at(medium: Any, rate: int) -> np.ndarray:
    """A recording's samples, float32 [n], at `rate` Hz; `MokaError` for another medium."""
    if not isinstance(medium, Waveform):
        raise wrong_medium(medium, "recordings")
    return resample(medium.samples, medium.rate, rate)


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples, followed by silence where there are fewer."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def extractor_settings(extractor_class: Any, name_or_path: str | None) -> dict[str, Any]:
    with narrow_bands():
        extractor = extractor_class()
        if name_or_path:
            with contextlib.suppress(OSError):  # a folder with weights only
                extractor = extractor_class.from_pretrained(name_or_path)
    return extractor.to_dict()


@contextlib.contextmanager
def narrow_bands() -> Iterator[None]:
    """Kaldi's lowest mel bands are narrower than an FFT bin, as the published models expect; are silent of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        yield


@dataclass
class WhisperFrontEnd(FrontEnd):
    """Recordings for Whisper: log-mel of 16 kHz sound, float32 [bins, frames], a frame every 10 ms.

    Shorter recordings are followed by silence and longer ones are cut, as Whisper takes clips of one length.
    """

    bins: int
    frames: int

    name: ClassVar[str] = "whisper"
    sampling_rate = RATE

    def __post_init__(self) -> None:
        from transformers import WhisperFeatureExtractor

        self.extractor = WhisperFeatureExtractor(feature_size=self.bins)

    def __call__(self, medium: Any) -> np.ndarray:
        values = self.extractor(
            samples_at(medium, RATE),
            sampling_rate=RATE,
            max_length=self.frames * self.extractor.hop_length,
            return_tensors="np",
        )["input_features"][0]
        return np.asarray(values, np.float32)


class WhisperEncoder(TowerEncoder):
    """The encoder half of Whisper: log-mel frames of a clip of fixed length to one feature vector per 20 ms.

    Layer -1 is the model's output, after its final layer norm.
    """

    name, kind, input_name = "whisper", "audio", "input_features"
    model_types = {"whisper": ("WhisperConfig", "WhisperModel")}
    tiny_model = {
        **{"d_model": 32, "num_mel_bins": 80, "max_source_positions": 50, "vocab_size": 20, "max_target_positions": 8},
        **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
        **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0},
    }
    front_end_class = WhisperFrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        model_config = cls.resolve_model_config(config, use_name=False)
        return WhisperFrontEnd(model_config.num_mel_bins, 2 * model_config.max_source_positions)

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


@dataclass
class AstFrontEnd(FrontEnd):
    """Recordings for AST: `ASTFeatureExtractor`, float32 [max_length, num_mel_bins], a frame every 10 ms.

    Shorter recordings are followed by frames of 0 before normalisation, and longer ones are cut, as the extractor does.
    """

    settings: dict[str, Any]  # of the extractor

    name: ClassVar[str] = "ast"

    def __post_init__(self) -> None:
        from transformers import ASTFeatureExtractor

        with narrow_bands():
            self.extractor = ASTFeatureExtractor(**self.settings)
        self.sampling_rate = self.extractor.sampling_rate

    def __call__(self, medium: Any) -> np.ndarray:
        rate = self.extractor.sampling_rate
        samples = samples_at(medium, rate)
        samples = fit_length(samples, max(len(samples), rate // 40))  # one frame
        values = self.extractor(samples, sampling_rate=rate, return_tensors="np")["input_values"][0]
        return np.asarray(values, np.float32)

    @classmethod
    def read(cls, name_or_path: str | None, frames: int, bins: int) -> AstFrontEnd:
        """The extractor next to the weights, where it is there; its sizes are the model's."""
        from transformers import ASTFeatureExtractor

        settings = extractor_settings(ASTFeatureExtractor, name_or_path)
        kept: dict[str, Any] = {key: settings[key] for key in ("mean", "std", "do_normalize", "sampling_rate")}
        return cls({**kept, "max_length": frames, "num_mel_bins": bins})


class AstEncoder(TowerEncoder):
    """Audio Spectrogram Transformer: one feature vector per patch of the spectrogram, before the final layer norm.

    Patches overlap; they are in order of frequency, and within one frequency of time. The class and distillation
    tokens are dropped.

    Source: Gong et al., AST: Audio Spectrogram Transformer (2021).
    """

    name, kind, input_name = "ast", "audio", "input_features"
    model_types = {"audio-spectrogram-transformer": ("ASTConfig", "ASTModel")}
    tiny_model = {**TINY_TRANSFORMER, "intermediate_size": 64, "num_mel_bins": 32, "max_length": 64}
    special_tokens = 2
    front_end_class = AstFrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        model_config = cls.resolve_model_config(config, use_name=False)
        return AstFrontEnd.read(config.name_or_path, model_config.max_length, model_config.num_mel_bins)

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        frames, bins, patch = model_config.max_length, model_config.num_mel_bins, model_config.patch_size
        self.input_shape = (frames, bins)
        self.width = model_config.hidden_size
        rows = (bins - patch) // model_config.frequency_stride + 1
        self.num_tokens = rows * ((frames - patch) // model_config.time_stride + 1)
        # a frame of 25 ms every 10 ms
        self.length_in_seconds = (400 + 160 * (frames - 1)) / RATE


@dataclass
class WaveformFrontEnd(FrontEnd):
    """Recordings for HuBERT and wav2vec 2.0: 16 kHz sound of a fixed length, float32 [samples] or [2, samples].

    `normalize` gives each recording mean 0 and variance 1 over its own length. Shorter ones are followed by zeros, and
    longer ones are cut. With `masked`, a second row is 1 where there is sound.
    """

    samples: int
    normalize: bool
    masked: bool

    name: ClassVar[str] = "waveform"
    sampling_rate = RATE

    def __call__(self, medium: Any) -> np.ndarray:
        sound = samples_at(medium, RATE)[: self.samples]
        length = len(sound)
        if self.normalize and length:
            sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
        sound = fit_length(sound, self.samples).astype(np.float32)
        if not self.masked:
            return sound
        return np.stack([sound, (np.arange(self.samples) < length).astype(np.float32)])

    @classmethod
    def read(cls, name_or_path: str | None, samples: int, masked: bool) -> WaveformFrontEnd:
        """Normalises where the preprocessing next to the weights says so, and where there is none.

        Raises:
            MokaError: a checkpoint of another sampling rate.
        """
        from transformers import Wav2Vec2FeatureExtractor

        settings = extractor_settings(Wav2Vec2FeatureExtractor, name_or_path)
        if settings["sampling_rate"] != RATE:
            raise MokaError(f"{name_or_path} takes sound at {settings['sampling_rate']} Hz; only {RATE} Hz is built.")
        return cls(samples, settings["do_normalize"], masked)


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
    model_types = {"hubert": ("HubertConfig", "HubertModel")}
    tiny_model = {
        **{**TINY_TRANSFORMER, "intermediate_size": 64, "conv_dim": [8] * 7, "vocab_size": 20},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    }
    front_end_class = WaveformFrontEnd
    kept_in_tiny = ("feat_extract_norm", "do_stable_layer_norm", "conv_bias", "feat_proj_layer_norm")

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        model_config = cls.resolve_model_config(config, use_name=False)
        samples = round(config.seconds * RATE)
        return WaveformFrontEnd.read(config.name_or_path, samples, masked=model_config.feat_extract_norm == "layer")

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().tiny(config), "seconds": min(2.0, config.get("seconds", 10.0))}

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
    model_types = {"wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model")}
