"""Stage 1 without the language model: pull projected media tokens to the embeddings of their caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput

from moka.modeling import MokaForConditionalGeneration

TEMPERATURE = 0.07


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

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        **unused: torch.Tensor,
    ) -> ModelOutput:
        embeds = self.model.merge_embeddings(
            input_ids, mm_token_type_ids, pixel_values=pixel_values, input_features=input_features
        ).float()  # [batch, seq, hidden]
        captions, which = self._captions(labels)  # [captions, hidden], [batch]
        row, _ = (mm_token_type_ids > 0).nonzero(as_tuple=True)
        tokens = embeds[mm_token_type_ids > 0]  # [media tokens, hidden]
        target = which[row]  # [media tokens]
        distance = (tokens - captions[target]).pow(2).sum(-1).mean() / captions.pow(2).sum(-1).mean()
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(captions, dim=-1).T  # [media tokens, captions]
        return ModelOutput(loss=distance + F.cross_entropy(cosine / TEMPERATURE, target))

    @torch.no_grad()
    def _captions(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean embeddings of the distinct captions in the batch, and which one each row has."""
        # The token that closes an answer is the same in all captions and tells nothing.
        longest = (labels != -100).sum(1).max().clamp(min=2) - 1
        rows = torch.stack(
            [F.pad(r[r != -100][:-1], (0, int(longest) - int((r != -100).sum()) + 1), value=-1) for r in labels]
        )
        distinct, which = rows.unique(dim=0, return_inverse=True)  # [captions, longest]
        mask = (distinct >= 0).float()[..., None]
        embedded = self.model.get_input_embeddings()(distinct.clamp(min=0)).float() * mask
        return embedded.sum(1) / mask.sum(1).clamp(min=1), which
