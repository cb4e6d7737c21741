"""The interface of a front end, and the error for a medium of the wrong kind."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform


class FrontEnd:
    """Base: `front_end(medium)` gives float32 [*input_shape], and `MokaError` for a medium of another kind."""

    name: ClassVar[str]

    def __call__(self, medium: Any) -> np.ndarray:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Its settings, fit for JSON; `front_end_from_dict` reads them."""
        return {"type": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def wrong_medium(medium: Any, expected: str) -> MokaError:
    """The error for a medium of the wrong kind; `expected` says what the encoder takes."""
    given = {
        Waveform: "a recording (Waveform)",
        AudioFeatures: f"audio features of kind {getattr(medium, 'kind', None)!r}",
    }.get(type(medium), "an image" if isinstance(medium, Image.Image) else f"a {type(medium).__name__}")
    return MokaError(
        f"given {given}, but this encoder takes {expected}. Check which modality the file is listed under."
    )
