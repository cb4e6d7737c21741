"""``MokaProcessor``: chat messages with decoded media in, model inputs out, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import BatchFeature

from moka.errors import MokaError
from moka.io import write_json
from moka.type_checks import from_mapping, read_dataclass

from .chat import Segment, resolve_template, segments
from .configuration import MEDIA_TYPE_IDS, MokaModelConfig
from .encoders import ENCODERS, build_front_end, features_name
from .language_models import load_tokenizer
from .media import Features
from .placeholders import check_token_ids, token_beyond_vocabulary

CONFIG_NAME = "moka_processor.json"
IGNORE = -100
Interaction = Literal["own_turn", "first_turn"]  # which question a medium interacts with
INTERACTIONS = get_args(Interaction)


@dataclass
class ProcessorModality:
    """How the processor prepares one modality.

    Args:
        encoder: its configuration, with ``type``.
        type_ids: the ``mm_token_type_ids`` that it serves.
        tokens: placeholders for one item.
        front_end: settings of the encoder's front end; default: those that follow from the encoder.
    """

    encoder: dict[str, Any]
    type_ids: list[int]
    tokens: int
    front_end: dict[str, Any] | None = None


@dataclass
class ProcessorSettings:
    """The content of ``moka_processor.json``; the fields are those of `MokaProcessor`."""

    modalities: dict[str, dict[str, Any]]
    vocab_size: int
    chat_template: str | None = None
    interaction: Interaction = "own_turn"
    decoding: dict[str, Any] = field(default_factory=dict)


class TooLongError(MokaError):
    """A sample that does not fit the context even with its text shortened."""


class ChatCalls:
    """The calls that processors of chats have in common, by their ``encode``, ``pad`` and ``tokenizer``."""

    tokenizer: Any

    def __call__(
        self,
        messages: list[dict] | list[list[dict]],
        *,
        add_generation_prompt: bool = True,
        max_length: int | None = None,
        padding_side: str = "left",
    ) -> BatchFeature:
        """One chat or a list of chats to a padded batch of tensors; see ``encode`` for the fields."""
        if not messages:
            raise MokaError("The processor was given no chat.")
        chats = [messages] if isinstance(messages[0], dict) else messages
        encoded = [self.encode(c, add_generation_prompt=add_generation_prompt, max_length=max_length) for c in chats]
        return self.pad(encoded, padding_side=padding_side)

    def encode(self, messages: list[dict], **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def pad(self, encoded: Sequence[dict[str, Any]], padding_side: str = "left") -> BatchFeature:
        raise NotImplementedError

    def decode(self, token_ids: Any) -> str:
        """Generated token ids to text, special tokens removed."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def batch_decode(self, sequences: Any) -> list[str]:
        return [self.decode(ids) for ids in sequences]


class MokaProcessor(ChatCalls):
    """Renders the chat template, expands media placeholders, and writes ids, labels and media tensors.

    Args:
        tokenizer: the backbone's tokenizer.
        modalities: name -> {"encoder": its configuration, "type_ids": [...], "tokens": placeholders per item}, and
            "front_end": its settings where they are known (else they are those of the encoder). Where an encoder names
            marks that the tokenizer has (Qwen2.5-VL's own), they are around each of its items.
        vocab_size: of the backbone; placeholder ids start there, so no token of the tokenizer may have an id beyond.
        chat_template: "chatml", "bare", "plain", Jinja text, or None for the tokenizer's own.
        interaction: "own_turn": a medium interacts with the question of its own user turn (default);
            "first_turn": with the first question of the chat.
        decoding: how media files are to be decoded for it, as it was in training: what
            ``moka.data.media.MediaDecoding.to_dict`` gives. The processor only remembers it.
    """

    def __init__(
        self,
        tokenizer: Any,
        modalities: dict[str, dict],
        vocab_size: int,
        chat_template: str | None = None,
        interaction: Interaction = "own_turn",
        decoding: dict[str, Any] | None = None,
    ) -> None:
        if interaction not in INTERACTIONS:
            raise MokaError(f"interaction: {interaction!r} is not one of {', '.join(INTERACTIONS)}.")
        self.tokenizer = tokenizer
        self.modalities = modalities
        self.vocab_size = vocab_size
        self.interaction = interaction
        self.decoding = {"video_frames": 10, "audio_windows": None, **(decoding or {})}
        self.chat_template = resolve_template(chat_template, tokenizer)
        for name, spec in modalities.items():
            from_mapping(ProcessorModality, spec, f"modalities.{name}")
        self.front_ends = {
            name: build_front_end(spec["encoder"], spec.get("front_end")) for name, spec in modalities.items()
        }
        self._owner = {type_id: name for name, spec in modalities.items() for type_id in spec["type_ids"]}
        words = {token.content for token in tokenizer.added_tokens_decoder.values()}
        marks = {name: ENCODERS[spec["encoder"]["type"]].marks for name, spec in modalities.items()}
        self._marks = {name: pair for name, pair in marks.items() if words.issuperset(pair)}
        self._scaffold_ids: dict[str, list[int]] = {}
        # What can end an answer. Many tokenizers name a few of their special tokens only; bos opens what follows.
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._ending_ids = special - {tokenizer.bos_token_id, tokenizer.unk_token_id} | {tokenizer.eos_token_id}
        if tokenizer.eos_token_id is None:
            raise MokaError("The tokenizer has no eos_token, so no answer could end; set tokenizer.eos_token.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._type_ids = {name: spec["type_ids"] for name, spec in modalities.items()}
        check_token_ids(tokenizer, vocab_size, self._type_ids)

    @classmethod
    def from_model(cls, model, tokenizer: Any, **kwargs: Any) -> MokaProcessor:
        """The processor that fits a ``MokaForConditionalGeneration``, which learns its end of an answer."""
        config: MokaModelConfig = model.config
        modalities = {
            name: {
                "encoder": spec["encoder"],
                "type_ids": spec["type_ids"],
                "tokens": model.projectors[name].num_tokens,
            }
            for name, spec in config.modalities.items()
        }
        processor = cls(tokenizer, modalities, config.vocab_size, **kwargs)
        processor.teach_end(model)
        return processor

    def teach_end(self, model) -> None:
        """Make ``model.generate`` stop at the token that ends an answer here: a base model's own may be another.

        Raises:
            MokaError: the model's vocabulary has another size, and so its placeholders have other ids.
        """
        if model.config.vocab_size != self.vocab_size:
            raise MokaError(
                f"vocab_size: the processor was made for {self.vocab_size} tokens, the model's language model has "
                f"{model.config.vocab_size}, so placeholders of media would have other ids. Use the processor saved with "
                "this model, or make one with MokaProcessor.from_model."
            )
        stops = model.generation_config.eos_token_id
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        if self.end_token_id not in stops:
            model.generation_config.eos_token_id = [*stops, self.end_token_id]

    @property
    def end_token_id(self) -> int:
        """The token that training puts at the end of every answer, for ``generate`` to stop at."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        return next(label for label in reversed(self.encode(chat)["labels"]) if label != IGNORE)

    def check_chat(self, messages: list[dict]) -> None:
        """Refuse a chat that the template or the tokenizer would refuse; media need not be decoded.

        Raises:
            MokaError: the template's reason, or text with a lone surrogate.
        """
        blank = [
            {**m, "content": [p if p["type"] == "text" else {**p, p["type"]: (None,)} for p in m["content"]]}
            if isinstance(m["content"], list)
            else m
            for m in messages
        ]  # no template looks at a medium
        for segment in segments(blank, self.tokenizer, self.chat_template, False):
            try:
                segment.text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise MokaError(
                    f"text with half of a surrogate pair ({segment.text[error.start : error.end]!r})"
                ) from error

    def encode(  # type: ignore[override]
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
    ) -> dict[str, Any]:
        """One chat to unpadded model inputs.

        Returns: lists of equal length ``input_ids``, ``attention_mask``, ``labels`` (-100 except in assistant
        messages), ``mm_token_type_ids``, ``interaction_ids``; and, of each medium present, ``pixel_values`` and
        ``input_features`` [items, ...] float32. A medium given as ``Features`` goes into ``image_features`` or
        ``audio_features`` [items, tokens, width]. Of a sample whose text was shortened also ``cut_from``, its tokens before.

        Raises:
            TooLongError: longer than ``max_length`` tokens; with ``truncate`` only when shortening the text (never a
                media span, never to nothing) does not help.
            MokaError: a medium that this model has no encoder for.
        """
        runs = [
            self._run(part)
            for segment in segments(messages, self.tokenizer, self.chat_template, add_generation_prompt)
            for part in self._with_marks(segment)
        ]
        self._close_answers(runs)
        total = sum(len(run["ids"]) for run in runs)
        if max_length is not None and total > max_length:
            self._shorten(runs, total, max_length, truncate)
        out: dict[str, Any] = {
            "input_ids": [i for run in runs for i in run["ids"]],
            "labels": [i for run in runs for i in (run["ids"] if run["supervised"] else [IGNORE] * len(run["ids"]))],
            "mm_token_type_ids": [run["type"] for run in runs for _ in run["ids"]],
            "interaction_ids": [run["group"] for run in runs for _ in run["ids"]],
        }
        out["attention_mask"] = [1] * len(out["input_ids"])
        if len(out["input_ids"]) < total:
            out["cut_from"] = total
        for name in self.modalities:
            for key in self._input_names(name):
                items = [
                    item for run in runs if run["modality"] == name and run["input"] == key for item in run["items"]
                ]
                if items:
                    out[key] = np.stack(items)
        return out

    def pad(self, encoded: Sequence[dict[str, Any]], padding_side: str = "left") -> BatchFeature:
        """Encoded chats to one batch: ids padded to the longest, media stacked over the full batch."""
        longest = max(len(one["input_ids"]) for one in encoded)
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORE}
        batch: dict[str, torch.Tensor] = {}
        packed = ("position_ids",) if "position_ids" in encoded[0] else ()
        for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "interaction_ids", *packed):
            rows = []
            for one in encoded:
                missing = [fill.get(name, 0)] * (longest - len(one[name]))
                rows.append(missing + one[name] if padding_side == "left" else one[name] + missing)
            batch[name] = torch.tensor(rows)
        for name in self.modalities:
            for key in self._input_names(name):
                items = [one[key] for one in encoded if key in one]
                if items:
                    batch[key] = torch.from_numpy(np.concatenate(items))
        return BatchFeature(batch)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the tokenizer's files and ``moka_processor.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        # The front ends' own settings: those of a published encoder are not to be looked up again, or guessed offline.
        front_ends = {name: front_end.to_dict() for name, front_end in self.front_ends.items()}
        modalities = {name: {**spec, "front_end": front_ends[name]} for name, spec in self.modalities.items()}
        own = ProcessorSettings(modalities, self.vocab_size, self.chat_template, self.interaction, self.decoding)
        write_json(folder / CONFIG_NAME, asdict(own))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> MokaProcessor:
        """Read what ``save_pretrained`` wrote; keyword arguments override saved settings.

        Raises:
            MokaError: a file is absent or damaged.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise MokaError(f"{folder} has no {CONFIG_NAME}: it is no folder of a moka processor.")
        settings = asdict(read_dataclass(ProcessorSettings, path))
        return cls(load_tokenizer(folder, "adapter folder"), **{**settings, **kwargs})

    def _input_names(self, modality: str) -> tuple[str, str]:
        """Return what the model calls the encoder's input, and its features."""
        encoder = ENCODERS[self.modalities[modality]["encoder"]["type"]]
        return encoder.input_name, features_name(encoder)

    def _with_marks(self, segment: Segment) -> list[Segment]:
        """The segment; a medium whose encoder names marks that the tokenizer has: each item between them."""
        name = self._owner.get(MEDIA_TYPE_IDS[segment.medium]) if segment.medium is not None else None
        marks = self._marks.get(name) if name is not None else None
        if not marks:
            return [segment]
        start, end = (Segment("template", segment.turn, text=mark) for mark in marks)
        frames = segment.value if isinstance(segment.value, (list, tuple)) else [segment.value]
        return [part for frame in frames for part in (start, replace(segment, value=frame), end)]

    def _run(self, segment: Segment) -> dict[str, Any]:
        """Token ids of one segment, with what is known of them."""
        run = {
            "segment": segment,
            "type": 0,
            "group": 0,
            "modality": None,
            "items": [],
            "supervised": segment.role == "assistant" and segment.medium is None,
        }
        if segment.medium is not None:
            type_id = MEDIA_TYPE_IDS[segment.medium]
            name = self._owner.get(type_id)
            if name is None:
                raise MokaError(
                    f"This model has no encoder for {segment.medium}; its modalities: {', '.join(self.modalities)}. Add "
                    "one under model.modalities, or leave the medium out."
                )
            frames = segment.value if isinstance(segment.value, (list, tuple)) else [segment.value]
            run["items"] = [
                frame.values if isinstance(frame, Features) else np.asarray(self.front_ends[name](frame), np.float32)
                for frame in frames
            ]
            run["modality"], run["type"] = name, type_id
            run["input"] = self._input_names(name)[isinstance(frames[0], Features)]
            run["ids"] = [self.vocab_size + type_id - 1] * (self.modalities[name]["tokens"] * len(frames))
        elif segment.role == "template":
            if segment.text not in self._scaffold_ids:
                ids = self.tokenizer(segment.text, add_special_tokens=False)["input_ids"]
                beyond = next((index for index in ids if index >= self.vocab_size), None)
                if beyond is not None:
                    token = self.tokenizer.convert_ids_to_tokens(beyond)
                    raise token_beyond_vocabulary("chat_template", token, beyond, self.vocab_size, self._type_ids)
                self._scaffold_ids[segment.text] = ids
            run["ids"] = list(self._scaffold_ids[segment.text])
        else:
            # What people write is text, also where it looks like a special token.
            run["ids"] = self.tokenizer(segment.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if segment.medium is not None or segment.role == "user":
            run["group"] = 1 if self.interaction == "first_turn" and segment.medium is not None else segment.turn
            if self.interaction == "first_turn" and segment.medium is None and segment.turn > 1:
                run["group"] = 0
        return run

    def _close_answers(self, runs: list[dict[str, Any]]) -> None:
        """Supervise the token that ends an answer: the template's own, or the tokenizer's end of sequence."""
        is_answer = [run["segment"].role == "assistant" for run in runs] + [False]
        for last in reversed(range(len(runs))):
            if not is_answer[last] or is_answer[last + 1]:
                continue
            first = last
            while first and is_answer[first - 1]:
                first -= 1
            blank = not any(run["segment"].text.strip() for run in runs[first : last + 1])
            for run in runs[first : last + 1]:
                run["supervised"] = run["supervised"] and not blank
            after = runs[last + 1] if last + 1 < len(runs) else None
            ids = after["ids"] if after is not None else []
            end = next((position for position, token in enumerate(ids) if token in self._ending_ids), None)
            if after is None or end is None:
                closing = [self.tokenizer.eos_token_id]
            else:
                closing, after["ids"] = ids[: end + 1], ids[end + 1 :]
            closer = {"segment": runs[last]["segment"], "ids": closing, "supervised": not blank, "closing": True}
            runs.insert(last + 1, {"type": 0, "group": 0, "modality": None, "items": [], **closer})

    def _shorten(self, runs: list[dict[str, Any]], total: int, max_length: int, truncate: bool) -> None:
        question = sum(len(r["ids"]) for r in runs if r["segment"].role == "user" and r["segment"].medium is None)
        sizes = f"the sample has {total} tokens (question: {question}), the context {max_length}"
        if not truncate:
            raise TooLongError(f"Too long: {sizes}. Shorten the question, or raise the context length.")
        excess = total - max_length
        # The answer's end goes first, then the question's; at least one token of each stays.
        for role in ("assistant", "system", "user"):
            for run in reversed(runs):
                if run["segment"].role == role and run["segment"].medium is None and not run.get("closing"):
                    cut = min(excess, max(0, len(run["ids"]) - 1))
                    run["ids"] = run["ids"][: len(run["ids"]) - cut]
                    excess -= cut
        if excess > 0:
            lost = ", and nothing would be left of the question" if question else ""
            raise TooLongError(f"Too long: {sizes}; media spans are never cut{lost}. Raise the context length.")
