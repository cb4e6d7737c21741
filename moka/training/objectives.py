"""Stage 1 without the language model: pull projected media tokens to the embeddings of their caption."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput

from moka.host import HostIds, upload
from moka.modeling import MokaForConditionalGeneration
from moka.modeling.composed import media_inputs

from .processes import everyones

TEMPERATURE = 0.07
_NONE = -1  # no token, in a padded table of captions


class EmbeddingAlignment(nn.Module):
    """Trains encoders and projectors so that each media token lands near its caption in the embedding space.

    loss = mean |p - e|^2 / mean |e|^2  +  cross-entropy of cos(p, e') / 0.07 over the distinct captions of the batch

    where p is a projected token and e the mean embedding of the caption's tokens. Costs no pass through the language
    model: seconds where the language-modelling objective takes minutes. The wrapper is the module that a distributed
    trainer sees, so that gradients are synchronised.
    """

    def __init__(self, model: MokaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._no_split_modules = model._no_split_modules  # FSDP's units

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        media_tokens: int | None = None,
        media_places: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        host_ids: HostIds | None = None,
        **unused: Any,
    ) -> ModelOutput:
        """The loss. What `caption_targets` gives, for the whole optimizer step, comes from ``share_captions``; without it
        this batch stands for itself.
        """
        media, host_ids = media_inputs(locals()), host_ids or HostIds()
        if captions is None or media_tokens is None or media_places is None or wanted is None:
            held = _on_host(labels, mm_token_type_ids, host_ids)
            captions, media_places, wanted = caption_targets(*held, set(caption_ids(held[0])), labels.device)
            media_tokens = len(media_places)
        embeds = self.model.merge_embeddings(input_ids, mm_token_type_ids, host_ids, **media).float()
        tokens = embeds.flatten(0, 1).index_select(0, media_places)  # [media tokens, hidden]
        targets = self._embed(captions)  # [captions, hidden]
        distance = (tokens - targets.index_select(0, wanted)).pow(2).sum() / targets.pow(2).sum(-1).mean()
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(targets, dim=-1).T  # [media tokens, captions]
        contrast = F.cross_entropy(cosine / TEMPERATURE, wanted, reduction="sum")
        return ModelOutput(loss=(distance + contrast) / max(1, media_tokens))

    @torch.no_grad()
    def _embed(self, captions: torch.Tensor) -> torch.Tensor:
        """Mean embedding of each caption: [captions, longest] -> [captions, hidden]."""
        mask = (captions != _NONE).float()[..., None]
        embedded = self.model.get_input_embeddings()(captions.clamp(min=0)).float() * mask
        return embedded.sum(1) / mask.sum(1).clamp(min=1)


def caption_ids(labels: torch.Tensor) -> list[tuple[int, ...]]:
    """The tokens of each row's caption, without the one that closes it: the same in all, it tells nothing."""
    return [tuple(row[row != -100][:-1].tolist()) for row in labels]


def table(captions: set[tuple[int, ...]]) -> torch.Tensor:
    """Distinct captions in a fixed order, padded: int64 [captions, longest]."""
    longest = max(1, *map(len, captions)) if captions else 1
    return torch.tensor([[*caption, *[_NONE] * (longest - len(caption))] for caption in sorted(captions)])


def caption_targets(
    labels: torch.Tensor, types: torch.Tensor, captions: set[tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """What the media tokens of a batch are drawn to, found in host memory and brought to ``device``.

    Args:
        labels, types: [batch, seq], in host memory.
        captions: of the whole optimizer step.
    Returns:
        [captions, longest]: `table`; [media tokens of the batch]: row * seq + column of each; likewise: its caption.
    """
    place = {caption: index for index, caption in enumerate(sorted(captions))}
    places = (types > 0).flatten().nonzero().squeeze(1)
    wanted = torch.tensor([place[caption] for caption in caption_ids(labels)])[places // labels.shape[1]]
    return upload([one.numpy() for one in (table(captions), places, wanted)], device)


def share_captions(batches: list[dict[str, Any]]) -> None:
    """Give each accumulated batch the captions and the number of media tokens of the whole optimizer step.

    Over all batches and processes, so that the loss is that of one big batch, however it is cut up.
    """
    held = [_on_host(b["labels"], b["mm_token_type_ids"], b.get("host_ids") or HostIds()) for b in batches]
    own = {caption for labels, _ in held for caption in caption_ids(labels)}
    captions, counts = zip(*everyones((own, sum(int((types > 0).sum()) for _, types in held))), strict=True)
    for batch, (labels, types) in zip(batches, held, strict=True):
        found = caption_targets(labels, types, set().union(*captions), batch["labels"].device)
        batch["captions"], batch["media_places"], batch["wanted"] = found
        batch["media_tokens"] = sum(counts)


def _on_host(labels: torch.Tensor, types: torch.Tensor, known: HostIds) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [batch, seq] in host memory; read back where ``known`` does not hold them."""
    held = known.read({"labels": labels, "mm_token_type_ids": types}).values()
    first, second = (ids for ids in held if ids is not None)
    return first, second
