"""MLA on the shared B: one modality at a time, without unlearning the modality before.

Zhang et al., "Multimodal Representation Learning by Alternating Unimodal Adaptation", CVPR 2024,
https://arxiv.org/abs/2311.10707.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .strategy import BalanceStrategy, Context, Needs


@dataclass
class MLA(BalanceStrategy):
    """Alternate: in some steps only one modality is visible, and B's gradient is projected away from the one before.

        grad B <- grad B P^T                                     P [r, r] for each layer, of the modalities before
        P <- P - (P z)(P z)^T / (alpha + z^T P z),   P <- (1 - leak) P + leak I,   P <- P / ||P||

    with z the mean z~ of the step's modality and alpha = 0.1^(1 + progress). MokA's shared B is the shared head of the paper, and
    its input has only r dimensions, so that P is small.

    Source: CVPR 2024, https://arxiv.org/abs/2311.10707. Adapted: joint steps stay, as only they train what needs
    both modalities; they are not projected. The leak, 0 in the paper, keeps P from running out of its r dimensions. The paper's
    fusion of modalities at inference is `moka eval --decoding entropy-fusion`, for which `p_alt` trains the model.

    Args:
        p_alt: share of the steps with one modality.
        leak: share of the identity that is mixed into P at each such step.
    """

    p_alt: float = 0.5
    leak: float = 0.01
    name: ClassVar[str] = "mla"
    changes: ClassVar[frozenset[str]] = frozenset({"visible tokens", "gradients of B"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(p_alt=(0, 1), leak=(0, 1))
        self.turns = 0
        self.projections: dict[str, torch.Tensor] = {}

    def needs(self) -> Needs:
        return Needs(adapter=True, gradients=True, parts_of_B=True)

    def single(self, ctx: Context) -> str | None:
        """Return the one modality of this step; None for a joint step."""
        acts = ctx.draw(self.name, ctx.step).random() < self.p_alt
        return ctx.media[self.turns % len(ctx.media)] if acts else None

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        single = self.single(ctx)
        if single is not None:
            rows = ctx.present(single)
            for other in ctx.media:
                if other != single:
                    ctx.hide(other, rows)

    def update(self, handles: Any, ctx: Context) -> None:
        single = self.single(ctx)
        if single is None:
            return
        self.turns += 1
        tokens = handles.parts.tokens.get(single, 0)
        for layer, grad in handles.gradients_of_B().items():
            total = handles.parts.z_sums.get(layer, {}).get(single)
            if total is None or not tokens:
                continue  # no sample of this step has it
            before = self.projections.get(layer)
            if before is None:
                before = torch.eye(grad.shape[1])
            else:
                grad.copy_((grad.float() @ before.to(grad.device).T).to(grad))
            alpha = 0.1 ** (1 + ctx.progress)
            self.projections[layer] = projection(before, (total / tokens).cpu(), alpha, self.leak)
        ctx.log(f"{self.name}/single/{single}", 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"turns": self.turns, "projections": self.projections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns, self.projections = state["turns"], state["projections"]


def projection(before: torch.Tensor, z: torch.Tensor, alpha: float, leak: float) -> torch.Tensor:
    """Return P [r, r] without the direction of ``z`` [r], of norm 1."""
    before, z = before.double(), z.double()
    k = before @ z
    after = before - torch.outer(k, k) / (alpha + z @ k)
    after = (1 - leak) * after + leak * torch.eye(len(z), dtype=torch.float64)
    return (after / after.norm()).float()
