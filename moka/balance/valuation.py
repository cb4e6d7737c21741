"""Sample-level modality valuation: show a modality by itself where it contributes little.

Wei, Feng, Wang and Hu, "Enhancing Multimodal Cooperation via Sample-level Modality Valuation", CVPR 2024,
https://arxiv.org/abs/2309.06255.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moka.distributed import all_gather_object

from .strategy import BalanceStrategy, Context, Needs


@dataclass
class Valuation(BalanceStrategy):
    """Value each modality of each sample by its Shapley value, and show those of little value by themselves, more often.

        phi_m(i): Shapley value of v(S) = |S| * 1[the answer is right with S]
        copies of sample i that show only m: 0 if phi_m >= 1, 1 from 0.4, 2 from -0.1, 3 below

    Source: CVPR 2024, https://arxiv.org/abs/2309.06255. Adapted: samples are valued as they are trained on, in every ``every``-th
    step, instead of in a sweep after each epoch; an epoch keeps its number of samples, in which a sample comes as often as it
    and its copies would, relative to the others; a visit shows it in full or one modality of it, as its copies would.

    Args:
        value: "weighted_correct" as above, for short answers, or "log_likelihood" for open ones: copies by the quarter of all
            values of m that phi_m is in, 3 in the lowest and 0 in the highest.
        every: steps between two in which the samples are valued; 1 values each sample in each epoch, as in the paper.
        warmup: share of the training before it acts; the paper's 5 of 60 epochs.
    """

    value: Literal["weighted_correct", "log_likelihood"] = "weighted_correct"
    every: int = 5
    warmup: float = 0.08
    name: ClassVar[str] = "valuation"
    changes: ClassVar[frozenset[str]] = frozenset({"visible tokens", "order of samples"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(every=(1, 1_000_000), warmup=(0, 1))
        self.table: dict[str, dict[str, float]] = {}  # sample id -> modality -> phi
        self.copies: dict[str, dict[str, int]] = {}  # as of the beginning of the epoch
        self.epoch = -1
        self._new: dict[str, dict[str, float]] = {}

    def needs(self) -> Needs:
        return Needs(likelihoods="all", every=self.every, sample_ids=True)

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        ids = ctx.sample_ids
        if ctx.step % self.every == 0:
            values = ctx.shapley(self.value)
            complete = ctx.complete().tolist() if values else []
            for i, one in enumerate(ids if values else []):
                if complete[i]:
                    self._new[one] = {name: float(value[i]) for name, value in values.items()}
        single: dict[str, list[int]] = {}
        for i, (one, key) in enumerate(zip(ids, ctx.row_keys(), strict=True)):
            shown = self._shown(one, key, ctx)
            if shown is not None:
                single.setdefault(shown, []).append(i)
        for shown, rows in single.items():
            mask = ctx.present(shown).new_zeros(len(ids))
            mask[rows] = True
            for other in ctx.media:
                if other != shown:
                    ctx.hide(other, mask & ctx.present(shown))
            ctx.log(f"{self.name}/single/{shown}", len(rows) / len(ids))

    def _shown(self, sample: str, key: str, ctx: Context) -> str | None:
        """Return the only modality that this visit of a sample shows; None: all of them."""
        copies = self.copies.get(sample)
        if not copies:
            return None
        place = ctx.draw(self.name, ctx.step, key).random() * (1 + sum(copies.values())) - 1
        for name, count in copies.items():
            if 0 <= place < count:
                return name
            place -= count
        return None

    def update(self, handles: Any, ctx: Context) -> None:
        if ctx.step % self.every:
            return
        for part in all_gather_object(self._new):
            self.table |= part
        self._new = {}
        for name in ctx.media:
            known = [values[name] for values in self.table.values() if name in values]
            if known:
                ctx.log(f"{self.name}/phi/{name}", sum(known) / len(known))

    def sampling(self, ids: Sequence[str], epoch: int, ctx: Context) -> list[float] | None:
        if epoch != self.epoch:  # a resumed epoch keeps what it began with
            self.epoch = epoch
            self.copies = {} if ctx.progress < self.warmup else self._copies()
        return [1.0 + sum(self.copies.get(one, {}).values()) for one in ids]

    def _copies(self) -> dict[str, dict[str, int]]:
        if self.value == "weighted_correct":
            return {one: {m: copies_of(phi) for m, phi in values.items()} for one, values in self.table.items()}
        ranked: dict[str, list[float]] = {}
        for values in self.table.values():
            for m, phi in values.items():
                ranked.setdefault(m, []).append(phi)
        for known in ranked.values():
            known.sort()
        return {
            one: {m: 3 - min(4 * bisect.bisect_left(ranked[m], phi) // len(ranked[m]), 3) for m, phi in values.items()}
            for one, values in self.table.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table, "copies": self.copies, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table, self.copies, self.epoch = dict(state["table"]), dict(state["copies"]), state["epoch"]


def copies_of(phi: float) -> int:
    """Return how many copies of a sample show only the modality with the value ``phi``; thresholds of the paper's code."""
    return 0 if phi >= 1 else 1 if phi >= 0.4 else 2 if phi >= -0.1 else 3
