"""The MFCC front end: its mathematics, clips of any length and rate, and errors."""

import numpy as np
import pytest
import torch

from moka.demo.mfcc import mfcc
from moka.errors import MokaError
from moka.modeling.encoders.audio import resample


def sine(hertz: float, rate: int, seconds: float = 1.0, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def decibels_by_torch(samples: np.ndarray) -> np.ndarray:
    """Mel decibels [frames, 128] by torch's own STFT and a band-by-band sum: a second way to the same numbers."""
    window = torch.hann_window(400, dtype=torch.float64)
    stft = torch.stft(torch.from_numpy(samples).double(), 400, 200, window=window, center=True, return_complex=True)
    power = stft.abs().square().T.numpy()  # [frames, 201]
    mels = np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 130)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bands = []
    for low, peak, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = np.interp(np.arange(201) * 20.0, [low, peak, high], [0, 1, 0], left=0, right=0)
        bands.append(power @ weights)
    decibels = 10 * np.log10(np.maximum(np.stack(bands, axis=1), 1e-10))
    return np.maximum(decibels, decibels.max() - 80)


@pytest.mark.parametrize("length", [201, 399, 400, 401, 8000, 12345])
def test_a_frame_every_200_samples(length):
    clip = np.random.RandomState(0).randn(length).astype(np.float32) * 0.1
    features = mfcc(clip, 8000)
    assert features.shape == (1 + length // 200, 13)
    assert features.dtype == np.float32


def test_equals_the_same_front_end_by_torch():
    rng = np.random.RandomState(1)
    clip = (sine(700, 8000) * np.linspace(0, 1, 8000) + 0.01 * rng.randn(8000)).astype(np.float32)
    clip[3000:3600] = 0  # silence, where the floor matters
    decibels = decibels_by_torch(clip)
    angles = np.pi / 128 * np.outer(np.arange(13), np.arange(128) + 0.5)
    expected = decibels @ (np.cos(angles) * np.sqrt(np.r_[1, np.full(12, 2)] / 128)[:, None]).T
    np.testing.assert_allclose(mfcc(clip, 8000), expected, atol=1e-3)


def test_a_gain_moves_the_first_coefficient_only():
    clip = sine(500, 8000, amplitude=0.1)
    difference = mfcc(clip * 2, 8000) - mfcc(clip, 8000)
    np.testing.assert_allclose(difference[:, 0], 10 * np.log10(4) * np.sqrt(128), rtol=1e-4)
    np.testing.assert_allclose(difference[:, 1:], 0, atol=1e-3)


def test_nothing_is_more_than_80_db_below_the_loudest():
    clip = np.concatenate([sine(500, 8000), np.zeros(8000, np.float32)])
    silent = mfcc(clip, 8000)[-5:]
    floor = decibels_by_torch(clip).max() - 80
    np.testing.assert_allclose(silent[:, 0], floor * np.sqrt(128), rtol=1e-4)
    np.testing.assert_allclose(silent[:, 1:], 0, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 200])
@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_very_short_clip_is_lengthened_by_silence(length, rate):
    features = mfcc(np.full(length, 0.3, np.float32), rate)
    assert features.shape == (2, 13)
    assert np.isfinite(features).all()


@pytest.mark.parametrize("rate", [16000, 44100])
def test_other_rates_give_the_features_of_8_khz(rate):
    seconds = np.arange(rate) / rate
    clip = (0.3 * np.sin(2 * np.pi * 440 * seconds) + 0.2 * np.sin(2 * np.pi * 1300 * seconds)).astype(np.float32)
    seconds = np.arange(8000) / 8000
    reference = (0.3 * np.sin(2 * np.pi * 440 * seconds) + 0.2 * np.sin(2 * np.pi * 1300 * seconds)).astype(np.float32)
    given, expected = mfcc(clip, rate), mfcc(reference, 8000)
    assert given.shape == expected.shape
    np.testing.assert_allclose(given[5:-5], expected[5:-5], atol=2)  # the coefficients reach into the hundreds


def test_resampling_keeps_the_sound_and_drops_what_the_rate_cannot_carry():
    low, high = sine(440, 48000), sine(7000, 48000)
    out = resample(low + high, 48000, 8000)
    assert len(out) == 8000
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[500:-500], sine(440, 8000)[500:-500], atol=2e-3)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(0, np.float32), 8000, r"shape is \[0\]"),
        (np.zeros(0, np.float32), 44100, r"shape is \[0\]"),
        (np.zeros((2, 800), np.float32), 8000, r"shape is \[2, 800\]"),
        (np.array([0.0, np.nan], np.float32), 8000, "not finite"),
        (np.ones(500, np.float32), 0, "sample rate is 0"),
    ],
)
def test_bad_sound_is_refused(samples, rate, message):
    with pytest.raises(MokaError, match=message):
        mfcc(samples, rate)
