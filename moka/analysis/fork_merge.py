"""Fork-Merge Decoding: the first blocks of the decoder see one modality at a time, the others all of them. No training.

    fork    h_v = blocks_1..L(x without audio),  h_a = blocks_1..L(x without visual)     both with the question
    merge   h_t = h_v,t for visual tokens t;  h_a,t for audio tokens;  w h_v,t + (1 - w) h_a,t for text
    rest    logits = head(blocks_L+1..N(h))

Source: Fork-Merge Decoding (https://arxiv.org/abs/2505.20873). Two choices are ours: the other modality is hidden from attention,
at the positions that it has (the paper sets its input to zero), and w is a number (the paper derives its weight from attention).

It works on any model whose decoder reads media as tokens, with an adapter or without one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from moka.adapter.inputs import CACHE, cache_of
from moka.adapter.text_decoder import decoder_blocks, language_decoder
from moka.errors import MokaError

from .contribution import extended, hidden_in, modality_index, unwrapped


@contextmanager
def fork_merge_decoding(
    model: nn.Module, batch: Mapping[str, Any], fork_layers: int | None = None, visual_weight: float = 0.5
) -> Iterator[None]:
    """Run every forward of the decoder inside the block, such as those of ``generate``, by Fork-Merge Decoding.

    Rows of the batch that lack one of the two modalities are decoded as usual. The keys and values of the second branch are
    stored in the model's cache, behind those of all blocks. Not for training.

    Args:
        model: a composed model or a Hugging Face multimodal LLM.
        batch: the prompt, with ``input_ids`` or ``mm_token_type_ids`` [batch, seq].
        fork_layers: L, from 0 (usual decoding) to all blocks; default: a quarter of them.
        visual_weight: w, from 0 to 1.
    Raises:
        MokaError: a value out of range; no row has both modalities; a decoder whose blocks take no attention mask.
    """
    decoder: Any = language_decoder(unwrapped(model))
    blocks: Any = decoder_blocks(unwrapped(model))[1]
    depth = max(1, len(blocks) // 4) if fork_layers is None else fork_layers
    if not 0 <= depth <= len(blocks):
        raise MokaError(f"fork_layers: {fork_layers}: the decoder has {len(blocks)} blocks; give 0 to {len(blocks)}.")
    if not 0 <= visual_weight <= 1:
        raise MokaError(f"visual_weight: {visual_weight}: give a number from 0 (sound only) to 1 (pictures only).")
    rows = modality_index(model, batch)
    visual, audio = rows["visual"], rows["audio"]
    both = visual.any(1, keepdim=True) & audio.any(1, keepdim=True)  # [batch, 1]
    if not both.any():
        raise MokaError(
            "decoding: fork-merge needs a picture or video and sound in one prompt; this one has no "
            f"{'sound' if visual.any() else 'picture or video'}. Use standard decoding."
        )
    if depth == 0:
        yield
        return
    fork = _Fork(decoder, list(blocks), depth, (audio & both, visual & both), visual_weight)
    with _replaced(decoder, fork.forward):
        yield


class _Fork:
    """The decoder's forward in two branches up to block ``depth``; ``hidden``: what each does not see, [batch, seq]."""

    def __init__(
        self, decoder: Any, blocks: list[Any], depth: int, hidden: tuple[torch.Tensor, torch.Tensor], weight: float
    ) -> None:
        self.decoder, self.blocks, self.depth, self.hidden, self.weight = decoder, blocks, depth, hidden, weight
        self.own = decoder.forward
        self.parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        seq = tokens.shape[1]
        cache = cache_of(given)
        if cache is None and given.get("use_cache") is not False:
            cache = given[CACHE] = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = given.get("attention_mask")
        hidden = [extended(one, given) for one in self.hidden]
        masks = [self._masks({**given, "attention_mask": hidden_in(mask, one)}) for one in hidden]
        if cache is not None and len(cache.layers) == len(self.blocks):
            cache.layers += [copy.deepcopy(layer) for layer in cache.layers[: self.depth]]
        self.states: list[torch.Tensor] = []
        with ExitStack() as stack:
            for k, block in enumerate(self.blocks[: self.depth]):
                columns = [one[:, past : past + seq, None] for one in hidden]
                stack.enter_context(_replaced(block, self._block(k, block.forward, masks, columns)))
            return self.own(**given)

    def _masks(self, given: dict[str, Any]) -> list[Any]:
        """Return the attention mask that the decoder gives each block, of a forward in which no block runs."""
        seen: list[Any] = []

        def keep(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if "attention_mask" not in kwargs:
                raise MokaError(
                    f"decoding: fork-merge: a block of {type(self.decoder).__name__} takes no attention_mask."
                )
            seen.append(kwargs["attention_mask"])
            return hidden_states

        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced(block, keep))
            self.own(**given)
        return seen

    def _block(self, k: int, own: Callable, masks: list[list[Any]], columns: list[torch.Tensor]) -> Callable:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            states = [hidden_states, hidden_states]
            if k:  # the decoder may add to what it got from the block before
                states[1] = self.states[1] + (hidden_states - self.states[0])
            cache = cache_of(kwargs)
            found = []
            for branch, state in enumerate(states):
                changed: dict[str, Any] = {"attention_mask": masks[branch][k]}
                if branch and cache is not None:
                    changed[CACHE] = _Shifted(cache, len(self.blocks))
                found.append(own(state, *args, **{**kwargs, **changed}))
            self.states = [one[0] if isinstance(one, tuple) else one for one in found]
            return self.states[0] if k + 1 < self.depth else self._merged(columns)

        return run

    def _merged(self, columns: list[torch.Tensor]) -> torch.Tensor:
        """Return the states [batch, seq, hidden] of the branch that sees a token; of text the weighted mean."""
        seeing_visual, seeing_audio = self.states
        no_audio, no_visual = columns  # [batch, seq, 1] what a branch does not see
        merged = torch.lerp(seeing_audio, seeing_visual, self.weight)
        return torch.where(no_visual, seeing_visual, torch.where(no_audio, seeing_audio, merged))


class _Shifted:
    """A cache in which block k writes and reads the place of block k + ``by``."""

    def __init__(self, cache: Any, by: int) -> None:
        self.cache, self.by = cache, by

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.cache.update(keys, values, layer_idx + self.by, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace a module's ``forward`` inside the block; its hooks stay."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
