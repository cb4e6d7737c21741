"""Decoding that fuses forwards with one modality each: each next token is chosen from a mixture of their logits.

    logits = sum_m w_m logits(question, modality m),     w_m ~ exp(-H_m), H_m the entropy of m's next token, or w_m = 1 / M

The first weights are those of MLA (Zhang et al., CVPR 2024, https://arxiv.org/abs/2311.10707), for one model; equal ones of
models that were trained on a modality each are UME (Du et al., ICML 2023, https://arxiv.org/abs/2305.01233).

Each forward belongs to a ``generate`` of its own, with its own cache, in a thread of its own. They run one after the other,
and meet at every token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from moka.errors import MokaError

from .contribution import hidden_from_attention, modality_index

Weights = Literal["entropy", "equal"]
Generate = Callable[..., torch.Tensor]


def fused_generate(
    models: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    generate: Callable[[nn.Module, Mapping[str, Any]], Generate],
    weights: Weights,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the tokens [batch, prompt + new] that ``generate`` of every model gives, with one mixture of their logits.

    A row has the forwards of the modalities that it has; one without media has all of them, which are equal for one model.

    Args:
        models: modality -> the model that sees it and no other; the same one for all, or others.
        batch: the prompt, with ``input_ids`` [batch, seq].
        generate: (model, inputs) -> its ``generate`` with these inputs, which takes keyword arguments.
        kwargs: for each ``generate``; beams are possible, sampling is not.
    Raises:
        MokaError: sampling.
    """
    if kwargs.get("do_sample"):
        raise MokaError(
            "decoding: entropy-fusion and ensembles choose the same token in every forward; leave do_sample out."
        )
    tokens = {name: modality_index(model, batch) for name, model in models.items()}  # [batch, seq] each
    rows = torch.stack([own[name].any(1) for name, own in tokens.items()])  # [M, batch]
    rows = rows | ~rows.any(0)
    calls = []
    for name, counts in zip(models, rows.any(1).tolist(), strict=True):
        others = [own for other, own in tokens[name].items() if other != name]
        if counts:
            calls.append(_Call(models[name], torch.stack(others).any(0) if others else None, batch, generate, kwargs))
    rows = rows[rows.any(1)]
    return _Meeting(calls, lambda scores: mixed(torch.stack(scores), rows, weights)).tokens()


def mixed(logits: torch.Tensor, rows: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Return the mixture of logits [M, batch, vocabulary]: [batch, vocabulary] float32.

        entropy: w_m = exp(max_k H_k - H_m) / sum_j exp(max_k H_k - H_j),    H_m: of softmax(logits of m), in nats

    Args:
        rows: [M, prompts] bool, which of them count for a prompt; a prompt may have several rows (beams), one after the other.
    """
    logits = logits.float()
    rows = rows.to(logits.device).repeat_interleave(logits.shape[1] // rows.shape[1], 1)  # [M, batch]
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # [M, batch]
    sure = -entropy if weights == "entropy" else torch.zeros_like(entropy)
    share = sure.masked_fill(~rows, float("-inf")).softmax(0)[..., None]  # [M, batch, 1]
    return torch.where(share > 0, share * logits, 0.0).sum(0)


class _Call:
    """One ``generate``, of which the tokens ``hidden`` [batch, seq] are not seen."""

    def __init__(
        self, model: nn.Module, hidden: torch.Tensor | None, batch: Mapping[str, Any], generate: Any, kwargs: dict
    ) -> None:
        self.model, self.hidden, self.kwargs = model, hidden, kwargs
        inputs = dict(batch)
        if hidden is not None and inputs.get("interaction_ids") is not None:
            ids = inputs["interaction_ids"]
            inputs["interaction_ids"] = ids.masked_fill(hidden.to(ids.device), 0)
        self.generate = generate(model, inputs)

    def __call__(self, processor: LogitsProcessor) -> torch.Tensor:
        more = self.kwargs.get("logits_processor") or []
        kwargs = {**self.kwargs, "logits_processor": LogitsProcessorList([*more, processor])}
        with torch.no_grad():
            if self.hidden is None:
                return self.generate(**kwargs)
            with hidden_from_attention(self.model, self.hidden, decoding=True):
                return self.generate(**kwargs)


class _Meeting:
    """Runs calls in threads, of which one works at a time, and replaces the logits of each by the mixture of those of all."""

    def __init__(self, calls: Sequence[_Call], mix: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        self.calls, self.mix = calls, mix
        self.scores: list[Any] = [None] * len(calls)
        self.results: list[Any] = [None] * len(calls)
        self.arrived = self.rounds = self.finished = 0
        self.mixture: Any = None
        self.error: BaseException | None = None
        self.turn = threading.Condition()  # whoever has its lock works

    def tokens(self) -> torch.Tensor:
        """Return the tokens, which are those of every call."""
        threads = [threading.Thread(target=self._run, args=(k,), daemon=True) for k in range(len(self.calls))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interruption: the threads end at their next token
            self.error = error
            raise
        if self.error is not None:
            raise self.error
        return self.results[0]

    def exchange(self, place: int, scores: torch.Tensor) -> torch.Tensor:
        """Wait for the logits of all calls, and return their mixture."""
        self.scores[place], mine = scores, self.rounds
        self.arrived += 1
        if self.arrived == len(self.calls):
            self.mixture, self.arrived, self.rounds = self.mix(self.scores), 0, self.rounds + 1
            self.turn.notify_all()
        self.turn.wait_for(lambda: self.rounds > mine or self.finished > 0 or self.error is not None)
        if self.error is not None or self.rounds == mine:
            raise _Ended
        return self.mixture.to(scores.dtype).clone()

    def _run(self, place: int) -> None:
        with self.turn:
            try:
                self.results[place] = self.calls[place](_Mixture(self, place))
                self.finished += 1
            except _Ended:
                pass
            except BaseException as error:
                self.error = self.error or error
            self.turn.notify_all()


class _Ended(Exception):
    """Another call ended first."""


class _Mixture(LogitsProcessor):
    def __init__(self, meeting: _Meeting, place: int) -> None:
        self.meeting, self.place = meeting, place

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.meeting.exchange(self.place, scores)
