"""Greedy's re-balancing: take the question away from a modality that learns through the question faster than by itself.

Wu, Jastrzebski, Cho and Geras, "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural
Networks", ICML 2022, https://arxiv.org/abs/2202.05306.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from moka.analysis.contribution import adapter_config
from moka.errors import MokaError

from .strategy import BalanceStrategy, Context, Needs


@dataclass
class Greedy(BalanceStrategy):
    """Compare how fast modalities learn through the interaction; for a few steps, leave the fastest one without it.

        bypass_m += ||G_m through the interaction||^2 / ||B||^2,     main_m += ||the rest of G_m||^2 / ||B||^2
        d_m = log10(bypass_m / main_m)
        if max d - min d > epsilon: lambda = 0 for the modality with the highest d, for ``window`` steps

    with G_m the part of B's gradient that comes from the tokens of m, over all layers. Sums run over the training's
    other steps.

    Source: ICML 2022, https://arxiv.org/abs/2202.05306. Adapted: the paper's cross-modal path is that of squeeze-and-excitation gates
    between two networks; the only one of MokA is the attention of media to the question. Speeds are those of B, which both
    paths go through, as A's gradient cannot be split without the input of every layer. The paper puts the running
    mean in place of the gate; here the term is 0. The conditional utilisation rate, the paper's measure, is
    `moka.analysis.attention.conditional_utilization`.

    Args:
        epsilon: smallest difference that is acted on; paper 0.01.
        window: steps without the interaction; paper 5.
        warmup: share of the training before it acts; the paper begins in its second epoch.
        random_side: the paper's control: the modality is drawn.
    """

    epsilon: float = 0.01
    window: int = 5
    warmup: float = 0.05
    random_side: bool = False
    name: ClassVar[str] = "greedy"
    changes: ClassVar[frozenset[str]] = frozenset({"interaction"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(epsilon=(0, 100), window=(1, 1_000_000), warmup=(0, 1))
        self.speeds: dict[str, list[float]] = {}  # modality -> [bypass, main]
        self.side = ""  # the modality without the interaction
        self.left = 0  # steps that it stays so

    def needs(self) -> Needs:
        return Needs(adapter=True, parts_of_B=True, paths_of_B=True)

    def check(self, model: nn.Module) -> None:
        config = adapter_config(model)
        if config is not None and config.interaction not in ("question", "mean"):
            raise MokaError(
                f"balance: {self.name}: compares what media learn through the question, and adapter.interaction is "
                f"{config.interaction}. Set it to question or mean, or take it out."
            )

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if self.left and bool(ctx.present(self.side).any()):
            ctx.without_interaction(self.side)

    def update(self, handles: Any, ctx: Context) -> None:
        if self.left:
            ctx.log(f"{self.name}/without/{self.side}", 1.0)
            self.left -= 1
            return
        if ctx.progress < self.warmup:
            return
        self._add(handles, ctx)
        lead, difference = faster(self.speeds)
        if lead:
            ctx.log(f"{self.name}/difference", difference)
        if lead and difference > self.epsilon:
            self.side = ctx.draw(self.name, ctx.step).choice(sorted(self.speeds)) if self.random_side else lead
            self.left = self.window

    def _add(self, handles: Any, ctx: Context) -> None:
        """Add the relative speeds of this step."""
        size = sum(float(B.float().pow(2).sum()) for B in handles.B().values())
        if not size:
            return
        for name in ctx.media:
            bypass = main = 0.0
            for layer, parts in handles.parts.parts.items():
                through = handles.parts.interaction.get(layer, {}).get(name)
                if name in parts:
                    bypass += 0.0 if through is None else float(through.pow(2).sum())
                    main += float((parts[name] if through is None else parts[name] - through).pow(2).sum())
            own = self.speeds.setdefault(name, [0.0, 0.0])
            own[0], own[1] = own[0] + bypass / size, own[1] + main / size

    def state_dict(self) -> dict[str, Any]:
        return {"speeds": self.speeds, "side": self.side, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.speeds = {name: list(own) for name, own in state["speeds"].items()}
        self.side, self.left = state["side"], state["left"]


def faster(speeds: Mapping[str, list[float]]) -> tuple[str, float]:
    """Return the modality with the highest log10(bypass / main), and by how much it is above the lowest.

    Args:
        speeds: modality -> [bypass, main]; those of 0 are left out. With fewer than two the modality is "".
    """
    logs = {name: math.log10(bypass / main) for name, (bypass, main) in speeds.items() if bypass > 0 and main > 0}
    if len(logs) < 2:
        return "", 0.0
    lead = max(logs, key=lambda name: logs[name])
    return lead, logs[lead] - min(logs.values())
