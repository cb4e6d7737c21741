"""Routing: which token is of which modality, and which text tokens it may attend to.

One immutable ``Routing`` per forward, built before the first layer and shared by all layers:

    mm_token_type_ids  [batch, seq]   0 text, 1 image, 2 video, 3 audio (transformers' convention)
    interaction_ids    [batch, seq]   0: takes no part; k > 0: media tokens with k attend to text tokens with k

Every adapter reads it through a ``View``: the same tokens under that adapter's map of modalities, as the flat indices and
masks that a layer uses. The ids are read and compared in host memory; only the result is copied to the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from moka.errors import MokaError

from .config import TEXT, MokaConfig


@dataclass(frozen=True)
class Attention:
    """Who attends to whom. Queries and keys of each row are padded to the longest row."""

    query: torch.Tensor  # [batch, queries] positions in the row
    key: torch.Tensor  # [batch, keys]
    mask: torch.Tensor | None  # [batch, queries, keys] bool; None: every query attends to every key of its row
    weight: torch.Tensor  # [batch, queries] lambda of the query's modality, 0 for padding and for queries without keys
    bias: torch.Tensor | None  # [batch, 1, queries, keys] the mask as an addend of the logits
    flat_query: torch.Tensor  # [batch * queries] positions among the tokens of all rows
    flat_key: torch.Tensor  # [batch * keys]

    @classmethod
    def build(
        cls, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor, seq: int
    ) -> Attention:
        """Build it from the first fields, of rows of ``seq`` tokens; weights of queries without a key become 0."""
        start = torch.arange(len(query), device=query.device)[:, None] * seq
        flat = (query + start).flatten(), (key + start).flatten()
        if mask is None:
            return cls(query, key, None, weight, None, *flat)
        # Finite: a row of only minus infinity is NaN; and half of the smallest, so that a sum stays finite.
        lowest = torch.finfo(torch.float32).min / 2
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)[:, None]
        return cls(query, key, mask, weight * mask.any(-1), bias, *flat)


@dataclass(frozen=True)
class View:
    """The tokens of one forward as one adapter sees them."""

    row: int  # of moka_A [M, r, in], for every token if `rows` is None
    rows: torch.Tensor | None = None  # [batch, seq] each token's row of moka_A
    index: torch.Tensor | None = None  # [batch * seq] token * M + its row
    adapter_mask: torch.Tensor | None = None  # [batch * seq, 1] 0: not adapted, 1: adapted; None: all are
    attention: Attention | None = None  # None: no token interacts
    disabled: bool = False  # no token goes through the adapter
    valid: torch.Tensor | None = None  # [batch, seq] bool, False at padding; None: no padding, or nobody asks

    @property
    def uniform(self) -> bool:
        """Return whether all tokens are treated in one way."""
        return self.rows is None and self.adapter_mask is None

    def to(self, device: torch.device) -> View:
        """Return the view on another device, for models that are spread over several."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        attention = None
        if self.attention is not None:
            attention = Attention(**{name: moved(value) for name, value in vars(self.attention).items()})
        return View(**{**{name: moved(value) for name, value in vars(self).items()}, "attention": attention})

    def at(self, positions: torch.Tensor, modalities: int) -> View:
        """Return the view of the tokens at ``positions`` [n] of every row; those outside are neither queries nor keys."""
        if self.rows is None:
            return self if self.valid is None else replace(self, valid=self.valid[:, positions])
        batch, seq = self.rows.shape
        rows = self.rows[:, positions]
        mask = self.adapter_mask
        mask = None if mask is None else mask.view(batch, seq)[:, positions].reshape(-1, 1)
        valid = None if self.valid is None else self.valid[:, positions]
        attention = None
        if self.attention is not None:
            new = torch.full((seq,), -1, dtype=torch.long, device=positions.device)
            new = new.index_copy(0, positions, torch.arange(len(positions), device=positions.device))
            query, key, old = new[self.attention.query], new[self.attention.key], self.attention.mask
            pairs = (query >= 0)[:, :, None] & (key >= 0)[:, None]
            pairs = pairs if old is None else pairs & old
            attention = Attention.build(query.clamp(0), key.clamp(0), pairs, self.attention.weight, len(positions))
        index = _flat_index(rows, modalities)
        return replace(self, rows=rows, index=index, adapter_mask=mask, attention=attention, valid=valid)


@dataclass(frozen=True)
class Routing:
    """Modalities and interaction of the tokens of one forward, for all layers."""

    shape: tuple[int, int]  # batch, seq
    views: dict[str, View]  # by adapter name
    device: torch.device
    kept: torch.Tensor | None = None  # positions that the output head sees, if the forward names them
    only: frozenset[str] | None = None  # the modalities that an `active_modalities` block left when it was built
    # While generate decodes: each layer's text path, kept from step to step.
    text_steps: dict | None = None
    merged: bool = False  # then no layer has anything to add
    _moved: dict[tuple[str, torch.device], View] = field(default_factory=dict)

    def view(self, adapter_name: str, device: torch.device) -> View:
        """Return an adapter's view on the device of a layer."""
        view = self.views[adapter_name]
        if device == self.device or view.uniform:
            return view
        key = adapter_name, device
        if key not in self._moved:
            self._moved[key] = view.to(device)
        return self._moved[key]


def modality_rows(config: MokaConfig, type_ids: np.ndarray) -> np.ndarray:
    """Map ``mm_token_type_ids`` [batch, seq] to rows of ``moka_A``.

    Raises:
        MokaError: an id that no modality of the configuration has.
    """
    table = np.full(max(max(ids) for ids in config.modalities.values()) + 1, -1, np.int64)
    for row, ids in enumerate(config.modalities.values()):
        table[ids] = row
    low, high = type_ids.min(initial=0), type_ids.max(initial=0)
    inside = low >= 0 and high < len(table)
    rows = table[type_ids] if inside else np.where(np.isin(type_ids, np.flatnonzero(table >= 0)), 0, -1)
    if rows.min(initial=0) < 0:
        unknown = np.unique(type_ids[rows < 0]).tolist()
        raise MokaError(
            f"mm_token_type_ids has {unknown}, which no modality of this adapter has; known: {config.modalities}. "
            "Add the id to MokaConfig.modalities, or route those tokens as text (0)."
        )
    return rows


def uniform_view(config: MokaConfig, modality: str = TEXT, only: frozenset[str] | None = None) -> View:
    """Return the view of tokens that are all of one modality."""
    adapted = modality in config.adapted and (only is None or modality in only)
    return View(list(config.modalities).index(modality), disabled=not adapted)


def view_key(config: MokaConfig) -> tuple:
    """Return what two adapters have in common if their views of the same ids are equal."""
    modalities = tuple((name, tuple(ids)) for name, ids in config.modalities.items())
    weights = tuple(config.weight_of(name) for name in config.modalities)
    tokens = tuple((name, tuple(ids)) for name, ids in (config.modality_token_ids or {}).items())
    markers = tuple((name, tuple(ids)) for name, ids in (config.turn_markers or {}).items())
    structure = tuple(config.structure_token_ids or ())
    interaction = config.interaction if config.interacts else "none"
    padding = config.rival is not None and config.rival.reads_padding(config)
    return modalities, tuple(config.adapted), interaction, weights, tokens, markers, structure, padding


def build_view(
    config: MokaConfig,
    rows: np.ndarray,
    groups: np.ndarray | None,
    only: frozenset[str] | None,
    device: torch.device,
    valid: np.ndarray | None = None,
) -> View:
    """Build one adapter's view of a forward: in host memory, then on ``device``.

    Args:
        config: the adapter's configuration.
        rows: [batch, seq] each token's row of ``moka_A``.
        groups: ``interaction_ids`` [batch, seq] int, 0 at padding; None: no interaction.
        only: the modalities whose tokens go through the adapter; None: all that it adapts.
        device: where the layers' inputs are.
        valid: [batch, seq] bool, False at padding; None: not known, or none.
    """
    is_text = rows == config.text_row
    real = None
    if config.rival is not None and config.rival.reads_padding(config):
        real = torch.from_numpy(np.ones(rows.shape, bool) if valid is None else np.ascontiguousarray(valid)).to(device)
    if is_text.all():
        return replace(uniform_view(config, TEXT, only), valid=real)
    names = list(config.modalities)
    takes = np.array([name in config.adapted and (only is None or name in only) for name in names])
    adapted = None if takes.all() else takes[rows]
    attention = None
    if groups is not None and config.interacts:
        takes_part = groups > 0 if adapted is None else (groups > 0) & adapted
        query, key = takes_part & ~is_text, takes_part & is_text
        if config.interaction == "reversed":
            query, key = key, query
        weights = np.array([config.weight_of(name) for name in names], np.float32)
        attention = _attention(query, key, groups, weights[rows], device)
    there = torch.from_numpy(np.ascontiguousarray(rows)).to(device, non_blocking=True)
    mask = None if adapted is None else torch.from_numpy(adapted.reshape(-1, 1)).to(device, non_blocking=True)
    return View(config.text_row, there, _flat_index(there, len(names)), mask, attention, valid=real)


def _flat_index(rows: torch.Tensor, modalities: int) -> torch.Tensor:
    """[batch, n] rows of moka_A -> [batch * n] token * M + row."""
    return torch.arange(rows.numel(), device=rows.device) * modalities + rows.flatten()


def _attention(
    query: np.ndarray, key: np.ndarray, groups: np.ndarray, weight: np.ndarray, device: torch.device
) -> Attention | None:
    """All [batch, seq]; ``query`` and ``key`` bool."""
    queries, keys = query.sum(1).max(initial=0), key.sum(1).max(initial=0)
    if queries == 0 or keys == 0:
        return None
    # A stable sort of the flags lists the flagged positions first, in order, for all rows at once.
    query_index = np.argsort(~query, axis=1, kind="stable")[:, :queries]  # [batch, queries]
    key_index = np.argsort(~key, axis=1, kind="stable")[:, :keys]  # [batch, keys]
    # Padding belongs to groups that nothing else belongs to.
    query_group = np.take_along_axis(np.where(query, groups, -1), query_index, 1)
    key_group = np.take_along_axis(np.where(key, groups, -2), key_index, 1)
    full = bool((query_group == query_group[:, :1]).all() and (key_group == query_group[:, :1]).all())
    arrays = (query_index, key_index, query_group, key_group, np.take_along_axis(weight, query_index, 1))
    q, k, q_group, k_group, lambdas = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
    mask = None if full else q_group[:, :, None] == k_group[:, None]  # [batch, queries, keys]
    return Attention.build(q, k, mask, lambdas, query.shape[1])
