"""The front end of the encoder `efficientnet`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from .base import FrontEnd, wrong_medium
from .pictures import ImageFrontEnd, to_8_bit

# As EfficientNet-Lite was trained: (value - 127) / 128 for values 0 ... 255.
MEAN, STD = 127.0, 128.0


@dataclass
class EfficientNetFrontEnd(FrontEnd):
    """Pictures of any size and mode for `efficientnet`: float32 [3, image_size, image_size] in -0.992 ... 1.

    The full picture is kept, with its aspect ratio; what is left of the square takes the colour of its border.
    """

    image_size: int = 224

    name: ClassVar[str] = "efficientnet"

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Image.Image):
            raise wrong_medium(medium, "images")
        pixels = ImageFrontEnd(self.image_size, grey=False).fit(to_8_bit(medium).convert("RGB"))
        return np.ascontiguousarray((pixels.astype(np.float32).transpose(2, 0, 1) - MEAN) / STD)
