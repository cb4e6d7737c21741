"""How much each modality trains the shared B: its gradient split by the tokens that it comes from.

    dL/dB = sum_m G_m,    G_m = s * sum_{t of modality m} delta_t z~_t^T,    delta_t = dL/dy_t

The split needs no additional pass: one hook on the output of each MokA layer, in the backward that runs anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moka.adapter.config import TEXT
from moka.adapter.layer import MokaLinear
from moka.adapter.ops import interact
from moka.adapter.routing import View
from moka.adapter.text_decoder import language_decoder
from moka.errors import MokaError

from .contribution import unwrapped


@dataclass
class ModalityGradients:
    """The parts of the gradient of every layer's B."""

    parts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # layer -> modality -> [out, r] float32
    tokens: dict[str, int] = field(
        default_factory=lambda: defaultdict(int)
    )  # modality -> tokens without padding, counted in one layer
    # layer -> modality -> the part of `parts` that comes through the interaction; only if it was asked for
    interaction: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    # (layer, modality) -> sum of |z~| over tokens, and their number
    z_norm: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    z_count: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    z_sums: dict[str, dict[str, torch.Tensor]] = field(
        default_factory=dict
    )  # layer -> modality -> sum of z~ [r] over tokens

    def modalities(self) -> list[str]:
        """Return the modalities that some layer saw, in the order of the adapter's rows."""
        return list(dict.fromkeys(name for parts in self.parts.values() for name in parts))

    def norms(self) -> dict[str, float]:
        """Return the L2 norm of G_m over all layers, by modality."""
        return {name: self._dot(name, name) ** 0.5 for name in self.modalities()}

    def update_shares(self) -> dict[str, float]:
        """Return each modality's share of the sum of `norms`."""
        norms = self.norms()
        total = sum(norms.values())
        return {name: norm / total if total else 0.0 for name, norm in norms.items()}

    def cosines(self) -> dict[tuple[str, str], float]:
        """Return the cosine of G_a and G_b over all layers for each pair; below 0 the modalities are in conflict."""
        names, norms = self.modalities(), self.norms()
        return {
            (a, b): self._dot(a, b) / (norms[a] * norms[b]) if norms[a] and norms[b] else 0.0
            for k, a in enumerate(names)
            for b in names[k + 1 :]
        }

    def z_norms(self) -> dict[str, float]:
        """Return the mean norm of z~ over tokens and layers, by modality."""
        sums: dict[str, list[float]] = {}
        for (layer, name), norm in self.z_norm.items():
            own = sums.setdefault(name, [0.0, 0])
            own[0], own[1] = own[0] + norm, own[1] + self.z_count[layer, name]
        return {name: sums[name][0] / sums[name][1] for name in self.modalities() if name in sums and sums[name][1]}

    def layer_norms(self) -> dict[str, dict[str, float]]:
        """Return the mean norm of z~ over tokens: layer -> modality -> norm."""
        found: dict[str, dict[str, float]] = {}
        for (layer, name), count in self.z_count.items():
            if count:
                found.setdefault(layer, {})[name] = self.z_norm[layer, name] / count
        return found

    def _dot(self, a: str, b: str) -> float:
        layers = (parts for parts in self.parts.values() if a in parts and b in parts)
        return float(sum((parts[a] * parts[b]).sum() for parts in layers))


@contextmanager
def observed_gradients(
    model: nn.Module, adapter: str | None = None, paths: bool = False
) -> Iterator[ModalityGradients]:
    """Split the gradient of B by modality in every backward inside the block; micro-batches add up.

    Right under gradient checkpointing, whose recomputation is what is observed. On several processes the parts are those of
    this process: `average` gives those of the averaged gradient.

    Args:
        model: an adapted model.
        adapter: its name; default: the first active one of each layer.
        paths: also what comes through the interaction, of z without dropout.
    Raises:
        MokaError: the model has no MokA adapter.
    """
    found = ModalityGradients()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MokaLinear) and not m.moka_tower}
    present: torch.Tensor | None = None  # [batch * seq] bool, of the last forward
    if not layers:
        raise MokaError(f"observed_gradients: {type(model).__name__} has no MokA adapter.")
    for layer in layers.values():
        for name in layer.adapters_in_use():
            layer.moka_config[name].require_moka("observed_gradients")
    names, first = {id(layer): name for name, layer in layers.items()}, next(iter(layers.values()))

    def read_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal present
        mask = kwargs.get("attention_mask")
        present = mask.flatten() > 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def observe(
        layer: MokaLinear, name: str, x: torch.Tensor, z: torch.Tensor, view: View, result: torch.Tensor
    ) -> None:
        if name != (adapter or layer.adapters_in_use()[0]):
            return
        config, z = layer.moka_config[name], z.detach()
        modalities = list(config.modalities)
        scale = layer.moka_scaling[name] if config.scale_position == "output" else 1.0
        rows = view.rows
        flat = torch.full((len(z),), view.row, device=z.device) if rows is None else rows.flatten()
        valid = torch.ones_like(flat, dtype=torch.bool) if present is None or len(present) != len(z) else present
        read = interaction_term(layer, name, x, view) if paths else None

        def split(grad: torch.Tensor) -> None:
            delta = grad.reshape(len(z), -1).float()  # [tokens, out]
            own = found.parts.setdefault(names[id(layer)], {})
            for row, modality in enumerate(modalities):
                here = flat == row
                if not here.any():
                    continue
                mine = z[here].float()  # [tokens, r], or, without a shared B, its slot of [tokens, M * r]
                mine = mine.view(len(mine), -1, layer.moka_r[name]).sum(1)
                part = scale * delta[here].T @ mine
                own[modality] = own[modality] + part if modality in own else part
                if read is not None:
                    part = scale * delta[here].T @ read[here]
                    through = found.interaction.setdefault(names[id(layer)], {})
                    through[modality] = through[modality] + part if modality in through else part
                counted = valid.to(here.device)[here]  # padding has no gradient, and counts as no token
                found.z_norm[names[id(layer)], modality] += float(mine.norm(dim=-1)[counted].sum())
                sums, total = found.z_sums.setdefault(names[id(layer)], {}), mine[counted].sum(0)
                sums[modality] = sums[modality] + total if modality in sums else total
                found.z_count[names[id(layer)], modality] += int(counted.sum())
                if layer is first:
                    found.tokens[modality] += int(counted.sum())

        result.register_hook(split)

    handle = language_decoder(unwrapped(model)).register_forward_pre_hook(read_mask, with_kwargs=True)
    for layer in layers.values():
        layer.moka_observers = (*layer.moka_observers, observe)
    try:
        yield found
    finally:
        handle.remove()
        for layer in layers.values():
            layer.moka_observers = tuple(other for other in layer.moka_observers if other is not observe)


@torch.no_grad()
def interaction_term(layer: MokaLinear, name: str, x: torch.Tensor, view: View) -> torch.Tensor | None:
    """Return lambda * sum_j softmax_j(z_t . z_j / sqrt(r)) z_j of each token, without dropout: [tokens, r] float32.

    None: no token of this forward interacts.

    Args:
        x: [..., in] the layer's input.
    """
    if view.attention is None:
        return None
    config, A = layer.moka_config[name], layer.moka_A[name]()  # [M, r, in]
    factor = layer.moka_scaling[name] if config.scale_position == "input" else 1.0
    flat = x.reshape(-1, x.shape[-1])
    z_all = (flat @ A.flatten(0, 1).to(flat.dtype).t()).view(-1, A.shape[1]) * factor  # [tokens * M, r]
    assert view.index is not None
    z = z_all.index_select(0, view.index).float()  # [tokens, r]
    z = z if view.adapter_mask is None else z * view.adapter_mask
    return interact(z, view.attention, 1, config.interaction == "mean") - z


def average(gradients: ModalityGradients) -> ModalityGradients:
    """Average the parts over all processes, as DDP averages gradients; a modality that a process lacks counts as zero there.

    All processes have to call it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return gradients
    everyone: list[Any] = [None] * dist.get_world_size()
    tables = (gradients.parts, gradients.interaction)
    own_shapes = [{(layer, m): t.shape for layer, own in table.items() for m, t in own.items()} for table in tables]
    counts = [dict(values) for values in (gradients.tokens, gradients.z_norm, gradients.z_count)]
    dist.all_gather_object(everyone, (own_shapes, counts))
    found = ModalityGradients()
    device = next((part.device for parts in gradients.parts.values() for part in parts.values()), torch.device("cpu"))
    for k, (table, into) in enumerate(zip(tables, (found.parts, found.interaction), strict=True)):
        shapes = {key: shape for theirs, _ in everyone for key, shape in theirs[k].items()}
        if not shapes:
            continue
        own = [table.get(layer, {}).get(m) for layer, m in shapes]
        flat = [torch.zeros(s, device=device) if p is None else p for p, s in zip(own, shapes.values(), strict=True)]
        total = torch.cat([part.flatten() for part in flat])
        dist.all_reduce(total)
        parts = (total / len(everyone)).split([part.numel() for part in flat])
        for (layer, m), shape, part in zip(shapes, shapes.values(), parts, strict=True):
            into.setdefault(layer, {})[m] = part.view(shape)
    shapes = {key: shape for theirs, _ in everyone for key, shape in theirs[0].items()}
    if not shapes:
        return found
    # Sums of z~ of layers and modalities that have a part have its width.
    sums = [gradients.z_sums.get(layer, {}).get(m) for layer, m in shapes]
    total = torch.cat(
        [
            torch.zeros(shape[1], device=device) if z is None else z
            for z, shape in zip(sums, shapes.values(), strict=True)
        ]
    )
    dist.all_reduce(total)
    for (layer, m), z in zip(shapes, total.split([shape[1] for shape in shapes.values()]), strict=True):
        found.z_sums.setdefault(layer, {})[m] = z
    for _, theirs in everyone:
        totals: tuple[dict[Any, Any], ...] = (found.tokens, found.z_norm, found.z_count)
        for into, values in zip(totals, theirs, strict=True):
            for name, value in values.items():
                into[name] += value
    return found


class FisherInformation:
    """The diagonal of the empirical Fisher information of every B by modality: the mean of G_m squared over observations."""

    def __init__(self) -> None:
        self.observations = 0
        self._sums: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, gradients: ModalityGradients) -> None:
        """Add the squares of one step's parts."""
        self.observations += 1
        for layer, parts in gradients.parts.items():
            sums = self._sums.setdefault(layer, {})
            for name, part in parts.items():
                sums[name] = sums[name] + part**2 if name in sums else part**2

    def traces(self) -> dict[str, float]:
        """Return the trace over all layers, by modality."""
        found: dict[str, float] = defaultdict(float)
        for sums in self._sums.values():
            for name, value in sums.items():
                found[name] += float(value.sum()) / max(self.observations, 1)
        return dict(found)

    def shares(self) -> dict[str, float]:
        """Return each modality's share of the sum of `traces`."""
        traces = self.traces()
        total = sum(traces.values())
        return {name: trace / total if total else 0.0 for name, trace in traces.items()}

    def non_text_dominance_rate(self) -> float:
        """Return the share of the entries whose information from other tokens exceeds that from text tokens.

            |{FIM_non-text > FIM_text}| / |W|

        Source: Implicit Modality Decomposition (IMoD), CVPR 2026.
        """
        larger, entries = 0, 0
        for sums in self._sums.values():
            some = next(iter(sums.values()))
            text = sums.get(TEXT, torch.zeros_like(some))
            other = sum((value for name, value in sums.items() if name != TEXT), torch.zeros_like(some))
            larger, entries = larger + int((other > text).sum()), entries + text.numel()
        return larger / max(entries, 1)
