"""Windows of sound: one long clip as several short ones, as video is several frames.

    |--w0--|          |--w1--|          |--w2--|         window k is centred at first + k * every seconds
    ^ moved inside the clip where it would leave it      and is ``seconds`` long

The MokA authors take ten windows of one second for AVE and ten of two seconds for MUSIC-AVQA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moka.errors import MokaError
from moka.modeling.media import Waveform
from moka.type_checks import check_types, from_mapping


@dataclass(frozen=True)
class AudioWindows:
    """Which windows are cut from each clip.

    Attributes:
        count: windows a clip; each is one item for the encoder.
        seconds: length of a window.
        every: seconds from the centre of one window to the centre of the next.
        first: seconds from the start of the clip to the centre of the first window; half of ``every`` by default, so
            that the windows stand in the middles of equal stretches.

    Raises:
        MokaError: a count below 1, a length that is not positive, or a negative time.
    """

    count: int = 10
    seconds: float = 1.0
    every: float = 1.0
    first: float | None = None

    def __post_init__(self) -> None:
        check_types(AudioWindows, vars(self), "audio_windows")
        for name, least in (("count", 1), ("seconds", math.ulp(0)), ("every", 0), ("first", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                allowed = "a number above 0" if name == "seconds" else f"at least {least}"
                raise MokaError(f"audio_windows: {name} is {value!r}; allowed: {allowed}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> AudioWindows | None:
        """Return the windows of ``data.audio_windows`` of a configuration, a mapping or None; unknown keys are refused."""
        return None if values is None else from_mapping(cls, values, "audio_windows")

    def cut(self, waveform: Waveform) -> list[Waveform]:
        """Return the windows of one clip; see `audio_windows`."""
        return audio_windows(waveform, self.count, self.seconds, self.every, self.first)


def audio_windows(
    waveform: Waveform, count: int = 10, seconds: float = 1.0, every: float = 1.0, first: float | None = None
) -> list[Waveform]:
    """Return ``count`` windows of a clip, the k-th centred at ``first + k * every`` seconds.

    A window that would leave the clip is moved inside it; a clip shorter than a window is followed by silence. So each
    has ``round(seconds * rate)`` samples, and windows beyond the end of the clip repeat its last one.

    Args:
        waveform: samples [n]; the windows keep its rate.
        count, seconds, every, first: as for `AudioWindows`.
    """
    samples, rate = waveform.samples, waveform.rate
    first = every / 2 if first is None else first
    size = max(1, round(seconds * rate))
    silence = np.zeros(max(0, size - len(samples)), np.float32)
    samples = np.concatenate([samples, silence]) if len(silence) else samples
    windows = []
    for k in range(count):
        start = round((first + k * every) * rate - size / 2)
        start = min(max(start, 0), len(samples) - size)
        windows.append(Waveform(samples[start : start + size].copy(), rate))
    return windows
