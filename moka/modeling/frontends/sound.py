"""Front ends for sound: MFCC, log-mel frames, filter banks and plain waveforms."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform

from .base import FrontEnd, wrong_medium

# Mean and standard deviation of each coefficient over all frames of the 2160 training recordings of the embedded spoken
# digits (`moka.demo.embedded.split_indices("recordings", "train")`).
MFCC_MEAN = np.array(
    [-304.31, 26.84, -4.01, -18.78, -37.12, -19.17, -17.41, -9.86, -13.90, -7.62, -12.05, -11.06, -12.15], np.float32
)
MFCC_STD = np.array(
    [145.05, 50.56, 38.71, 29.46, 30.02, 25.27, 18.86, 15.36, 15.45, 14.77, 14.25, 12.49, 12.49], np.float32
)


@dataclass
class MfccFrontEnd(FrontEnd):
    """Recordings, or their stored MFCC, for `conv-audio`: float32 [14, frames], 13 coefficients and the mask.

    Coefficients are normalised. A longer recording is cut to its loudest stretch of `frames`; a shorter one is followed
    by zeros, where the mask is 0 too.
    """

    frames: int

    name: ClassVar[str] = "mfcc"
    rate: ClassVar[int] = 8000  # Hz, to which sound is brought

    def __call__(self, medium: Any) -> np.ndarray:
        if isinstance(medium, Waveform):
            from moka.demo.mfcc import mfcc

            values = mfcc(medium.samples, medium.rate)
        elif isinstance(medium, AudioFeatures) and medium.kind == "mfcc":
            values = np.asarray(medium.values, np.float32)
        else:
            raise wrong_medium(medium, "recordings, or audio features of kind 'mfcc'")
        bins = len(MFCC_MEAN)
        if values.ndim != 2 or not len(values) or values.shape[1] != bins:
            raise MokaError(
                f"MFCC of shape {list(values.shape)} given; expected [frames, {bins}] with at least one frame."
            )
        values = (values - MFCC_MEAN) / MFCC_STD
        if len(values) > self.frames:
            # the first coefficient is the loudness
            loudness = np.convolve(values[:, 0], np.ones(self.frames), mode="valid")
            start = int(loudness.argmax())
            values = values[start : start + self.frames]
        item = np.zeros((bins + 1, self.frames), np.float32)
        item[:bins, : len(values)] = values.T
        item[bins, : len(values)] = 1
        return item


@dataclass
class WhisperFrontEnd(FrontEnd):
    """Recordings for Whisper: log-mel of 16 kHz sound, float32 [bins, frames], a frame every 10 ms.

    Shorter recordings are followed by silence and longer ones are cut, as Whisper takes clips of one length.
    """

    bins: int
    frames: int

    name: ClassVar[str] = "whisper"

    def __post_init__(self) -> None:
        from transformers import WhisperFeatureExtractor

        self.extractor = WhisperFeatureExtractor(feature_size=self.bins)

    def __call__(self, medium: Any) -> np.ndarray:
        rate = self.extractor.sampling_rate
        values = self.extractor(
            samples_at(medium, rate),
            sampling_rate=rate,
            max_length=self.frames * self.extractor.hop_length,
            return_tensors="np",
        )["input_features"][0]
        return np.asarray(values, np.float32)


def samples_at(medium: Any, rate: int) -> np.ndarray:
    """A recording's samples, float32 [n], at `rate` Hz; `MokaError` for another medium."""
    if not isinstance(medium, Waveform):
        raise wrong_medium(medium, "recordings")
    from moka.demo.mfcc import resample

    return resample(medium.samples, medium.rate, rate)


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples, followed by silence where there are fewer."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


@dataclass
class AstFrontEnd(FrontEnd):
    """Recordings for AST: `ASTFeatureExtractor`, float32 [max_length, num_mel_bins], a frame every 10 ms.

    Shorter recordings are followed by frames of 0 before normalisation, and longer ones are cut, as the extractor does.
    """

    settings: dict[str, Any]  # of the extractor

    name: ClassVar[str] = "ast"

    def __post_init__(self) -> None:
        from transformers import ASTFeatureExtractor

        with _narrow_bands():
            self.extractor = ASTFeatureExtractor(**self.settings)

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

        settings = _extractor_settings(ASTFeatureExtractor, name_or_path)
        kept: dict[str, Any] = {key: settings[key] for key in ("mean", "std", "do_normalize", "sampling_rate")}
        return cls({**kept, "max_length": frames, "num_mel_bins": bins})


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
    rate: ClassVar[int] = 16_000

    def __call__(self, medium: Any) -> np.ndarray:
        sound = samples_at(medium, self.rate)[: self.samples]
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

        settings = _extractor_settings(Wav2Vec2FeatureExtractor, name_or_path)
        if settings["sampling_rate"] != cls.rate:
            raise MokaError(
                f"{name_or_path} takes sound at {settings['sampling_rate']} Hz; only {cls.rate} Hz is built."
            )
        return cls(samples, settings["do_normalize"], masked)


def _extractor_settings(extractor_class: Any, name_or_path: str | None) -> dict[str, Any]:
    with _narrow_bands():
        extractor = extractor_class()
        if name_or_path:
            with contextlib.suppress(OSError):  # a folder with weights only
                extractor = extractor_class.from_pretrained(name_or_path)
    return extractor.to_dict()


@contextlib.contextmanager
def _narrow_bands() -> Iterator[None]:
    """Kaldi's lowest mel bands are narrower than an FFT bin, as the published models expect; are silent of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        yield


@dataclass
class BeatsFrontEnd(FrontEnd):
    """Recordings for BEATs: Kaldi's filter bank of 16 kHz sound of a fixed length, float32 [frames, 128].

    Shorter recordings are followed by silence, and longer ones are cut. Mean and deviation are those of the authors.
    """

    samples: int

    name: ClassVar[str] = "beats"
    rate: ClassVar[int] = 16_000
    mean: ClassVar[float] = 15.41663
    std: ClassVar[float] = 6.55582

    def __call__(self, medium: Any) -> np.ndarray:
        sound = fit_length(samples_at(medium, self.rate), self.samples)
        return ((kaldi_fbank(sound * 2**15) - self.mean) / (2 * self.std)).astype(np.float32)


def kaldi_fbank(samples: np.ndarray) -> np.ndarray:
    """Logarithm of the power in 128 mel bands of 16 kHz sound: float [n] -> float32 [1 + (n - 400) // 160, 128].

    Frames of 25 ms every 10 ms, full ones only; mean removed, pre-emphasis 0.97, Povey window, 512-point FFT, bands
    from 20 Hz to 8 kHz; no dither. What `torchaudio.compliance.kaldi.fbank` gives for the same settings.
    """
    from transformers.audio_utils import spectrogram

    window, bands = _kaldi_constants()
    return spectrogram(
        np.asarray(samples, np.float64),
        window,
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=bands,
        log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
        remove_dc_offset=True,
    ).T


@lru_cache(maxsize=1)
def _kaldi_constants() -> tuple[np.ndarray, np.ndarray]:
    """The window [400] and the mel bands [257, 128]."""
    from transformers.audio_utils import mel_filter_bank, window_function

    with _narrow_bands():
        bands = mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=128,
            min_frequency=20,
            max_frequency=8000,
            sampling_rate=16_000,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return window_function(400, "povey", periodic=False), bands
