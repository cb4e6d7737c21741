"""PMR: pull the features of the slow modality towards the prototypes of the classes. For closed answers.

Fan, Xu, Wang, Wang and Guo, "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023,
https://arxiv.org/abs/2211.07089.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moka.distributed import all_gather_object, all_reduce_sum
from moka.errors import MokaError

from .features import pooled
from .strategy import BalanceStrategy, Context, Needs

Sums = dict[str, dict[str, list[Any]]]  # modality -> class -> [sum of features [hidden], number]


@dataclass
class PMR(BalanceStrategy):
    """Add the prototypical cross-entropy of the modality whose features tell the classes apart worse.

        sim_m,k = -||phi_m - c_m,k||,     PCE_m = -log softmax_k(sim_m)_y,     s_m = mean softmax_k(sim_m)_y
        L = NLL + alpha * PCE of the modality with the lowest s_m
        c_m,k <- momentum * c_m,k + (1 - momentum) * mean of phi_m over the samples of class k

    Source: CVPR 2023, https://arxiv.org/abs/2211.07089, as in the authors' code (without the entropy term of the paper).
    Adapted: a class is an answer, token by token, so that it is for closed answers to one kind of question; phi_m is the mean
    hidden state at the modality's tokens after the first quarter of the decoder; prototypes are means over the
    training steps of an interval, not over a sweep of 10 % of the data each epoch; scores are those of the step before.

    Args:
        alpha: weight of PCE; paper 1 to 3.
        momentum: of the prototypes; paper 0.2.
        every: steps of an interval, after which prototypes change.
        end: share of the training in which it acts.
        max_classes: more different answers are refused: they are open.
        random_side: a control: the modality is drawn for each step.
    """

    alpha: float = 1.0
    momentum: float = 0.2
    every: int = 50
    end: float = 1.0
    max_classes: int = 100
    random_side: bool = False
    name: ClassVar[str] = "pmr"
    changes: ClassVar[frozenset[str]] = frozenset({"prototypical loss"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._check(alpha=(0, 100), momentum=(0, 1), every=(1, 1_000_000), end=(0, 1), max_classes=(2, 1_000_000))
        self.prototypes: dict[str, dict[str, torch.Tensor]] = {}  # modality -> class -> [hidden] float32
        self.weak = ""  # the modality with the lowest score in the step before
        self.sums: Sums = {}  # of the interval
        self._new: Sums = {}  # of the step, of this process
        self._scores: dict[str, list[float]] = {}

    def needs(self) -> Needs:
        return Needs()

    def prepare(self, batch: Mapping[str, Any], ctx: Context) -> None:
        if ctx.progress <= self.end:
            ctx.keep_hidden_states()

    def loss(self, loss: torch.Tensor, ctx: Context) -> torch.Tensor:
        if self.weak:
            ctx.add(f"{self.name}/loss/{self.weak}", 0.0)  # on every process, whose mean is logged
        states = ctx.own_hidden_states
        if states is None:
            return loss
        answers = answers_of(ctx.batch["labels"])
        for name in ctx.media:
            if bool(ctx.present(name).any()):
                phi = pooled(states, ctx.tokens_of(name))  # [batch, hidden]
                self._collect(name, phi.detach(), answers, ctx.present(name))
                loss = loss + self._added(name, phi, answers, ctx).to(loss)
        return loss

    def _collect(self, name: str, phi: torch.Tensor, answers: list[str], present: torch.Tensor) -> None:
        """Add the features of a micro-batch to the sums of their classes."""
        for one, answer, here in zip(phi.double().cpu(), answers, present.tolist(), strict=True):
            if here and answer:
                _add(self._new, name, answer, one, 1)

    def _added(self, name: str, phi: torch.Tensor, answers: list[str], ctx: Context) -> torch.Tensor:
        """Return alpha * PCE in the trainer's unit if ``name`` is the weak modality, else 0; and note its score."""
        known = self.prototypes.get(name, {})
        classes = list(known)
        compared = ctx.compared(name).tolist()
        rows = [i for i, answer in enumerate(answers) if answer in known and compared[i]]
        if len(classes) < 2 or not rows:
            return phi.new_zeros(())
        targets = torch.tensor([classes.index(answers[i]) for i in rows], device=phi.device)
        log_p = prototype_log_probabilities(phi[rows], torch.stack(list(known.values())).to(phi.device))
        own = log_p.gather(1, targets[:, None])[:, 0]  # [rows]
        sums = self._scores.setdefault(name, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + float(own.detach().double().exp().sum()), sums[1] + len(rows)
        if name != self.weak:
            return phi.new_zeros(())
        found = self.alpha * (-own * ctx.answer_tokens().to(own)[rows]).sum() * ctx.loss_scale()
        ctx.add(f"{self.name}/loss/{name}", float(found.detach()))
        return found

    def update(self, handles: Any, ctx: Context) -> None:
        flat = all_reduce_sum([value for name in ctx.media for value in self._scores.get(name, (0.0, 0.0))])
        self._scores = {}
        scores = {name: s / n for name, s, n in zip(ctx.media, flat[::2], flat[1::2], strict=True) if n}
        for name, score in scores.items():
            ctx.log(f"{self.name}/score/{name}", score)
        if len(scores) > 1:
            lowest = min(scores, key=lambda name: scores[name])
            self.weak = ctx.draw(self.name, ctx.step).choice(sorted(scores)) if self.random_side else lowest
        for part in all_gather_object(self._new):
            for name, own in part.items():
                for answer, (total, number) in own.items():
                    _add(self.sums, name, answer, total, number)
        self._new = {}
        self._refuse_open_answers()

    def _refuse_open_answers(self) -> None:
        for name, own in self.sums.items():
            classes = len({*own, *self.prototypes.get(name, {})})
            if classes > self.max_classes:
                raise MokaError(
                    f"balance: {self.name}: the answers are open: {classes} different ones so far, and max_classes is "
                    f"{self.max_classes}. It needs classes; raise max_classes if these are, or take it out."
                )

    def interval(self, handles: Any, ctx: Context) -> None:
        if (ctx.step + 1) % self.every:
            return
        for name, own in self.sums.items():
            known = self.prototypes.setdefault(name, {})
            for answer in sorted(own):
                total, number = own[answer]
                mean = (total / number).float()
                before = known.get(answer)
                known[answer] = mean if before is None else self.momentum * before + (1 - self.momentum) * mean
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"prototypes": self.prototypes, "weak": self.weak, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prototypes, self.weak, self.sums = state["prototypes"], state["weak"], state["sums"]


def answers_of(labels: torch.Tensor) -> list[str]:
    """Return the answer of each row of ``labels`` [batch, seq] as its token ids; empty if a row has none."""
    return [" ".join(str(token) for token in row if token != -100) for row in labels.tolist()]


def prototype_log_probabilities(phi: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Return log softmax_k(-||phi - c_k||) [batch, classes] of ``phi`` [batch, hidden] and c [classes, hidden]."""
    distance = torch.cdist(phi, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return (-distance).log_softmax(-1)


def _add(sums: Sums, name: str, answer: str, total: torch.Tensor, number: int) -> None:
    own = sums.setdefault(name, {}).setdefault(answer, [torch.zeros_like(total), 0])
    own[0], own[1] = own[0] + total, own[1] + number
