"""Samples with decoded media as model inputs, and batches of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from moka.data.media import MediaDecoding, SubstitutingDataset, UnusableError
from moka.data.schema import check_sample
from moka.errors import MokaError
from moka.modeling.hf_processing import ChatProcessor
from moka.modeling.processing import IGNORE, Interaction, MokaProcessor, TooLongError


def encode_sample(
    processor: MokaProcessor, sample: dict[str, Any], max_length: int | None, sample_id: Any = None
) -> tuple[dict[str, Any], int | None]:
    """Return a sample as model inputs for training, its text shortened to fit, and how many tokens it had if it was.

    Raises:
        UnusableError: its media are too long, or no token is supervised.
    """
    try:
        encoded = processor.encode(sample["messages"], max_length=max_length, truncate=True)
    except TooLongError as error:
        raise UnusableError(str(error)) from error
    if all(label == IGNORE for label in encoded["labels"]):
        raise UnusableError("no supervised token: the assistant's text is empty")
    cut_from = encoded.pop("cut_from", None)
    return {**encoded, "sample_id": str(sample.get("id", sample_id))}, cut_from


class EncodedDataset(SubstitutingDataset):
    """Samples as model inputs, for training.

    Text is shortened to fit ``max_length``; a sample that cannot be (its media are too long) or that has nothing to learn from
    is replaced by another, and counted in ``dropped``. So is, unless ``on_bad_media`` is "error", one that the chat template
    or a front end refuses.
    """

    lengths: Any = None  # of the samples (`moka.data.lengths`), if batches are grouped by them

    def __init__(
        self,
        dataset: Any,
        processor: Any,
        max_length: int | None,
        seed: int = 0,
        report_path: str | os.PathLike[str] | None = None,
        on_bad_media: str = "error",
    ) -> None:
        super().__init__(dataset, seed, report_path)
        self.processor, self.max_length, self.on_bad_media = processor, max_length, on_bad_media

    @property
    def dropped(self) -> dict[int, str]:
        """Index -> reason of every sample replaced so far; with a report also by the other loader workers and ranks."""
        return {index: record["reason"] for index, record in self.reported.records("replaced").items()}

    def make(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
        try:
            encoded, cut_from = encode_sample(self.processor, sample, self.max_length, index)
        except UnusableError:
            raise
        except Exception as error:  # a template that refuses the chat, a tokenizer, features of another width
            reason = " ".join(str(error).split())
            if self.on_bad_media == "error":
                raise MokaError(f"{self.where(index)}: sample {sample.get('id')!r}: {reason}") from error
            raise UnusableError(reason) from error
        if cut_from is not None:
            reason = f"its {cut_from:,} tokens were cut to {self.max_length:,}: the end of its text is lost"
            self.reported.add(index, encoded["sample_id"], reason, "shortened")
        return encoded

    def note(self, index: int, sample: dict[str, Any], error: Exception) -> None:
        self.reported.add(index, sample.get("id", str(index)), str(error), "replaced")


class Collator:
    """Encoded samples to one padded batch of tensors. Left padding aligns the answers, so that few positions carry loss.

    ``sample_ids`` (a list of text, one for each row) names the samples of a batch, for messages; no model takes it.
    """

    def __init__(self, processor: Any, padding_side: str = "left") -> None:
        self.processor, self.padding_side = processor, padding_side

    def __call__(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.processor.pad(encoded, padding_side=self.padding_side))
        batch["sample_ids"] = [str(one.get("sample_id", "")) for one in encoded]
        return batch


class MultimodalCollator:
    """Collate chats with pictures, videos and sound into batches of a Hugging Face multimodal LLM, for any trainer.

        Trainer(model, args, train_dataset=samples, data_collator=moka.MultimodalCollator(processor))

    A sample is ``{"messages": [...]}`` in the format of `moka.data.schema`, media as files or decoded. The trainer must hand
    samples over as they are: ``remove_unused_columns=False``, for TRL also ``dataset_kwargs={"skip_prepare_dataset": True}``.

    Args:
        processor: the model's own, from ``AutoProcessor.from_pretrained``.
        max_length: longest chat in tokens; default: any.
        padding_side: "right" or "left".
        decoding: how media files are decoded.
        interaction: which question a medium interacts with, see `ChatProcessor`.

    Returns of a call:
        what the model takes: ``input_ids``, ``attention_mask``, ``labels`` (of the assistant's answers only),
        ``mm_token_type_ids``, ``interaction_ids`` [batch, seq], and the processor's tensors of media.
    Raises:
        MokaError: a sample that is not a chat, a medium that cannot be read or that the model does not take, no answer, a chat
            that is too long. The sample is named.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        padding_side: str = "right",
        decoding: MediaDecoding | None = None,
        interaction: Interaction = "own_turn",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise MokaError(f"padding_side: {padding_side!r} is not one of left, right.")
        self.processor, self.max_length, self.padding_side = (
            ChatProcessor(processor, interaction),
            max_length,
            padding_side,
        )
        self.decoding = decoding or MediaDecoding()

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        encoded = []
        for i, sample in enumerate(samples):
            sample = check_sample(sample, f"sample {i} of the batch")
            try:
                messages = self.decoding.decode_sample(sample)["messages"]
                encoded.append(self.processor.encode(messages, max_length=self.max_length))
            except MokaError as error:
                raise MokaError(f"sample {sample['id']!r}: {error}") from error
        return dict(self.processor.pad(encoded, padding_side=self.padding_side))
