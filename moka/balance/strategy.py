"""The protocol of balanced multimodal learning: what a strategy needs, and the five moments of a step at which it can act.

    prepare(batch, ctx)      before the forward of a micro-batch: which tokens are visible          (feed-forward, data)
    loss(loss, ctx)          after it: losses that are added                                        (objective)
    update(handles, ctx)     once a step, between backward and the optimizer: gradients, rates      (optimization)
    interval(handles, ctx)   once a step, after the optimizer: values of A, windows                 (optimization)
    sampling(ids, epoch, ctx) before an epoch: how often each sample comes                          (data)

A strategy is a dataclass: its fields are the keys of the YAML, named as in its paper. What it has learnt while training is in
`state_dict`, which every checkpoint keeps.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from moka.adapter import MokaConfig
from moka.adapter.config import TEXT
from moka.adapter.targets import placeholder_ids
from moka.analysis import Contribution
from moka.analysis.contribution import (
    adapter_config,
    evaluating,
    hidden_from_attention,
    media_modalities,
    modality_index,
    unwrapped,
)
from moka.distributed import all_gather_object, all_reduce_sum, rank_and_world_size
from moka.errors import MokaError
from moka.type_checks import check_types

from .features import hidden_states

# Arguments of a forward that choose what it returns, not what the model reads.
_OUTPUT_ARGUMENTS = ("loss_only", "logits_to_keep", "num_items_in_batch")


@dataclass(frozen=True)
class Needs:
    """The needs of a strategy in a step, and with that its cost.

    Args:
        likelihoods: answers' likelihoods, without gradients: of each modality "single", also of none of them ("lift"), or of
            "all" coalitions.
        every: steps between two such measurements.
        once: batches that are measured besides, over the full training.
        losses: additional losses a micro-batch, each a forward and a backward: "each" modality only, or a number.
        adapter: it reads or changes A or B, so there must be a MokA adapter whose tensors are complete.
        gradients: it changes gradients, which DeepSpeed does not show.
        moments: it clears the optimizer's moments, which DeepSpeed keeps elsewhere.
        teachers: hidden states of other adapters, with each modality by itself: a forward without gradients each.
        parts_of_B: B's gradient split by modality.
        paths_of_B: these parts split by the path too: directly, or through the interaction.
        validation: validation data.
        sample_ids: names of the samples, and a data set that can be drawn from by index.
        media: the fewest modalities other than text that it can balance.
    """

    likelihoods: Literal["none", "single", "lift", "all"] = "none"
    every: int = 1
    once: int = 0
    losses: Literal["each"] | int = 0
    adapter: bool = False
    gradients: bool = False
    moments: bool = False
    teachers: bool = False
    parts_of_B: bool = False
    paths_of_B: bool = False
    validation: bool = False
    sample_ids: bool = False
    media: int = 2

    def forwards(self, players: int) -> float:
        """Return the forwards without gradients that a step takes more, as a mean over steps."""
        return self._measured(players) / self.every

    def _measured(self, players: int) -> int:
        likelihoods = {"none": 0, "single": players, "lift": players + 1, "all": 2**players}[self.likelihoods]
        return likelihoods + players * self.teachers

    def backwards(self, players: int) -> int:
        """Return the forwards with a backward that a step takes more."""
        return players if self.losses == "each" else int(self.losses)

    def cost(self, players: int) -> str:
        """Return the estimate in words; a forward with its backward counts as 2 forwards, as in LoRA training."""
        forwards, backwards = self.forwards(players), self.backwards(players)
        if not forwards and not backwards:
            return "no additional forward"
        parts = []
        if forwards:
            parts.append(f"{forwards * self.every:g} forwards without gradients every {self.every} steps")
        if self.once:
            parts.append(f"{self.once * self._measured(players)} once")
        if backwards:
            parts.append(f"{backwards} forwards with backward a step")
        return f"{', '.join(parts)}: about {50 * forwards + 100 * backwards:.0f} % more time at most"


class BalanceStrategy:
    """Base of the strategies; every hook does nothing by default."""

    name: ClassVar[str] = ""  # in the YAML
    # What it changes; two strategies that change the same thing are refused.
    changes: frozenset[str] = frozenset()

    def needs(self) -> Needs:
        """Return what it needs with its settings."""
        return Needs()

    def check(self, model: nn.Module) -> None:
        """Refuse a model that it cannot work with, before training."""

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        """Act before the forward of a micro-batch: measure, or hide tokens (`Context.hide`)."""

    def loss(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Return the loss of a micro-batch with what is added to it."""
        return loss

    def update(self, handles: Any, ctx: Context) -> None:
        """Act between backward and the optimizer's step, once for all micro-batches."""

    def interval(self, handles: Any, ctx: Context) -> None:
        """Act after the optimizer's step."""

    def sampling(self, ids: Sequence[str], epoch: int, ctx: Context) -> list[float] | None:
        """Return how often each sample comes in the epoch, relative to the others; None: once each."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what it has learnt: what a checkpoint has to keep for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""

    def _check(self, **ranges: tuple[float, float]) -> None:
        """Refuse fields of a wrong type or outside of their ranges (inclusive)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        check_types(type(self), values, f"balance: {self.name}: ")
        for name, (low, high) in ranges.items():
            if not low <= values[name] <= high:
                raise MokaError(
                    f"balance: {self.name}: {name} is {values[name]}; allowed: {low:g} to {high:g}. Correct the field."
                )


class Context:
    """The step as strategies know it, and answers to what they ask. One for a training; the step's values change.

    Args:
        model: the adapted model, outside of DDP's and DeepSpeed's wrappers.
        seed: of what strategies draw.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.media = media_of(model)
        self.step = 0  # optimizer steps done
        self.total_steps = 1
        self.micro = 0  # micro-batches of the step before this one
        self.learning_rate = 0.0
        self.handles: Any = None  # `Handles`, if a strategy needs them
        self.validation: Any = None  # () -> batches of this process
        self.forwards = self.backwards = 0  # those that strategies asked for, counted
        self.figures: dict[str, list[float]] = {}
        self._parts: dict[str, float] = {}
        self.batch: dict[str, Any] = {}
        self.sample_ids: list[str] = []
        self.hidden: torch.Tensor | None = None  # [batch, seq] bool
        self.apart: torch.Tensor | None = None  # [batch, seq] bool: media tokens that do not interact
        self._kept: list[torch.Tensor] | None = None
        self._tokens: Any = None
        self._backward: Any = None

    @property
    def progress(self) -> float:
        """Return the share of the steps that are done, 0 to 1."""
        return self.step / max(self.total_steps, 1)

    @contextmanager
    def micro_batch(
        self, batch: Mapping[str, Any], sample_ids: Sequence[str] = (), tokens: Any = None, backward: Any = None
    ) -> Iterator[None]:
        """Make ``batch`` the current micro-batch inside the block.

        Args:
            sample_ids: of its rows.
            tokens: what a summed loss is divided by; default: the batch's answer tokens.
            backward: called with a loss to add its gradients now.
        """
        self.batch = {key: value for key, value in batch.items() if key not in _OUTPUT_ARGUMENTS}
        self.sample_ids = list(sample_ids)
        self._tokens, self._backward = tokens, backward
        self.hidden = self.apart = self._kept = None
        try:
            yield
        finally:
            self.micro += 1
            self.batch, self._backward, self._kept = {}, None, None
            for known in ("_tokens_of", "_contribution"):
                self.__dict__.pop(known, None)

    @functools.cached_property
    def _tokens_of(self) -> dict[str, torch.Tensor]:
        """Tokens of each modality in the micro-batch: name -> [batch, seq] bool."""
        return modality_index(self.model, self.batch)

    @functools.cached_property
    def _contribution(self) -> Contribution | None:
        """The micro-batch's likelihoods; None if it has no answer, or no medium."""
        labels = self.batch.get("labels")
        has_answer = isinstance(labels, torch.Tensor) and bool((labels[:, 1:] != -100).any())
        has_medium = has_answer and any(bool(tokens.any()) for tokens in self._tokens_of.values())
        return Contribution(self.model, self.batch) if has_medium else None

    def present(self, modality: str) -> torch.Tensor:
        """Return which rows have tokens of a modality: [batch] bool."""
        return self._tokens_of[modality].any(1)

    def compared(self, modality: str) -> torch.Tensor:
        """Return which rows have a modality and another one, so that the two can be compared: [batch] bool."""
        counts = torch.stack([self.present(name) for name in self.media]).sum(0)
        return self.present(modality) & (counts > 1)

    def log_likelihood(self, available: Collection[str], ablate: str = "tokens") -> torch.Tensor | None:
        """Return l(S) [batch] in nats per answer token, without gradients; computed once for all strategies.

        None: the micro-batch has no answer, or no medium.
        """
        if self._contribution is None:
            return None
        before = len(self._contribution._known)
        found = self._contribution.log_likelihood(available, ablate)
        self.forwards += len(self._contribution._known) > before
        return found

    def shapley(self, value: str) -> dict[str, torch.Tensor]:
        """Return the Shapley value of each modality of the micro-batch, [batch] each; empty if there are fewer than two."""
        found = self._contribution
        if found is None or len(found.modalities) < 2:
            return {}
        before = len({id(known) for known in found._known.values()})
        values = found.shapley(value).values
        self.forwards += len({id(known) for known in found._known.values()}) - before
        return values

    def complete(self) -> torch.Tensor:
        """Return which rows have all modalities of the micro-batch, and an answer: [batch] bool."""
        here = torch.stack([rows.any(1) for rows in self._tokens_of.values() if bool(rows.any())]).all(0)
        return here & (self.answer_tokens() > 0).to(here.device)

    def row_likelihood(self, available: Collection[str] | None) -> torch.Tensor | None:
        """Return l(S) [batch] with its graph, in the mode of the model; None as `log_likelihood`."""
        if self._contribution is None:
            return None
        self.backwards += 1
        return self._contribution.log_likelihood(available, grad=True)

    def distribution(self, available: Collection[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return log p [batch, places, vocabulary] with its graph, and the answers' tokens [batch, places] or -100."""
        if self._contribution is None:
            return None
        self.backwards += 1
        return self._contribution.answer_distribution(available)

    def nll(self, available: Collection[str], weight: torch.Tensor) -> torch.Tensor | None:
        """Return the loss of the answers if only ``available`` is visible, scaled as the trainer scales its own.

        Args:
            weight: [batch] of each row's loss; rows of 0 have no part in it. All 0: None.
        """
        if self._contribution is None or not bool((weight != 0).any()):
            return None
        rows = self.row_likelihood(available)
        assert rows is not None
        return (-torch.nan_to_num(rows) * weight.to(rows) * self.answer_tokens().to(rows)).sum() * self.loss_scale()

    def answer_tokens(self) -> torch.Tensor:
        """Return the number of answer tokens of each row: [batch]."""
        return (self.batch["labels"][:, 1:] != -100).sum(1)

    def loss_scale(self) -> Any:
        """Return what a sum over answer tokens is multiplied with to be in the trainer's unit."""
        return 1 / (self.answer_tokens().sum() if self._tokens is None else self._tokens)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of an additional loss now, so that they can be told from those of the step's own loss."""
        self._backward(loss)

    def hide(self, modality: str, rows: torch.Tensor) -> None:
        """Hide the tokens of a modality from attention in ``rows`` [batch] bool, in the step's own forward."""
        mask = self._tokens_of[modality] & rows.to(self._tokens_of[modality].device)[:, None]
        self.hidden = mask if self.hidden is None else self.hidden | mask

    def hide_part(self, modality: str, share: float, key: str) -> None:
        """Hide a share of each row's tokens of a modality, drawn by chance."""
        tokens = self._tokens_of[modality]
        mask = torch.zeros_like(tokens)
        for i, name in enumerate(self.row_keys()):
            places = tokens[i].nonzero().flatten().tolist()
            chosen = self.draw(key, self.step, name, modality).sample(places, int(share * len(places)))
            mask[i, chosen] = True
        self.hidden = mask if self.hidden is None else self.hidden | mask

    def without_interaction(self, modality: str) -> None:
        """Let the tokens of a modality read nothing from the question in the step's own forward: lambda is 0 for them."""
        if self.batch.get("interaction_ids") is None:
            raise MokaError(
                "balance: interaction_ids: the batch has none, so that a modality cannot be taken out of the interaction. Pass "
                "them, as moka's collators do."
            )
        tokens = self._tokens_of[modality]
        self.apart = tokens if self.apart is None else self.apart | tokens

    def keep_hidden_states(self) -> None:
        """Keep the `hidden_states` of the step's own forward, which begins after ``prepare``."""
        self._kept = []

    @property
    def own_hidden_states(self) -> torch.Tensor | None:
        """Return what was kept, with its graph: [batch, seq, hidden]; None if the micro-batch has no answer, or no medium."""
        return self._kept[-1] if self._kept and self._contribution is not None else None

    def single_hidden_states(self, modality: str) -> torch.Tensor | None:
        """Return `hidden_states` [batch, seq, hidden] of a forward in eval mode, without gradients, with one modality only."""
        if self._contribution is None:
            return None
        self.forwards += 1
        with evaluating(self.model), torch.no_grad(), hidden_states(self.model) as found:
            self._contribution.log_likelihood([modality], grad=True)  # computed again: the adapter may be another
        return found[-1]

    def tokens_of(self, modality: str) -> torch.Tensor:
        """Return which tokens are of a modality: [batch, seq] bool."""
        return self._tokens_of[modality]

    def row_keys(self) -> list[str]:
        """Return a name of each row to draw for: its sample's id, or else its process, micro-batch and place."""
        rows = len(self.batch["labels"])
        if len(self.sample_ids) == rows:
            seen: dict[str, int] = {}
            for one in self.sample_ids:
                seen[one] = seen.get(one, 0) + 1
            if len(seen) == rows:
                return self.sample_ids
            return [f"{one}#{self.sample_ids[:i].count(one)}" for i, one in enumerate(self.sample_ids)]
        rank, _ = rank_and_world_size()
        return [f"{rank}:{self.micro}:{i}" for i in range(rows)]

    def visible(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the arguments of the forward without what is hidden, and the block in which it has to run."""
        changed, block = dict(given), ExitStack()
        ids = changed.get("interaction_ids")
        for tokens in (self.hidden, self.apart):
            if ids is not None and tokens is not None:
                ids = changed["interaction_ids"] = ids.masked_fill(tokens.to(ids.device), 0)
        if self._kept is not None:
            self._kept = block.enter_context(hidden_states(self.model))
        if self.hidden is not None and bool(self.hidden.any()):
            block.enter_context(hidden_from_attention(self.model, self.hidden))
        return changed, block

    def draw(self, *keys: Any) -> random.Random:
        """Return random numbers that depend only on the seed and ``keys``, on every process and after a resume."""
        return random.Random(":".join(map(str, (self.seed, *keys))))

    def log(self, name: str, value: float) -> None:
        """Add a figure to the next log, which has its mean over steps and processes."""
        self.figures.setdefault(f"balance/{name}", []).append(float(value))

    def add(self, name: str, value: float) -> None:
        """Add a micro-batch's part of a figure, which is the sum of a step's parts."""
        self._parts[name] = self._parts.get(name, 0.0) + float(value)

    def end_step(self) -> None:
        """Make figures of the parts of this step."""
        parts, self._parts = self._parts, {}
        for name, value in parts.items():
            self.log(name, value)

    def read_figures(self) -> dict[str, float]:
        """Return the figures since the last reading; every process has to call it."""
        own = {name: (sum(values), len(values)) for name, values in self.figures.items()}
        self.figures = {}
        everyone = all_gather_object(own)
        names = dict.fromkeys(name for one in everyone for name in one)
        totals = {name: [sum(one[name][k] for one in everyone if name in one) for k in (0, 1)] for name in names}
        return {name: total / count for name, (total, count) in totals.items()}


def media_of(model: nn.Module) -> list[str]:
    """Return the modalities other than text that a model has: an adapter's configuration may name more."""
    inner: Any = unwrapped(model)
    names = list(media_modalities(model))
    known: Any = getattr(inner.config, "type_ids", None)  # of a composed model
    if known is None:
        config = adapter_config(model) or MokaConfig()
        known = config.modality_token_ids or placeholder_ids(inner, config)
    return [name for name in names if name in known] if known else names


class Scores:
    """Mean negative log-likelihood s_m of each player only, over micro-batches and processes, with a running mean.

    Only rows that have at least two players count, so that all are compared on the same kind of sample.

    Args:
        decay: of the running mean, 0 to 1; 0: the last measurement.
        ablate: "tokens", or "adapter", in which text is a player too.
    """

    def __init__(self, decay: float, ablate: str = "tokens") -> None:
        self.decay, self.ablate = decay, ablate
        self.running: dict[str, float] = {}
        self.current: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}

    def measure(self, ctx: Context) -> None:
        """Add the current micro-batch of this process."""
        text_plays = self.ablate == "adapter"
        for name in self.players(ctx):
            rows = ctx.log_likelihood([name], self.ablate) if self._plays(name, ctx) else None
            if rows is None:
                continue
            counted = ~rows.isnan()
            if name != TEXT:
                counted &= (ctx.present(name) if text_plays else ctx.compared(name)).to(rows.device)
            else:
                counted &= torch.stack([ctx.present(other) for other in ctx.media]).any(0).to(rows.device)
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] -= float(rows[counted].double().sum())
            sums[1] += int(counted.sum())

    def players(self, ctx: Context) -> list[str]:
        """Return who is compared."""
        return [TEXT, *ctx.media] if self.ablate == "adapter" else ctx.media

    def _plays(self, name: str, ctx: Context) -> bool:
        if name == TEXT:
            return any(bool(ctx.present(other).any()) for other in ctx.media)
        return bool((ctx.present(name) if self.ablate == "adapter" else ctx.compared(name)).any())

    def reduce(self, ctx: Context) -> bool:
        """Sum over the processes and update the means; return whether there is a new measurement of two players or more.

        Every process has to call it at the same steps.
        """
        players = self.players(ctx)
        flat = all_reduce_sum([value for name in players for value in self._sums.get(name, (0.0, 0.0))])
        self._sums = {}
        pairs = zip(players, flat[::2], flat[1::2], strict=True)
        self.current = {name: total / count for name, total, count in pairs if count}
        for name, score in self.current.items():
            before = self.running.get(name)
            self.running[name] = score if before is None else self.decay * before + (1 - self.decay) * score
            ctx.log(f"score/{name}", score)
        return len(self.current) > 1

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {"running": dict(self.running)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.running = copy.deepcopy(state["running"])


def dominance(scores: Mapping[str, float]) -> dict[str, float]:
    """Return rho_m = exp(M / (M - 1) * (mean_k s_k - s_m)) of mean scores; empty for fewer than two.

    As `moka.analysis.dominance_ratios`, of means over samples instead of samples.
    """
    if len(scores) < 2:
        return {}
    players, values = list(scores), torch.tensor(list(scores.values()), dtype=torch.float64)
    factor = len(players) / (len(players) - 1)
    # At most e^20: scores of a diverged model must not become infinite.
    ratios = torch.exp((factor * (values.mean() - values)).clamp(-20, 20))
    return dict(zip(players, torch.nan_to_num(ratios, nan=1.0).tolist(), strict=True))
