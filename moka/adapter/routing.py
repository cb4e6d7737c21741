"""Routing: which token is of which modality, and which text tokens it may attend to.

One immutable ``Routing`` per forward, built before the first layer and shared by all layers:

    mm_token_type_ids  [batch, seq]   0 text, 1 image, 2 video, 3 audio (transformers' convention)
    interaction_ids    [batch, seq]   0: takes no part; k > 0: media tokens with k attend to text tokens with k
    attention_mask     [batch, seq]   0: padding, no adapter at all

Every adapter reads it through a ``View``: the same tokens under that adapter's map of modalities, with the indices of
queries and keys gathered once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moka.errors import MokaError

from .config import TEXT, MokaConfig


@dataclass(frozen=True)
class Pairs:
    """Who attends to whom: queries and keys of each row, padded to the longest row."""

    query_index: torch.Tensor  # [batch, queries] positions in the row
    key_index: torch.Tensor  # [batch, keys]
    mask: torch.Tensor  # [batch, queries, keys] bool; False where padding or of another group
    weight: torch.Tensor  # [batch, queries] lambda of the query's modality


@dataclass(frozen=True)
class View:
    """The tokens of one forward as one adapter sees them."""

    row: torch.Tensor | None  # [batch, seq] index into moka_A [M, r, in]; None: every token is text
    adapted: torch.Tensor | None  # [batch, seq, 1] bool; None: every token goes through the adapter
    pairs: Pairs | None  # None: no token interacts
    silent: bool = False  # no token goes through the adapter at all

    @property
    def uniform(self) -> bool:
        """Whether all tokens are treated alike: as text, or not at all."""
        return self.row is None and self.adapted is None


TEXT_ONLY = View(row=None, adapted=None, pairs=None)
SILENT = View(row=None, adapted=None, pairs=None, silent=True)


@dataclass(frozen=True)
class Routing:
    """What the layers need to know about the tokens of one forward."""

    shape: tuple[int, int]  # batch, seq
    views: dict[str, View]  # by adapter name
    idle: bool = False  # no layer has anything to add to its base layer's result


def build_routing(
    configs: dict[str, MokaConfig],
    type_ids: torch.Tensor,
    interaction_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    only: frozenset[str] | None = None,
) -> Routing:
    """Build the routing of one forward for the given adapters.

    Args:
        configs: adapter name -> its configuration.
        type_ids: [batch, seq] int.
        interaction_ids: [batch, seq] int, or None for no interaction.
        valid: [batch, seq] bool, False at padding; None: no padding.
        only: the modalities whose tokens go through the adapters; None: all that they adapt.
    Raises:
        MokaError: an id that no modality of the configuration claims.
    """
    if valid is not None and bool(valid.all()):
        valid = None
    views: dict[tuple, View] = {}
    by_adapter = {}
    for name, config in configs.items():
        key = _view_key(config)
        if key not in views:
            views[key] = _build_view(config, type_ids, interaction_ids, valid, only)
        by_adapter[name] = views[key]
    return Routing(shape=(type_ids.shape[0], type_ids.shape[1]), views=by_adapter)


def text_view(config: MokaConfig, only: frozenset[str] | None = None) -> View:
    """The view of tokens that are all text, none of them padding."""
    adapts = TEXT in config.adapted and (only is None or TEXT in only)
    return TEXT_ONLY if adapts else SILENT


def _view_key(config: MokaConfig) -> tuple:
    modalities = tuple((name, tuple(ids)) for name, ids in config.modalities.items())
    weights = tuple(config.weight_of(name) for name in config.modalities)
    return modalities, tuple(config.adapted), config.interaction, weights


def modality_rows(config: MokaConfig, type_ids: torch.Tensor) -> torch.Tensor:
    """Map ``mm_token_type_ids`` [batch, seq] to rows of ``moka_A``; an id that no modality claims is an error."""
    table = torch.full((max(max(ids) for ids in config.modalities.values()) + 1,), -1, dtype=torch.long)
    for row, ids in enumerate(config.modalities.values()):
        table[ids] = row
    table = table.to(type_ids.device)
    clamped = type_ids.clamp(0, len(table) - 1)
    rows = torch.where(type_ids == clamped, table[clamped], -1)
    if bool((rows < 0).any()):
        unknown = sorted(set(type_ids[rows < 0].tolist()))
        raise MokaError(
            f"mm_token_type_ids holds {unknown}, which no modality of this adapter claims; known: {config.modalities}. "
            "Add the id to MokaConfig.modalities, or route those tokens as text (0)."
        )
    return rows


def _build_view(
    config: MokaConfig,
    type_ids: torch.Tensor,
    interaction_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    only: frozenset[str] | None,
) -> View:
    rows = modality_rows(config, type_ids)
    is_text = rows == config.text_row
    adapted = valid
    names = list(config.modalities)
    if valid is None and bool(is_text.all()):
        return text_view(config, only)
    left_out = [
        i for i, name in enumerate(names) if name not in config.adapted or (only is not None and name not in only)
    ]
    if left_out:
        chosen = torch.isin(rows, torch.tensor(left_out, device=rows.device), invert=True)
        adapted = chosen if adapted is None else adapted & chosen
    if bool(is_text.all()):
        return View(row=None, adapted=None if adapted is None else adapted[..., None], pairs=None)

    pairs = None
    if interaction_ids is not None and config.interacts:
        takes_part = interaction_ids > 0
        if adapted is not None:
            takes_part = takes_part & adapted
        text, media = takes_part & is_text, takes_part & ~is_text
        query, key = (text, media) if config.interaction == "reversed" else (media, text)
        weights = torch.tensor([config.weight_of(name) for name in names], device=rows.device)
        pairs = _build_pairs(query, key, interaction_ids, weights[rows])
    return View(row=rows, adapted=None if adapted is None else adapted[..., None], pairs=pairs)


def _build_pairs(query: torch.Tensor, key: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> Pairs | None:
    queries, keys = int(query.sum(1).max()), int(key.sum(1).max())
    if queries == 0 or keys == 0:
        return None
    # A stable descending sort of the flags lists the flagged positions first, in order, for all rows at once.
    query_index = query.long().argsort(dim=1, descending=True, stable=True)[:, :queries]  # [batch, queries]
    key_index = key.long().argsort(dim=1, descending=True, stable=True)[:, :keys]  # [batch, keys]
    same_group = ids.gather(1, query_index)[:, :, None] == ids.gather(1, key_index)[:, None, :]
    both_real = query.gather(1, query_index)[:, :, None] & key.gather(1, key_index)[:, None, :]
    return Pairs(query_index, key_index, same_group & both_real, weight.gather(1, query_index))


def question_to_interaction(question_mask: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """The one-question shorthand as ``interaction_ids``: question tokens and all media tokens form group 1."""
    return ((question_mask.bool() & is_text) | ~is_text).long()


def text_before_answer(is_text: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[batch, seq] bool: text tokens before the first supervised token of each row (``labels != -100``)."""
    before = (labels != -100).long().cumsum(1) == 0
    keys = is_text & before
    return keys if valid is None else keys & valid
