"""Batches: media tokens, the question about them, the answer.

visual ... visual  audio ... audio  question ... question  answer ... answer       training
text ... text  visual ... visual  audio ... audio  question ... question           a prompt
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch

from moka import MokaError

from .reference import Masks

# transformers' ids (0 text, 1 image, 2 video, 3 audio), and three modalities more.
MODALITIES = {"text": [0], "visual": [1, 2], "audio": [3], "point": [4], "depth": [5], "touch": [6]}


def modalities(count: int) -> dict[str, list[int]]:
    """The first ``count`` modalities and their values in ``mm_token_type_ids``; text first."""
    if not 1 <= count <= len(MODALITIES):
        raise MokaError(f"modalities: {count} was asked for; there are 1 (text only) to {len(MODALITIES)}.")
    return dict(list(MODALITIES.items())[:count])


@dataclass
class Batch:
    """The arguments of a forward; ``keep`` and ``targets`` are of the supervised positions only."""

    ids: torch.Tensor  # [batch, seq]
    types: torch.Tensor  # [batch, seq] mm_token_type_ids
    groups: torch.Tensor  # [batch, seq] interaction_ids
    mask: torch.Tensor | None  # [batch, seq] attention_mask; None: no padding
    keep: torch.Tensor  # [kept] positions whose logits the loss needs, the same in all rows
    targets: torch.Tensor  # [batch, kept]
    masks: Masks

    @property
    def tokens(self) -> int:
        """Padding is not counted."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def routing(self) -> dict[str, torch.Tensor]:
        """Return what MokA's forward takes and no other does."""
        return {"mm_token_type_ids": self.types, "interaction_ids": self.groups}


def make_batch(arguments: Namespace, vocabulary: int, answer: bool = True) -> Batch:
    """A batch of random tokens, all rows laid out equally.

    Args:
        arguments: ``batch``, ``seq``, ``media`` (share of the tokens), ``modalities``, ``question`` (share of the text
            below 1, else tokens), ``padding`` (share of every second row, on the left), ``seed``, ``device``.
        vocabulary: ids are drawn below it.
        answer: with an answer at the end, or the prompt of one.
    Raises:
        MokaError: too few tokens for the layout, or a share that is none.
    """
    source = torch.Generator().manual_seed(arguments.seed)
    types, groups, length = _layout(arguments, answer)
    types, groups = (torch.tensor(row).repeat(arguments.batch, 1) for row in (types, groups))
    ids = torch.randint(3, vocabulary, types.shape, generator=source)
    mask = None
    if arguments.padding:
        mask = torch.ones_like(types)
        mask[1::2, : round(arguments.padding * arguments.seq)] = 0
        types, groups = types * mask, groups * mask  # padding is text that takes no part in the interaction
    keep = torch.arange(arguments.seq - length - 1, arguments.seq - 1)
    of_each = [torch.isin(types, torch.tensor(own)) for own in modalities(arguments.modalities).values()]
    masks = Masks([one.to(arguments.device) for one in of_each], (of_each[0] & (groups > 0)).to(arguments.device))
    given = (ids, types, groups, mask, keep, ids[:, keep + 1])
    return Batch(*(None if one is None else one.to(arguments.device) for one in given), masks)


def _layout(arguments: Namespace, answer: bool) -> tuple[list[int], list[int], int]:
    """Type ids and interaction ids of one row, and how many tokens the answer has."""
    if not 0 <= arguments.media < 1 or not 0 <= arguments.padding < 1:
        raise MokaError(f"media {arguments.media}, padding {arguments.padding}: each is a share, 0 <= share < 1.")
    kinds = [ids[0] for ids in modalities(arguments.modalities).values()][1:]
    media = round(arguments.seq * arguments.media) if kinds else 0
    text = arguments.seq - media
    if text < 3:
        raise MokaError(f"{arguments.seq} tokens, {arguments.media:.0%} media, leave {text} of text; 3 are needed.")
    wanted = round(text * arguments.question) if arguments.question < 1 else int(arguments.question)
    question = min(max(wanted, 1), text - 2)
    rest = text - question
    spans = [media // len(kinds) + (i < media % len(kinds)) for i in range(len(kinds))]
    shown = [kind for kind, span in zip(kinds, spans, strict=True) for _ in range(span)]
    types = shown + [0] * text if answer else [0] * rest + shown + [0] * question
    groups = [1] * (media + question) + [0] * rest if answer else [0] * rest + [1] * (media + question)
    return types, groups, rest if answer else 0
