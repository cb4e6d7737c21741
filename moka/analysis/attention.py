"""Attention of a decoder by modality: how much of it the answer gives to each modality's tokens, layer by layer.

The mass of a modality grows with its number of tokens, so both figures are given: in total, and per token; they tell different
stories (arXiv 2508.10552). Attention is read with the "eager" implementation, which returns its weights; the values may differ in
the last digits from those of the implementation that the model usually runs with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moka.adapter.config import TEXT
from moka.adapter.layer import MokaLinear
from moka.adapter.text_decoder import decoder_blocks
from moka.errors import MokaError

from .contribution import Contribution, evaluating, modality_index, unwrapped


@dataclass(frozen=True)
class AttentionByModality:
    """Attention of the positions that predict the answers, averaged over them and over the rows that have the modality."""

    mass: dict[str, torch.Tensor]  # modality -> [layers, heads] sum of the weights on its tokens
    tokens: dict[str, float]  # modality -> its mean number of tokens in a row
    alignment: dict[str, torch.Tensor]  # modality -> [layers, heads] mean cosine of the queries and its mean key
    rows: dict[str, int]  # modality -> rows that have it, and an answer

    def per_token(self) -> dict[str, torch.Tensor]:
        """Return the mass divided by the number of tokens: [layers, heads]."""
        return {name: mass / self.tokens[name] for name, mass in self.mass.items()}

    def imbalance_rate(self, first: str, second: str) -> torch.Tensor:
        """Return the attention imbalance rate of RollingQ: [layers, heads], above 0 if the queries prefer ``first``.

            AIR = mean_i [cos(q_i, mean key of first) - cos(q_i, mean key of second)]

        Queries and keys as their projections give them, before positions are put in. Source: RollingQ, ICML 2025.
        """
        return self.alignment[first] - self.alignment[second]


def attention_by_modality(model: nn.Module, batch: Mapping[str, Any]) -> AttentionByModality:
    """Read the attention weights of every block of the decoder in one forward, without gradients.

    Args:
        model: with attention whose modules have ``q_proj`` and ``k_proj``; others (linear attention) are left out.
        batch: what its ``forward`` takes, with ``labels``.
    Raises:
        MokaError: no labels, no media, or no such attention.
    """
    labels = Contribution(model, batch).labels
    media = modality_index(model, batch)
    valid = batch.get("attention_mask")
    valid = torch.ones_like(labels) if valid is None else valid
    asks = nn.functional.pad(labels[:, 1:] != -100, (0, 1))  # [batch, seq] positions that predict an answer token
    tokens = {TEXT: valid.bool() & ~torch.stack(list(media.values())).any(0), **media}
    tokens = {name: here for name, here in tokens.items() if here.any()}
    mass: dict[str, list[torch.Tensor]] = {name: [] for name in tokens}
    alignment: dict[str, list[torch.Tensor]] = {name: [] for name in tokens}

    def record(weights: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        """weights [batch, heads, seq, seq]; query, key [batch, heads, seq, head_dim]."""
        device = weights.device
        asking = asks.to(device)[:, None].float()  # [batch, 1, seq]
        questions = asking.sum(-1).clamp(min=1)  # [batch, 1]
        for name, here in tokens.items():
            here = here.to(device)
            rows = here.any(1) & asks.to(device).any(1)
            on = (weights.float() * here[:, None, None]).sum(-1)  # [batch, heads, seq]
            mass[name].append(((on * asking).sum(-1) / questions)[rows].mean(0))
            weight = here[:, None, :, None].float()
            mean_key = (key.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
            cosine = nn.functional.cosine_similarity(query.float(), mean_key, dim=-1)  # [batch, heads, seq]
            alignment[name].append(((cosine * asking).sum(-1) / questions)[rows].mean(0))

    with evaluating(model), torch.no_grad(), _recorded(model, record):
        model(**batch)
    if not mass[TEXT]:
        raise MokaError(
            f"attention: no block of {type(unwrapped(model)).__name__} has attention with q_proj and k_proj that returns "
            "its weights."
        )
    counts = {name: here.sum(1)[here.any(1)].float().mean().item() for name, here in tokens.items()}
    stacked = {name: torch.stack(each).cpu() for name, each in mass.items()}
    rows = {name: int((here.any(1) & asks.to(here.device).any(1)).sum()) for name, here in tokens.items()}
    return AttentionByModality(
        stacked, counts, {name: torch.stack(each).cpu() for name, each in alignment.items()}, rows
    )


@contextmanager
def _recorded(model: nn.Module, record: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call ``record`` for every attention of the decoder's blocks inside the block, with attention run as "eager"."""
    inner: Any = unwrapped(model)
    modules: list[Any] = [
        m for m in decoder_blocks(inner)[1].modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")
    ]
    owners = [m for m in inner.modules() if hasattr(m, "set_attn_implementation")]
    before = [owner.config._attn_implementation for owner in owners]
    handles = []
    for module in modules:
        projected: dict[str, torch.Tensor] = {}

        def keep(name: str, into: dict) -> Callable:
            return lambda part, args, output: into.__setitem__(name, output)

        def after(part: Any, args: tuple, output: Any, into: dict = projected) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, torch.Tensor) or weights.dim() != 4:
                return
            batch, heads, seq, _ = weights.shape
            query, key = (into.pop(name) for name in ("q_proj", "k_proj"))
            width = query.shape[-1] // heads
            query = query.view(batch, seq, heads, width).transpose(1, 2)
            key = key.view(batch, seq, -1, width).transpose(1, 2)
            record(weights, query, key.repeat_interleave(heads // key.shape[1], dim=1))

        handles += [module.q_proj.register_forward_hook(keep("q_proj", projected))]
        handles += [module.k_proj.register_forward_hook(keep("k_proj", projected)), module.register_forward_hook(after)]
    try:
        for owner in owners[:1]:
            owner.set_attn_implementation("eager")
        yield
    finally:
        for owner, name in zip(owners, before, strict=True):  # the outermost first: it sets those inside too
            owner.set_attn_implementation(name)
        for handle in handles:
            handle.remove()


@contextmanager
def interaction_off(model: nn.Module) -> Iterator[None]:
    """Switch the interaction of every active MokA adapter off inside the block: lambda is 0."""
    configs = {
        id(c): c
        for m in model.modules()
        if isinstance(m, MokaLinear)
        for c in (m.moka_config[name] for name in m.adapters_in_use())
    }
    if not configs:
        raise MokaError(f"interaction_off: {type(model).__name__} has no MokA adapter.")
    before = {key: config.interaction_weight for key, config in configs.items()}
    for config in configs.values():
        config.interaction_weight = 0.0
    try:
        yield
    finally:
        for key, config in configs.items():
            config.interaction_weight = before[key]


def conditional_utilization(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return how much the interaction adds to each answer's log-likelihood: [batch] nats per token.

    The path from the question to the media is MokA's only path between modalities. The rate of Greedy (arXiv 2202.05306) is the
    relative loss of accuracy without it: compute it from ``Contribution.correct`` inside `interaction_off`.
    """
    with_interaction = Contribution(model, batch).log_likelihood()
    with interaction_off(model):
        return with_interaction - Contribution(model, batch).log_likelihood()
