"""Stage 1 without the language model: pull projected media tokens to the embeddings of their caption."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput

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
        media_tokens: torch.Tensor | None = None,
        **unused: Any,
    ) -> ModelOutput:
        """The loss. ``captions`` [captions, longest] and ``media_tokens`` are those of the whole optimizer step, from
        ``share_captions``; without them this batch stands for itself.
        """
        media = media_inputs(locals())
        embeds = self.model.merge_embeddings(input_ids, mm_token_type_ids, **media).float()  # [batch, seq, hidden]
        own = caption_ids(labels)
        if captions is None or media_tokens is None:
            captions, media_tokens = table(set(own)).to(labels.device), (mm_token_type_ids > 0).sum()
        targets = self._embed(captions)  # [captions, hidden]
        place = {tuple(t for t in row if t != _NONE): i for i, row in enumerate(captions.tolist())}
        which = torch.tensor([place[caption] for caption in own], device=labels.device)  # [batch]
        row, _ = (mm_token_type_ids > 0).nonzero(as_tuple=True)
        tokens = embeds[mm_token_type_ids > 0]  # [media tokens, hidden]
        distance = (tokens - targets[which[row]]).pow(2).sum() / targets.pow(2).sum(-1).mean()
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(targets, dim=-1).T  # [media tokens, captions]
        contrast = F.cross_entropy(cosine / TEMPERATURE, which[row], reduction="sum")
        return ModelOutput(loss=(distance + contrast) / media_tokens.clamp(min=1))

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


def share_captions(batches: list[dict[str, Any]]) -> None:
    """Give each accumulated batch the captions and the number of media tokens of the whole optimizer step.

    Over all batches and processes, so that the loss is that of one big batch, however it is cut up.
    """
    own = {caption for batch in batches for caption in caption_ids(batch["labels"])}
    count = sum(int((batch["mm_token_type_ids"] > 0).sum()) for batch in batches)
    captions, counts = zip(*everyones((own, count)), strict=True)
    for batch in batches:
        device = batch["labels"].device
        batch["captions"] = table(set().union(*captions)).to(device)
        batch["media_tokens"] = torch.tensor(sum(counts), device=device)
