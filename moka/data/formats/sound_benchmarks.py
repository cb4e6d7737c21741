"""Benchmarks of questions about sound: MMAU and AIR-Bench's foundation part. For evaluation, not for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.questions import LETTERS, Entry, lettered, question_rows, question_sample, take
from moka.errors import MokaError

_DOMAINS = ("speech", "sound", "music", "all")
_MMAU_INSTRUCTION = "Select one option from the provided choices."
# AIR-Bench names no domain. Its task names say the sound and the music tasks; the others are about speech.
_AIR_PREFIXES = {"sound": ("audio_", "sound_", "acoustic_", "vocal_"), "music": ("music_",)}


def _read_mmau(root: Path, split: str, task: str = "speech") -> Rows:
    path = find_file(root, "mmau-test-mini.json", format=MMAU)

    def keep(record: dict[str, Any]) -> bool:
        return task == "all" or record.get("task") in (task, None)  # one without a task is reported when it is read

    left_out = f"of other tasks than {task}"
    return question_rows(path, lambda one: take(one, "id"), _mmau_sample, root, keep=keep, left_out=left_out)


def _mmau_sample(entry: Entry) -> dict[str, Any]:
    record = entry.data
    options = record.get("choices") if isinstance(record, dict) else None
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options) or len(options) < 2:
        raise MokaError(f"field 'choices' is {options!r}; a list of at least two texts is expected.")
    options = [option.strip() for option in options]
    task, truth = take(record, "task"), take(record, "answer", allowed=options)
    category = record.get("sub-category") or record.get("sub_category") or record.get("category") or task
    return question_sample(
        entry.id,
        [("audio", take(record, "audio_id").removeprefix("./"))],
        "\n".join([take(record, "question"), _MMAU_INSTRUCTION, *options]),
        truth,
        category=category,
        reference=truth,
        options=options,
    )


def _read_air_bench(root: Path, split: str, tasks: str = "speech") -> Rows:
    path = find_file(root, "Foundation_meta.json", "Foundation/Foundation_meta.json", format=AIR_BENCH)
    return question_rows(
        path,
        lambda one: take(one, "uniq_id"),
        _air_bench_sample,
        path.parent,
        keep=lambda one: tasks in ("all", air_bench_domain(one)),
        left_out=f"of other tasks than {tasks}",
    )


def air_bench_domain(record: dict[str, Any]) -> str:
    """Return ``"speech"``, ``"sound"`` or ``"music"``, by the record's task name."""
    name = str(record.get("task_name", "")).lower()
    return next((domain for domain, prefixes in _AIR_PREFIXES.items() if name.startswith(prefixes)), "speech")


def _air_bench_sample(entry: Entry) -> dict[str, Any]:
    record = entry.data
    task, sound = take(record, "task_name"), take(record, "path")
    options = [str(record[f"choice_{letter}"]).strip() for letter in "abcd" if record.get(f"choice_{letter}")]
    letter = LETTERS[options.index(take(record, "answer_gt", allowed=options))]
    if task.lower() == "audio_grounding":  # the list says .wav, the archive has .flac
        sound = f"{sound.rpartition('.')[0]}.flac"
    return question_sample(
        entry.id,
        [("audio", f"{task}_{take(record, 'dataset_name')}/{sound}")],
        lettered(take(record, "question"), options),
        letter,
        category=task,
        options=options,
        reference=letter,
    )


MMAU = Format(
    name="mmau",
    about="MMAU test-mini: multiple-choice questions about speech, sound and music (Sakshi et al. 2024, arXiv 2410.19168)",
    media=("audio",),
    splits=("test-mini",),
    layout="mmau-test-mini.json and test-mini-audios/{id}.wav",
    fields={
        "id": "the sample's id",
        "audio_id": "the sound file, from the root on",
        "question": "the question",
        "choices": "the options' texts",
        "answer": "the text of the right one",
        "task": "speech, sound or music",
        "sub-category": "the category; else category, else task",
    },
    read=_read_mmau,
    options={"task": Option("speech", "speech, sound, music, or all", _DOMAINS)},
    benchmark="mmau",
)

AIR_BENCH = Format(
    name="air-bench",
    about="AIR-Bench foundation: multiple-choice questions about sound (Yang et al. 2024, arXiv 2402.07729)",
    media=("audio",),
    splits=("test",),
    layout="Foundation_meta.json and {task_name}_{dataset_name}/{path}, in the root or in Foundation/",
    fields={
        "uniq_id": "the sample's id",
        "path": "the sound file in its task's folder; .wav stands for .flac in Audio_Grounding",
        "question": "the question",
        "choice_a ... choice_d": "the options; empty ones are none",
        "answer_gt": "the text of the right one",
        "task_name": "the category; names that begin with Audio, Sound, Acoustic or Vocal are about sound, with Music about "
        "music, all others about speech",
        "dataset_name": "where the sounds come from; a part of the folder's name",
    },
    read=_read_air_bench,
    options={"tasks": Option("speech", "speech, sound, music, or all", _DOMAINS)},
    benchmark="air-bench",
)

FORMATS: tuple[Format, ...] = (MMAU, AIR_BENCH)
