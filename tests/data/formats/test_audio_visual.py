"""AVE, MUSIC-AVQA and its variant with reasoning: the published files become questions with the video and its sound."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from moka.data.formats import open_format
from moka.data.media import MediaDecoding
from moka.data.media_io import BadMediaError
from moka.data.schema import media_parts
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"


def ask(sample):
    return sample["messages"][0]["content"][-1]["text"]


def answer(sample):
    return sample["messages"][-1]["content"][0]["text"]


def files(sample):
    return [(kind, Path(path).relative_to(FIXTURES.resolve()).as_posix()) for kind, path in media_parts(sample)]


def change(path, index, **fields):
    records = json.loads(path.read_text("utf-8"))
    records[index].update(fields)
    path.write_text(json.dumps(records), "utf-8")


def test_ave_asks_for_event_and_range_of_a_video_and_its_sound():
    dataset = open_format("ave", FIXTURES / "ave", "train")
    assert [sample["id"] for sample in dataset] == ["RUhOCu3LNXM", "--AbCd_12ef"]
    second = dataset[1]
    assert files(second) == [("video", "ave/AVE/--AbCd_12ef.mp4"), ("audio", "ave/AVE/--AbCd_12ef.mp4")]
    assert ask(second) == "Please describe the events and time range that occurred in the video."
    assert answer(second) == "<event>Male speech, man speaking</event><range>2,7</range>"
    assert second["reference"] == {"event": "Male speech, man speaking", "start": 2, "end": 7}
    assert second["category"] == "Male speech, man speaking"
    assert dataset.missing_media() == []
    assert pickle.loads(pickle.dumps(dataset))[1] == second  # loader workers that are spawned


def test_ave_has_one_file_a_split_and_one_with_a_header_for_all():
    ids = {split: [s["id"] for s in open_format("ave", FIXTURES / "ave", split)] for split in ("validation", "test")}
    assert ids == {"validation": ["valvideo001"], "test": ["testvideo01"]}
    assert len(open_format("ave", FIXTURES / "ave", "all")) == 5


def test_an_ave_video_without_a_sound_track_is_reported_when_it_is_decoded():
    dataset = open_format("ave", FIXTURES / "ave", "all")
    decoded = MediaDecoding(2).decode_sample(dataset[0])
    assert [kind for kind, _ in media_parts(decoded)] == ["video", "audio"]
    with pytest.raises(BadMediaError, match="silent00001") as error:
        MediaDecoding(2).decode_sample(dataset[2])
    assert error.value.file == str((FIXTURES / "ave/AVE/silent00001.mp4").resolve())


def test_a_video_that_ave_lists_twice_gives_two_ids(editable):
    root = editable("ave")
    with open(root / "valSet.txt", "a") as file:
        file.write("Bark&valvideo001&good&9&10\n")
    assert [sample["id"] for sample in open_format("ave", root, "validation")] == ["valvideo001", "valvideo001-2"]


def test_music_avqa_fills_templates_and_leaves_out_deleted_questions():
    dataset = open_format("music-avqa", FIXTURES / "music-avqa", "train")
    assert [sample["id"] for sample in dataset] == ["6", "7", "8", "10"]
    assert dataset.notes == ("1 question marked as deleted (question_deleted) left out of avqa-train.json",)
    assert [ask(sample) for sample in dataset][:3] == [
        "Is the ukulele in the video always playing?",
        "Is the flute louder than the acoustic_guitar?",
        "Where is the performance?",
    ]
    assert [sample["category"] for sample in dataset] == [
        "Audio-Visual/Existential",
        "Audio/Comparative",
        "Visual/Location",
        "Audio-Visual/Counting",
    ]
    assert [sample["reference"] for sample in dataset] == ["yes", "no", "indoor", "more than ten"]
    assert answer(dataset[3]) == "<answer>more than ten</answer>"
    assert dataset.where(3).endswith("avqa-train.json: record 5")  # the deleted one counts: the place is in the file


def test_music_avqa_finds_videos_in_the_real_and_the_synthetic_folder():
    dataset = open_format("music-avqa", FIXTURES / "music-avqa", "train")
    real = "music-avqa/MUSIC-AVQA-videos-Real/00000272.mp4"
    assert files(dataset[0]) == [("video", real), ("audio", real)]
    assert files(dataset[2])[0][1] == "music-avqa/MUSIC-AVQA-videos-Synthetic/sv0000001.mp4"
    assert dataset.missing_media() == []
    named = open_format("music-avqa", FIXTURES / "music-avqa", "train", videos="elsewhere")
    assert files(named[0])[0][1] == "music-avqa/elsewhere/00000272.mp4"
    assert len(named.missing_media()) == 2


def test_music_avqa_may_be_answered_by_the_bare_word():
    dataset = open_format("music-avqa", FIXTURES / "music-avqa", "test", answer="word")
    assert (answer(dataset[0]), dataset[0]["reference"]) == ("piano", "piano")
    with pytest.raises(MokaError, match="option answer is 'tag'; allowed are tagged, word"):
        open_format("music-avqa", FIXTURES / "music-avqa", "test", answer="tag")


def test_music_avqa_takes_lists_and_the_right_spelling_of_answer_too(editable):
    path = editable("music-avqa") / "avqa-val.json"
    change(path, 0, anser=None, answer="Two", type=["Audio", "Counting"], templ_values=None)
    sample = open_format("music-avqa", path.parent, "validation")[0]
    assert (sample["reference"], sample["category"]) == ("two", "Audio/Counting")


def test_reasoning_comes_before_the_tagged_answer():
    dataset = open_format("music-avqa-reasoning", FIXTURES / "music-avqa-reasoning")
    first, second = dataset
    assert answer(first) == "The ukulele is seen and heard from the first to the last second. <answer>yes</answer>"
    assert (first["reference"], first["category"]) == ("yes", "Audio-Visual/Existential")
    assert files(first) == [(kind, "music-avqa-reasoning/videos/00000272.mp4") for kind in ("video", "audio")]
    # Other names for the same fields, and paths of another machine, of which the file's name is looked for.
    assert ask(second) == "Where is the flute?"
    assert answer(second) == "The flute player stands on the left. <answer>left</answer>"
    assert files(second) == [
        ("video", "music-avqa-reasoning/videos/00000272.mp4"),
        ("audio", "music-avqa-reasoning/audio/00000272.wav"),
    ]
    assert first["id"] != second["id"]
