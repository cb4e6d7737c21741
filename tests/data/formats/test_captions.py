"""Video-LLaVA's captions and AudioCaps in their published layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moka.data.formats import open_format
from moka.data.media import MediaDecoding
from moka.data.schema import media_parts
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"
AUDIOCAPS = FIXTURES / "audiocaps"
HEAD = "audiocap_id,youtube_id,start_time,caption\n"


def question(sample):
    return sample["messages"][0]["content"][-1]["text"]


def answer(sample):
    return sample["messages"][-1]["content"][0]["text"]


def files(dataset):
    return [Path(medium).relative_to(dataset.media_root).as_posix() for s in dataset for _, medium in media_parts(s)]


@pytest.mark.parametrize(
    ("name", "ids", "paths", "first"),
    [
        (
            "video-llava-image",
            ["004539375", "002394255"],
            ["llava_image/00453/004539375.jpg", "llava_image/00239/002394255.jpg"],
            ("Say in short what the photo shows.", "an orange box"),
        ),
        (
            "video-llava-video",
            ["1014045476", "1023499789"],
            ["valley/000001_000050/1014045476.mp4", "valley/000001_000050/1023499789.mp4"],
            ("Say in short what the video shows.", "A screen turns red."),
        ),
    ],
)
def test_video_llava_captions_have_their_medium_before_the_question(name, ids, paths, first):
    dataset = open_format(name, FIXTURES / name)
    kind = name.removeprefix("video-llava-")
    assert [sample["id"] for sample in dataset] == ids
    assert files(dataset) == paths
    assert (question(dataset[0]), answer(dataset[0])) == first
    assert [part["type"] for part in dataset[0]["messages"][0]["content"]] == [kind, "text"]
    assert dataset.missing_media() == []
    assert all(MediaDecoding(2).decode_sample(sample) for sample in dataset)


def test_the_question_of_captions_can_be_set_and_chosen_by_the_id():
    root, phrases = FIXTURES / "video-llava-image", [f"Phrase {i}?" for i in range(50)]
    assert [question(s) for s in open_format("video-llava-image", root, question="What?")] == ["What?", "What?"]
    chosen = [question(s) for s in open_format("video-llava-image", root, question=phrases)]
    assert chosen == [question(s) for s in open_format("video-llava-image", root, question=phrases)]
    assert len(set(chosen)) == 2
    assert set(chosen) < set(phrases)
    for wrong in (7, [], ["a", ""]):
        with pytest.raises(MokaError, match="option question is"):
            open_format("video-llava-image", root, question=wrong)


def test_of_the_mixed_file_each_format_reads_its_own_kind_and_says_what_it_left_out(tmp_path):
    root = shutil.copytree(FIXTURES / "video-llava-image", tmp_path / "data")
    shutil.copytree(FIXTURES / "video-llava-video" / "valley", root / "valley")
    videos = json.loads((FIXTURES / "video-llava-video" / "valley_.json").read_text())
    images = json.loads((root / "llava_image_.json").read_text())
    (root / "train_json").mkdir()
    (root / "train_json" / "valley_llavaimage.json").write_text(json.dumps([images[0], *videos, images[1]]))
    (root / "llava_image_.json").unlink()
    dataset = open_format("video-llava-video", root)
    assert [sample["id"] for sample in dataset] == [record["id"] for record in videos]
    assert dataset.notes[1:] == ("2 records of valley_llavaimage.json without a video left out",)
    assert dataset.where(0).endswith("valley_llavaimage.json: record 2")
    assert [s["id"] for s in open_format("video-llava-image", root)] == [record["id"] for record in images]


def test_video_llava_says_a_record_whose_placeholder_is_absent_and_a_layout_that_is_wrong(tmp_path):
    record = {"id": "1", "video": "valley/1.mp4", "conversations": [{"from": "human", "value": "Describe."}]}
    (tmp_path / "valley.json").write_text(json.dumps([record]))
    with pytest.raises(MokaError, match=r"valley\.json: record 1: 1 video file listed, but 0 <video> placeholders"):
        open_format("video-llava-video", tmp_path)[0]
    with pytest.raises(
        MokaError, match=r"looked for .*llava_image_\.json.* Expected under the root: llava_image_\.json"
    ):
        open_format("video-llava-image", tmp_path)


def test_each_caption_of_audiocaps_training_data_is_a_sample():
    dataset = open_format("audiocaps", AUDIOCAPS)
    assert [(s["id"], question(s), answer(s), s["reference"]) for s in dataset] == [
        ("91139", "Describe the sound.", "A low tone", ["A low tone"]),
        ("58146", "Describe the sound.", "A tone that goes on", ["A tone that goes on"]),
        ("26853", "Describe the sound.", "A tone, higher than most", ["A tone, higher than most"]),
    ]
    # Named by clip and start, by caption, and by clip only in the common folder.
    assert files(dataset) == ["audio/train/tone4000000_130.wav", "audio/train/58146.wav", "audio/-tone600_00.flac"]
    assert dataset.missing_media() == []
    assert all(next(media_parts(MediaDecoding().decode_sample(sample)))[1].rate == 8000 for sample in dataset)


def test_the_captions_of_a_test_clip_are_references_of_one_sample_and_a_lost_clip_is_listed():
    dataset = open_format("audiocaps", AUDIOCAPS, "test")
    assert [sample["id"] for sample in dataset] == ["tone3000000_0", "gone0000000_10"]
    assert dataset[0]["reference"] == [
        "A tone",
        "A low tone is heard",
        "A tone, low",
        "Someone plays a tone",
        "A short tone",
    ]
    assert answer(dataset[0]) == "A tone"
    gone = AUDIOCAPS.resolve() / "audio/test/gone0000000_10.wav"
    assert dataset.missing_media() == [f"{AUDIOCAPS / 'test.csv'}:7: audio {gone}: does not exist"]


def test_the_place_of_the_sound_can_be_reported():
    dataset = open_format("audiocaps", AUDIOCAPS, "test", audio="clips/{split}/{youtube_id}.mp3")
    assert files(dataset) == ["clips/test/tone3000000.mp3", "clips/test/gone0000000.mp3"]
    with pytest.raises(MokaError, match=r"test\.csv:2: option audio is .*it may name \{split\}"):
        open_format("audiocaps", AUDIOCAPS, "test", audio="{name}.wav")[0]
