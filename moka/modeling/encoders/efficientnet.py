"""EfficientNet-Lite0: a small convolutional network trained on ImageNet, as a frozen encoder of photographs.

    picture 3 x 224 x 224 -> stem 32 -> 16 blocks -> 320 x 7 x 7 -> head 1280 x 7 x 7 -> mean over each cell of a grid

    block: 1x1 expand (x 6) -> depthwise 3x3 or 5x5 -> 1x1 project, each followed by batch norm; ReLU6 after the first
    two; the input is added where stride and channels allow

Source: Tan and Le, EfficientNet (2019), and its Lite variant in TensorFlow's TPU models: no squeeze-and-excitation,
ReLU6 for swish, stem and head not scaled. Names of modules are those of the published state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moka.adapter.checks import read_tensors
from moka.errors import MokaError
from moka.modeling.fields import about

from .base import Encoder, FrontEnd, local_path, same_weights
from .images import fit_square, picture

# Stages of (blocks, kernel, stride of the first block, expansion, channels).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
_SHRINKS = 32  # pixels to a cell of the last map
# As EfficientNet-Lite was trained: (value - 127) / 128 for values 0 ... 255.
MEAN, STD = 127.0, 128.0
_EPS = 1e-3  # of the batch norms; PyTorch's own default is 1e-5


class SameConv2d(nn.Conv2d):
    """A convolution without bias and padded as TensorFlow's "SAME": where the padding is odd, more after than before."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (values.shape[2], values.shape[3])
        )
        values = F.pad(values, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(values)


class Block(nn.Module):
    """An inverted residual block: [items, before, h, w] -> [items, after, h / stride, w / stride]."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = before * expansion
        self.adds = stride == 1 and before == after
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv2d(before, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=_EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=_EPS)
        self._project_conv = SameConv2d(inner, after, 1)
        self._bn2 = nn.BatchNorm2d(after, eps=_EPS)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(values))) if self.expands else values
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return values + inner if self.adds else inner


class EfficientNetLite0(nn.Module):
    """The network with the published names, classifier included: [items, 3, 224, 224] -> logits [items, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(STEM, eps=_EPS)
        blocks, before = [], STEM
        for count, kernel, first_stride, expansion, after in STAGES:
            for index in range(count):
                blocks.append(Block(before, after, kernel, first_stride if index == 0 else 1, expansion))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(before, HEAD, 1)
        self._bn1 = nn.BatchNorm2d(HEAD, eps=_EPS)
        self._fc = nn.Linear(HEAD, CLASSES)

    def last_map(self, values: torch.Tensor) -> torch.Tensor:
        """[items, 3, 224, 224] -> [items, 320, 7, 7], what the last block gives."""
        values = F.relu6(self._bn0(self._conv_stem(values)))
        for block in self._blocks:
            values = block(values)
        return values

    def head(self, values: torch.Tensor) -> torch.Tensor:
        """[items, 320, 7, 7] -> [items, 1280, 7, 7], what the classifier averages."""
        return F.relu6(self._bn1(self._conv_head(values)))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self._fc(self.head(self.last_map(values)).mean((2, 3)))


@dataclass
class EfficientNetFrontEnd(FrontEnd):
    """Pictures of any size and mode for `efficientnet`: float32 [3, image_size, image_size] in -0.992 ... 1.

    The full picture is kept, with its aspect ratio; what is left of the square takes the colour of its border.
    """

    image_size: int = 224

    name: ClassVar[str] = "efficientnet"

    def __call__(self, medium: Any) -> np.ndarray:
        pixels = fit_square(picture(medium), self.image_size)
        return np.ascontiguousarray((pixels.astype(np.float32).transpose(2, 0, 1) - MEAN) / STD)


class EfficientNetEncoder(Encoder):
    """EfficientNet-Lite0's map before its classifier, averaged over the cells of a grid; frozen unless the configuration says otherwise.

    Batch norm always uses its running statistics, also where the encoder is trained: an item's features are the same
    whatever else is in its batch.
    """

    @dataclass
    class Config(Encoder.Config):
        trainable: bool = field(
            default=False, metadata=about("train this encoder's weights; False freezes it, in evaluation mode")
        )
        name_or_path: str | None = field(
            default=None,
            metadata=about(
                "embedded:efficientnet-lite0, or a file with the network's state dict; None: random weights"
            ),
        )
        image_size: int = field(
            default=224,
            metadata=about("height and width of the picture, in pixels: a multiple of 32", minimum=_SHRINKS),
        )
        grid: int = field(
            default=1,
            metadata=about(
                "the map is averaged to grid x grid feature vectors; 7 keeps all of a 224 pixel picture's", 1
            ),
        )

    name, kind, input_name = "efficientnet", "image", "pixel_values"
    front_end_class = EfficientNetFrontEnd

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        return EfficientNetFrontEnd(config.image_size)

    def build(self, pretrained: bool) -> None:
        config = self.config
        if config.image_size % _SHRINKS:
            raise MokaError(f"encoder 'efficientnet': image_size {config.image_size} is not a multiple of {_SHRINKS}.")
        if config.grid > config.image_size // _SHRINKS:
            raise MokaError(
                f"encoder 'efficientnet': grid {config.grid} is finer than the map of a picture of {config.image_size} "
                f"pixels, which has {config.image_size // _SHRINKS} cells a side. Give a smaller grid."
            )
        self.input_shape = (3, config.image_size, config.image_size)
        self.width, self.num_tokens = HEAD, config.grid**2
        with same_weights():
            self.model = EfficientNetLite0()
        if pretrained and config.name_or_path:
            load_weights(self.model, local_path(config.name_or_path))
        del self.model._fc  # the classifier: nothing here uses it

    @classmethod
    def tiny(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # The widths are the architecture's; a small picture is what makes it quick.
        return {**config, "name_or_path": None, "image_size": _SHRINKS * config.get("grid", 1)}

    def train(self, mode: bool = True) -> EfficientNetEncoder:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        # Depthwise convolutions on a CPU are two to three times faster with the channels last.
        values = values.contiguous(memory_format=torch.channels_last)
        features = self.model.head(self.model.last_map(values))  # [items, 1280, size / 32, size / 32]
        return F.adaptive_avg_pool2d(features, self.config.grid).flatten(2).transpose(1, 2)


def load_weights(model: EfficientNetLite0, path: str) -> None:
    """Reads a state dict from a file into ``model``; raises `MokaError` where it is none of this network."""
    if not Path(path).is_file():
        raise MokaError(
            f"encoder 'efficientnet': name_or_path {path!r} is no file. Give embedded:efficientnet-lite0, or a file with "
            "the network's state dict."
        )
    try:
        model.load_state_dict(read_tensors(Path(path)), strict=True)
    except RuntimeError as error:
        raise MokaError(
            f"encoder 'efficientnet': {path!r} does not hold the weights of EfficientNet-Lite0: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
