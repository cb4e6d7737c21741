"""Captioned media for alignment (stage 1): Video-LLaVA's images and videos, AudioCaps."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moka.data.dataset import BAR_AFTER_S
from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.files import Chosen, JsonRecords
from moka.data.formats.general import llava
from moka.data.formats.questions import csv_rows
from moka.errors import MokaError

AUDIO_QUESTION = "Describe the sound."
_FOLDERS = ("", "train_json/", "ft_json/", "llava_all_image_video/ft_json/")
_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
_NAMES = ("{youtube_id}_{start_time}", "{audiocap_id}", "{youtube_id}")
_PATHS = tuple(
    f"{folder}{name}{ending}"
    for folder in ("audio/{split}/", "audio/")
    for name in _NAMES
    for ending in (".wav", ".flac")
)


def pick(question: str | Sequence[str], key: str) -> str:
    """Return the user's instruction of a sample: ``question``, or of several the one that ``key`` leads to, always the same."""
    return question if isinstance(question, str) else question[zlib.crc32(key.encode()) % len(question)]


def check_question(name: str, question: Any, may_be_none: bool = False) -> None:
    """Raise a MokaError unless the option ``question`` is a text or a list of texts."""
    given = [question] if isinstance(question, str) else question
    if question is None and may_be_none:
        return
    if not isinstance(given, list | tuple) or not given or not all(isinstance(q, str) and q.strip() for q in given):
        raise MokaError(f"format {name}: option question is {question!r}; a text or a list of texts is expected.")


def _video_llava(
    name: str, kind: str, files: tuple[str, ...], root: Path, split: str, *, file: str | None, question: Any
) -> Rows:
    check_question(name, question, may_be_none=True)
    candidates = [f"{folder}{named}" for named in ([file] if file else files) for folder in _FOLDERS]
    path = find_file(root, *candidates, format=name, layout=_LAYOUTS[kind])
    items: Any = JsonRecords(path)
    make = partial(_caption, question=question)
    # The mixed file lists images and videos; every other has one kind.
    if "llavaimage" not in path.name:
        return Rows(items, make, items.where, root)
    bar = tqdm(items, f"choosing the {kind}s", unit="record", delay=BAR_AFTER_S, leave=False)
    kept = [position for position, record in enumerate(bar) if record.get(kind)]
    notes = (f"{len(items) - len(kept)} records of {path.name} without a {kind} left out",)
    chosen = Chosen(items, kept)
    return Rows(chosen, make, chosen.where, root, notes)


def _caption(record: dict[str, Any], question: str | Sequence[str] | None) -> dict[str, Any]:
    return llava(record, None if question is None else pick(question, str(record.get("id", ""))))


def _audiocaps(root: Path, split: str, *, question: Any, audio: str | None) -> Rows:
    check_question("audiocaps", question)
    path = find_file(root, f"{split}.csv", f"dataset/{split}.csv", format="audiocaps", layout=_LAYOUTS["audio"])
    clips: dict[str, dict[str, Any]] = {}
    lines: list[int] = []
    for number, row in csv_rows(path, _COLUMNS):
        # Training rows are samples of their own; the five captions of a test clip are references of one sample.
        key = row["audiocap_id"] if split == "train" else f"{row['youtube_id']}_{row['start_time']}"
        if key not in clips:
            clips[key] = {**row, "id": key, "captions": []}
            lines.append(number)
        clips[key]["captions"].append(row["caption"])
    make = partial(_clip, root=root, split=split, question=question, audio=audio)
    return Rows(list(clips.values()), make, partial(_line, path, lines), root)


def _line(path: Path, lines: list[int], index: int) -> str:
    return f"{path}:{lines[index]}"


def _clip(
    clip: dict[str, Any], root: Path, split: str, question: str | Sequence[str], audio: str | None
) -> dict[str, Any]:
    captions = [(caption or "").strip() for caption in clip["captions"]]
    if not all(captions):
        raise MokaError("field 'caption' is empty. Write the caption, or remove the line.")
    paths = []
    for template in (audio,) if audio else _PATHS:
        try:
            paths.append(template.format(split=split, **{column: clip[column] for column in _COLUMNS[:3]}))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise MokaError(
                f"option audio is {audio!r} ({type(error).__name__}: {error}); it may name "
                "{split}, {audiocap_id}, {youtube_id} and {start_time}."
            ) from error
    # A clip that is nowhere keeps its first name, so that it is listed as missing.
    path = next((path for path in paths if (root / path).is_file()), paths[0])
    content = [{"type": "audio", "audio": path}, {"type": "text", "text": pick(question, clip["id"])}]
    return {
        "id": clip["id"],
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": captions[0]}],
        "reference": captions,
    }


_LAYOUTS = {
    "image": """
        llava_image_.json (also in train_json/ or ft_json/)
        llava_image/  the images, named in the file as llava_image/...
    """,
    "video": """
        valley_.json, valley.json or valley_llavaimage.json (also in train_json/ or ft_json/)
        valley/  the videos, named in the file as valley/...
    """,
    "audio": """
        train.csv, val.csv, test.csv (also in dataset/)
        audio/{split}/ or audio/  one file a clip: {youtube_id}_{start_time}, {audiocap_id} or {youtube_id}, .wav or .flac
    """,
}
_FILES = {
    "image": ("llava_image_.json", "valley_llavaimage.json"),
    "video": ("valley_.json", "valley.json", "valley_llavaimage.json"),
}


def _video_llava_format(kind: str, about: str) -> Format:
    name = f"video-llava-{kind}"
    return Format(
        name=name,
        about=about,
        media=(kind,),
        splits=("train",),
        layout=_LAYOUTS[kind],
        fields={
            "id": "a string",
            kind: "a path",
            "conversations": f"LLaVA's: one question with `<{kind}>`, and the caption as the answer",
        },
        experimental="file names",
        read=partial(_video_llava, name, kind, _FILES[kind]),
        options={
            "file": Option(
                None, "the annotation file, relative to the root; by default the first of those in the layout"
            ),
            "question": Option(
                None,
                "the user's instruction, or a list to choose from by the id; the record's own by default",
            ),
        },
    )


FORMATS = (
    _video_llava_format(
        "image",
        "Image captions of LLaVA's pretraining data, as Video-LLaVA publishes them "
        "(github.com/PKU-YuanGroup/Video-LLaVA)",
    ),
    _video_llava_format(
        "video",
        "Video captions of Valley, as Video-LLaVA publishes them (github.com/PKU-YuanGroup/Video-LLaVA)",
    ),
    Format(
        name="audiocaps",
        about="AudioCaps: captions of ten-second AudioSet clips (github.com/cdjkim/audiocaps). The sound is not published; "
        "clips that are gone are listed as missing media.",
        media=("audio",),
        splits=("train", "val", "test"),
        layout=_LAYOUTS["audio"],
        fields={
            "audiocap_id": "number of the caption; the id of a training sample",
            "youtube_id, start_time": "the clip; in val and test the captions of one clip are one sample",
            "caption": "the answer; `reference` lists all captions of the clip",
        },
        read=_audiocaps,
        options={
            "question": Option(AUDIO_QUESTION, "the user's instruction, or a list to choose from by the id"),
            "audio": Option(
                None,
                "where a clip is, such as `clips/{youtube_id}.wav`; by default every name in the layout is tried",
            ),
        },
        benchmark="captioning",
    ),
)
