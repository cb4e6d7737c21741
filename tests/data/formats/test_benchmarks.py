"""MME, POPE, MMBench, SEED-Bench, MMAU and AIR-Bench: the published files become the questions that the scorers expect."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from moka.data.formats import open_format
from moka.data.media import MediaDecoding
from moka.data.schema import media_parts
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"
BENCHMARKS = ("mme", "pope", "mmbench", "seed-bench", "mmau", "air-bench")
EVERYTHING = {
    "mme": {"tasks": "all"},
    "seed-bench": {"tasks": "all"},
    "mmau": {"task": "all"},
    "air-bench": {"tasks": "all"},
    "mmbench": {"circular": True},
}
LETTER_LINE = "Answer with the option's letter from the given choices directly."


def opened(name, **options):
    return open_format(name, FIXTURES / name, **options)


def ask(sample):
    return sample["messages"][0]["content"][-1]["text"]


def files(dataset):
    paths = [medium for sample in dataset for _, medium in media_parts(sample)]
    return [Path(path).relative_to(dataset.media_root).as_posix() for path in paths]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_question_has_its_own_id_and_its_reference_as_the_last_message(name):
    dataset = opened(name, **EVERYTHING.get(name, {}))
    samples = list(dataset)
    assert len({sample["id"] for sample in samples}) == len(samples) >= 3
    for sample in samples:
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
        assert sample["messages"][1]["content"] == [{"type": "text", "text": sample["reference"]}]
        kinds = [part["type"] for part in sample["messages"][0]["content"]]
        assert kinds[1:] == ["text"]
        assert kinds[0] in dataset.format.media
        assert isinstance(sample["category"], str)
    assert dataset.missing_media() == []
    assert dataset.format.benchmark == name
    assert pickle.loads(pickle.dumps(dataset))[1] == samples[1]  # loader workers that are spawned


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_media_of_the_fixtures_decode(name):
    for sample in opened(name, **EVERYTHING.get(name, {})):
        MediaDecoding(2).decode_sample(sample)


def test_mme_asks_two_questions_of_each_picture_in_the_ten_perception_subtasks():
    dataset = opened("mme")
    samples = list(dataset)
    assert len(samples) == 20
    assert list(dict.fromkeys(sample["category"] for sample in samples)) == (
        ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
    )
    first, second = samples[:2]
    assert first["group"] == second["group"] != samples[2]["group"]
    assert (first["reference"], second["reference"]) == ("yes", "no")
    assert ask(first) == "Is there a red square in this image? Please answer yes or no."  # as published
    assert len({sample["group"] for sample in samples}) == 10


def test_mme_finds_pictures_next_to_the_questions_and_in_a_folder_of_their_own():
    dataset = opened("mme", tasks="all")
    assert len(dataset) == 28
    paths = files(dataset)
    assert paths[0] == "existence/000000000000.jpg"
    assert "posters/images/0004.jpg" in paths
    assert "code_reasoning/000000000013.png" in paths
    assert len(opened("mme", tasks="cognition")) == 8


def test_mme_says_of_odd_questions_and_of_a_line_without_an_answer(editable):
    root = editable("mme")
    path = root / "MME_Benchmark_release_version/count/000000000001.txt"
    path.write_text("How many? Please answer yes or no.\n")
    dataset = open_format("mme", root)
    assert dataset.notes == ("1 picture has an odd number of questions; the paper's protocol leaves out the last",)


def test_mme_without_one_subtask_is_reported(editable):
    root = editable("mme")
    shutil.rmtree(root / "MME_Benchmark_release_version/OCR")
    with pytest.raises(MokaError, match=r"OCR/questions_answers_YN/\*\.txt or .*OCR/\*\.txt"):
        open_format("mme", root)


def test_pope_reads_its_three_files_each_a_category():
    dataset = opened("pope")
    assert [(s["id"], s["category"], s["reference"]) for s in dataset][::3] == [
        ("random-1", "random", "yes"),
        ("popular-2", "popular", "no"),
    ]
    assert len(dataset) == 6
    assert set(files(dataset)) == {"val2014/COCO_val2014_000000310196.jpg"}
    assert ask(dataset[5]) == "Is there a fork in the image?"
    assert {sample["category"] for sample in opened("pope", splits="adversarial")} == {"adversarial"}


def test_mmbench_asks_with_hint_and_lettered_options_and_has_the_picture():
    dataset = opened("mmbench")
    first, second = dataset
    assert ask(first) == f"Which color is shown?\nA. red\nB. green\nC. blue\n{LETTER_LINE}"  # D is nan
    assert ask(second) == f'The picture "as shown" is plain.\nWhich is warmer?\nA. red\nB. blue\n{LETTER_LINE}'
    assert [(s["id"], s["group"], s["category"], s["reference"]) for s in dataset] == [
        ("241", "241", "attribute_recognition", "A"),
        ("252", "252", "attribute_comparison", "A"),
    ]
    pictures = [medium for sample in dataset for _, medium in media_parts(sample)]
    assert pictures[0] == pictures[1]  # the second row names the first by its index
    assert Image.open(io.BytesIO(pictures[0])).getpixel((0, 0)) == (255, 0, 0)
    assert dataset.notes == ("3 rotated copies of questions left out of mmbench_dev_20230712.tsv",)


def test_circular_evaluation_asks_once_per_option_and_the_right_text_stays_right():
    samples = list(opened("mmbench", circular=True))
    assert [sample["id"] for sample in samples] == ["241-0", "241-1", "241-2", "252-0", "252-1"]
    assert [sample["group"] for sample in samples] == ["241"] * 3 + ["252"] * 2
    assert [sample["reference"] for sample in samples] == ["A", "C", "B", "A", "B"]
    for sample in samples:
        assert f"\n{sample['reference']}. red\n" in ask(sample)
    # Each option has each place once.
    assert {re.search(r"(.)\. green", ask(sample))[1] for sample in samples[:3]} == {"A", "B", "C"}


def test_mmbench_test_questions_have_no_answer_and_can_only_be_asked():
    with pytest.raises(MokaError, match="no assistant message"):
        opened("mmbench", split="test")[0]
    (sample,) = opened("mmbench", split="test", require_answer=False)
    assert [message["role"] for message in sample["messages"]] == ["user"]
    assert "reference" not in sample


def test_seed_bench_asks_about_pictures_and_names_the_dimension():
    dataset = opened("seed-bench")
    assert [(s["id"], s["category"], s["reference"]) for s in dataset] == [
        ("101669", "Instances Counting", "A"),
        ("52943", "Scene Understanding", "C"),
    ]
    assert ask(dataset[1]) == f"What is the theme?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER_LINE}"
    assert files(dataset) == ["SEED-Bench-image/1454426_2591111986"] * 2
    assert dataset.notes == ("1 question about videos left out of SEED-Bench.json",)
    assert files(opened("seed-bench", tasks="video")) == ["SEED-Bench-video/v2_10.mp4"]


def test_mmau_refers_to_the_text_of_the_right_option_and_carries_all():
    dataset = opened("mmau")
    first = dataset[0]
    assert ask(first) == "Who speaks with joy?\nSelect one option from the provided choices.\nMonica\nJoey, Ross\nRoss"
    assert (first["reference"], first["options"]) == ("Ross", ["Monica", "Joey, Ross", "Ross"])
    assert [sample["category"] for sample in dataset] == ["Emotion Flip Detection", "Phonemic Stress Pattern Analysis"]
    assert files(dataset)[0] == "test-mini-audios/3fe64f3d-282c.wav"
    assert dataset.notes == ("2 questions of other tasks than speech left out of mmau-test-mini.json",)
    assert [sample["reference"] for sample in opened("mmau", task="music")] == ["Drum"]


def test_air_bench_turns_the_right_text_into_its_letter():
    dataset = opened("air-bench")
    assert [(s["id"], s["category"], s["reference"]) for s in dataset] == [
        ("1", "Speaker_Gender_Recognition", "B"),
        ("2", "Speech_Grounding", "C"),
    ]
    assert ask(dataset[0]) == f"What is the gender of the speaker?\nA. female\nB. male\n{LETTER_LINE}"
    assert files(dataset)[0] == "Speaker_Gender_Recognition_common_voice_13.0_en/a.wav"
    assert dataset.notes == ("2 questions of other tasks than speech left out of Foundation_meta.json",)


def test_air_bench_says_sound_and_music_tasks_by_their_names():
    assert files(opened("air-bench", tasks="sound")) == ["Audio_Grounding_AudioGrounding/c.flac"]  # listed as .wav
    assert files(opened("air-bench", tasks="music")) == ["Music_AQA_MUSIC-AVQA/d.wav"]
