"""Routing: which token is of which modality, and which text tokens it may attend to.

One immutable ``Routing`` per forward, built before the first layer and shared by all layers:

    mm_token_type_ids  [batch, seq]   0 text, 1 image, 2 video, 3 audio (transformers' convention)
    interaction_ids    [batch, seq]   0: takes no part; k > 0: media tokens with k attend to text tokens with k
    attention_mask     [batch, seq]   0: padding, no adapter at all

Every adapter reads it through a ``View``: the same tokens under that adapter's map of modalities, with the indices of
queries and keys gathered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from moka.errors import MokaError
from moka.host import upload

from .config import TEXT, MokaConfig


@dataclass(frozen=True)
class Pairs:
    """Who attends to whom: queries and keys of each row, padded to the longest row."""

    query_index: torch.Tensor  # [batch, queries] positions in the row
    key_index: torch.Tensor  # [batch, keys]
    mask: torch.Tensor  # [batch, queries, keys] bool; False where padding or of another group
    weight: torch.Tensor  # [batch, queries] lambda of the query's modality
    full: bool = False  # the mask is known to be True everywhere


@dataclass(frozen=True)
class View:
    """The tokens of one forward as one adapter sees them."""

    row: torch.Tensor | None  # [batch, seq] index into moka_A [M, r, in]; None: every token is text
    adapted: torch.Tensor | None  # [batch, seq, 1] bool; None: every token goes through the adapter
    pairs: Pairs | None  # None: no token interacts
    silent: bool = False  # no token goes through the adapter at all
    # What layers made of it (`selection.select`).
    derived: dict = field(default_factory=dict, compare=False, repr=False)

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
    types: np.ndarray,
    groups: np.ndarray | None,
    valid: np.ndarray | None,
    only: frozenset[str] | None,
    device: torch.device,
) -> Routing:
    """Build the routing of one forward for the given adapters: in host memory, then uploaded at once.

    Args:
        configs: adapter name -> its configuration.
        types: ``mm_token_type_ids`` [batch, seq] int.
        groups: ``interaction_ids`` [batch, seq] int, or None for no interaction.
        valid: [batch, seq], 0 at padding; None: no padding.
        only: the modalities whose tokens go through the adapters; None: all that they adapt.
        device: where the layers' inputs lie.
    Raises:
        MokaError: an id that no modality of the configuration claims.
    """
    real = None if valid is None or valid.all() else valid != 0
    made: dict[tuple, View | _HostView] = {}
    for config in configs.values():
        key = _view_key(config)
        if key not in made:
            made[key] = _build_view(config, types, groups, real, only)
    built = _upload(made, device)
    views = {name: built[_view_key(config)] for name, config in configs.items()}
    return Routing(shape=(types.shape[0], types.shape[1]), views=views)


def text_view(config: MokaConfig, only: frozenset[str] | None = None) -> View:
    """The view of tokens that are all text, none of them padding."""
    adapts = TEXT in config.adapted and (only is None or TEXT in only)
    return TEXT_ONLY if adapts else SILENT


def _view_key(config: MokaConfig) -> tuple:
    modalities = tuple((name, tuple(ids)) for name, ids in config.modalities.items())
    weights = tuple(config.weight_of(name) for name in config.modalities)
    return modalities, tuple(config.adapted), config.interaction, weights


def modality_rows(config: MokaConfig, type_ids: np.ndarray) -> np.ndarray:
    """Map ``mm_token_type_ids`` [batch, seq] to rows of ``moka_A``; an id that no modality claims is an error."""
    table = np.full(max(max(ids) for ids in config.modalities.values()) + 1, -1, np.int64)
    for row, ids in enumerate(config.modalities.values()):
        table[ids] = row
    low, high = type_ids.min(initial=0), type_ids.max(initial=0)
    inside = low >= 0 and high < len(table)
    if inside and low == high:
        rows = np.full(type_ids.shape, table[low])
    else:
        rows = table[type_ids] if inside else np.where(np.isin(type_ids, np.flatnonzero(table >= 0)), 0, -1)
    if rows.min(initial=0) < 0:
        unknown = np.unique(type_ids[rows < 0]).tolist()
        raise MokaError(
            f"mm_token_type_ids holds {unknown}, which no modality of this adapter claims; known: {config.modalities}. "
            "Add the id to MokaConfig.modalities, or route those tokens as text (0)."
        )
    return rows


@dataclass(frozen=True)
class _HostPairs:
    """`Pairs`, with the groups [batch, queries] and [batch, keys] of which the mask is made on the device."""

    query_index: np.ndarray
    key_index: np.ndarray
    query_group: np.ndarray
    key_group: np.ndarray
    weight: np.ndarray

    @property
    def full(self) -> bool:
        one = self.query_group[:, :1]
        return bool((self.query_group == one).all() and (self.key_group == one).all())


@dataclass(frozen=True)
class _HostView:
    """A `View` in host memory."""

    row: np.ndarray | None
    adapted: np.ndarray | None  # [batch, seq]
    pairs: _HostPairs | None

    def arrays(self) -> list[np.ndarray]:
        pairs = () if self.pairs is None else vars(self.pairs).values()
        adapted = None if self.adapted is None else self.adapted[..., None]
        return [array for array in (self.row, adapted, *pairs) if array is not None]

    def view(self, tensors: Iterator[torch.Tensor]) -> View:
        """The view made of what became of `arrays`."""
        row = None if self.row is None else next(tensors)
        adapted = None if self.adapted is None else next(tensors)
        if self.pairs is None:
            return View(row, adapted, None)
        query_index, key_index, query_group, key_group, weight = (next(tensors) for _ in vars(self.pairs))
        if self.pairs.full:
            mask = torch.ones((1, 1, 1), dtype=torch.bool, device=weight.device).expand(
                *weight.shape, key_index.shape[1]
            )
        else:
            mask = query_group[:, :, None] == key_group[:, None]  # [batch, queries, keys]
        return View(row, adapted, Pairs(query_index, key_index, mask, weight, self.pairs.full))


def _upload(made: dict[tuple, View | _HostView], device: torch.device) -> dict[tuple, View]:
    arrays = [array for view in made.values() if isinstance(view, _HostView) for array in view.arrays()]
    tensors = iter(upload(arrays, device))
    return {key: view.view(tensors) if isinstance(view, _HostView) else view for key, view in made.items()}


def _build_view(
    config: MokaConfig,
    type_ids: np.ndarray,
    interaction_ids: np.ndarray | None,
    valid: np.ndarray | None,
    only: frozenset[str] | None,
) -> View | _HostView:
    """All arrays [batch, seq]."""
    rows = modality_rows(config, type_ids)
    is_text = rows == config.text_row
    all_text = bool(is_text.all())
    if valid is None and all_text:
        return text_view(config, only)
    names = list(config.modalities)
    takes = [name in config.adapted and (only is None or name in only) for name in names]
    adapted = valid
    if not all(takes):
        chosen = np.array(takes)[rows]
        adapted = chosen if adapted is None else adapted & chosen
    pairs = None
    if not all_text and interaction_ids is not None and config.interacts:
        takes_part = interaction_ids > 0
        if adapted is not None:
            takes_part &= adapted
        text, media = takes_part & is_text, takes_part & ~is_text
        query, key = (text, media) if config.interaction == "reversed" else (media, text)
        weights = np.array([config.weight_of(name) for name in names], np.float32)
        pairs = _build_pairs(query, key, interaction_ids, weights[rows])
    return _HostView(None if all_text else rows, adapted, pairs)


def _build_pairs(query: np.ndarray, key: np.ndarray, ids: np.ndarray, weight: np.ndarray) -> _HostPairs | None:
    queries, keys = query.sum(1).max(initial=0), key.sum(1).max(initial=0)
    if queries == 0 or keys == 0:
        return None
    # A stable sort of the flags lists the flagged positions first, in order, for all rows at once.
    query_index = np.argsort(~query, axis=1, kind="stable")[:, :queries]  # [batch, queries]
    key_index = np.argsort(~key, axis=1, kind="stable")[:, :keys]  # [batch, keys]
    # Padding belongs to groups that nothing else belongs to.
    query_group = np.take_along_axis(np.where(query, ids, -1), query_index, 1)
    key_group = np.take_along_axis(np.where(key, ids, -2), key_index, 1)
    return _HostPairs(query_index, key_index, query_group, key_group, np.take_along_axis(weight, query_index, 1))


def question_to_interaction(question_mask: np.ndarray, is_text: np.ndarray) -> np.ndarray:
    """The one-question shorthand as ``interaction_ids``: question tokens and all media tokens form group 1."""
    return (((question_mask != 0) & is_text) | ~is_text).astype(np.int64)


def text_before_answer(is_text: np.ndarray, labels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """[batch, seq] bool: text tokens before the first supervised token of each row (``labels != -100``)."""
    keys = is_text & ~np.logical_or.accumulate(labels != -100, axis=1)
    return keys if valid is None else keys & valid
