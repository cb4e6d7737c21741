"""Windows of sound: their exact samples, and settings that cannot be."""

import numpy as np
import pytest

from moka.data.audio_segments import AudioWindows, audio_windows
from moka.errors import MokaError
from moka.modeling.media import Waveform


def numbered(seconds, rate=100):
    """A clip whose samples are their own positions."""
    return Waveform(np.arange(int(seconds * rate), dtype=np.float32), rate)


@pytest.mark.parametrize(
    ("seconds", "given", "starts", "length"),
    [
        (10, (10, 1.0, 1.0, 0.5), range(0, 1000, 100), 100),  # AVE
        # MUSIC-AVQA: the first and the last are moved inside.
        (60, (10, 2.0, 6.0, 0.0), [0, *range(500, 5400, 600)], 200),
        (55, (10, 2.0, 6.0, 0.0), [0, *range(500, 5300, 600), 5300], 200),
        (30, (10, 2.0, 6.0, 0.0), [0, 500, 1100, 1700, 2300, *[2800] * 5], 200),
        (10, (4, 0.5, 2.5, None), [100, 350, 600, 850], 50),  # first: half of every
        (10, (3, 10.0, 1.0, 0.5), [0, 0, 0], 1000),
    ],
)
def test_windows_stand_at_their_exact_samples(seconds, given, starts, length):
    windows = audio_windows(numbered(seconds), *given)
    assert [int(window.samples[0]) for window in windows] == list(starts)
    for window, start in zip(windows, starts, strict=True):
        np.testing.assert_array_equal(window.samples, np.arange(start, start + length))
        assert window.rate == 100


def test_a_clip_shorter_than_a_window_is_followed_by_silence():
    for window in audio_windows(Waveform(np.ones(30, np.float32), 100), 3, 1.0, 1.0, 0.5):
        np.testing.assert_array_equal(window.samples, [1.0] * 30 + [0.0] * 70)
        assert window.samples.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 2.5}, "count is 2.5; allowed: int"),
        ({"count": True}, "count is True"),
        ({"seconds": 0}, "seconds is 0; allowed: a number above 0"),
        ({"seconds": float("nan")}, "seconds is nan; allowed: finite"),
        ({"every": -1}, "every is -1"),
        ({"first": "half"}, "first is 'half'"),
        ({"second": 1}, "'second'; allowed are count, seconds, every, first. Did you mean 'seconds'"),
    ],
)
def test_windows_that_cannot_be_are_refused(given, words):
    with pytest.raises(MokaError, match=f"^audio_windows: .*{words}"):
        AudioWindows.from_dict(given)
