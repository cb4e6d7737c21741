"""Stage 1 without the language model: pull projected media tokens to the embeddings of their caption."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput

from moka.distributed import all_gather_object
from moka.modeling import MokaForConditionalGeneration
from moka.modeling.model import MEDIA_INPUTS

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
        captions: torch.Tensor | None = None,
        media_tokens: int | None = None,
        media_places: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        **batch: Any,
    ) -> ModelOutput:
        """Return the loss. ``share_captions`` passes the targets of the full optimizer step (`caption_targets`); without
        them the loss is that of this batch only. ``batch`` has the media, and fields that are not used here.
        """
        types_on_host = mm_token_type_ids.cpu()
        if captions is None or media_tokens is None or media_places is None or wanted is None:
            on_host = labels.cpu()
            every = set(caption_ids(on_host))
            captions, media_places, wanted = caption_targets(on_host, types_on_host, every, labels.device)
            media_tokens = len(media_places)
        media = {name: batch.get(name) for name in MEDIA_INPUTS}
        embeds = self.model.merge_embeddings(input_ids, types_on_host, **media).float()
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
    """The tokens of each row's caption, without the one that closes it: the same in all, it says nothing."""
    return [tuple(row[row != -100][:-1].tolist()) for row in labels]


def caption_targets(
    labels: torch.Tensor, types: torch.Tensor, captions: set[tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """Find the targets of a batch's media tokens in host memory, and copy them to ``device``.

    Args:
        labels, types: [batch, seq], in host memory.
        captions: of the full optimizer step.
    Returns:
        [captions, longest]: distinct captions in a fixed order, padded; [media tokens of the batch]: row * seq + column of each; likewise: its caption.
    """
    ordered = sorted(captions)
    longest = max(1, *map(len, ordered)) if ordered else 1
    table = torch.tensor([[*caption, *[_NONE] * (longest - len(caption))] for caption in ordered])
    place = {caption: index for index, caption in enumerate(ordered)}
    places = (types > 0).flatten().nonzero().squeeze(1)
    wanted = torch.tensor([place[caption] for caption in caption_ids(labels)])[places // labels.shape[1]]
    return [one.to(device, non_blocking=True) for one in (table, places, wanted)]


def share_captions(batches: list[dict[str, Any]]) -> None:
    """Give each accumulated batch the captions and the number of media tokens of the full optimizer step.

    Over all batches and processes, so that the loss is that of one big batch, however it is cut up.
    """
    on_host = [(batch["labels"].cpu(), batch["mm_token_type_ids"].cpu()) for batch in batches]
    own = {caption for labels, _ in on_host for caption in caption_ids(labels)}
    captions, counts = zip(*all_gather_object((own, sum(int((types > 0).sum()) for _, types in on_host))), strict=True)
    for batch, (labels, types) in zip(batches, on_host, strict=True):
        found = caption_targets(labels, types, set().union(*captions), batch["labels"].device)
        batch["captions"], batch["media_places"], batch["wanted"] = found
        batch["media_tokens"] = sum(counts)
