"""What a balance strategy is, what it may ask of a step, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from moka.analysis.contribution import Contribution, media_modalities, modality_index
from moka.distributed import all_gather_object

from .handles import Handles


@dataclass(frozen=True)
class Needs:
    """What a strategy asks for.

    Args:
        forwards: without gradient, each time it measures, for a model with this many modalities besides text.
        every: steps between two measurements.
        modalities: besides text, at least.
        updates: it scales the updates of A, which must be on the device in full.
    """

    forwards: int = 0
    every: int = 1
    modalities: int = 1
    updates: bool = False

    @property
    def forwards_per_step(self) -> float:
        """Return the additional forwards of a step, on average; a step itself costs about three."""
        return self.forwards / self.every


class BalanceStrategy:
    """Base of the strategies: hooks that do nothing.

    ``name`` is that of the configuration. Coefficients that a strategy puts into ``figures`` are logged under
    ``balance/NAME/KEY``.
    """

    name = ""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def needs(self, modalities: Sequence[str]) -> Needs:
        """Return what it asks for, with these modalities besides text."""
        return Needs()

    def prepare(self, step: StepContext, generator: torch.Generator) -> torch.Tensor | None:
        """Return tokens to hide from attention in this forward, [batch, seq] bool; None: none. Before each forward."""
        return None

    def update(self, handles: Handles, step: StepContext) -> None:
        """Scale updates by modality (``handles.scale``). After the backward of the last micro-batch, before the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""


class StepContext:
    """One step: its last micro-batch and the model.

    Args:
        model: the adapted model, without a trainer's wrappers.
        batch: what its forward takes, with ``labels``.
        number: of the step, from 1.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], number: int) -> None:
        self.model, self.batch, self.number = model, batch, number

    @cached_property
    def tokens(self) -> dict[str, torch.Tensor]:
        """Return the tokens of each modality besides text, [batch, seq] bool."""
        return modality_index(self.model, self.batch)

    @cached_property
    def modalities(self) -> list[str]:
        """Return the names of all modalities besides text that the model tells apart."""
        return list(media_modalities(self.model))

    def dominance_ratios(self) -> dict[str, float] | None:
        """Return rho_m = exp(n / (n - 1) * (mean_k s_k - s_m)), s_m the mean over samples of -l({m}), on all processes.

        l({m}) is the log-likelihood per answer token with the media of m only. Above 1 for a modality that explains the
        answers better than the others do: the ratio of OGM-GE (arXiv 2203.15332) for likelihoods of answers. None if no sample
        has the media of all. One forward for each modality.
        """
        sums, count = [0.0] * len(self.modalities), 0
        complete = torch.stack([rows.any(1) for rows in self.tokens.values()]).all(0)
        answered = (self.batch["labels"][:, 1:] != -100).any(1).to(complete.device)
        chosen = (complete & answered).nonzero().flatten()
        if len(chosen):
            contribution = Contribution(self.model, self.batch)
            for k, name in enumerate(self.modalities):
                values = contribution.log_likelihood({name})
                sums[k] = -float(values[chosen.to(values.device)].double().sum())
            count = len(chosen)
        everyone = all_gather_object((sums, count))
        total = sum(n for _, n in everyone)
        if not total:
            return None
        scores = torch.tensor([[*own] for own, _ in everyone], dtype=torch.float64).sum(0) / total
        return dict(zip(self.modalities, ratios_of(scores).tolist(), strict=True))


def ratios_of(scores: torch.Tensor) -> torch.Tensor:
    """Return rho for the scores (mean negative log-likelihoods, [modalities]) of `StepContext.dominance_ratios`."""
    n = len(scores)
    return torch.exp(n / (n - 1) * (scores.mean() - scores))
