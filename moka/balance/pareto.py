"""MMPareto: a gradient for each modality that helps both its own loss and the joint one; and the same over B's parts.

Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024,
https://arxiv.org/abs/2405.17730; minimum-norm weights: Sener and Koltun, NeurIPS 2018, https://arxiv.org/abs/1810.04650.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .handles import Rows, averaged
from .strategy import BalanceStrategy, Context, Needs


@dataclass
class MMPareto(BalanceStrategy):
    """Mix, for each A_m, the gradients of the joint loss (g) and of the modality's own (u), so that neither loss is hurt.

        c = 1/2 if cos(g, u) > 0, else argmin ||c g + (1 - c) u||, within [0.001, 0.999]
        h = 2 c g + 2 (1 - c) u,  each tensor times max(1, ||g + u|| / ||h||),  and then times gamma

    Everything that modalities share (B, A of text, projectors) gets the plain sum, as the heads in the paper.

    Source: ICML 2024, https://arxiv.org/abs/2405.17730. Adapted: L_m is the loss with only modality m visible, of
    rows that have m and another one; gamma scales the update, as Adam is blind to a constant factor of a gradient.

    Args:
        gamma: magnitude, paper 1.5.
        apply: what gamma scales: "update", or "grad" as in the paper.
    """

    gamma: float = 1.5
    apply: Literal["update", "grad"] = "update"
    name: ClassVar[str] = "mmpareto"

    def __post_init__(self) -> None:
        self._check(gamma=(0.05, 3))
        own = {"gradients of A", "unimodal losses"}
        self.changes = frozenset(own | ({"updates of A"} if self.apply == "update" and self.gamma != 1 else set()))
        self._own: dict[str, Rows] = {}

    def needs(self) -> Needs:
        return Needs(losses="each", adapter=True, gradients=True)

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        handles = ctx.handles
        for name in ctx.media:
            own = ctx.nll([name], ctx.compared(name).float())
            if own is None:
                continue
            before = {layer: grad.clone() for layer, grad in handles.gradient(name).items()}
            ctx.backward(own)
            ctx.add(f"{self.name}/loss/{name}", float(own.detach()))
            total = self._own.setdefault(name, {})
            for layer, grad in handles.gradient(name).items():
                added = grad.float() - before[layer].float() if layer in before else grad.float().clone()
                total[layer] = total[layer] + added if layer in total else added

    def update(self, handles: Any, ctx: Context) -> None:
        own, self._own = self._own, {}
        for name in ctx.media:
            rows = handles.gradient(name)
            mine = own.get(name, {})
            u = averaged(
                {layer: mine.get(layer, torch.zeros_like(row, dtype=torch.float32)) for layer, row in rows.items()}
            )
            if not any(bool(row.any()) for row in u.values()):
                continue
            layers = list(rows)
            g = [rows[layer].float() - u[layer] for layer in layers]
            mixed, c, cosine = pareto_mix(
                g, [u[layer] for layer in layers], self.gamma if self.apply == "grad" else 1.0
            )
            for layer, h in zip(layers, mixed, strict=True):
                rows[layer].copy_(h)
            if self.apply == "update" and self.gamma != 1:
                handles.lr_scale[name] = self.gamma
            ctx.log(f"{self.name}/joint_weight/{name}", c)
            ctx.log(f"{self.name}/cosine/{name}", cosine)


@dataclass
class ParetoB(BalanceStrategy):
    """Mix the parts of the shared B's gradient so that no modality's part is hurt; no additional pass.

        h = M sum_m w_m G_m with minimum-norm w if some pair of parts is in conflict (cosine below 0), else sum_m G_m;
        times max(1, ||sum_m G_m|| / ||h||)

    MMPareto's rule (https://arxiv.org/abs/2405.17730) where MokA gives the gradients for free: dL/dB = sum_m G_m over the
    modalities of the tokens, text among them.
    """

    name: ClassVar[str] = "pareto_b"
    changes: ClassVar[frozenset[str]] = frozenset({"gradients of B"})  # type: ignore[misc]

    def needs(self) -> Needs:
        return Needs(adapter=True, gradients=True, parts_of_B=True, media=1)

    def update(self, handles: Any, ctx: Context) -> None:
        parts, grads = handles.parts_of_B(), handles.gradients_of_B()
        names = [m for m in handles.modalities if any(m in own for own in parts.values())]
        if len(names) < 2:
            return
        gram = torch.zeros(len(names), len(names), dtype=torch.float64)
        for own in parts.values():
            for i, a in enumerate(names):
                for j, b in enumerate(names):
                    if a in own and b in own:
                        gram[i, j] += (own[a] * own[b]).sum().double().cpu()
        weights = pareto_weights(gram)
        for name, weight in zip(names, weights, strict=True):
            ctx.log(f"{self.name}/weight/{name}", weight)
        if all(abs(weight * len(names) - 1) < 1e-12 for weight in weights):
            return
        scaled = torch.tensor(weights, dtype=torch.float64) * len(names)
        plain, mixed = (float((w @ gram @ w).clamp(min=0)) ** 0.5 for w in (torch.ones_like(scaled), scaled))
        factor = max(1.0, plain / mixed) if mixed > 0 else 1.0
        for layer, own in parts.items():
            mixed = sum(float(w) * factor * own[m] for m, w in zip(names, scaled, strict=True) if m in own)
            grads[layer].copy_(mixed)  # type: ignore[arg-type]


def pareto_mix(
    joint: Sequence[torch.Tensor], own: Sequence[torch.Tensor], gamma: float = 1.0
) -> tuple[list[torch.Tensor], float, float]:
    """Return (mixed gradients, the joint loss's weight c, cosine) of MMPareto for one modality's tensors."""
    gg, uu, gu = (
        float(sum((a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)))
        for one, other in ((joint, joint), (own, own), (joint, own))
    )
    cosine = gu / (gg * uu) ** 0.5 if gg > 0 and uu > 0 else 0.0
    c = 0.5
    if gg > 0 and uu > 0 and cosine <= 0:
        c = min(max((uu - gu) / (gg + uu - 2 * gu), 0.001), 0.999)
    mixed = []
    for g, u in zip(joint, own, strict=True):
        h = 2 * c * g + 2 * (1 - c) * u
        plain, norm = float((g + u).norm()), float(h.norm())
        factor = max(1.0, plain / norm) if c != 0.5 and norm > 0 else 1.0
        mixed.append(h * (factor * gamma) if factor * gamma != 1 else h)
    return mixed, c, cosine


def pareto_weights(gram: torch.Tensor, steps: int = 1000) -> list[float]:
    """Return weights [M] that sum to 1: uniform without a conflict, else those of the vectors' minimum-norm combination.

    Args:
        gram: [M, M] inner products of the vectors.
        steps: of Frank and Wolfe's algorithm, with exact line search; for two vectors it ends after the first.
    """
    m = len(gram)
    off = gram - torch.diag(torch.diagonal(gram))
    weights = torch.full((m,), 1 / m, dtype=torch.float64)
    if not bool((off < 0).any()):
        return weights.tolist()
    gram = gram.double()
    for _ in range(steps):
        slope = gram @ weights
        vertex = torch.zeros(m, dtype=torch.float64)
        vertex[int(slope.argmin())] = 1
        # Away from the worst corner as well: without it the steps get small where the optimum is on an edge.
        away = torch.zeros(m, dtype=torch.float64)
        away[int(torch.where(weights > 0, slope, -torch.inf).argmax())] = 1
        forward, backward = vertex - weights, weights - away
        toward = bool(-(slope @ forward) >= -(slope @ backward))
        direction = forward if toward else backward
        worst = float(weights[int(away.argmax())])
        longest = 1.0 if toward else worst / max(1 - worst, 1e-12)
        curve, fall = float(direction @ gram @ direction), float(-(slope @ direction))
        if fall <= 1e-12 * max(float(torch.diagonal(gram).max()), 1e-300):
            break
        size = min(fall / curve, longest) if curve > 0 else longest
        weights = (weights + size * direction).clamp(min=0)
        weights = weights / weights.sum()
    return weights.tolist()
