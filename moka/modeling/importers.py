"""Projectors that others published, under our names: the MokA authors' Q-Formers, and LLaVA's linear and MLP ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from moka.errors import MokaError

# The authors' names, without "model.vl_projector." and "visual_" (or "al" and "audio"), to ours. Their Q-Former is a
# BERT whose text half (word embeddings, feed-forward layers of text, masked-word head) queries never pass through.
OFFICIAL_NAMES = (
    (r"query_tokens", "queries"),
    (r"ln\.(weight|bias)", r"norm.\1"),
    (r"proj\.0\.(weight|bias)", r"hidden.\1"),
    (r"proj\.2\.(weight|bias)", r"output.\1"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", r"qformer.layernorm.\1"),
    (r"Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention)\.self\.(.+)", r"qformer.\1.attention.\2"),
    (r"Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention\.output\..+)", r"qformer.\1"),
    (r"Qformer\.bert\.(encoder\.layer\.\d+\.(?:intermediate|output)_query\..+)", r"qformer.\1"),
)
OFFICIAL_UNUSED = (
    r"Qformer\.cls\..+",
    r"Qformer\.bert\.embeddings\.(position_ids|(word|position)_embeddings\.weight)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+",
)


_OFFICIAL_PREFIX = re.compile(r"(?:base_model\.(?:model\.)?)?(?:model\.)?(?:(?:vl|al)_projector\.)?(visual|audio)_")


def official_projector_name(key: str) -> tuple[str | None, str | None]:
    """Return the medium (visual, audio) and our name of a tensor of the MokA authors' projectors.

    The name is "" for the text half, which queries never pass through, and None for a tensor of anything else.
    """
    prefix = _OFFICIAL_PREFIX.match(key)
    if prefix is None:
        return None, None
    short = key[prefix.end() :]
    if any(re.fullmatch(pattern, short) for pattern in OFFICIAL_UNUSED):
        return prefix[1], ""
    matches = ((re.fullmatch(pattern, short), name) for pattern, name in OFFICIAL_NAMES)
    return prefix[1], next((match.expand(name) for match, name in matches if match), None)


def import_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The MokA authors' `visual_pretrain.bin` or `audio_pretrain.bin`, as `torch.load` gives it, in our names.

    Returns:
        the state dict for a `qformer` projector, to load strictly, and the names left out (the text half).

    Raises:
        MokaError: a name that belongs to neither.
    """
    names = {key: official_projector_name(key)[1] for key in state_dict}
    if unknown := [key for key, name in names.items() if name is None]:
        raise MokaError(
            f"not one of the weights of the MokA authors' projectors: {unknown[0]!r}. Give one of their files "
            "visual_pretrain.bin and audio_pretrain.bin."
        )
    return {name: state_dict[key] for key, name in names.items() if name}, [key for key in names if not names[key]]


# LLaVA's names, without "model.mm_projector.", to ours.
LLAVA_NAMES = {
    "linear": {"weight": "output.weight", "bias": "output.bias"},
    "mlp": {"0.weight": "hidden.weight", "0.bias": "hidden.bias", "2.weight": "output.weight", "2.bias": "output.bias"},
}


def import_llava(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """LLaVA's `mm_projector.bin`, as `torch.load` gives it, in our names.

    Returns:
        the state dict, to load strictly, and the type of projector it is of: "linear" (without `tokens`), or "mlp" for
        `mlp2x_gelu`.

    Raises:
        MokaError: names of another projector, or of none.
    """
    short = {re.sub(r"^(model\.)?mm_projector\.", "", key): key for key in state_dict}
    for projector, names in LLAVA_NAMES.items():
        if short.keys() == names.keys() and all("mm_projector." in key for key in state_dict):
            return {names[name]: state_dict[key] for name, key in short.items()}, projector
    given = ", ".join(sorted(state_dict)[:6]) or "nothing"
    raise MokaError(
        f"not one of LLaVA's projectors that are known: given {given}. Known are a linear layer (model.mm_projector.weight "
        "and bias) and mlp2x_gelu (model.mm_projector.0 and .2)."
    )
