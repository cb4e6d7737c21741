"""A quantised backbone: bitsandbytes' 4-bit NF4 or 8-bit weights in the linear layers of the language model.

Everything else is as without: embeddings, output head, norms and biases in the backbone's type, encoders, projectors and
adapter in float32. Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023,
https://arxiv.org/abs/2305.14314 (NF4), and "LLM.int8()", NeurIPS 2022, https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import is_bitsandbytes_available

from moka.distributed import default_device
from moka.errors import MokaError, nearest

from .language_models import HUB_ARGUMENTS, create_language_model, decoder_config, load_config, load_language_model
from .sharding import full_shape

Quantization = Literal["nf4", "int8"]
QUANTIZATIONS = get_args(Quantization)
# The first whose 8-bit weights can be moved to another device.
OLDEST_BITSANDBYTES = "0.48"
# Weights that share a scale. bitsandbytes' kernels for the CPU take each row to begin a block.
BLOCK = 64


def check_quantization(kind: str, where: str = "model.quantization") -> None:
    """Raises `MokaError` for an unknown kind, or without bitsandbytes."""
    if kind not in QUANTIZATIONS:
        raise MokaError(
            f"{where}: {kind!r} is not one of {', '.join(QUANTIZATIONS)}, or null for none.{nearest(kind, QUANTIZATIONS)}"
        )
    if not is_bitsandbytes_available(OLDEST_BITSANDBYTES):
        raise MokaError(
            f"{where}: {kind} needs the package bitsandbytes, {OLDEST_BITSANDBYTES} or newer: pip install "
            "'moka-peft[quant]'."
        )


def load_quantized(
    backbone: str, kind: str, dtype: torch.dtype, device: torch.device | str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The language model of a folder or hub name with quantised linear layers.

    Args:
        kind: one of ``QUANTIZATIONS``.
        dtype: of what is not quantised, and what the 4-bit layers compute in.
        device: where it is put as it is read; default: this process's GPU if there is one.
        kwargs: for ``AutoModelForCausalLM.from_pretrained``.
    Raises:
        MokaError: an unknown kind, no bitsandbytes, or a backbone that is quantised already or cannot be.
    """
    check_quantization(kind)
    # At every call of every layer: that 8-bit layers compute in float16 next to a backbone in another type.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config = load_config(backbone, **hub)
    if getattr(config, "quantization_config", None) is not None:
        raise MokaError(f"model.quantization: {backbone} is quantised already; set model.quantization: null.")
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            # Of bytes, which nothing casts. Storage in a floating type is for sharding of frozen weights, which is refused.
            "bnb_4bit_quant_storage": torch.uint8,
        }
        settings["llm_int8_skip_modules"] = _left_out(backbone, config)
    model = load_language_model(
        backbone,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": device or default_device()},
        **kwargs,
    )
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # In evaluation it would pack the weights again, with rounded scales, in a form that no gradient goes through.
            layer.support_avx512bf16_for_cpu = False
    return model


def _left_out(backbone: str, config: Any) -> list[str] | None:
    """Layers to leave as they are: None for those that bitsandbytes leaves out by itself."""
    with torch.device("meta"):
        skeleton = create_language_model(decoder_config(config))
    usual = get_keys_to_not_convert(skeleton)
    linear = {name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear) and name not in usual}
    odd = [name for name, module in linear.items() if module.in_features % BLOCK]
    if linear and len(odd) == len(linear):
        raise MokaError(
            f"model.quantization: nf4 quantises blocks of {BLOCK} weights, and no layer of {backbone} has an input width "
            "that is a multiple of it. Use int8."
        )
    return [*usual, *odd] if odd else None


def mark_quantized(model: Any, kind: str) -> None:
    """Tell peft and the trainer what the composed model has.

    ``hf_quantizer`` and ``is_quantized`` stay the language model's: a trainer refuses a model that is quantised completely
    and has no adapter, and here projectors train without one in stage 1.
    """
    model.quantization = kind
    model.quantization_method = model.language_model.quantization_method
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, name, getattr(model.language_model, name, False))
    place = model.language_model.device
    model.encoders.to(place)
    model.projectors.to(place)


def logical_numel(parameter: torch.Tensor) -> int:
    """Values that a parameter means: a byte of a 4-bit weight has two."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(full_shape(parameter) if state is None else state.shape)
