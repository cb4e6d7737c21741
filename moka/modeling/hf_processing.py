"""``ChatProcessor``: chats with decoded media as inputs of a Hugging Face multimodal LLM, by that model's own processor.

messages -> chat template -> text -> processor (placeholders expanded, media prepared) -> ids, media
         -> text before and after each answer -> labels          turn markers -> interaction_ids
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import BatchFeature

from moka.adapter import turn_markers
from moka.adapter.turns import question_groups
from moka.errors import MokaError

from .configuration import DEFAULT_TYPE_IDS, MEDIA_TYPE_IDS
from .encoders.audio import samples_at
from .processing import IGNORE, INTERACTIONS, ChatCalls, Interaction, TooLongError

# Of a medium: the argument of processors, and the part of a processor that prepares it.
_MEDIA = {
    "image": ("images", "image_processor"),
    "video": ("videos", "video_processor"),
    "audio": ("audio", "feature_extractor"),
}
_PER_TOKEN = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "interaction_ids", "token_type_ids")


class ChatProcessor(ChatCalls):
    """Encodes chats for a Hugging Face multimodal LLM; ``encode`` and ``pad`` are those of `MokaProcessor`.

    Args:
        processor: the model's own (`transformers.ProcessorMixin`), with a chat template and a fast tokenizer.
        interaction: "own_turn": a medium interacts with the question of its own user turn (default);
            "first_turn": with the first question of the chat.
        decoding: how media files are to be decoded for it, as in `MokaProcessor`.
    """

    def __init__(
        self, processor: Any, interaction: Interaction = "own_turn", decoding: dict[str, Any] | None = None
    ) -> None:
        if interaction not in INTERACTIONS:
            raise MokaError(f"interaction: {interaction!r} is not one of {', '.join(INTERACTIONS)}.")
        self.processor, self.interaction, self.decoding = processor, interaction, dict(decoding or {})
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.name = type(processor).__name__
        if not getattr(self.tokenizer, "is_fast", False):
            raise MokaError(
                f"processor: {self.name} has {type(self.tokenizer).__name__}, which gives no positions of tokens in a text; "
                "give a processor with a fast tokenizer."
            )
        self.markers = turn_markers(processor)
        self._special = np.array(
            sorted({*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}), np.int64
        )

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:
        """Return modality -> {"type_ids": its ``mm_token_type_ids``} of the media that the processor prepares."""
        kinds = [kind for kind, (_, part) in _MEDIA.items() if getattr(self.processor, part, None) is not None]
        takes = {MEDIA_TYPE_IDS[kind] for kind in kinds}
        return {name: {"type_ids": ids} for name, ids in DEFAULT_TYPE_IDS.items() if takes.intersection(ids)}

    @property
    def sampling_rate(self) -> int | None:
        """Return the rate (Hz) of sound that the processor takes; None if it takes none."""
        return getattr(getattr(self.processor, "feature_extractor", None), "sampling_rate", None)

    @property
    def chat_template(self) -> str | None:
        """Return the processor's chat template, as Jinja text."""
        return getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template

    def check_chat(self, messages: list[dict]) -> None:
        """Refuse a chat that the template would refuse; media need not be decoded.

        Raises:
            MokaError: the template's reason.
        """
        self._render([{**message, "content": _parts(message)} for message in messages])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files."""
        self.processor.save_pretrained(str(folder))

    def encode(  # type: ignore[override]
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
    ) -> dict[str, Any]:
        """Encode one chat.

        Args:
            truncate: taken for `MokaProcessor`'s sake; text is never shortened here.
        Returns:
            lists of equal length ``input_ids``, ``attention_mask``, ``labels`` (-100 except in assistant messages and the token
            that ends them), ``mm_token_type_ids``, ``interaction_ids``, and the processor's tensors of media.
        Raises:
            TooLongError: longer than ``max_length`` tokens.
            MokaError: a medium that the processor cannot prepare; a template whose answers cannot be found in the tokens.
        """
        messages = [{**message, "content": _parts(message)} for message in messages]
        media = self._media(messages)
        text = self._render(messages, add_generation_prompt)
        # As in `ProcessorMixin.apply_chat_template`.
        special = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        if "audio" in media:
            media["sampling_rate"] = self.sampling_rate
        row = dict(
            self.processor(
                text=[text], return_tensors="pt", return_mm_token_type_ids=True, add_special_tokens=special, **media
            )
        )
        ids = row["input_ids"][0].numpy()
        if max_length is not None and len(ids) > max_length:
            raise TooLongError(
                f"{len(ids)} tokens do not fit into max_length {max_length}. Shorten the text, or give fewer or smaller media"
            )
        if "mm_token_type_ids" not in row:
            row["mm_token_type_ids"] = torch.from_numpy(self._types(ids))[None]
        encoded = {name: value[0].tolist() if name in _PER_TOKEN else value for name, value in row.items()}
        encoded["labels"] = self._labels(ids, messages, text)
        encoded["interaction_ids"] = self._groups(ids, row["mm_token_type_ids"][0].numpy())
        return encoded

    def pad(self, encoded: Sequence[dict[str, Any]], padding_side: str = "left") -> BatchFeature:
        """Encoded chats to one batch: ids padded to the longest, media joined, smaller ones padded with zeros."""
        longest = max(len(one["input_ids"]) for one in encoded)
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORE}
        batch: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(name for one in encoded for name in one):
            rows = [one[name] for one in encoded if name in one]
            if name in _PER_TOKEN:
                pads = [[fill.get(name, 0)] * (longest - len(row)) for row in rows]
                joined = [p + row if padding_side == "left" else row + p for p, row in zip(pads, rows, strict=True)]
                batch[name] = torch.tensor(joined)
            elif isinstance(rows[0], torch.Tensor):
                sizes = [max(size) for size in zip(*(row.shape[1:] for row in rows), strict=True)]
                missing = [[want - have for want, have in zip(sizes, row.shape[1:], strict=True)] for row in rows]
                spread = [[n for size in reversed(sides) for n in (0, size)] for sides in missing]
                batch[name] = torch.cat(
                    [torch.nn.functional.pad(row, sides) for row, sides in zip(rows, spread, strict=True)]
                )
        return BatchFeature(batch)

    def _media(self, messages: list[dict]) -> dict[str, Any]:
        """Return the arguments of the processor for the media, in order of appearance."""
        found: dict[str, Any] = {}
        for part in (part for message in messages for part in message["content"] if part["type"] != "text"):
            kind = part["type"]
            argument, needed = _MEDIA[kind]
            if getattr(self.processor, needed, None) is None:
                takes = [one for one, (_, own) in _MEDIA.items() if getattr(self.processor, own, None) is not None]
                raise MokaError(
                    f"a part of type {kind!r}: {self.name} has no {needed}; it takes text{''.join(f', {one}' for one in takes)}. "
                    "Use a model with that modality, or leave the part out"
                )
            medium = part[kind]
            if kind == "audio":
                medium = samples_at(medium, self.processor.feature_extractor.sampling_rate)
            found.setdefault(argument, []).append(medium)
        return found

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, KeyError) as error:
            raise MokaError(f"the chat template of {self.name} refuses the chat: {error}") from error

    def _labels(self, ids: np.ndarray, messages: list[dict], text: str) -> list[int]:
        """Return the ids of answers, -100 elsewhere: a turn of the assistant is found in ``ids`` by its own tokens."""
        labels = np.full_like(ids, IGNORE)
        turns = list(self._answers(messages, text))
        if not turns:
            return labels.tolist()
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        plain, offsets = np.array(tokens["input_ids"]), np.array(tokens["offset_mapping"])
        stop = len(ids)
        for opened, start, end in reversed(turns):
            inside = np.flatnonzero((offsets[:, 0] >= opened) & (offsets[:, 1] <= end))
            answer = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end))
            merged = ((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()
            if merged or not len(answer):
                raise MokaError(
                    f"the tokenizer of {self.name} joins an answer with the text before it, so that training and generation "
                    f"would read other tokens: {text[max(0, start - 20) : start + 20]!r}"
                )
            turn = plain[inside[0] : answer[-1] + 1]
            stop = _last_occurrence(ids, turn, stop)
            if stop < 0:
                raise MokaError(
                    f"the answer {text[start:end][:60]!r} is not among the tokens that {self.name} made; it changes text "
                    "other than placeholders of media"
                )
            begin = stop + answer[0] - inside[0]
            closing = np.flatnonzero(np.isin(plain[answer], self.tokenizer.all_special_ids))
            length = int(closing[0]) + 1 if len(closing) else _without_space(self.tokenizer, plain[answer])
            labels[begin : begin + length] = ids[begin : begin + length]
        return labels.tolist()

    def _answers(self, messages: list[dict], text: str) -> Iterator[tuple[int, int, int]]:
        """Return for each turn of the assistant where in ``text`` it opens, its answer starts, and the turn ends."""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, prompt = self._render(messages[:i]), self._render(messages[:i], True)
            after = text if i + 1 == len(messages) else self._render(messages[: i + 1])
            if not (text.startswith(prompt) and text.startswith(after) and prompt.startswith(before)):
                raise MokaError(
                    f"the chat template of {self.name} writes a turn in another way if others follow it, so that the place of "
                    "answers is unknown. Set processor.chat_template, or give one answer a chat"
                )
            yield len(before), len(prompt), len(after)

    def _groups(self, ids: np.ndarray, types: np.ndarray) -> list[int]:
        """Return the ``interaction_ids`` of one chat."""
        media = types > 0
        allowed = ~media & ~np.isin(ids, self._special)
        groups = question_groups(ids[None], media[None], allowed[None], np.zeros_like(ids)[None], self.markers)[0][0]
        if self.interaction == "first_turn":
            groups = np.where(media, np.minimum(groups, 1), np.where(groups == 1, 1, 0))
        return groups.tolist()

    def _types(self, ids: np.ndarray) -> np.ndarray:
        """Return ``mm_token_type_ids`` of a processor that gives none, by its placeholder tokens."""
        types = np.zeros_like(ids)
        for kind, type_id in MEDIA_TYPE_IDS.items():
            token = getattr(self.processor, f"{kind}_token_id", None)
            if token is None and (name := getattr(self.processor, f"{kind}_token", None)) is not None:
                token = self.tokenizer.convert_tokens_to_ids(str(name))
            if token is not None:
                types[ids == token] = type_id
        return types


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _last_occurrence(ids: np.ndarray, run: np.ndarray, stop: int) -> int:
    """Return where ``run`` is found last in ``ids[:stop]``, -1 if nowhere."""
    for start in range(stop - len(run), -1, -1):
        if ids[start] == run[0] and np.array_equal(ids[start : start + len(run)], run):
            return start
    return -1


def _without_space(tokenizer: Any, answer: np.ndarray) -> int:
    """Return the number of tokens up to the last that is more than white space."""
    return max((i + 1 for i, token in enumerate(answer) if tokenizer.decode([token]).strip()), default=0)
