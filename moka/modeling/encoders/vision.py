"""Published encoders of pictures: CLIP, SigLIP and DINOv2, one feature vector per patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moka.errors import MokaError
from moka.modeling.fields import about

from .towers import TowerEncoder

TINY_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_PICTURES = {**TINY_TRANSFORMER, "image_size": 28, "patch_size": 14}


class ClipEncoder(TowerEncoder):
    """CLIP's vision tower: one feature vector per patch, without the class token, before the final layer norm.

    LLaVA takes layer -2; the class token and the pooled output are never used.
    """

    name, kind, input_name = "clip", "image", "pixel_values"
    model_types = ("clip", "clip_vision_model")
    tiny_model = {**TINY_PICTURES, "intermediate_size": 64}
    special_tokens = 1  # the class token

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionConfig, CLIPVisionModel

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.num_hidden_layers)
        self.input_shape = (model_config.num_channels, model_config.image_size, model_config.image_size)
        self.width = model_config.hidden_size
        self.num_tokens = (model_config.image_size // model_config.patch_size) ** 2


class SiglipEncoder(ClipEncoder):
    """SigLIP's vision tower: one feature vector per patch, before the final layer norm; it has no class token.

    Its attention pooling is not built. SigLIP 2 checkpoints of one fixed size are of the same type.
    """

    name = "siglip"
    model_types = ("siglip", "siglip_vision_model")
    special_tokens = 0

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionConfig, SiglipVisionModel

    @classmethod
    def adjust(cls, model_config: Any) -> Any:
        model_config.vision_use_head = False
        return model_config


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
    model_types = ("dinov2", "dinov2_with_registers")
    tiny_model = {**TINY_PICTURES, "mlp_ratio": 2}
    kept_in_tiny = ("model_type", "num_register_tokens", "use_swiglu_ffn")

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().tiny(config), "image_size": 28}

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        if model_type == "dinov2_with_registers":
            return Dinov2WithRegistersConfig, Dinov2WithRegistersModel
        return Dinov2Config, Dinov2Model

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
