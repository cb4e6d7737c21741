"""Backbones: random ones by size, and any folder, hub name or embedded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from moka import MokaError
from moka.modeling.build import resolve_backbone

PREFIX = "random:"
EMBEDDED = "embedded:smollm2-135m"


def _shape(hidden: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int, tied: bool = True) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // shared,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# LLaMA shapes; the names say the parameters.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(64, 160, 2, 4, 2, 256),
    "4m": _shape(256, 768, 3, 4, 2, 4096),
    "15m": _shape(256, 1024, 10, 4, 2, 16384),
    "60m": _shape(512, 1536, 14, 8, 2, 32768),
    "1b": _shape(2048, 5632, 22, 32, 8, 32000, tied=False),
    "7b": _shape(4096, 11008, 32, 32, 1, 32000, tied=False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}


def backbone_config(name: str) -> PreTrainedConfig:
    """The shape of a backbone: ``random:SIZE``, ``embedded:smollm2-135m``, a folder or a hub name."""
    if not name.startswith(PREFIX):
        return AutoConfig.from_pretrained(resolve_backbone(name))
    size = name.removeprefix(PREFIX)
    if size not in SHAPES:
        raise MokaError(f"backbone: unknown {name!r}; there is {', '.join(PREFIX + one for one in SHAPES)}.")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**SHAPES[size], **special, max_position_embeddings=16384)


def open_backbone(name: str, dtype: str, device: str, seed: int) -> nn.Module:
    """A causal language model, frozen; ``dtype`` "nf4" quantises the linear maps of its blocks with bitsandbytes."""
    if name.startswith(PREFIX):
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(backbone_config(name), dtype=DTYPES[dtype])
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_backbone(name), dtype=DTYPES[dtype]).to(device)
    if dtype == "nf4":
        quantize(model, device)
    return model.requires_grad_(False)


def one_block(name: str, dtype: str, device: str, seed: int) -> nn.Module:
    """A model of one decoder block of the backbone's shape, with its rotary positions and last norm; no vocabulary."""
    config = backbone_config(name)
    config.num_hidden_layers, config.vocab_size = 1, 8
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=DTYPES[dtype])
    if dtype == "nf4":
        quantize(model, device)
    return model.requires_grad_(False)


def quantize(model: nn.Module, device: str) -> None:
    """Linear maps other than the vocabulary's to nf4, in place.

    Raises:
        MokaError: bitsandbytes is missing.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MokaError('dtype nf4 needs bitsandbytes: pip install "moka-peft[quant]".') from error
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            sizes = module.in_features, module.out_features
            small = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            setattr(model.get_submodule(parent), child, small.to(device))
    model.is_loaded_in_4bit = True
