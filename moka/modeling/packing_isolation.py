"""Whether a language model keeps the samples of a packed row apart, tried on the model itself.

transformers builds the mask of a packed row from ``position_ids`` that begin again. Models that take no mask from there
(OPT, Falcon, Bloom, MPT), and layers that carry a state along the row (Mamba, short convolutions, linear attention),
read past the beginning of a sample, and are silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moka.errors import MokaError

from .model import MokaForConditionalGeneration
from .sharding import gathered

_TOKENS = 8  # of a sample; more than the convolutions of such models reach
# What may come through, as a share of what does where a sample may see the other: rounding, where sums are taken in no
# fixed order. Measured: exactly nothing in most models, all in those that leak by attention.
_ROUNDING, _COARSE_ROUNDING = 1e-4, 0.02


def check_confined(model: MokaForConditionalGeneration, device: torch.device | str | None = None) -> None:
    """Compare the logits of a sample after one other and after another, packed and not: one small forward.

    The model is left as it was. Where it is kept in parts (ZeRO-3) every process has to call it.

    Args:
        device: what computes; the weights go there layer by layer. Default: where they are.
    Raises:
        MokaError: a sample sees those before it in its row.
    """
    words = model.config.vocab_size
    drawn = torch.randint(words // 2, words, (3, _TOKENS), generator=torch.Generator().manual_seed(0))
    before, other, sample = drawn
    rows = torch.stack([torch.cat([before, sample]), torch.cat([other, sample])])
    apart, together = torch.arange(_TOKENS).repeat(2), torch.arange(2 * _TOKENS)
    batch = {
        "input_ids": rows.repeat(2, 1),  # [4, seq]: packed twice, then as one sample each
        "position_ids": torch.stack([apart, apart, together, together]),
    }
    batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
    place = torch.device(device) if device is not None else model.device
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), _at_work(model.language_model, place):
            logits = model.eval()(**{name: values.to(place) for name, values in batch.items()}, use_cache=False).logits
    finally:
        for module, mode in training.items():
            module.training = mode
    packed, whole = logits[:, _TOKENS:].float().chunk(2)  # [2, tokens, vocabulary] of the sample
    leak, seen = (float((one[0] - one[1]).abs().max()) for one in (packed, whole))
    coarse = model.language_model.dtype != torch.float32 or getattr(model.language_model, "is_quantized", False)
    rounding = _COARSE_ROUNDING if coarse else _ROUNDING
    if not leak <= rounding * seen:  # also where they are not numbers
        raise MokaError(
            f"packing: a sample of a packed row sees those before it in a backbone of model_type "
            f"{model.config.text_config.model_type!r}, which does not keep to restarts of position_ids. Take training.packing out; "
            "train_sampling_strategy: group_by_length saves padding with any backbone."
        )


@contextmanager
def _at_work(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a block has its weights on the device, and full, while it computes."""
    names = getattr(model, "_no_split_modules", None) or ()
    units: list[tuple[nn.Module, bool]] = []
    inside: set[nn.Module] = set()  # of a block
    for module in model.modules():  # a parent before its children
        if module not in inside:
            is_block = type(module).__name__ in names
            units.append((module, is_block))
            inside.update(module.modules() if is_block else ())
    at_work: dict[nn.Module, ExitStack] = {}

    def begin(module: nn.Module, recurse: bool) -> None:
        tensors = [*module.parameters(recurse), *module.buffers(recurse)]
        at_work[module] = ExitStack()
        at_work[module].enter_context(gathered(tensors))
        for tensor in tensors:
            if tensor.device != device:
                at_work[module].callback(_put, tensor, tensor.data)
                _put(tensor, tensor.data.to(device))

    with ExitStack() as hooks:
        for module, recurse in units:
            started = module.register_forward_pre_hook(lambda m, _, recurse=recurse: begin(m, recurse), prepend=True)
            ended = module.register_forward_hook(lambda m, *_: at_work.pop(m).close(), always_call=True)
            hooks.callback(started.remove)
            hooks.callback(ended.remove)
        yield


def _put(tensor: Any, data: torch.Tensor) -> None:
    tensor.data = data
