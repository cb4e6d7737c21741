"""Front ends for pictures: drawings and photographs for the small encoders, and those of the published encoders."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from .base import FrontEnd, wrong_medium


def to_8_bit(image: Image.Image) -> Image.Image:
    """Any PIL picture as mode "L" or "RGB": turned upright (EXIF), transparency over white, 16 bits scaled to 8.

    Integers and floats carry no range in PIL: "I;16" is read as 0 ... 65535, "I" and "F" as 0 ... 255 when nothing
    exceeds it and else as 0 ... 65535 (a float picture within 0 ... 1 as that).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        if image.mode == "F" and values.max() <= 1:
            top = 1.0
        return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if "A" in image.mode.replace("LAB", "") or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """The median of the outermost pixels, per channel: [height, width, channels] -> [channels]."""
    sides = [pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]
    return np.median(np.concatenate(sides), axis=0)


@dataclass
class ImageFrontEnd(FrontEnd):
    """Pictures of any size and mode for the small image encoders: float32 [1 or 3, image_size, image_size] in -1 ... 1.

    The picture keeps its aspect ratio; what is left of the square takes the colour of its border. With polarity
    "light-on-dark" it is a drawing, and becomes one in MNIST's manner (`centre_ink`).
    """

    image_size: int
    grey: bool = True
    polarity: str | None = None

    name: ClassVar[str] = "image"

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Image.Image):
            raise wrong_medium(medium, "images")
        image = to_8_bit(medium)
        if self.polarity:
            pixels = centre_ink(np.asarray(image.convert("L")), self.image_size)[:, :, None]
            pixels = np.repeat(pixels, 1 if self.grey else 3, axis=2)
        else:
            pixels = self.fit(image.convert("L" if self.grey else "RGB"))
        return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)

    def fit(self, image: Image.Image) -> np.ndarray:
        """The picture in the middle of a square of its border's colour: uint8 [image_size, image_size, channels]."""
        scale = self.image_size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = np.atleast_3d(np.asarray(image))
        square = np.empty((self.image_size, self.image_size, pixels.shape[2]), np.uint8)
        square[:] = border_colour(pixels).round()
        top, left = (self.image_size - height) // 2, (self.image_size - width) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width] = np.atleast_3d(np.asarray(resized))
        return square


def centre_ink(pixels: np.ndarray, size: int) -> np.ndarray:
    """A drawing of any size, dark on light or light on dark, as MNIST's makers would have stored it.

    Light ink on black; cropped to the ink, the longer side scaled to 20 of 28 pixels, the centre of mass moved to the
    middle. A drawing that already is of that form comes back unchanged. Thin strokes stay thin: their brightness is
    restored, not their width.

    Args:
        pixels: uint8 [height, width], grey.
        size: height and width of the result, in pixels.

    Returns:
        uint8 [size, size]; zeros for an empty page.

    Source: LeCun and Cortes, The MNIST database (2010), on how the digits were normalised.
    """
    box = round(size * 20 / 28)
    if _is_centred(pixels, size, box):
        return pixels
    ground = float(border_colour(pixels[:, :, None])[0])
    ink = (pixels - ground) * (1 if pixels.mean() > ground else -1)
    if ink.max() < 16:  # grain of the paper, not a drawing
        return np.zeros((size, size), np.uint8)
    ink = ink / ink.max()
    ink[ink < 0.2] = 0  # shadows and grain would widen the box
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = box / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    ink = np.asarray(small) / np.asarray(small).max()
    top, left = (
        int(np.clip(round(size / 2 - centre), 0, size - side))
        for centre, side in zip(_centre_of_mass(ink), ink.shape, strict=True)
    )
    page = np.zeros((size, size), np.uint8)
    page[top : top + height, left : left + width] = (ink * 255).round()
    return page


def _centre_of_mass(ink: np.ndarray) -> tuple[float, float]:
    """Row and column, counted in pixels from the first."""
    mass = ink.sum()
    return float(ink.sum(1) @ np.arange(ink.shape[0]) / mass), float(ink.sum(0) @ np.arange(ink.shape[1]) / mass)


def _is_centred(pixels: np.ndarray, size: int, box: int) -> bool:
    """Return whether a drawing has MNIST's form: its size, a black ground, ink within the box and centred to half a pixel."""
    if pixels.shape != (size, size) or not pixels.any() or border_colour(pixels[:, :, None])[0] > 0:
        return False
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    longest = 1 + max(rows[-1] - rows[0], columns[-1] - columns[0])
    off = max(abs(centre - size / 2) for centre in _centre_of_mass(pixels.astype(np.float64)))
    return box - 1 <= longest <= box and off <= 0.51


@dataclass
class ProcessorFrontEnd(FrontEnd):
    """Pictures for a published encoder: `transformers`' image processor, float32 [3, height, width]."""

    settings: dict[str, Any]  # of the image processor

    def __post_init__(self) -> None:
        self.processor = self.processor_class()(**self.settings)

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Image.Image):
            raise wrong_medium(medium, "images")
        values = self.processor(to_8_bit(medium).convert("RGB"), return_tensors="np")["pixel_values"][0]
        return np.asarray(values, np.float32)

    # The Pillow classes by name: where torchvision is installed, the plain ones give slightly other pixels.
    @staticmethod
    def processor_class() -> Any:
        raise NotImplementedError

    @classmethod
    def defaults(cls, image_size: int) -> dict[str, Any]:
        """The published preprocessing at another size of picture."""
        raise NotImplementedError

    @classmethod
    def read(cls, name_or_path: str | None, image_size: int) -> ProcessorFrontEnd:
        """The preprocessing next to the weights, where it is there; else the published one at the model's size."""
        processor = cls.processor_class()(**cls.defaults(image_size))
        if name_or_path:
            with contextlib.suppress(OSError):  # a folder with weights only
                processor = cls.processor_class().from_pretrained(name_or_path)
        settings = processor.to_dict()
        kept = {key: value for key, value in settings.items() if key not in ("image_processor_type", "processor_class")}
        # as JSON has them: lists, not tuples
        return cls(json.loads(json.dumps(cls.fitted(kept, image_size))))

    @classmethod
    def fitted(cls, settings: dict[str, Any], image_size: int) -> dict[str, Any]:
        return settings


class ClipFrontEnd(ProcessorFrontEnd):
    """Pictures for CLIP: shorter side to `image_size`, the middle square."""

    name: ClassVar[str] = "clip"

    @staticmethod
    def processor_class() -> Any:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil

    @classmethod
    def defaults(cls, image_size: int) -> dict[str, Any]:
        return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


class SiglipFrontEnd(ProcessorFrontEnd):
    """Pictures for SigLIP: the full picture stretched to a square, in -1 ... 1."""

    name: ClassVar[str] = "siglip"

    @staticmethod
    def processor_class() -> Any:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return SiglipImageProcessorPil

    @classmethod
    def defaults(cls, image_size: int) -> dict[str, Any]:
        return {"size": {"height": image_size, "width": image_size}}


class Dinov2FrontEnd(ProcessorFrontEnd):
    """Pictures for DINOv2: shorter side to 256 of every 224 pixels of `image_size`, the middle square."""

    name: ClassVar[str] = "dinov2"

    @staticmethod
    def processor_class() -> Any:
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        return BitImageProcessorPil

    @classmethod
    def defaults(cls, image_size: int) -> dict[str, Any]:
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        sizes = {
            "size": {"shortest_edge": round(image_size * 256 / 224)},
            "crop_size": {"height": image_size, "width": image_size},
        }
        return {**sizes, "image_mean": mean, "image_std": std}

    @classmethod
    def fitted(cls, settings: dict[str, Any], image_size: int) -> dict[str, Any]:
        # The field image_size of the encoder decides; a checkpoint knows only its own.
        if dict(settings["crop_size"]) == {"height": image_size, "width": image_size}:
            return settings
        sizes = {key: value for key, value in cls.defaults(image_size).items() if key in ("size", "crop_size")}
        return {**settings, **sizes}
