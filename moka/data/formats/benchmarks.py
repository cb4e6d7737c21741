"""The benchmarks that are asked and not trained on, of pictures and of sound."""

from __future__ import annotations

from moka.data.formats import mmbench, picture_benchmarks, sound_benchmarks
from moka.data.formats.base import Format

FORMATS: tuple[Format, ...] = (*picture_benchmarks.FORMATS, *mmbench.FORMATS, *sound_benchmarks.FORMATS)
