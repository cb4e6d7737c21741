"""A modality's parameters, although MokA stores them stacked: rows of A [M, r, in], parts of the shared B's gradient.

The rate of a modality is changed by its *update*: after the optimizer's step

    row <- before + k * (after - before)

which equals a parameter group with the learning rate k * lr for every optimizer whose step is proportional to it (SGD, Adam,
AdamW with its decoupled weight decay). Multiplying the gradient does not: Adam divides it by its own root mean square, so a
constant factor cancels (docs/balance.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moka.adapter.layer import MokaLinear
from moka.analysis.gradients import ModalityGradients
from moka.distributed import is_distributed
from moka.errors import MokaError

Rows = dict[str, torch.Tensor]  # layer -> [r, in]
# Limits of every coefficient of an update.
LOWEST, HIGHEST = 0.05, 3.0


class Rates(MutableMapping[str, float]):
    """Factor of each modality's update in this step; 1 if none is set."""

    def __init__(self, modalities: list[str]) -> None:
        self.modalities, self.values_set = modalities, {}  # type: ignore[var-annotated]

    def __getitem__(self, modality: str) -> float:
        return self.values_set.get(modality, 1.0)

    def __setitem__(self, modality: str, factor: float) -> None:
        if modality not in self.modalities:
            raise MokaError(f"lr_scale: unknown modality {modality!r}; the adapter has {self.modalities}.")
        self.values_set[modality] = min(max(float(factor), LOWEST), HIGHEST)

    def __delitem__(self, modality: str) -> None:
        del self.values_set[modality]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_set)

    def __len__(self) -> int:
        return len(self.values_set)


class Handles:
    """The rows of every MokA layer's A (and of B, if modalities do not share it), and what a step does to them.

    Args:
        model: an adapted model.
    Raises:
        MokaError: it has no MokA adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, MokaLinear) and not m.moka_tower}
        if not self.layers:
            raise MokaError(f"balance: {type(model).__name__} has no MokA adapter; attach one with moka.MokaConfig.")
        first = next(iter(self.layers.values()))
        self.adapter = first.adapters_in_use()[0]
        self.config = first.moka_config[self.adapter]
        self.config.require_moka("balance")
        self.modalities = list(self.config.modalities)
        self.lr_scale = Rates(self.modalities)
        self.parts: ModalityGradients | None = None  # of the last backward, averaged over processes
        self.init: dict[str, Rows] = {}
        self.optimizer: Any = None
        self._noise: dict[str, Any] = {}
        self._pulls: list[tuple[str, Rows, float]] = []
        self._before: list[tuple[str, torch.nn.Parameter, int, torch.Tensor]] = []

    def learning_rate(self) -> float:
        """Return the rate of the group that A belongs to, as it is now."""
        weight = self._weight(next(iter(self.layers.values())))
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        own = (group["lr"] for group in groups if any(p is weight for p in group["params"]))
        return float(next(own, groups[0]["lr"] if groups else 0.0))  # DeepSpeed's groups have other tensors

    def A(self, modality: str) -> Rows:
        """Return a modality's rows as views [r, in]: what is written into them is trained on."""
        index = self.modalities.index(modality)
        return {name: self._weight(layer).detach()[index] for name, layer in self.layers.items()}

    def copy(self, modality: str) -> Rows:
        """Return copies of a modality's rows."""
        return {name: row.clone() for name, row in self.A(modality).items()}

    def keep_init(self) -> None:
        """Remember A as it is now, as the start of the training."""
        self.init = {name: self.copy(name) for name in self.modalities}

    def gradient(self, modality: str) -> Rows:
        """Return a modality's rows of A's gradient as views [r, in]; layers without a gradient are left out."""
        index = self.modalities.index(modality)
        grads = ((name, self._weight(layer).grad) for name, layer in self.layers.items())
        return {name: grad[index] for name, grad in grads if grad is not None}

    def B(self) -> dict[str, torch.Tensor]:
        """Return every layer's B, as it is stored: [out, r]."""
        return {name: layer.moka_B[self.adapter].local().detach() for name, layer in self.layers.items()}

    def gradients_of_B(self) -> dict[str, torch.Tensor]:
        """Return the gradient of every layer's shared B, as it is stored: [out, r]."""
        grads = ((name, layer.moka_B[self.adapter].weight.grad) for name, layer in self.layers.items())
        return {name: grad for name, grad in grads if grad is not None}

    def parts_of_B(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return layer -> modality -> G_m [out, r], float32, which sum to B's gradient as it is stored.

        Where the gradient was clipped since, or scaled for float16, the parts are scaled alike.
        """
        if self.parts is None:
            return {}
        grads, parts = self.gradients_of_B(), self.parts.parts
        total = stored = 0.0
        for name, grad in grads.items():
            full = sum(parts.get(name, {}).values(), torch.zeros_like(grad, dtype=torch.float32))
            total, stored = total + float((full * full).sum()), stored + float((full * grad.float()).sum())
        factor = stored / total if total else 1.0
        if abs(factor - 1) < 1e-4:  # rounding
            return parts
        return {name: {m: part * factor for m, part in own.items()} for name, own in parts.items()}

    def noise(self, modality: str, generator: Any) -> None:
        """Add noise to a modality's next update, with the standard deviation of the update itself.

        Args:
            generator: layer name -> ``torch.Generator``, the same on every process.
        """
        self._noise[modality] = generator

    def pull(self, modality: str, anchor: Rows, strength: float) -> None:
        """Move a modality's rows towards ``anchor`` after the next step: A <- A - strength * (A - anchor), decoupled."""
        self._pulls.append((modality, anchor, min(max(strength, 0.0), 1.0)))

    def set(self, modality: str, rows: Mapping[str, torch.Tensor]) -> None:
        """Write a modality's rows, and clear the optimizer's moments of them.

        Raises:
            MokaError: the optimizer keeps state of a kind that is not known.
        """
        index = self.modalities.index(modality)
        for name, row in rows.items():
            weight = self._weight(self.layers[name])
            _write(weight, index, row)
            self._clear(weight, index)

    def scale(self, modality: str, factors: Mapping[str, float]) -> None:
        """Multiply a modality's rows by a factor for each layer; the optimizer's moments stay."""
        index = self.modalities.index(modality)
        for name, factor in factors.items():
            weight = self._weight(self.layers[name])
            _write(weight, index, _read(weight)[index].detach().float() * factor)

    def before_step(self) -> None:
        """Keep what the next step's updates are taken from."""
        self._before = []
        changed = {m for m in self.modalities if self.lr_scale[m] != 1.0} | set(self._noise)
        for name, layer in self.layers.items():
            weights = [self._weight(layer)]
            if not self.config.share_b:
                weights.append(layer.moka_B[self.adapter].weight)
            for weight in weights:
                for modality in sorted(changed):
                    index = self.modalities.index(modality)
                    self._before.append((name, weight, index, _read(weight)[index].detach().clone()))

    def after_step(self, skipped: bool = False) -> None:
        """Scale the updates; then the pulls.

        Args:
            skipped: the optimizer took no step (float16 overflow): nothing is changed.
        """
        for name, weight, index, before in self._before if not skipped else ():
            modality = self.modalities[index]
            before32, step = before.float(), _read(weight)[index].detach().float() - before.float()
            generator = self._noise.get(modality)
            after = before32 + self.lr_scale[modality] * step
            if generator is not None and step.numel() > 1:
                after = after + torch.randn(step.shape, generator=generator(name)).to(step.device) * step.std()
            _write(weight, index, after)
        for modality, anchor, strength in self._pulls if not skipped else ():
            index = self.modalities.index(modality)
            for name, row in anchor.items():
                weight = self._weight(self.layers[name])
                now = _read(weight)[index].detach().float()
                _write(weight, index, now - strength * (now - row.to(now)))
        self.lr_scale.values_set, self._noise, self._pulls, self._before = {}, {}, [], []

    def _weight(self, layer: MokaLinear) -> torch.nn.Parameter:
        return layer.moka_A[self.adapter].local()

    def _clear(self, weight: torch.nn.Parameter, index: int) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
        state = {} if optimizer is None else optimizer.state.get(weight, {})
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or key.startswith(("qmap", "absmax")):
                continue
            if value.numel() != weight.numel():
                raise MokaError(
                    f"balance: the optimizer {type(optimizer).__name__} keeps {key} {list(value.shape)} for a weight "
                    f"{list(weight.shape)}, and its rows cannot be cleared; use adamw_torch or sgd."
                )
            zero: Any = 0
            if value.dtype == torch.uint8:  # bitsandbytes: the code of zero
                zero = int(state[key.replace("state", "qmap")].abs().argmin())
            value.view(weight.shape)[index] = zero


def _read(weight: torch.Tensor) -> torch.Tensor:
    """Return a parameter's values: under ZeRO-1 and -2 those that its optimizer has, float32."""
    if hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight)
    return weight


def _write(weight: torch.Tensor, index: int, row: torch.Tensor) -> None:
    """Write one row of a parameter: under ZeRO-1 and -2 also into what its optimizer has."""
    if hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        full = safe_get_full_fp32_param(weight).clone()
        full[index] = row.to(full)
        safe_set_full_fp32_param(weight, full)
    weight.data[index] = row.to(weight.dtype).to(weight.device)


def averaged(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Average tensors of a process over all processes, which have to call it with the same names and shapes."""
    if not is_distributed() or not rows:
        return rows
    flat = torch.cat([row.flatten().float() for row in rows.values()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([row.numel() for row in rows.values()])
    return {name: part.view(row.shape) for (name, row), part in zip(rows.items(), parts, strict=True)}
