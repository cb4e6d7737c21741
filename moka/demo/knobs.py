"""Knobs of the embedded tasks: how hard each modality is, and what the question tells, with the truth noted in each sample.

    {source: embedded:audio-visual-text, noise: {visual: 1.0}, leak: 0.1, missing: {audio: 0.1}, corrupt: {visual: 0.3}}

Which samples are changed depends on the seed and the index of a sample only; those of a smaller share are among those of a
larger one, and no knob changes what another one draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image

from moka.errors import MokaError, nearest
from moka.modeling.media import AudioFeatures, Waveform

MODALITY_OF = {"image": "visual", "audio": "audio"}  # type of a part of a message -> modality
_MODALITIES = tuple(MODALITY_OF.values())


@dataclass(frozen=True)
class Knobs:
    """How an embedded task is changed.

    Args:
        noise: modality -> standard deviation of the Gaussian noise that is added to its media, in standard deviations of the
            medium itself: of its pixels (by channel), of its waveform, of each of its MFCC over the frames. Pixels are cut to
            0 ... 255, a waveform to -1 ... 1.
        leak: share of the samples whose question ends with "The answer is ANSWER."
        missing: modality -> share of the samples without its media.
        corrupt: modality -> share of the samples whose media of it show something else than the answer is about.
    """

    noise: Mapping[str, float] = field(default_factory=dict)
    leak: float = 0.0
    missing: Mapping[str, float] = field(default_factory=dict)
    corrupt: Mapping[str, float] = field(default_factory=dict)

    def check(self, task: str, modalities: tuple[str, ...], stage: int) -> None:
        """Refuse what the task cannot do.

        Raises:
            MokaError: a value that is no number or out of range; a modality that the task lacks; in stage 1 any knob but
                noise.
        """
        for knob in ("noise", "missing", "corrupt"):
            values = getattr(self, knob)
            if not isinstance(values, Mapping):
                raise MokaError(
                    f"{task}: {knob}: {values!r}: give a number for each modality, such as {{{modalities[0]}: 0.5}}."
                )
            for name, value in values.items():
                if name not in modalities:
                    raise MokaError(
                        f"{task}: {knob}: unknown modality {name!r}; the task has {', '.join(modalities)}."
                        f"{nearest(str(name), modalities)}"
                    )
                _check_number(f"{task}: {knob}.{name}", value, math.inf if knob == "noise" else 1)
        _check_number(f"{task}: leak", self.leak, 1)
        for knob in ("leak", "missing", "corrupt"):
            if stage == 1 and getattr(self, knob):
                raise MokaError(
                    f"{task}: {knob}: {getattr(self, knob)!r}: a sample of stage 1 is one medium and its words; it takes "
                    "noise only. Take it out of data.alignment."
                )

    def __bool__(self) -> bool:
        return any(getattr(self, knob) for knob in KNOBS)

    def draw(self, seed: int, index: int) -> Draw:
        """Decide what happens to sample ``index``."""
        draw = Draw(seed, index)
        leaked, *rest = draw.stream(0).random_sample(1 + 2 * len(_MODALITIES))
        missing, corrupt = (dict(zip(_MODALITIES, rest[i::2], strict=True)) for i in range(2))
        draw.leak = bool(leaked < self.leak)
        draw.missing = [name for name in _MODALITIES if missing[name] < self.missing.get(name, 0)]
        draw.corrupt = [name for name in _MODALITIES if corrupt[name] < self.corrupt.get(name, 0)]
        return draw

    def apply(self, sample: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """Return the sample with noise, the leak and without missing media; ``knobs`` in it says what was done."""
        user, assistant = sample["messages"]
        content = []
        for position, part in enumerate(user["content"]):
            name = MODALITY_OF.get(part["type"])
            if name in draw.missing:
                continue
            if name is not None and self.noise.get(name):
                rng = draw.stream(2, position)
                part = {**part, part["type"]: _noisy(part[part["type"]], self.noise[name], rng)}
            content.append(part)
        if draw.leak:
            content[-1] = {
                "type": "text",
                "text": f"{content[-1]['text']} The answer is {assistant['content'][0]['text']}.",
            }
        done = {"leak": draw.leak, "missing": draw.missing, "corrupt": draw.corrupt, "noise": dict(self.noise)}
        return {**sample, "messages": [{**user, "content": content}, assistant], "knobs": done}


KNOBS = tuple(f.name for f in fields(Knobs))
OFF = Knobs()
SCENE_WORDINGS = 6  # of each category of questions about scenes, in training


@dataclass(frozen=True)
class SceneKnobs(Knobs):
    """The knobs of ``embedded:scenes``: those of the others, and how large a scene is.

    Args:
        drawings: drawings in the picture, 4 ... 9; each is two facts, a digit and a colour.
        digits: spoken digits in the recording, 2 ... 4; each is one fact.
        templates: wordings of each category in training, 1 ... 6; of nine categories.
    """

    drawings: int = 6
    digits: int = 3
    templates: int = SCENE_WORDINGS

    def check(self, task: str, modalities: tuple[str, ...], stage: int) -> None:
        super().check(task, modalities, stage)
        for knob, low, high in (("drawings", 4, 9), ("digits", 2, 4), ("templates", 1, SCENE_WORDINGS)):
            value = getattr(self, knob)
            if type(value) is not int or not low <= value <= high:
                raise MokaError(f"{task}: {knob}: {value!r}: give a whole number from {low} to {high}.")
        if stage == 1 and self.templates != SCENE_WORDINGS:
            raise MokaError(
                f"{task}: templates: {self.templates}: stage 1 asks no questions. Take it out of data.alignment."
            )


@dataclass
class Draw:
    """The changes of sample ``index``; ``missing`` and ``corrupt`` are modalities."""

    seed: int
    index: int
    leak: bool = False
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)

    def other(self, position: int) -> np.random.RandomState:
        """Return the random numbers that choose what the corrupted medium at a position of the message shows."""
        return self.stream(1, position)

    def stream(self, purpose: int, position: int = 0) -> np.random.RandomState:
        # Five numbers: the tasks' own streams begin with two and three.
        return np.random.RandomState([self.seed, self.index, purpose, position, 0])


def _noisy(medium: Any, sigma: float, rng: np.random.RandomState) -> Any:
    """Return the medium with Gaussian noise of ``sigma`` standard deviations of its own values."""

    def noisy(values: np.ndarray, over: int | tuple[int, int]) -> np.ndarray:
        return values + sigma * values.std(axis=over) * rng.standard_normal(values.shape)

    if isinstance(medium, Waveform):
        return Waveform(noisy(medium.samples, 0).clip(-1, 1).astype(np.float32), medium.rate)
    if isinstance(medium, AudioFeatures):
        return AudioFeatures(noisy(medium.values, 0).astype(np.float32), medium.kind)
    return Image.fromarray(noisy(np.asarray(medium), (0, 1)).round().clip(0, 255).astype(np.uint8))


def _check_number(where: str, value: Any, largest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest or value == math.inf:
        allowed = "a number of at least 0" if largest == math.inf else "a share of the samples, from 0 to 1"
        raise MokaError(f"{where}: {value!r}: give {allowed}.")
