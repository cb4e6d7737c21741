"""Placeholders of media: their token ids, which follow the vocabulary, and their positions in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moka.errors import MokaError

from .configuration import MEDIA_TYPE_IDS

_USED_TOKENS = ("pad_token", "eos_token", "bos_token", "unk_token")


def check_token_ids(tokenizer: Any, vocab_size: int, modalities: Mapping[str, list[int]]) -> None:
    """Check that no id which the tokenizer gives to text is the id of a placeholder.

    The named special tokens (padding, ends, unknown) and all ordinary tokens are checked. Other special tokens are not:
    only a chat template can contain them, which `MokaProcessor.encode` checks, and the tokenizers of some text-only
    models have marks of pictures beyond the vocabulary.

    Args:
        vocab_size: of the language model; the placeholders have the ids from there on.
        modalities: name -> its type ids.
    Raises:
        MokaError: a token with such an id.
    """
    for name in _USED_TOKENS:
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= vocab_size:
            raise token_beyond_vocabulary(
                f"tokenizer.{name}", getattr(tokenizer, name), token_id, vocab_size, modalities
            )
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id >= vocab_size and token_id not in special:
            raise token_beyond_vocabulary("tokenizer", token, token_id, vocab_size, modalities)


def token_beyond_vocabulary(
    field: str, token: str, token_id: int, vocab_size: int, modalities: Mapping[str, list[int]]
) -> MokaError:
    """Build the error for a token whose id is not in the vocabulary of the language model; ``field`` has the token."""
    type_id = token_id - vocab_size + 1
    media = {value: name for name, value in MEDIA_TYPE_IDS.items()}
    owner = next((name for name, ids in modalities.items() if type_id in ids), None)
    taken = "" if owner is None else f", and {token_id} is the placeholder of {media.get(type_id, owner)}"
    return MokaError(
        f"{field}: the token {token!r} has id {token_id}, but the language model's vocabulary has {vocab_size} tokens (ids 0 "
        f"to {vocab_size - 1}); the placeholders of media begin at {vocab_size}{taken}. Use a token of the vocabulary (for "
        "padding: tokenizer.pad_token = tokenizer.eos_token), or enlarge the backbone before the model is composed: "
        "backbone.resize_token_embeddings(len(tokenizer)), then save it with its tokenizer."
    )


@torch.compiler.disable  # how many there are depends on the data: found outside of any graph
def media_positions(
    type_ids: torch.Tensor,
    modalities: Mapping[str, list[int]],
    given: Mapping[str, tuple[int, int]],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Find the positions (row * seq + column) of each modality's placeholders, in order.

    Args:
        type_ids: [batch, seq] ``mm_token_type_ids``; read back if they are not in host memory.
        modalities: name -> its type ids.
        given: name -> (items, tokens of each) of the media that are to fill the positions.
        device: of the result.
    Returns:
        name -> int64 [items * tokens].
    Raises:
        MokaError: more or fewer placeholders than the media fill; a type that no modality has.
    """
    flat = type_ids.cpu().flatten()
    media = (flat > 0).nonzero().squeeze(1)
    kinds = flat[media]  # [media tokens]
    positions, unserved = {}, torch.ones_like(kinds, dtype=torch.bool)
    for name, ids in modalities.items():
        own = torch.isin(kinds, torch.tensor(ids))
        unserved &= ~own
        positions[name] = media[own]
        items, tokens = given[name]
        if len(positions[name]) != items * tokens:
            raise MokaError(
                f"{name}: the text has {len(positions[name])} placeholder tokens, and {items} media give "
                f"{items * tokens} ({tokens} each). Pass one medium for each placeholder."
            )
    if unserved.any():
        raise MokaError(
            f"mm_token_type_ids: no encoder serves {kinds[unserved].unique().tolist()}; the model's: "
            f"{dict(modalities)}. Make the ids with this model's processor."
        )
    return {name: own.to(device, non_blocking=True) for name, own in positions.items()}
