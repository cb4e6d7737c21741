"""UMT: keep the features of each modality near those of a teacher that was trained on that modality only.

Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning", ICML 2023, https://arxiv.org/abs/2305.01233.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import nn

from moka.adapter.checks import adapter_tensors
from moka.adapter.matching import match_names
from moka.analysis.contribution import adapter_config
from moka.errors import MokaError

from .strategy import BalanceStrategy, Context, Needs

# Of an adapter: what its tensors do not show, and what changes with them what it computes.
_SETTINGS = ("alpha", "use_rslora", "interaction", "interaction_weight", "scale_position", "alpha_pattern")


@dataclass
class UMT(BalanceStrategy):
    """Add the distance between the features of each modality and those of its teacher, which sees that modality only.

        L = NLL + w * sum_m mean over the tokens t of m of ||h_t - h_t(teacher m)||^2 / ||h_t(teacher m)||^2

    with h the hidden states after the first quarter of the decoder. A teacher is a run of the same model with
    ``balance: [{name: single_modality, modality: m}]``; its adapter and projectors replace the model's own for one forward.

    Source: ICML 2023, https://arxiv.org/abs/2305.01233. Adapted: the squared error is relative, as hidden states have no common
    unit, and is taken at each token instead of a pooled feature.

    Args:
        teachers: modality -> run folder, or adapter folder.
        w: BalanceBenchmark's 10.
    """

    teachers: dict[str, str] = field(default_factory=dict)
    w: float = 10.0
    name: ClassVar[str] = "umt"
    changes: ClassVar[frozenset[str]] = frozenset({"distillation of features"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(w=(0, 1000))
        if not self.teachers:
            raise MokaError(
                "balance: umt: teachers is empty; name a run for each modality, as {visual: runs/visual, audio: runs/audio}, "
                "each trained with balance: [{name: single_modality, modality: ...}]."
            )
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def named_modalities(self) -> list[str]:
        """Return the modalities that its settings name."""
        return list(self.teachers)

    def needs(self) -> Needs:
        return Needs(adapter=True, teachers=True, media=1)

    def check(self, model: nn.Module) -> None:
        for modality, folder in self.teachers.items():
            self._tensors[modality] = read_teacher(model, modality, folder)

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        ctx.keep_hidden_states()
        self._taught: dict[str, torch.Tensor] = {}
        for modality, tensors in self._tensors.items():
            if bool(ctx.present(modality).any()):
                with replaced_tensors(ctx.model, tensors):
                    states = ctx.single_hidden_states(modality)
                if states is not None:
                    self._taught[modality] = states

    def loss(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        for modality in self.teachers:
            ctx.add(f"{self.name}/{modality}", 0.0)  # on every process, whose mean is logged
        own = ctx.own_hidden_states
        if own is None:
            return loss
        for modality, taught in self._taught.items():
            error = relative_error(own, taught, ctx.tokens_of(modality))  # [batch]
            added = self.w * (error * ctx.answer_tokens().to(error)).sum() * ctx.loss_scale()
            ctx.add(f"{self.name}/{modality}", float(added.detach()))
            loss = loss + added.to(loss)
        self._taught = {}
        return loss


def relative_error(states: torch.Tensor, taught: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean over a row's ``tokens`` [batch, seq] of ||h - h'||^2 / ||h'||^2, 0 without any: [batch] float32.

    Args:
        states, taught: [batch, seq, hidden] h and h'.
    """
    states, taught, tokens = states.float(), taught.float(), tokens.to(states.device)
    error = (states - taught).pow(2).sum(-1) / taught.pow(2).sum(-1).clamp(min=1e-12)  # [batch, seq]
    return (error * tokens).sum(1) / tokens.sum(1).clamp(min=1)


def read_teacher(model: nn.Module, modality: str, folder: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's adapter by their names in ``model``.

    Raises:
        MokaError: no adapter there, or one of another model.
    """
    where = f"balance: umt: teachers.{modality}: {folder}"
    path = next((p for p in (Path(folder) / "adapter", Path(folder)) if (p / "adapter_config.json").is_file()), None)
    if path is None:
        raise MokaError(
            f"{where} has no adapter. Train it first, with balance: [{{name: single_modality, modality: {modality}}}]."
        )
    own = adapter_tensors(model, _adapter_name(model))
    given = load_file(path / "adapter_model.safetensors")
    try:
        names = match_names({n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in given.items()})
    except MokaError as error:
        raise MokaError(f"{where}: {error}") from error
    config = adapter_config(model)
    theirs = json.loads((path / "adapter_config.json").read_text())
    for key in _SETTINGS if config is not None else ():
        if theirs.get(key) != getattr(config, key):
            raise MokaError(
                f"{where}: its adapter.{key} is {theirs.get(key)}, and this run's is {getattr(config, key)}. Train both with "
                "the same adapter."
            )
    return {names[name]: tensor for name, tensor in given.items() if names[name] in own}


@contextmanager
def replaced_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the adapter of ``model`` other values inside the block; not between a forward and its backward."""
    own = adapter_tensors(model, _adapter_name(model))
    with torch.no_grad():
        before = {name: own[name].clone() for name in tensors}
        try:
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
            yield
        finally:
            for name, tensor in before.items():
                own[name].copy_(tensor)


def _adapter_name(model: Any) -> str:
    active = getattr(model, "active_adapter", "default")
    return active if isinstance(active, str) else active[0]
