"""Where the features of media go: the places of placeholder tokens, found in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from moka.errors import MokaError
from moka.host import upload


def media_places(
    type_ids: np.ndarray, modalities: Mapping[str, list[int]], given: Mapping[str, tuple[int, int]]
) -> dict[str, np.ndarray]:
    """Of each modality the places (row * seq + column) of its placeholders, in order: int64 [items * tokens].

    Args:
        type_ids: [batch, seq] ``mm_token_type_ids``.
        modalities: name -> its type ids.
        given: name -> (items, tokens of each) of the media that are to fill the places.
    Raises:
        MokaError: more or fewer placeholders than the media fill; a type that no modality has.
    """
    flat = type_ids.reshape(-1)
    media = np.flatnonzero(flat > 0)
    kinds = flat[media]  # [media tokens]
    places, unserved = {}, np.ones(len(media), bool)
    for name, ids in modalities.items():
        here = np.isin(kinds, ids)
        unserved &= ~here
        places[name] = media[here]
        items, tokens = given[name]
        if len(places[name]) != items * tokens:
            raise MokaError(
                f"{name}: the text has {len(places[name])} placeholder tokens, and {items} media give "
                f"{items * tokens} ({tokens} each). Pass one medium for each placeholder."
            )
    if unserved.any():
        raise MokaError(
            f"mm_token_type_ids: no encoder serves {np.unique(kinds[unserved]).tolist()}; the model's: "
            f"{dict(modalities)}. Make the ids with this model's processor."
        )
    return places


@torch.compiler.disable  # how many there are depends on the data, and is settled outside of any graph
def uploaded_places(
    type_ids: torch.Tensor,
    modalities: Mapping[str, list[int]],
    given: Mapping[str, tuple[int, int]],
    device: torch.device,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`media_places` on ``device``: those of all media, and of each modality. ``type_ids`` lie in host memory."""
    places = media_places(type_ids.numpy(), modalities, given)
    (every,) = upload([np.concatenate(list(places.values()))] if places else [np.empty(0, np.int64)], device)
    return every, dict(zip(places, every.split([len(own) for own in places.values()]), strict=True))
