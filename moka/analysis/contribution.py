"""Which modality a model uses for an answer: log-likelihood of the answer's tokens by coalition of modalities.

    l(S) = 1 / T sum_t log p(y_t | y_<t, question, X_S)        mean over the T answer tokens of a sample, in nats

Three ablations answer three questions, and are never mixed in one number:

- ``tokens``: the tokens of the other modalities are masked out of attention in the decoder, with the positions that they
  had (information use);
- ``adapter``: their tokens stay, but do not go through the MokA adapter: partial-modality inference (arXiv 2506.05191,
  figure 1), in which text is a player too (adaptation use);
- ``blank``: their media are replaced by empty ones (a black picture, silence), by the caller.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from moka.adapter import MokaConfig
from moka.adapter.config import TEXT
from moka.adapter.diagnostics import active_modalities
from moka.adapter.inputs import cache_length, cache_of
from moka.adapter.layer import MokaLinear
from moka.adapter.targets import placeholder_ids
from moka.adapter.text_decoder import language_decoder
from moka.errors import MokaError, nearest

from .coalitions import (
    Coalition,
    InteractionShares,
    ShapleyValues,
    dominance_ratios,
    interaction_shares,
    shapley_values,
)

Ablation = str  # one of ABLATIONS
ABLATIONS = ("tokens", "adapter", "blank")
# Value functions. "weighted_correct" is |S| * correct, of sample-level modality valuation (arXiv 2309.06255).
VALUES = ("log_likelihood", "correct", "weighted_correct")


class Contribution:
    """Likelihoods of one batch's answers by coalition of modalities, computed on request and kept.

    Works on moka's composed models and on any Hugging Face multimodal LLM with a decoder that reads media as tokens, with a
    MokA adapter, with LoRA, or with none.

    Args:
        model: runs in eval mode, without gradients, unless `log_likelihood` is asked for them.
        batch: what its ``forward`` takes, with ``labels`` [batch, seq], -100 outside of the answers.
        blank: a coalition -> the same batch in which the media of all other modalities are empty; for ``blank``.
    Raises:
        MokaError: no labels, no supervised token, or no token of a medium.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        blank: Callable[[Coalition], Mapping[str, Any]] | None = None,
    ) -> None:
        self.model, self.batch, self._blank = model, dict(batch), blank
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor) or not (labels[:, 1:] != -100).any():
            raise MokaError(
                "labels: the batch has no answer token; give labels [batch, seq], -100 outside of the answers."
            )
        self.labels = labels
        self.rows = modality_index(model, batch)
        if not any(tokens.any() for tokens in self.rows.values()):
            raise MokaError(
                f"mm_token_type_ids: no token of the batch belongs to a medium; the model knows {list(self.rows)}."
            )
        self._known: dict[tuple[Coalition, str], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def modalities(self) -> list[str]:
        """Return the modalities other than text that the batch has."""
        return [name for name, tokens in self.rows.items() if tokens.any()]

    def players(self, ablate: Ablation = "tokens") -> list[str]:
        """Return the players of an ablation: the modalities of the batch, and text for ``adapter``."""
        return [TEXT, *self.modalities] if ablate == "adapter" else self.modalities

    def log_likelihood(
        self, coalition: Collection[str] | None = None, ablate: Ablation = "tokens", grad: bool = False
    ) -> torch.Tensor:
        """Return l(S) [batch] in nats per token, float32; NaN for a row without an answer.

        Args:
            coalition: the modalities that are available; default: all.
            ablate: how the others are taken away.
            grad: keep the graph, and the model's mode; the result is not kept.
        """
        chosen = self._checked(coalition, ablate)
        if grad:
            return self._compute(chosen, ablate)[0]
        if (chosen, ablate) not in self._known:
            # Nothing was taken away: one forward for all ablations.
            full = chosen == frozenset(self.players(ablate))
            key = (chosen, ablate) if not full else (frozenset(), "full")
            if key not in self._known:
                with evaluating(self.model), torch.no_grad():
                    self._known[key] = self._compute(chosen, ablate)
            self._known[chosen, ablate] = self._known[key]
        return self._known[chosen, ablate][0]

    def answer_distribution(
        self, coalition: Collection[str] | None = None, ablate: Ablation = "tokens"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of all tokens where an answer token is predicted, with their graph.

        Returns:
            log p [batch, places, vocabulary] float32 and the answers' tokens [batch, places], -100 where a row has none.
        """
        with self._available(self._checked(coalition, ablate), ablate) as (batch, labels):
            logits, targets = _answer_logits(self.model, batch, labels)
        return logits.log_softmax(-1), targets

    def correct(self, coalition: Collection[str] | None = None, ablate: Ablation = "tokens") -> torch.Tensor:
        """Return 1 for rows whose every answer token is the most likely one, else 0: [batch] float32.

        That is the case exactly if greedy decoding would give the answer.
        """
        self.log_likelihood(coalition, ablate)
        return self._known[self._checked(coalition, ablate), ablate][1]

    def value(
        self, function: str = "log_likelihood", ablate: Ablation = "tokens"
    ) -> Callable[[Coalition], torch.Tensor]:
        """Return v(S) for one of `VALUES`."""
        if function not in VALUES:
            raise MokaError(
                f"value: unknown function {function!r}; allowed: {', '.join(VALUES)}.{nearest(function, VALUES)}"
            )
        if function == "log_likelihood":
            return lambda coalition: self.log_likelihood(coalition, ablate)
        if function == "correct":
            return lambda coalition: self.correct(coalition, ablate)
        return lambda coalition: len(coalition) * self.correct(coalition, ablate)

    def lift(self, coalition: Collection[str] | None = None, ablate: Ablation = "tokens") -> torch.Tensor:
        """Return l(S) - l({}) [batch]: nats per token that the coalition adds to the question only."""
        return self.log_likelihood(coalition, ablate) - self.log_likelihood((), ablate)

    def dominance_ratio(self, ablate: Ablation = "tokens") -> dict[str, torch.Tensor]:
        """Return rho_m [batch], above 1 for the modality that explains the answer better; see `dominance_ratios`."""
        return dominance_ratios(self.value(ablate=ablate), self.players(ablate))

    def shapley(self, function: str = "log_likelihood", ablate: Ablation = "tokens") -> ShapleyValues:
        """Return the Shapley value of each player, [batch] each."""
        return shapley_values(self.value(function, ablate), self.players(ablate))

    def shares(self, first: str, second: str, ablate: Ablation = "tokens") -> InteractionShares:
        """Return unique, redundant and synergistic shares of two modalities, all others absent."""
        return interaction_shares(self.value(ablate=ablate), first, second)

    def _checked(self, coalition: Collection[str] | None, ablate: str) -> Coalition:
        if ablate not in ABLATIONS:
            raise MokaError(
                f"ablate: unknown ablation {ablate!r}; allowed: {', '.join(ABLATIONS)}.{nearest(ablate, ABLATIONS)}"
            )
        if ablate == "blank" and self._blank is None:
            raise MokaError("ablate: 'blank' needs blank=, which gives the batch with empty media.")
        if coalition is None:
            return frozenset(self.players(ablate))
        chosen = frozenset([coalition] if isinstance(coalition, str) else coalition)
        known = {*self.rows, TEXT} if ablate == "adapter" else set(self.rows)
        for name in chosen - known:
            raise MokaError(
                f"coalition: unknown modality {name!r}; the model has {sorted(known)}.{nearest(name, known)}"
            )
        return chosen & frozenset(self.players(ablate))

    def _compute(self, coalition: Coalition, ablate: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one forward: log-likelihood and correctness [batch] each."""
        with self._available(coalition, ablate) as (batch, labels):
            return _answer_likelihood(self.model, batch, labels)

    @contextmanager
    def _available(self, coalition: Coalition, ablate: str) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Give the batch and its labels with which, inside the block, only the coalition is available."""
        batch, absent = dict(self.batch), [name for name in self.modalities if name not in coalition]
        context: Any = nullcontext()
        if ablate == "blank" and absent and self._blank is not None:
            batch = dict(self._blank(coalition))
        elif ablate == "adapter" and coalition != frozenset(self.players(ablate)):
            context = active_modalities(self.model, coalition)
        elif ablate == "tokens" and absent:
            hidden = torch.stack([self.rows[name] for name in absent]).any(0)  # [batch, seq]
            if batch.get("interaction_ids") is not None:
                ids = batch["interaction_ids"]
                batch["interaction_ids"] = ids.masked_fill(hidden.to(ids.device), 0)
            context = hidden_from_attention(self.model, hidden)
        with context:
            yield batch, self.labels if ablate != "blank" else batch["labels"]


def modality_index(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return which tokens belong to each modality other than text: name -> [batch, seq] bool.

    By ``mm_token_type_ids``, or else by the placeholder ids that the model's configuration names, as MokA's routing.

    Raises:
        MokaError: neither is known.
    """
    config, media = adapter_config(model) or MokaConfig(), media_modalities(model)
    types, tokens = batch.get("mm_token_type_ids"), batch.get("input_ids")
    if types is not None:
        return {name: torch.isin(types, torch.tensor(ids, device=types.device)) for name, ids in media.items()}
    ids_by_name = config.modality_token_ids or placeholder_ids(unwrapped(model), config)
    if tokens is None or not ids_by_name:
        raise MokaError(
            f"mm_token_type_ids: the configuration of {type(unwrapped(model)).__name__} names no placeholder token, so "
            "the tokens of media are unknown. Pass mm_token_type_ids [batch, seq] (0 text, 1 image, 2 video, 3 audio)."
        )
    return {
        name: torch.isin(
            tokens, torch.tensor(list(ids_by_name.get(name, ())), dtype=tokens.dtype, device=tokens.device)
        )
        for name in media
    }


def media_modalities(model: nn.Module) -> dict[str, list[int]]:
    """Return the modalities other than text that the model tells apart, with their token types."""
    config = adapter_config(model) or MokaConfig()
    return {name: list(ids) for name, ids in config.modalities.items() if name != TEXT}


def adapter_config(model: nn.Module) -> MokaConfig | None:
    """Return the configuration of the MokA adapter that is in use, None if there is none."""
    for module in model.modules():
        if isinstance(module, MokaLinear):
            for name in module.adapters_in_use():
                return module.moka_config[name]
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP's, DeepSpeed's, a compiled module's and peft's wrappers."""
    found: Any = model
    while True:
        inner = found.get_base_model() if isinstance(found, PeftModel) else getattr(found, "module", None)
        inner = getattr(found, "_orig_mod", None) if inner is None else inner
        if not isinstance(inner, nn.Module):
            return found
        found = inner


@contextmanager
def hidden_from_attention(model: nn.Module, hidden: torch.Tensor, decoding: bool = False) -> Iterator[None]:
    """Mask tokens out of the decoder's attention inside the block. All positions stay as they are.

    The mask is changed on its way into the decoder, after the outer model computed positions from the original one (such as
    Qwen-VL's three-dimensional positions).

    Args:
        hidden: [batch, seq] bool, True for tokens that no other token attends to.
        decoding: they are those of a prompt, and what is decoded after it is seen; only forwards of this thread are changed.
    """
    decoder = language_decoder(unwrapped(model))
    parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]
    thread = threading.get_ident()

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if decoding and threading.get_ident() != thread:
            return None
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        embeds = given.get("inputs_embeds")
        embeds = given.get("input_ids") if embeds is None else embeds
        places = extended(hidden, given) if decoding and embeds is not None else hidden
        if embeds is None or (not decoding and tuple(embeds.shape[:2]) != tuple(hidden.shape)):
            got = None if embeds is None else list(embeds.shape[:2])
            raise MokaError(
                f"mm_token_type_ids is {list(hidden.shape)}, and the decoder was given {got} tokens: this model expands "
                "media inside. Pass the ids of the expanded tokens."
            )
        given["attention_mask"] = hidden_in(given.get("attention_mask"), places.to(embeds.device))
        return (), given

    handle = decoder.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def extended(hidden: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """Return the hidden tokens of a prompt [prompts, seq] for a forward of a decoder inside ``generate``: [batch, keys].

    A row for each beam; columns for the decoded tokens, which are seen, and for all places of a static cache.
    """
    tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    batch, seq = tokens.shape[:2]
    mask, cache = given.get("attention_mask"), cache_of(given)
    made = [one for one in (mask.values() if isinstance(mask, Mapping) else [mask]) if one is not None]
    keys = made[0].shape[-1] if made else cache_length(cache) + seq
    hidden = hidden.to(tokens.device).repeat_interleave(batch // len(hidden), 0)
    return nn.functional.pad(hidden, (0, keys - hidden.shape[1]))


def hidden_in(mask: Any, hidden: torch.Tensor) -> Any:
    """Return an attention mask, of any kind that transformers passes, without the ``hidden`` keys [batch, seq]."""
    if mask is None:
        return (~hidden).long()
    if isinstance(mask, Mapping):
        return {
            name: None if own is None and "linear" in name else hidden_in(own, hidden) for name, own in mask.items()
        }
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.masked_fill(hidden, 0)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        columns = hidden[:, None, None, :]
        if mask.dtype == torch.bool:
            return mask & ~columns
        return mask.masked_fill(columns, torch.finfo(mask.dtype).min)
    raise MokaError(
        f"attention: a mask of kind {type(mask).__name__} cannot be changed; load the model with "
        "attn_implementation='sdpa' or 'eager'."
    )


def _answer_likelihood(
    model: nn.Module, batch: dict[str, Any], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean log-probability of each row's answer tokens, and whether each is the most likely: [batch] each."""
    logits, targets = _answer_logits(model, batch, labels)
    answer = targets != -100
    chosen = targets.clamp(min=0)[..., None]
    log_p = (logits.gather(-1, chosen)[..., 0] - logits.logsumexp(-1)) * answer
    tokens = answer.sum(-1)
    wrong = (answer & (logits.argmax(-1) != targets)).any(-1) | (tokens == 0)
    return log_p.sum(-1) / torch.where(tokens > 0, tokens, torch.nan), (~wrong).float()


def _answer_logits(model: nn.Module, batch: dict[str, Any], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [batch, places, vocabulary] float32 where some row predicts an answer token, and these tokens or -100."""
    given = dict(batch)
    if given.get("interaction_ids") is not None or given.get("question_mask") is not None:
        given.pop("labels", None)  # otherwise the labels say which text is the question
    columns = (labels[:, 1:] != -100).any(0).nonzero().flatten()  # positions that predict an answer token in some row
    takes = "logits_to_keep" in inspect.signature(type(unwrapped(model)).forward).parameters
    keeps = takes and "labels" not in given
    if keeps:
        given["logits_to_keep"] = columns.to(_device(model))
    elif takes and model.training:  # a composed model would give only those of supervised positions
        given["logits_to_keep"] = torch.arange(labels.shape[1], device=_device(model))
    logits = model(**given).logits
    logits = (logits if keeps else logits[:, columns.to(logits.device)]).float()  # [batch, columns, vocabulary]
    return logits, labels[:, columns.to(labels.device) + 1].to(logits.device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, mode in modes.items():
            stack.callback(setattr, module, "training", mode)
        model.eval()
        yield
