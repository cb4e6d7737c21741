"""The `qwen2.5-vl` encoder: the vision tower of a Qwen2.5-VL checkpoint with its merger, the connector it came with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from moka.errors import MokaError
from moka.modeling.fields import about

from .base import FrontEnd
from .images import ProcessorFrontEnd, picture
from .towers import TowerEncoder


class VisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """The tower and merger only, out of a checkpoint of the full model."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.", r"^lm_head\."]  # the language model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, key_mapping={r"^(model\.)?visual\.": ""}, **kwargs)


class QwenVlFrontEnd(ProcessorFrontEnd):
    """Pictures for Qwen2.5-VL: the full picture stretched to a square, as float32 [patches, 2 * 3 * 14 * 14].

    Patches are in the order of the checkpoint's own image processor, the four of a token together; each has the
    picture twice, for the two frames that the tower reads at once.
    """

    name: ClassVar[str] = "qwen2.5-vl"

    def __call__(self, medium: Any) -> np.ndarray:
        side = math.isqrt(self.settings["size"]["shortest_edge"])
        image = picture(medium).resize((side, side), self.processor.resample)
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


class QwenVlEncoder(TowerEncoder):
    """Qwen2.5-VL's vision tower and merger: one token of the language model for each square of 28 x 28 pixels.

    The merger has already brought the features into the embedding space of the checkpoint's own language model, so with
    that one as the backbone the projector is `identity`, and the language model gives the tokens their positions on
    `grid`. A video's frames are pictures of their own: the tower's pairing of frames in time is not used.

    Source: Bai et al., Qwen2.5-VL Technical Report (2025).
    """

    @dataclass
    class Config(TowerEncoder.Config):
        image_size: int = field(
            default=224,
            metadata=about("height and width of the picture, in pixels: a multiple of 28", minimum=1, weightless=True),
        )

    name, kind, input_name = "qwen2.5-vl", "image", "pixel_values"
    model_types = {"qwen2_5_vl": ("Qwen2_5_VLVisionConfig", "")}
    marks = ("<|vision_start|>", "<|vision_end|>")  # what is around a picture in the checkpoint's own prompts
    tiny_model = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32},
        "fullatt_block_indexes": [1],
    }
    front_end_class = QwenVlFrontEnd
    grid: tuple[int, int]  # rows and columns of a picture's tokens

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        return QwenVlFrontEnd.read(config.name_or_path, config.image_size)

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().tiny(config), "image_size": 56}

    @classmethod
    def classes(cls, model_type: str | None) -> tuple[Any, Any]:
        return Qwen2_5_VLVisionConfig, VisionTower

    def read_sizes(self, model_config: Any) -> None:
        size, cell = self.config.image_size, model_config.patch_size * model_config.spatial_merge_size
        if self.config.layer != -1:
            raise MokaError(
                f"encoder 'qwen2.5-vl': given layer {self.config.layer}; its merger reads the last layer only. Leave "
                "layer out."
            )
        if size % cell:
            raise MokaError(
                f"encoder 'qwen2.5-vl': given image_size {size}; it must be a multiple of {cell} (two patches), such as "
                f"{max(1, size // cell) * cell}."
            )
        self.patches = size // model_config.patch_size  # of one side
        values = model_config.in_channels * model_config.temporal_patch_size * model_config.patch_size**2
        self.input_shape = (self.patches**2, values)
        self.grid = (size // cell, size // cell)
        self.width, self.num_tokens = model_config.out_hidden_size, self.grid[0] * self.grid[1]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        grid = torch.tensor([[1, self.patches, self.patches]] * len(values), device=values.device)
        features = self.model(values.flatten(0, 1), grid_thw=grid).pooler_output  # [items * num_tokens, width]
        return features.unflatten(0, (len(values), self.num_tokens))
