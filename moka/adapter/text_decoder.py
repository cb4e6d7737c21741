"""The decoder inside a model: its blocks, the modules that read its text, and what share of its weights is adapted.

"Weights" are base parameters of two or more dimensions; only their shapes are read, so meta tensors will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .quantization import resolve_quantization_backend

# Within a module's name. The keys and values of cross-attention are tokens of another sequence.
CROSS_ATTENTION = ("cross_attn", "cross_attention", "encoder_attn", "encdec_attention")
# Experts and poolers see some positions only, which the routing of the sequence does not describe; an indexer (DeepSeek)
# chooses positions by top-k, so no gradient reaches it.
_LEFT_OUT = ("experts", "pooler", "indexer")


def language_decoder(model: nn.Module) -> nn.Module:
    """Return the stack of blocks that reads the text: the end of ``get_decoder``; ``model`` itself if there is none."""
    found: Any = model
    while hasattr(found, "get_decoder"):
        inner = found.get_decoder()
        if inner is None or inner is found:
            break
        found = inner
    if found is not model:
        return found
    # A wrapper around the language model. Of several, a speaking model's is called `thinker`.
    generating = [m for m in model.modules() if m is not model and isinstance(m, GenerationMixin)]
    inside: Any = getattr(model, "thinker", None) or (generating[0] if len(generating) == 1 else None)
    return model if inside is None else language_decoder(inside)


def decoder_scope(model: nn.Module) -> set[str] | None:
    """Return the full names of the modules that a bare target name may mean; None: all, as in peft.

    A layer that another adapter wraps counts under the wrapper's name.
    """
    decoder = language_decoder(model)
    if not isinstance(decoder, PreTrainedModel) and decoder is model:
        return None
    towers, blocks = {id(m) for m in _towers(decoder)}, decoder_blocks(model)[1]
    inside = {id(m) for m in _reading_text(decoder, "", towers, blocks)}
    inside |= {id(owner.get_output_embeddings()) for owner in owners_of(model)}
    return {name for name, m in named_modules(model) if name and id(m) in inside}


def coverage(model: nn.Module, names: Iterable[str]) -> float:
    """Return the share (0 to 1) of the weights in the decoder's blocks that the layers called ``names`` hold.

    Base weights of two or more dimensions, experts included; only shapes are read.
    """
    blocks, wanted = decoder_blocks(model)[1], {id(model.get_submodule(name)) for name in names}
    adapted = sum(count_weights(m) for _, m in named_modules(blocks) if id(m) in wanted)
    return adapted / max(count_weights(blocks), 1)


def named_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules under each of their names, without what is inside an adapter's layer."""
    yield prefix, root
    if not isinstance(root, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        for name, child in root._modules.items():
            if child is not None:
                yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def owners_of(model: nn.Module) -> list[PreTrainedModel]:
    """Return the transformers models that contain the decoder, outermost first."""
    decoder = language_decoder(model)
    return [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and any(part is decoder for part in m.modules())
    ]


def _towers(decoder: Any) -> list[nn.Module]:
    """Return complete models within the decoder that do not embed its text, such as encoders on its embeddings."""
    try:
        words = decoder.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return []
    inner = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m is not decoder]
    return [m for m in inner if all(part is not words for part in m.modules())]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the largest list of modules in the decoder, outside of towers, with its name; without one the decoder."""
    decoder = language_decoder(model)
    skipped = {id(part) for tower in _towers(decoder) for part in tower.modules()}
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and id(m) not in skipped]
    found = max(lists, key=count_weights, default=decoder)
    return next((name, m) for name, m in named_modules(model) if m is found)


def _reading_text(module: nn.Module, name: str, towers: set[int], blocks: nn.Module) -> Iterator[nn.Module]:
    """Yield the decoder's modules that run their own forward on every position of the text's sequence."""
    inside = {id(part) for part in module.modules()} if towers else set()
    media = towers & inside and name and id(blocks) not in inside  # a tower, or it with its projector
    if media or name in _LEFT_OUT or contains_any(name, CROSS_ATTENTION):
        return
    yield module
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return
    # A fused kernel of Mamba reads the weights of out_proj, x_proj and dt_proj and never runs these layers.
    mamba = hasattr(module, "A_log") and hasattr(module, "D")
    for key, child in module._modules.items():
        if child is not None and (not mamba or key == "in_proj"):
            yield from _reading_text(child, key, towers, blocks)


def is_linear(module: nn.Module) -> bool:
    """Return whether MokA can adapt ``module``: a linear map, also a quantised one or one that an adapter wraps."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    return hasattr(base, "in_features") and getattr(resolve_quantization_backend(base), "layer_type", "") == "linear"


def linear_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of the model's linear layers."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name, m in named_modules(model) if is_linear(m)))


def count_weights(module: nn.Module) -> int:
    """Count the elements of weights of two or more dimensions, adapters left out."""
    if isinstance(module, BaseTunerLayer):
        return count_weights(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        return count_weights(module.original_module)
    if is_linear(module) and hasattr(module, "in_features"):  # a quantised weight is packed
        layer: Any = module
        return layer.in_features * layer.out_features
    shapes = [getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False)]  # ZeRO-3 empties the parameter
    own = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    return own + sum(count_weights(child) for child in module.children())


def contains_any(name: str, words: tuple[str, ...]) -> bool:
    """Return whether one of ``words`` is in ``name``, in upper or lower case, underscores ignored."""
    return any(word.replace("_", "") in name.lower().replace("_", "") for word in words)
