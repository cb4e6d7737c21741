"""Published encoders of pictures and their front ends: CLIP, SigLIP and DINOv2, one feature vector per patch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from moka.errors import MokaError
from moka.modeling.fields import about

from .base import FrontEnd, wrong_medium
from .towers import TowerEncoder

TINY_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_PICTURES = {**TINY_TRANSFORMER, "image_size": 28, "patch_size": 14}


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


def picture(medium: Any, mode: str = "RGB") -> Image.Image:
    """Return a medium as a picture of a mode; raise `MokaError` if it is none."""
    if not isinstance(medium, Image.Image):
        raise wrong_medium(medium, "images")
    return to_8_bit(medium).convert(mode)


def fit_square(image: Image.Image, size: int) -> np.ndarray:
    """Return a full picture in the middle of a square of its border's colour: uint8 [size, size, channels]."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.atleast_3d(np.asarray(image))
    square = np.empty((size, size, pixels.shape[2]), np.uint8)
    square[:] = border_colour(pixels).round()
    top, left = (size - height) // 2, (size - width) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square[top : top + height, left : left + width] = np.atleast_3d(np.asarray(resized))
    return square


@dataclass
class ProcessorFrontEnd(FrontEnd):
    """Pictures for a published encoder: `transformers`' image processor, float32 [3, height, width]."""

    settings: dict[str, Any]  # of the image processor

    def __post_init__(self) -> None:
        self.processor = self.processor_class()(**self.settings)

    def __call__(self, medium: Any) -> np.ndarray:
        values = self.processor(picture(medium), return_tensors="np")["pixel_values"][0]
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


class ClipEncoder(TowerEncoder):
    """CLIP's vision tower: one feature vector per patch, without the class token, before the final layer norm.

    LLaVA takes layer -2; the class token and the pooled output are never used.
    """

    name, kind, input_name = "clip", "image", "pixel_values"
    model_types = dict.fromkeys(("clip", "clip_vision_model"), ("CLIPVisionConfig", "CLIPVisionModel"))
    tiny_model = {**TINY_PICTURES, "intermediate_size": 64}
    special_tokens = 1  # the class token
    front_end_class: ClassVar[type[ProcessorFrontEnd]] = ClipFrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        model_config = cls.resolve_model_config(config, use_name=False)
        return cls.front_end_class.read(config.name_or_path, model_config.image_size)

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        self.input_shape = (model_config.num_channels, model_config.image_size, model_config.image_size)
        self.width = model_config.hidden_size
        self.num_tokens = (model_config.image_size // model_config.patch_size) ** 2


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


class SiglipEncoder(ClipEncoder):
    """SigLIP's vision tower: one feature vector per patch, before the final layer norm; it has no class token.

    Its attention pooling is not built. SigLIP 2 checkpoints of one fixed size are of the same type.
    """

    name = "siglip"
    model_types = dict.fromkeys(("siglip", "siglip_vision_model"), ("SiglipVisionConfig", "SiglipVisionModel"))
    special_tokens = 0
    front_end_class = SiglipFrontEnd

    @classmethod
    def adjust(cls, model_config: Any) -> Any:
        model_config.vision_use_head = False
        return model_config


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


class Dinov2Encoder(TowerEncoder):
    """DINOv2, with or without registers: one feature vector per patch, before the final layer norm.

    The class token and the registers are dropped. The model interpolates its positions to the size of the picture.
    """

    @dataclass
    class Config(TowerEncoder.Config):
        image_size: int = field(
            default=224,
            metadata=about(
                "height and width of the picture, in pixels; a multiple of the patch size", minimum=1, weightless=True
            ),
        )

    name, kind, input_name = "dinov2", "image", "pixel_values"
    model_types = {
        "dinov2": ("Dinov2Config", "Dinov2Model"),
        "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    }
    tiny_model = {**TINY_PICTURES, "mlp_ratio": 2}
    kept_in_tiny = ("model_type", "num_register_tokens", "use_swiglu_ffn")
    front_end_class = Dinov2FrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        return cls.front_end_class.read(config.name_or_path, config.image_size)

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().tiny(config), "image_size": 28}

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        size, patch = self.config.image_size, model_config.patch_size
        if size % patch:
            raise MokaError(
                f"encoder 'dinov2': given image_size {size}; it must be a multiple of the patch size {patch}, such as "
                f"{max(1, size // patch) * patch}."
            )
        self.input_shape = (model_config.num_channels, size, size)
        self.width = model_config.hidden_size
        self.num_tokens = (size // patch) ** 2
        self.special_tokens = 1 + getattr(model_config, "num_register_tokens", 0)
