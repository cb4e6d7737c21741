"""Speech with its text: LibriSpeech, GigaSpeech, and LibriSpeech with SALMONN's instructions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from moka.data.formats.base import Format, Option, Rows, find_file
from moka.data.formats.files import TableRecords
from moka.data.formats.questions import (
    Entries,
    Entry,
    among,
    json_entries,
    question_rows,
    question_sample,
    take,
    text_lines,
)
from moka.errors import MokaError, counted

TRANSCRIBE = "Please transcribe the speech."

_LIBRISPEECH_960 = ("train-clean-100", "train-clean-360", "train-other-500")
_LIBRISPEECH_PARTS = (*_LIBRISPEECH_960, "dev-clean", "dev-other", "test-clean", "test-other")


def _read_librispeech(root: Path, split: str, instruction: str = TRANSCRIBE, case: str = "lower") -> Rows:
    base = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    placed: list[tuple[str, Any]] = []
    for part in _LIBRISPEECH_960 if split == "train-960" else (split,):
        files = sorted((base / part).glob("*/*/*.trans.txt"))
        if not files:
            looked = base / part / "SPEAKER" / "CHAPTER" / "SPEAKER-CHAPTER.trans.txt"
            raise MokaError(
                f"format librispeech: looked for {looked}, and found none. Unpack {part}.tar.gz from openslr.org/12 "
                "there, or name a split that is there."
            )
        for file in files:
            placed += [(place, (file.parent, line)) for place, line in text_lines(file)]
    make = partial(_librispeech_sample, base=base, instruction=instruction, case=case)
    return Entries(placed, lambda data: data[1].split()[0]).rows(make, base)


def _librispeech_sample(entry: Entry, base: Path, instruction: str, case: str) -> dict[str, Any]:
    folder, line = entry.data
    name, _, text = line.strip().partition(" ")
    if not text.strip():
        raise MokaError(f"is {line!r}; an utterance's name and its words are expected.")
    path = (folder / f"{name}.flac").relative_to(base).as_posix()
    return _transcription(entry.id, path, text.strip(), case, instruction)


def _transcription(id: str, audio: str | bytes, text: str, case: str, instruction: str) -> dict[str, Any]:
    text = text.lower() if case == "lower" else text
    return question_sample(id, [("audio", audio)], instruction, text, reference=text)


_SUBSETS = ("XS", "S", "M", "L", "XL")
_HELD_OUT = {"validation": "DEV", "test": "TEST"}
_MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
_MARK = re.compile(rf"\s*({'|'.join(_MARKS)})")
_SOUND_FILES = (".wav", ".flac", ".opus")


def _read_gigaspeech(
    root: Path,
    split: str,
    subset: str = "M",
    instruction: str = TRANSCRIBE,
    case: str = "lower",
    punctuation: str = "drop",
) -> Rows:
    subset = str(subset).strip("{}").upper()
    Option("M", "", _SUBSETS).check("format gigaspeech: option subset", subset)
    wanted = _HELD_OUT.get(split, subset)
    tables = [] if (root / "GigaSpeech.json").is_file() else _tables(root, split)
    media: Callable[[Any], str | bytes]
    if tables:
        records = TableRecords(f"{tables[0].parent}/{split}*.parquet", split, files=tables)
        found, left = _spoken(_table_rows(records))
        media = partial(_table_audio, records=records)
    else:
        path = find_file(root, "GigaSpeech.json", f"{split}*.parquet", format=GIGASPEECH)
        found, left = _spoken(_segments(path, wanted))
        if not found and not left:
            raise MokaError(f"{path}: has no segment of subset {{{wanted}}}. Name a subset that you have.")
        media = partial(_cut_audio, root=root)
    notes = [f"{counted(left, 'utterance')} without speech ({', '.join(_GARBAGE)}) left out"] if left else []

    make = partial(_clip_sample, media=media, case=case, punctuation=punctuation, instruction=instruction)
    return found.rows(make, root, notes)


def _clip_sample(
    entry: Entry, media: Callable[[Any], str | bytes], case: str, punctuation: str, instruction: str
) -> dict[str, Any]:
    _, text, key = entry.data
    return _transcription(entry.id, media(key), _marked(text, punctuation), case, instruction)


def _spoken(placed: Iterable[tuple[str, str, str, Any]]) -> tuple[Entries, int]:
    """Return the entries of ``(place, id, text, key of the sound)`` that have words, and how many have none."""
    kept, left = [], 0
    for place, sid, text, key in placed:
        if any(tag in text for tag in _GARBAGE) or not _marked(text, "drop"):
            left += 1
        else:
            kept.append((place, (sid, text, key)))
    return Entries(kept, lambda data: data[0]), left


def _marked(text: str, punctuation: str) -> str:
    """Return the text with its punctuation tags as characters, or without them."""
    return _MARK.sub(lambda match: _MARKS[match[1]] if punctuation == "keep" else "", text).strip()


def _segments(path: Path, wanted: str) -> Iterable[tuple[str, str, str, Any]]:
    for place, audio in json_entries(path, key="audios"):
        segments = audio.get("segments") if isinstance(audio, dict) else None
        if not isinstance(segments, list):
            raise MokaError(f"{place}: has no list 'segments'. Use the file as it is published.")
        for number, segment in enumerate(segments, start=1):
            here = f"{place}, segment {number}"
            try:
                if f"{{{wanted}}}" in segment["subsets"]:
                    sid = take(segment, "sid")
                    yield here, sid, take(segment, "text_tn", "text_tts"), sid
            except KeyError as error:
                raise MokaError(f"{here}: field {error.args[0]!r} is missing.") from error
            except (MokaError, TypeError) as error:
                raise MokaError(f"{here}: {error}") from error


def _cut_audio(sid: str, root: Path) -> str:
    paths = [f"segments/{sid}{suffix}" for suffix in _SOUND_FILES]
    return next((path for path in paths if (root / path).is_file()), paths[0])


def _tables(root: Path, split: str) -> list[Path]:
    for pattern in ("", "data/", "*/"):
        found = sorted(root.glob(f"{pattern}{split}*.parquet"))
        if len({path.parent for path in found}) > 1:
            folders = ", ".join(sorted({path.parent.name for path in found}))
            raise MokaError(
                f"format gigaspeech: several folders of {root} hold {split} tables: {folders}. Name one as root."
            )
        if found:
            return found
    return []


def _table_rows(records: TableRecords) -> Iterable[tuple[str, str, str, Any]]:
    """Return the ids and texts of a table, read without the sound."""
    try:
        columns = records.rows.select_columns(["segment_id", "text"])[:]
    except ValueError as error:
        raise MokaError(
            f"{records.name}: columns segment_id and text are expected; it has {records.rows.column_names}."
        ) from error
    pairs = zip(columns["segment_id"].to_pylist(), columns["text"].to_pylist(), strict=True)
    for row, (sid, text) in enumerate(pairs):
        yield records.where(row), str(sid), text or "", row


def _table_audio(row: int, records: TableRecords) -> bytes:
    audio = records[row].get("audio")
    if not isinstance(audio, dict) or not audio.get("bytes"):
        raise MokaError("field 'audio' has no 'bytes'; the table must hold the clips themselves.")
    return audio["bytes"]


# One instruction a task, in the words of SALMONN's prompt list as far as they are known to us; not verified word for word.
SALMONN_PROMPTS = {
    "asr": "Recognize the speech and give me the transcription.",
    "phone_recognition": "Provide the phonetic transcription for the speech.",
    "gender_recognition": "What is the gender of the speaker?",
    "emotion_recognition": "Describe the emotion of the speaker in one word.",
    "speaker_verification": "Do you only hear the same person talking? Answer yes or no.",
    "overlapped_speech": "Please write down what you hear each person says.",
    "en2zh": "Listen to the speech and translate it into Chinese.",
    "en2ja": "Listen to the speech and translate it into Japanese.",
    "en2de": "Listen to the speech and translate it into German.",
    "audiocaption": "Please describe the audio.",
    "music_description": "Listen to this music clip and describe the music.",
}
_SALMONN_FILES = {
    "stage2": ("salmonn_stage2_data.json", "stage2_train.json", "stage2.json"),
    "stage1": ("salmonn_stage1_data.json", "stage1_train.json", "stage1.json"),
}


def _read_salmonn(root: Path, split: str, annotation: str = "", corpus: str = "LibriSpeech") -> Rows:
    path = find_file(root, *([annotation] if annotation else _SALMONN_FILES[split]), format=SALMONN)
    return question_rows(
        path,
        lambda record: f"{Path(take(record, 'path')).stem}-{record.get('task') or 'asr'}",
        _salmonn_sample,
        root,
        key="annotation",
        keep=lambda record: corpus == "all" or _of_corpus(record, corpus),
        unit="record",
        left_out=f"of other corpora than {corpus}",
    )


def _of_corpus(record: Any, corpus: str) -> bool:
    # A record without a path is kept, so that the error says of it.
    path = record.get("path")
    return not isinstance(path, str) or corpus.lower() in (part.lower() for part in Path(path).parts)


def _salmonn_sample(entry: Entry) -> dict[str, Any]:
    record = entry.data
    path, text, task = take(record, "path"), take(record, "text"), record.get("task") or "asr"
    question = (record.get("Q") or "").strip()  # or else the task's instruction
    question = question or SALMONN_PROMPTS[among("task", task, SALMONN_PROMPTS, " Or give the record a 'Q'.")]
    # The published paths begin with a slash, and mean the folder that has the corpora.
    return question_sample(entry.id, [("audio", path.lstrip("/"))], question, text, category=task, reference=text)


_INSTRUCTION_OPTION = Option(TRANSCRIBE, "what the user asks")
_CASE_OPTION = Option("lower", "lower: the words in lower case; as-is: as published, in capitals", ("lower", "as-is"))

GIGASPEECH = Format(
    name="gigaspeech",
    about="GigaSpeech: transcribed English speech of podcasts, audiobooks and YouTube (Chen et al. 2021, arXiv 2106.06909; "
    "speechcolab/gigaspeech)",
    media=("audio",),
    splits=("train", "validation", "test"),
    layout="GigaSpeech.json with segments/{sid}.wav, .flac or .opus, cut from the recordings beforehand, each with: "
    "ffmpeg -ss BEGIN_TIME -to END_TIME -i PATH -ac 1 -ar 16000 segments/SID.wav; "
    "or Parquet files train*.parquet (validation*, test*) of one clip a row, in the root or one folder below, which "
    "hold one subset as they were downloaded",
    fields={
        "path": "recording; only for the cutting",
        "sid": "the sample's id and the clip's name; segment_id in Parquet",
        "begin_time": "s; only for the cutting",
        "end_time": "s; only for the cutting",
        "text_tn": "the words in capitals, with tags such as <COMMA>; text_tts is taken too, text in Parquet",
        "subsets": 'the subsets that hold the segment, such as ["{XL}", "{M}"]; GigaSpeech.json only',
        "audio": 'Parquet only: {"bytes": the clip}',
    },
    read=_read_gigaspeech,
    options={
        "subset": Option("M", "which training subset of GigaSpeech.json: XS, S, M (1,000 h), L or XL"),
        "instruction": _INSTRUCTION_OPTION,
        "case": _CASE_OPTION,
        "punctuation": Option("drop", "drop: without the punctuation tags; keep: as characters", ("drop", "keep")),
    },
    benchmark="asr",
)

LIBRISPEECH = Format(
    name="librispeech",
    about="LibriSpeech: read English speech, 960 h for training (Panayotov et al. 2015; openslr.org/12)",
    media=("audio",),
    splits=("train-960", *_LIBRISPEECH_PARTS),
    layout="{split}/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with the .flac files beside it, in the root or in LibriSpeech/; "
    "train-960 is the three training parts",
    fields={
        "name": "the first word of a line: the sample's id and the .flac file's name",
        "text": "the rest of the line",
    },
    read=_read_librispeech,
    options={"instruction": _INSTRUCTION_OPTION, "case": _CASE_OPTION},
    benchmark="asr",
)

SALMONN = Format(
    name="salmonn",
    about="SALMONN's instructions for speech, of which MokA trains on those for LibriSpeech 960 h (Tang et al. 2024, "
    "arXiv 2310.13289)",
    media=("audio",),
    splits=tuple(_SALMONN_FILES),
    layout="salmonn_stage2_data.json or salmonn_stage1_data.json (or another name, as option annotation) beside LibriSpeech/",
    fields={
        "path": "sound file, from the root on; a leading slash is not minded",
        "text": "the answer",
        "task": "the category; asr by default",
        "Q": "the question; without it the task's instruction is asked",
    },
    experimental="file names and prompts",
    read=_read_salmonn,
    options={
        "annotation": Option("", "name of the annotation file under the root, where it is another"),
        "corpus": Option("LibriSpeech", "only records with this folder in their path; all keeps every record"),
    },
    benchmark=None,
)

FORMATS: tuple[Format, ...] = (GIGASPEECH, LIBRISPEECH, SALMONN)
