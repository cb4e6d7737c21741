"""Losses of each modality by itself, added to the step's own loss: uniform, and with the weights of several papers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from .events import Means, at_event, check_events
from .strategy import BalanceStrategy, Context, Needs

JOINT = "joint"  # the loss with all modalities


@dataclass
class UnimodalLosses(BalanceStrategy):
    """Add the loss of the answers with only one modality visible, for each modality.

        L = L_joint + sum_m w_m L_m,     L_m: NLL of the answers, of rows that have m and another modality

    The plain sum is the control of everything in this family; it is strong, and it hurts where a modality is nearly noise.

    Args:
        weight: factor of all that is added.
        scale: modality -> a factor of its own.
        form: how L_m is made:

            "uniform": the NLL.
            "blend": Gradient-Blending (Wang et al., CVPR 2020, https://arxiv.org/abs/1905.12681): the NLL, and weights of all
            losses, the joint one too, as G_k / O_k^2, scaled to a mean of 1: O the loss on validation minus that on training
            data, G the fall of the loss on validation data since the moment before. Adapted: from the run itself, where the
            paper trains a copy for each loss; uniform until the second of the ``events``.
            "margin": of CRMT (Yang et al., ICLR 2024, https://arxiv.org/abs/2402.06244): log(sum_m (1 / p_m - 1) + 1e-5), p_m the
            geometric mean of the answer tokens' probabilities; ``weight`` is its rho, in the paper 2. The certificate of the
            paper, a Lipschitz constant of the network, says nothing of a language model; `moka diagnose --noise` shows
            the vulnerability.
            "distill": of MBSD (WSDM 2023, https://dl.acm.org/doi/10.1145/3539597.3570423): the NLL, and of each other modality |p_a - p_b| KL(strongest || other)
            over the answer's tokens, in rows whose strongest modality is right; the strongest one gets no gradient of it.
            "alignment": of LFM (NeurIPS 2024, https://jiangqy.github.io/publications/NeurIPS2024_LFM.pdf): (1 - k) NLL + k JS, the Jensen-Shannon divergence of the
            modalities' distributions; k falls from 0.95 to 0.05: align early, classify late. Adapted: linear, not learned.
            "residual": of ReconBoost (Hua et al., ICML 2024, https://arxiv.org/abs/2405.09321): each row's NLL times
            5 - p_rest, p_rest what the other modalities already give the answer.
        events: of "blend": shares of the training at which the weights are computed.
        batches: of "blend": validation batches of an event, of each process.
        every: of "blend": steps between two measurements on training batches.
    """

    weight: float = 1.0
    scale: dict[str, float] = field(default_factory=dict)
    form: Literal["uniform", "blend", "margin", "distill", "alignment", "residual"] = "uniform"
    events: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.6, 0.8])
    batches: int = 8
    every: int = 8
    name: ClassVar[str] = "unimodal_losses"
    changes: ClassVar[frozenset[str]] = frozenset({"unimodal losses"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(weight=(0, 100), batches=(1, 1_000_000), every=(1, 1_000_000))
        check_events(self.name, self.events)
        self.losses = Losses()
        self.before: dict[str, float] = {}  # the losses on validation data at the last event
        self.blend: dict[str, float] = {}

    def named_modalities(self) -> list[str]:
        """Return the modalities that its settings name."""
        return list(self.scale)

    def needs(self) -> Needs:
        if self.form == "blend":
            once = len(self.events) * self.batches
            return Needs(losses="each", likelihoods="lift", every=self.every, once=once, validation=True)
        return Needs(losses="each", likelihoods="single" if self.form == "residual" else "none")

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if self.form == "blend" and ctx.step % self.every == 0:
            self.losses.measure(ctx)

    def loss(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        if self.form in ("distill", "alignment"):
            return self._compared(loss, ctx)
        if self.form == "margin":
            return loss + self._margin(ctx)
        loss = loss * self.blend.get(JOINT, 1.0) if self.blend else loss
        for name in ctx.media:
            rows = ctx.compared(name)
            factor = self.weight * self.scale.get(name, 1.0) * self.blend.get(name, 1.0)
            if not factor or not bool(rows.any()):
                continue
            weight = factor * rows.float()
            if self.form == "residual":
                rest = ctx.log_likelihood([other for other in ctx.media if other != name])
                if rest is not None:
                    weight = weight * residual_weight(torch.nan_to_num(rest)).to(weight)
            own = ctx.nll([name], weight)
            if own is not None:
                ctx.add(f"{self.name}/{name}", float(own.detach()))
                loss = loss + own.to(loss)
        return loss

    def interval(self, handles: Any, ctx: Context) -> None:
        if self.form != "blend" or not at_event(self.events, ctx):
            return
        train, held_out = self.losses.read(ctx), Losses()
        held_out.sweep(ctx, self.batches)
        validation = held_out.read(ctx)
        if self.before:
            shared = [k for k in validation if k in train and k in self.before]
            self.blend = blending_weights(
                {k: self.before[k] - validation[k] for k in shared}, {k: validation[k] - train[k] for k in shared}
            )
            for key, value in self.blend.items():
                ctx.log(f"{self.name}/weight/{key}", value)
        self.before = validation

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.losses.sums, "before": self.before, "blend": self.blend}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.sums = {name: list(sums) for name, sums in state["sums"].items()}
        self.before, self.blend = dict(state["before"]), dict(state["blend"])

    def _compared(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Return the loss with NLL of each modality and what compares their distributions, for rows that have them all."""
        found = {name: ctx.distribution([name]) for name in ctx.media if bool(ctx.compared(name).any())}
        log_p = {name: one[0] for name, one in found.items() if one is not None}
        if len(log_p) < 2:
            return loss
        targets = next(one[1] for one in found.values() if one is not None)
        answer = targets != -100  # [batch, places]
        k = 0.95 - 0.9 * ctx.progress if self.form == "alignment" else 0.0
        nll = {name: -one.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * answer for name, one in log_p.items()}
        rows = torch.stack([ctx.compared(name) for name in log_p]).to(answer.device)  # [modalities, batch]
        total = sum(
            self.scale.get(name, 1.0) * (1 - k) * (one.sum(1) * here).sum()
            for (name, one), here in zip(nll.items(), rows, strict=True)
        )
        stacked = torch.stack(list(log_p.values()))  # [modalities, batch, places, vocabulary]
        if self.form == "alignment":
            each = jensen_shannon(stacked) * k
        else:
            each = distillation(stacked, torch.stack(list(nll.values())), targets)
        added = self.weight * (total + (each * answer * rows.all(0)[:, None]).sum()) * ctx.loss_scale()
        ctx.add(f"{self.name}/{self.form}", float(added.detach()))
        return loss + added.to(loss)

    def _margin(self, ctx: Context) -> Any:
        """Return the margin term of the rows in which modalities are compared."""
        total: Any = 0.0
        rows = torch.stack([ctx.compared(name) for name in ctx.media]).any(0)
        if not bool(rows.any()):
            return total
        for name in ctx.media:
            factor = self.scale.get(name, 1.0)
            if factor and bool(ctx.compared(name).any()):
                single = ctx.row_likelihood([name])
                if single is not None:
                    here = ctx.compared(name).to(single)
                    total = total + factor * here * torch.expm1(-torch.nan_to_num(single).clamp(min=-30))
        each = torch.log(total + 1e-5)[rows.to(total.device)]
        tokens = ctx.answer_tokens().to(each)[rows.to(each.device)]
        found = self.weight * (each * tokens).sum() * ctx.loss_scale()
        ctx.add(f"{self.name}/margin", float(found.detach()))
        return found


class Losses(Means):
    """Mean NLL of the answers of each modality by itself and of all together, over rows that are compared: nats per token."""

    def measure(self, ctx: Context) -> None:
        """Add the current micro-batch of this process."""
        for key in (*ctx.media, JOINT):
            rows = torch.stack([ctx.compared(name) for name in ctx.media]).any(0) if key == JOINT else ctx.compared(key)
            found = ctx.log_likelihood(ctx.media if key == JOINT else [key]) if bool(rows.any()) else None
            if found is not None:
                self.add(key, -found, rows)


def blending_weights(falls: Mapping[str, float], overfitting: Mapping[str, float]) -> dict[str, float]:
    """Return weights G_k / O_k^2 of Gradient-Blending, scaled to a mean of 1; uniform if no loss fell.

    Args:
        falls: G, of the losses on validation data; a rise counts as 0.
        overfitting: O, at least 0.001 in absolute value.
    """
    raw = {k: max(fall, 0.0) / max(abs(overfitting[k]), 1e-3) ** 2 for k, fall in falls.items()}
    total = sum(raw.values())
    return {k: len(raw) * value / total if total > 0 else 1.0 for k, value in raw.items()}


def jensen_shannon(log_p: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of M distributions [M, ..., vocabulary], in nats: [...]."""
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - mean)).sum(-1).mean(0)


def distillation(log_p: torch.Tensor, nll: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return sum over m of |p_strongest - p_m| KL(strongest || m) at each place: [batch, places].

    The strongest modality of a row has the lowest NLL, p is the geometric mean of the answer's probabilities; rows whose
    strongest modality does not give each answer token the highest probability have 0.

    Args:
        log_p: [M, batch, places, vocabulary].
        nll: [M, batch, places], 0 outside of answers.
        targets: [batch, places], -100 outside of answers.
    """
    answer = targets != -100
    p = (-nll.detach().sum(-1) / answer.sum(-1).clamp(min=1)).exp()  # [M, batch]
    strongest = p.argmax(0)  # [batch]
    batch = torch.arange(log_p.shape[1], device=log_p.device)
    teacher = log_p[strongest, batch].detach()  # [batch, places, vocabulary]
    right = ((teacher.argmax(-1) == targets) | ~answer).all(-1)  # [batch]
    divergence = (teacher.exp() * (teacher - log_p)).sum(-1)  # [M, batch, places]; 0 for the strongest
    gap = (p[strongest, batch] - p).abs() * right
    return (gap[..., None] * divergence).sum(0)


def residual_weight(rest: torch.Tensor) -> torch.Tensor:
    """Return 5 - p_rest of ReconBoost for the log-likelihoods ``rest`` [batch] of the other modalities."""
    return 5 - rest.exp()


@dataclass
class CML(BalanceStrategy):
    """Let the confidence not rise when a modality is taken away.

        R = lam * mean_i max(0, conf_i(S without m) - conf_i(S)),     m drawn for each step

    Source: Ma et al., "Calibrating Multimodal Learning", ICML 2023, https://arxiv.org/abs/2306.01265. Adapted: the confidence is
    the mean log-likelihood of the answer's tokens, nats per token.

    Args:
        lam: weight of the term; BalanceBenchmark's 0.1.
    """

    lam: float = 0.1
    name: ClassVar[str] = "cml"
    changes: ClassVar[frozenset[str]] = frozenset({"confidence loss"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(lam=(0, 100))

    def needs(self) -> Needs:
        return Needs(losses=2, media=1)

    def loss(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        removed = ctx.draw(self.name, ctx.step).choice(ctx.media)
        rows = ctx.present(removed)
        if not bool(rows.any()):
            return loss
        full, less = ctx.row_likelihood(None), ctx.row_likelihood([n for n in ctx.media if n != removed])
        if full is None or less is None:
            return loss
        here = rows.to(full.device) & ~full.isnan() & ~less.isnan()
        violation = torch.relu(torch.where(here, less - full, torch.zeros_like(full)))  # [batch]
        ctx.log(f"{self.name}/violations", float((violation[here] > 0).float().mean()) if bool(here.any()) else 0.0)
        tokens = ctx.answer_tokens().to(violation)
        return loss + (self.lam * (violation * tokens).sum() * ctx.loss_scale()).to(loss)
