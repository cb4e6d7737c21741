"""Questions about COCO images for instruction tuning (stage 2): LLaVA-Instruct-150K and A-OKVQA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.files import JsonRecords
from moka.data.formats.general import llava
from moka.data.formats.questions import LETTER_INSTRUCTION, LETTERS, lettered, question_sample
from moka.errors import MokaError

ANSWERS = {
    "letter": LETTER_INSTRUCTION,
    "text": "Answer with the text of the right option directly.",
}


def _llava_instruct(root: Path, split: str, *, file: str) -> Rows:
    path = find_file(root, file, format="llava-instruct", layout=_LLAVA_LAYOUT)
    items = JsonRecords(path)
    folders = [root / folder for folder in ("train2017", "coco/train2017", "images/train2017")]
    # Without any of them the first is reported to be absent, unless media_root names another.
    return Rows(items, llava, items.where, next((folder for folder in folders if folder.is_dir()), folders[0]))


def _a_okvqa(root: Path, split: str, *, answer: str) -> Rows:
    path = find_file(root, f"aokvqa_v1p0_{split}.json", format="a-okvqa", layout=_AOKVQA_LAYOUT)
    items = JsonRecords(path)
    media_root = root / "coco" if (root / "coco").is_dir() else root
    return Rows(items, partial(_choice_question, split=split, answer=answer), items.where, media_root)


def _choice_question(record: dict[str, Any], split: str, answer: str) -> dict[str, Any]:
    choices, right = (
        record["choices"],
        record.get("correct_choice_idx"),
    )  # the test split is published without the index
    if not isinstance(choices, list) or not 1 < len(choices) <= len(LETTERS):
        raise MokaError(f"field 'choices' is {choices!r:.60}; a list of two or more options is expected.")
    if right is not None and right not in range(len(choices)):
        raise MokaError(f"field 'correct_choice_idx' is {right!r}; a number from 0 to {len(choices) - 1} is expected.")
    given = (LETTERS if answer == "letter" else choices)[right] if right is not None else None
    return question_sample(
        record["question_id"],
        [("image", f"{split}2017/{record['image_id']:012d}.jpg")],
        lettered(record["question"].strip(), choices, instruction=ANSWERS[answer]),
        given,
        **{key: record[key] for key in ("choices", "direct_answers", "rationales") if key in record},
    )


_LLAVA_LAYOUT = """
    llava_instruct_150k.json
    train2017/, coco/train2017/ or images/train2017/  COCO's training images, such as 000000033471.jpg
"""
_AOKVQA_LAYOUT = """
    aokvqa_v1p0_train.json, aokvqa_v1p0_val.json, aokvqa_v1p0_test.json
    train2017/, val2017/, test2017/ (also in coco/)  COCO's images, such as 000000299207.jpg
"""

FORMATS = (
    Format(
        name="llava-instruct",
        about="LLaVA-Instruct-150K: conversations, descriptions and reasoning about COCO images "
        "(huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K).",
        media=("image",),
        splits=("train",),
        layout=_LLAVA_LAYOUT,
        fields={
            "id": "a string",
            "image": "file name of the COCO image; set media_root to the folder of the images if it is elsewhere",
            "conversations": "LLaVA's: turns from human, with `<image>` in the first, and gpt",
        },
        read=_llava_instruct,
        options={"file": Option("llava_instruct_150k.json", "the annotation file, such as one of its three parts")},
    ),
    Format(
        name="a-okvqa",
        about="A-OKVQA: multiple-choice questions about COCO images that need knowledge (github.com/allenai/aokvqa). "
        "The test split has no answers.",
        media=("image",),
        splits=("train", "val", "test"),
        layout=_AOKVQA_LAYOUT,
        fields={
            "question_id": "the id",
            "image_id": "number of the COCO image: {split}2017/ and the number in 12 digits",
            "question, choices": "asked with lettered options",
            "correct_choice_idx": "position of the right option, from 0",
            "direct_answers, rationales": "kept with the sample",
        },
        read=_a_okvqa,
        options={
            "answer": Option("letter", "what the model answers: `letter`, or the `text` of the option", tuple(ANSWERS))
        },
    ),
)
