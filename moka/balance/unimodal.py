"""Losses of each modality alone, added to the step's own loss: uniform, and with the weights of several papers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from .strategy import BalanceStrategy, Context, Needs


@dataclass
class UnimodalLosses(BalanceStrategy):
    """Add the loss of the answers with only one modality visible, for each modality.

        L = L_joint + sum_m w_m L_m,     L_m: NLL of the answers, of rows that have m and another modality

    The plain sum is the control of everything in this family; it is strong, and it hurts where a modality is nearly noise.

    Args:
        weight: factor of all of them.
        scale: modality -> a factor of its own.
        form: how L_m is made:

            "uniform": the NLL.
            "margin": of CRMT (Yang et al., ICLR 2024, https://arxiv.org/abs/2402.06244): log(sum_m (1 / p_m - 1) + 1e-5), p_m the
            geometric mean of the answer tokens' probabilities; ``weight`` is its rho, in the paper 2. The certificate of the
            paper, a Lipschitz constant of the network, says nothing of a language model; `moka diagnose --noise` shows
            the vulnerability.
            "residual": of ReconBoost (Hua et al., ICML 2024, https://arxiv.org/abs/2405.09321): each row's NLL times
            5 - p_rest, p_rest what the other modalities already give the answer.
    """

    weight: float = 1.0
    scale: dict[str, float] = field(default_factory=dict)
    form: Literal["uniform", "margin", "residual"] = "uniform"
    name: ClassVar[str] = "unimodal_losses"
    changes: ClassVar[frozenset[str]] = frozenset({"unimodal losses"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(weight=(0, 100))

    def named_modalities(self) -> list[str]:
        """Return the modalities that its settings name."""
        return list(self.scale)

    def needs(self) -> Needs:
        return Needs(losses="each", likelihoods="alone" if self.form == "residual" else "none")

    def loss(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        if self.form == "margin":
            return loss + self._margin(ctx)
        for name in ctx.media:
            rows = ctx.compared(name)
            factor = self.weight * self.scale.get(name, 1.0)
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

    def _margin(self, ctx: Context) -> Any:
        """Return the margin term of the rows in which modalities are compared."""
        total: Any = 0.0
        rows = torch.stack([ctx.compared(name) for name in ctx.media]).any(0)
        if not bool(rows.any()):
            return total
        for name in ctx.media:
            factor = self.scale.get(name, 1.0)
            if factor and bool(ctx.compared(name).any()):
                alone = ctx.row_likelihood([name])
                if alone is not None:
                    here = ctx.compared(name).to(alone)
                    total = total + factor * here * torch.expm1(-torch.nan_to_num(alone).clamp(min=-30))
        each = torch.log(total + 1e-5)[rows.to(total.device)]  # type: ignore[arg-type]
        tokens = ctx.answer_tokens().to(each)[rows.to(each.device)]
        found = self.weight * (each * tokens).sum() * ctx.loss_scale()
        ctx.add(f"{self.name}/margin", float(found.detach()))
        return found


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
