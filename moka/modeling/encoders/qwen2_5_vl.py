"""The `qwen2.5-vl` encoder: the vision tower of a Qwen2.5-VL checkpoint with its merger, the connector it came with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from moka.errors import MokaError
from moka.modeling.fields import about

from .towers import TowerEncoder


class VisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """The tower and merger only, out of a checkpoint of the full model."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.", r"^lm_head\."]  # the language model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, key_mapping={r"^(model\.)?visual\.": ""}, **kwargs)


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
    model_types = ("qwen2_5_vl",)
    marks = ("<|vision_start|>", "<|vision_end|>")  # what is around a picture in the checkpoint's own prompts
    tiny_model = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32},
        "fullatt_block_indexes": [1],
    }
    grid: tuple[int, int]  # rows and columns of a picture's tokens

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
