"""OGM and OGM-GE: slow the modality that leads. AGM and the signal of CGGM are modes.

Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022, https://arxiv.org/abs/2203.15332;
Li et al., "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation", ICCV 2023,
https://arxiv.org/abs/2308.07686; Guo et al., "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning",
NeurIPS 2024, https://arxiv.org/abs/2411.01409.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .strategy import BalanceStrategy, Context, Needs, Scores, dominance


@dataclass
class OGM(BalanceStrategy):
    """Slow the update of A_m while the modality m by itself explains the answers better than the others.

        rho_m = exp(M / (M - 1) * (mean_k s_k - s_m)),   s_m: mean NLL of the answers if only m is visible
        k_m = 1 - tanh(alpha * rho_m) if rho_m > 1, else 1

    Source: CVPR 2022, https://arxiv.org/abs/2203.15332. Adapted: rho from likelihoods of the answers, as a language model has
    no head that is a sum over modalities; k_m scales the update and not the gradient, to which Adam is blind; noise (GE) is
    off, and where it is on it is added to the update. The paper's jump at rho = 1 is kept: k falls from 1 to 1 - tanh(alpha).

    Args:
        alpha: strength; paper 0.1 (VGGSound) to 0.8 (CREMA-D).
        apply: "update", or "grad" as in the paper, for SGD.
        every: steps between two measurements.
        form: "tanh", or "exp" of AGM: k_m = exp(alpha * (r_m of the running scores - r_m)), which raises too, or "speed" of
            CGGM: k_m = 1.3 * (sum_k D_k - D_m) / sum_k D_k with D_m the gain of likelihood since the measurement before.
        smooth: 1 - tanh(alpha * (rho - 1)), without the jump.
        noise: OGM-GE: Gaussian noise with the standard deviation of the update (or gradient) of each tensor.
        share_B: also B's gradient: sum_m k_m G_m.
        start, end: share of the training in which it acts.
        decay: of the running mean of the scores.
        ablate: what "single" means: "tokens", or "adapter", in which text is compared too.
        random_side: a control: the coefficients are dealt to the modalities by chance.
    """

    alpha: float = 0.3
    apply: Literal["update", "grad"] = "update"
    every: int = 8
    form: Literal["tanh", "exp", "speed"] = "tanh"
    smooth: bool = False
    noise: bool = False
    share_B: bool = False
    start: float = 0.0
    end: float = 1.0
    decay: float = 0.9
    ablate: Literal["tokens", "adapter"] = "tokens"
    random_side: bool = False
    name: ClassVar[str] = "ogm"

    def __post_init__(self) -> None:
        self._check(alpha=(0, 100), every=(1, 1_000_000), start=(0, 1), end=(0, 1), decay=(0, 1))
        self.scores = Scores(self.decay, self.ablate)
        self.coefficients: dict[str, float] = {}
        self._before: dict[str, float] = {}
        own = {"gradients of A"} if self.apply == "grad" else {"updates of A"}
        self.changes = frozenset(own | ({"gradients of B"} if self.share_B else set()))

    def needs(self) -> Needs:
        return Needs(
            likelihoods="single",
            every=self.every,
            adapter=True,
            gradients=self.apply == "grad" or self.share_B,
            parts_of_B=self.share_B,
            media=1 if self.ablate == "adapter" else 2,
        )

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if ctx.step % self.every == 0 and self.start <= ctx.progress <= self.end:
            self.scores.measure(ctx)

    def update(self, handles: Any, ctx: Context) -> None:
        if not self.start <= ctx.progress <= self.end:
            return
        if ctx.step % self.every == 0 and self.scores.reduce(ctx):
            self.coefficients = self._coefficients(ctx)
            for name, k in self.coefficients.items():
                ctx.log(f"{self.name}/{name}", k)
        for modality, k in self.coefficients.items():
            if self.apply == "update":
                handles.lr_scale[modality] = k
                if self.noise:
                    handles.noise(modality, lambda layer, m=modality: _generator(ctx, m, layer))
                continue
            for layer, grad in handles.gradient(modality).items():
                std = grad.float().std() if self.noise and grad.numel() > 1 else None
                grad.mul_(k)
                if std is not None:
                    drawn = torch.randn(grad.shape, generator=_generator(ctx, modality, layer))
                    grad.add_((drawn.to(std.device) * std).to(grad.dtype))
        if self.share_B and self.coefficients:
            grads = handles.gradients_of_B()
            for layer, parts in handles.parts_of_B().items():
                for modality, k in self.coefficients.items():
                    if modality in parts and k != 1.0:
                        grads[layer].add_(((k - 1) * parts[modality]).to(grads[layer]))

    def _coefficients(self, ctx: Context) -> dict[str, float]:
        scores, running = self.scores.current, self.scores.running
        if self.form == "exp":
            found = agm_coefficients(dominance(scores), dominance({m: running[m] for m in scores}), self.alpha)
        elif self.form == "speed":
            found = speed_coefficients({m: self._before[m] - s for m, s in scores.items() if m in self._before})
            self._before = dict(scores)
        else:
            found = ogm_coefficients(dominance({m: running[m] for m in scores}), self.alpha, self.smooth)
        if self.random_side:
            values = list(found.values())
            ctx.draw(self.name, ctx.step).shuffle(values)
            found = dict(zip(found, values, strict=True))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**self.scores.state_dict(), "coefficients": self.coefficients, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state)
        self.coefficients, self._before = dict(state["coefficients"]), dict(state["before"])


def ogm_coefficients(ratios: Mapping[str, float], alpha: float, smooth: bool = False) -> dict[str, float]:
    """Return k_m of OGM for each rho_m: 1 - tanh(alpha * rho_m) above 1, else 1."""
    shift = 1.0 if smooth else 0.0
    return {m: 1 - math.tanh(alpha * (rho - shift)) if rho > 1 else 1.0 for m, rho in ratios.items()}


def agm_coefficients(ratios: Mapping[str, float], reference: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Return k_m = exp(alpha * (reference_m - r_m)) of AGM, at most e^20."""
    return {m: math.exp(min(alpha * (reference[m] - r), 20)) for m, r in ratios.items()}


def speed_coefficients(gains: Mapping[str, float], rho: float = 1.3) -> dict[str, float]:
    """Return k_m = rho * (sum D - D_m) / sum D of CGGM for gains D_m, of which losses count as 0; 1 if nothing was gained."""
    positive = {m: max(gain, 0.0) for m, gain in gains.items()}
    total = sum(positive.values())
    return {m: rho * (total - gain) / total if total > 0 else 1.0 for m, gain in positive.items()}


def _generator(ctx: Context, modality: str, layer: str) -> torch.Generator:
    """Return a generator that is the same on every process and after a resume."""
    key = f"{ctx.seed}:{ctx.step}:{modality}:{layer}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
