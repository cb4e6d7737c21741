"""Benchmarks of questions about pictures: MME, POPE and SEED-Bench. For evaluation, not for training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.questions import (
    Entries,
    Entry,
    among,
    lettered,
    load_json,
    question_rows,
    question_sample,
    take,
    text_lines,
)
from moka.data.jsonl import parse_line
from moka.data.vocabulary import MME_TASKS
from moka.errors import MokaError, counted

_MME_ROOTS = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", ".")
_PICTURES = (".jpg", ".jpeg", ".png")


def _read_mme(root: Path, split: str, tasks: str = "perception") -> Rows:
    base = next((root / name for name in _MME_ROOTS if (root / name / MME_TASKS["perception"][0]).is_dir()), root)
    placed: list[tuple[str, Any]] = []
    odd = 0
    for subtask in (*MME_TASKS["perception"], *MME_TASKS["cognition"]) if tasks == "all" else MME_TASKS[tasks]:
        for file in _mme_files(base, subtask):
            lines = text_lines(file)
            odd += len(lines) % 2
            placed += [(place, (subtask, file, number, line)) for number, (place, line) in enumerate(lines, start=1)]
    found = Entries(placed, lambda data: f"{data[0]}/{data[1].stem}-{data[2]}")
    notes = [
        f"{counted(odd, 'picture has', 'pictures have')} an odd number of questions; the paper's protocol leaves out the last"
    ]
    return found.rows(partial(_mme_sample, base=base), base, notes if odd else ())


def _mme_files(base: Path, subtask: str) -> list[Path]:
    folders = [base / subtask / "questions_answers_YN", base / subtask]
    for folder in folders:
        if files := sorted(folder.glob("*.txt")):
            return files
    looked = " or ".join(str(folder / "*.txt") for folder in folders)
    raise MokaError(f"format mme: looked for {looked}, and found none. Expected under the root: {MME.layout}.")


def _mme_sample(entry: Entry, base: Path) -> dict[str, Any]:
    subtask, file, _, line = entry.data
    question, tab, truth = line.rpartition("\t")
    truth = truth.strip().lower()
    if not tab or not question.strip() or truth not in ("yes", "no"):
        raise MokaError(f"is {line!r}; a question, a tab, and Yes or No are expected.")
    folder = file.parent.parent / "images" if file.parent.name == "questions_answers_YN" else file.parent
    pictures = [folder / (file.stem + suffix) for suffix in _PICTURES]
    picture = next((path for path in pictures if path.is_file()), pictures[0])
    return question_sample(
        entry.id,
        [("image", picture.relative_to(base).as_posix())],
        question.strip(),
        truth,
        category=subtask,
        group=f"{subtask}/{file.stem}",
        reference=truth,
    )


_POPE_SPLITS = ("random", "popular", "adversarial")
_POPE_FOLDERS = ("", "coco/", "output/coco/")


def _read_pope(root: Path, split: str, splits: Any = _POPE_SPLITS, images: str = "val2014") -> Rows:
    names = [splits] if isinstance(splits, str) else list(splits)
    placed: list[tuple[str, Any]] = []
    for name in names:
        file = f"coco_pope_{name}.json"
        path = find_file(root, *(folder + file for folder in _POPE_FOLDERS), format=POPE)
        placed += [(place, (name, line)) for place, line in text_lines(path)]
    found = Entries(placed, lambda data: f"{data[0]}-{take(json.loads(data[1]), 'question_id')}")
    return found.rows(partial(_pope_sample, images=images), root)


def _pope_sample(entry: Entry, images: str) -> dict[str, Any]:
    name, line = entry.data
    record = parse_line(line.encode(), "the line")
    truth = among("label", take(record, "label").lower(), ("yes", "no"))
    picture = [("image", f"{images}/{take(record, 'image')}")]
    return question_sample(entry.id, picture, take(record, "text"), truth, category=name, reference=truth)


def _read_seed_bench(root: Path, split: str, tasks: str = "image") -> Rows:
    path = find_file(root, "SEED-Bench.json", format=SEED_BENCH)
    content = load_json(path)
    names = content.get("question_type") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise MokaError(f"{path}: has no 'question_type', which names the dimensions. Use the file as it is published.")
    make = partial(_seed_sample, dimensions={str(number): name for name, number in names.items()})

    def keep(record: dict[str, Any]) -> bool:
        return tasks == "all" or record.get("data_type") in (tasks, None)  # one without is reported when it is read

    others = "videos" if tasks == "image" else "images"
    return question_rows(
        path,
        lambda record: take(record, "question_id"),
        make,
        root,
        key="questions",
        keep=keep,
        left_out=f"about {others}",
    )


def _seed_sample(entry: Entry, dimensions: dict[str, str]) -> dict[str, Any]:
    record = entry.data
    kind = take(record, "data_type", allowed=("image", "video"))
    number = take(record, "question_type_id", allowed=dimensions)
    truth = take(record, "answer", allowed="ABCD")
    image = f"SEED-Bench-image/{take(record, 'data_id')}"
    medium = image if kind == "image" else f"SEED-Bench-video/{take(record, 'question_id')}.mp4"
    options = [take(record, f"choice_{letter}") for letter in "abcd"]
    question = lettered(take(record, "question"), options)
    extra = {"category": dimensions[number], "options": options, "reference": truth}
    return question_sample(entry.id, [(kind, medium)], question, truth, **extra)


MME = Format(
    name="mme",
    about="MME: two yes/no questions about each picture, in 14 subtasks (Fu et al. 2023, arXiv 2306.13394)",
    media=("image",),
    splits=("test",),
    layout="MME_Benchmark_release_version/{subtask}/ with {name}.jpg or .png beside {name}.txt, or with images/ and "
    "questions_answers_YN/{name}.txt",
    fields={"question": "text before the tab of a line", "answer": "Yes or No after it"},
    read=_read_mme,
    options={"tasks": Option("perception", "perception (10 subtasks), cognition (4), or all", (*MME_TASKS, "all"))},
    benchmark="mme",
)

POPE = Format(
    name="pope",
    about="POPE: is this object in the picture? On COCO, with objects drawn in three ways (Li et al. 2023, arXiv 2305.10355)",
    media=("image",),
    splits=("test",),
    layout="coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json (also in coco/ or output/coco/), "
    "one JSON object a line, and val2014/ with COCO's pictures",
    fields={
        "question_id": "with the name of its file the sample's id",
        "image": "file name in val2014/",
        "text": "the question",
        "label": "yes or no",
    },
    read=_read_pope,
    options={
        "splits": Option(_POPE_SPLITS, "which of random, popular, adversarial: one, or a list", _POPE_SPLITS),
        "images": Option("val2014", "folder of the pictures under the root"),
    },
    benchmark="pope",
)

SEED_BENCH = Format(
    name="seed-bench",
    about="SEED-Bench: multiple-choice questions in 12 dimensions, 9 of them about pictures (Li et al. 2023, arXiv 2307.16125)",
    media=("image", "video"),
    splits=("test",),
    layout="SEED-Bench.json, SEED-Bench-image/{data_id}, and for the video questions SEED-Bench-video/{question_id}.mp4, "
    "each cut to its segment with: ffmpeg -ss START -to END -i VIDEO SEED-Bench-video/QUESTION_ID.mp4",
    fields={
        "question_id": "the sample's id",
        "question": "the question",
        "choice_a ... choice_d": "the options",
        "answer": "the letter",
        "data_type": "image or video",
        "data_id": "name of the picture's file, with no suffix where it was published with none",
        "question_type_id": 'dimension, which the file\'s "question_type" names; the category',
        "segment": "start and end in the video (s); only for the cutting",
    },
    read=_read_seed_bench,
    options={"tasks": Option("image", "image (dimensions 1 to 9), video, or all", ("image", "video", "all"))},
    benchmark="seed-bench",
)

FORMATS: tuple[Format, ...] = (MME, POPE, SEED_BENCH)
