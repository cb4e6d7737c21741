"""Decoded media, as they travel from the readers to the processor. Images are ``PIL.Image.Image``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Waveform:
    """Mono sound: ``samples`` float32 [n] in -1 ... 1, at ``rate`` samples a second (Hz)."""

    samples: np.ndarray
    rate: int


@dataclass(frozen=True)
class AudioFeatures:
    """Sound already through a front end: ``values`` float32 [frames, bins], of the front end called ``kind``.

    Used where a data set ships features and no waveform (the embedded spoken digits ship MFCC).
    """

    values: np.ndarray
    kind: str


@dataclass(frozen=True)
class Features:
    """One item that its encoder has already seen: ``values`` float32 [tokens, width]. A medium is a list of them."""

    values: np.ndarray
