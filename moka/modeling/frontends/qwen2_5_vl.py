"""The front end of the `qwen2.5-vl` encoder."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from .base import wrong_medium
from .pictures import ProcessorFrontEnd, to_8_bit


class QwenVlFrontEnd(ProcessorFrontEnd):
    """Pictures for Qwen2.5-VL: the full picture stretched to a square, as float32 [patches, 2 * 3 * 14 * 14].

    Patches are in the order of the checkpoint's own image processor, the four of a token together; each has the
    picture twice, for the two frames that the tower reads at once.
    """

    name: ClassVar[str] = "qwen2.5-vl"

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Image.Image):
            raise wrong_medium(medium, "images")
        side = math.isqrt(self.settings["size"]["shortest_edge"])
        image = to_8_bit(medium).convert("RGB").resize((side, side), self.processor.resample)
        return np.asarray(self.processor(image, return_tensors="np")["pixel_values"], np.float32)

    @staticmethod
    def processor_class() -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil

    @classmethod
    def defaults(cls, image_size: int) -> dict[str, Any]:
        return {"size": {"shortest_edge": image_size**2, "longest_edge": image_size**2}}

    @classmethod
    def fitted(cls, settings: dict[str, Any], image_size: int) -> dict[str, Any]:
        # The checkpoint's range of sizes gives way to the one size of the encoder.
        kept = {key: value for key, value in settings.items() if key not in ("min_pixels", "max_pixels")}
        return {**kept, **cls.defaults(image_size)}
