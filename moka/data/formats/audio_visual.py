"""Questions about videos with sound: AVE (what happens, and when) and MUSIC-AVQA (one word about a performance).

Each video is two parts of the message, its pictures and its sound: both name the same mp4.
"""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.questions import Entries, Entry, among, question_rows, question_sample, take, text_lines
from moka.data.vocabulary import ave_events, music_avqa_answers
from moka.errors import MokaError, counted

AVE_QUESTION = "Please describe the events and time range that occurred in the video."

_AVE_FILES = {"train": "trainSet.txt", "validation": "valSet.txt", "test": "testSet.txt", "all": "Annotations.txt"}
_AVQA_NAMES = {"train": "train", "validation": "val", "test": "test"}
_AVQA_FOLDERS = ("videos", "MUSIC-AVQA-videos-Real", "MUSIC-AVQA-videos-Synthetic")
_SLOT = re.compile(r"<[^<>]*>")
_TEMPLATES = {"tagged": "<answer>{}</answer>", "word": "{}"}


def _read_ave(root: Path, split: str, question: str = AVE_QUESTION) -> Rows:
    path = find_file(root, _AVE_FILES[split], f"AVE_Dataset/{_AVE_FILES[split]}", format=AVE)
    lines = [(place, line) for place, line in text_lines(path) if not line.startswith("Category&")]
    found = Entries(lines, lambda line: line.split("&")[1].strip())
    return found.rows(partial(_ave_sample, question=question), path.parent)


def _ave_sample(entry: Entry, question: str) -> dict[str, Any]:
    values = [value.strip() for value in entry.data.split("&")]
    if len(values) != 5:
        raise MokaError(f"has {counted(len(values), 'field')}; Category&VideoID&Quality&StartTime&EndTime is expected.")
    event, video, _, *times = values
    if not all(time.isdecimal() for time in times) or int(times[0]) > int(times[1]):
        raise MokaError(f"StartTime&EndTime is {'&'.join(times)!r}; whole seconds, the start first, are expected.")
    among("Category", event, ave_events())
    start, end = map(int, times)
    return question_sample(
        entry.id,
        [(kind, f"AVE/{video}.mp4") for kind in ("video", "audio")],
        question,
        f"<event>{event}</event><range>{start},{end}</range>",
        category=event,
        reference={"event": event, "start": start, "end": end},
    )


def _read_music_avqa(root: Path, split: str, videos: Any = _AVQA_FOLDERS, answer: str = "tagged") -> Rows:
    name = f"avqa-{_AVQA_NAMES[split]}.json"
    path = find_file(root, name, f"json/{name}", f"data/json/{name}", format=MUSIC_AVQA)
    template = _TEMPLATES[answer]
    make = partial(_music_avqa_sample, root=root, folders=_folders(videos), template=template)
    return question_rows(
        path,
        lambda record: take(record, "question_id"),
        make,
        root,
        keep=lambda record: str(record.get("question_deleted", 0)) in ("0", "False", "None"),
        left_out="marked as deleted (question_deleted)",
    )


def _music_avqa_sample(entry: Entry, root: Path, folders: tuple[str, ...], template: str) -> dict[str, Any]:
    record = entry.data
    word = _answer_word(record)
    path = _found(f"{take(record, 'video_id')}.mp4", root, folders)
    return question_sample(
        entry.id,
        [("video", path), ("audio", path)],
        _filled(take(record, "question_content"), record.get("templ_values")),
        template.format(word),
        category=_category(record),
        reference=word,
    )


def _filled(template: str, values: Any) -> str:
    """Return the question with its ``<...>`` slots replaced by the values in order; values beyond the last slot are not used."""
    given = [str(value) for value in _listed("templ_values", values)]
    slots = _SLOT.findall(template)
    if len(given) < len(slots):
        raise MokaError(
            f"templ_values has {counted(len(given), 'value')} for the {counted(len(slots), 'slot')} of {template!r}."
        )
    rest = iter(given)
    return _SLOT.sub(lambda _: next(rest), template)


def _listed(name: str, value: Any) -> list[Any]:
    """Return a list, or one written as a string (``"[\\"ukulele\\"]"``), as the published files have it; other text is one item."""
    if value is None or value == "":
        return []
    given = value
    if isinstance(value, str):
        try:
            given = ast.literal_eval(value.strip()) if value.strip().startswith("[") else [value]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval names
            given = None
    if not isinstance(given, (list, tuple)):
        raise MokaError(f'field {name!r} is {value!r}; a list in a string, such as "[\\"ukulele\\"]", is expected.')
    return list(given)


def _category(record: dict[str, Any]) -> str | None:
    """Return such as ``"Audio-Visual/Existential"``: the modality and the kind of question."""
    return "/".join(str(part).strip() for part in _listed("type", record.get("type"))) or None


def _answer_word(record: Any) -> str:
    return among("answer", take(record, "anser", "answer").lower(), music_avqa_answers())


def _folders(videos: Any) -> tuple[str, ...]:
    return (videos,) if isinstance(videos, str) else tuple(videos)


def _found(name: str, root: Path, folders: tuple[str, ...]) -> str:
    """Return the file in the first folder that has it; where none has, in the first folder that is there."""
    paths = [f"{folder}/{name}" for folder in folders]
    there = [path for path in paths if (root / path).is_file()] or [
        path for folder, path in zip(folders, paths, strict=True) if (root / folder).is_dir()
    ]
    return (there or paths)[0]


def _read_reasoning(root: Path, split: str, videos: Any = _AVQA_FOLDERS, annotation: str = "") -> Rows:
    name = annotation or f"{_AVQA_NAMES[split]}_samples_with_reasoning_avqa.json"
    path = find_file(root, name, format=REASONING)
    make = partial(_reasoning_sample, root=root, folders=_folders(videos))
    return question_rows(path, lambda one: take(one, "question_id", "id"), make, root, key="data")


def _reasoning_sample(entry: Entry, root: Path, folders: tuple[str, ...]) -> dict[str, Any]:
    record = entry.data
    reasoning = take(record, "reasoning", "rationale", "explanation", "cot")
    word = _answer_word(record)
    named = record.get("video_path") or f"{take(record, 'video_id', 'vid', 'video')}"
    video = _own_path(named, root, folders, ".mp4")
    sound = (
        _own_path(record["audio_path"], root, ("audio", "audios", *folders), ".wav")
        if record.get("audio_path")
        else video
    )
    question = take(record, "question", "question_content")
    return question_sample(
        entry.id,
        [("video", video), ("audio", sound)],
        _filled(question, record["templ_values"]) if record.get("templ_values") else question,
        f"{reasoning} {_TEMPLATES['tagged'].format(word)}",
        category=_category(record),
        reference=word,
    )


def _own_path(named: str, root: Path, folders: tuple[str, ...], suffix: str) -> str:
    """Return the path as given where it leads to a file under the root; else the file of that name in one of the folders.

    The authors' lists may hold paths of their own machine, of which only the last component means anything here.
    """
    if not named.startswith("/") and ".." not in Path(named).parts and (root / named).is_file():
        return named
    name = PureWindowsPath(named).name  # takes both kinds of slash
    return _found(name if Path(name).suffix else name + suffix, root, folders)


_VIDEOS_OPTION = Option(
    _AVQA_FOLDERS,
    "folder of the videos under the root, or a list of folders; the first that has a video gives it",
)

AVE = Format(
    name="ave",
    about="AVE: which of 28 events happens in a ten-second video, and when (Tian et al. 2018, arXiv 1803.08842)",
    media=("video", "audio"),
    splits=tuple(_AVE_FILES),
    layout="trainSet.txt, valSet.txt, testSet.txt, Annotations.txt (all videos) and AVE/{VideoID}.mp4, in the root or in AVE_Dataset/",
    fields={
        "Category": "the event, one of 28",
        "VideoID": "name of the mp4",
        "Quality": "not used",
        "StartTime": "second in which the event starts",
        "EndTime": "second in which it ends",
    },
    read=_read_ave,
    options={"question": Option(AVE_QUESTION, "the instruction")},
    benchmark="ave",
)

MUSIC_AVQA = Format(
    name="music-avqa",
    about="MUSIC-AVQA: questions about musical performances, answered by one of 42 words (Li et al. 2022, arXiv 2203.14072)",
    media=("video", "audio"),
    splits=tuple(_AVQA_NAMES),
    layout="avqa-train.json, avqa-val.json, avqa-test.json (also in json/ or data/json/) and videos/{video_id}.mp4, or the "
    "folders as published, MUSIC-AVQA-videos-Real/ and MUSIC-AVQA-videos-Synthetic/",
    fields={
        "video_id": "name of the mp4",
        "question_id": "the sample's id",
        "type": 'modality and kind, a list in a string: "[\\"Audio-Visual\\", \\"Existential\\"]"; the category',
        "question_content": "the question, with slots such as <Object>",
        "templ_values": "what fills the slots in order, a list in a string",
        "question_deleted": "1: the question is left out",
        "anser": 'the answer word, so spelled; "answer" is taken too',
    },
    read=_read_music_avqa,
    options={
        "videos": _VIDEOS_OPTION,
        "answer": Option(
            "tagged",
            "what is to be learnt: tagged (<answer>two</answer>, as the scorer reads it) or word (two)",
            tuple(_TEMPLATES),
        ),
    },
    benchmark="music-avqa",
)

REASONING = Format(
    name="music-avqa-reasoning",
    about="MUSIC-AVQA with reasoning before the answer, as the MokA authors train on it (GeWu-Lab/MokA)",
    media=("video", "audio"),
    splits=tuple(_AVQA_NAMES),
    layout="train_samples_with_reasoning_avqa.json (val_..., test_...) and the videos as for music-avqa",
    fields={
        "video_id": "name of the mp4; also vid or video",
        "question_id": "the sample's id; also id",
        "question": "the question; also question_content, whose slots templ_values fill",
        "answer": "the answer word; also anser",
        "reasoning": "the text before the answer; also rationale, explanation or cot",
        "type": "the category, where it is there, as for music-avqa",
        "video_path": "used in place of video_id where it is there",
        "audio_path": "the sound, where it is a file of its own; else the video's",
    },
    experimental="file names, folders and field names",
    read=_read_reasoning,
    options={
        "videos": _VIDEOS_OPTION,
        "annotation": Option("", "name of the annotation file under the root, where it is another"),
    },
    benchmark="music-avqa",
)

FORMATS: tuple[Format, ...] = (AVE, MUSIC_AVQA, REASONING)
