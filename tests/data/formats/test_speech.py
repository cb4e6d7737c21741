"""LibriSpeech, GigaSpeech and SALMONN: the published files become speech with an instruction and its text."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import datasets
import pytest

from moka.data.formats import open_format
from moka.data.media import MediaDecoding
from moka.data.schema import media_parts
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def table_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(sample):
    """Question and answer."""
    return sample["messages"][0]["content"][-1]["text"], sample["messages"][-1]["content"][0]["text"]


def sound(sample):
    ((kind, medium),) = media_parts(sample)
    assert kind == "audio"
    return medium if isinstance(medium, bytes) else Path(medium).relative_to(FIXTURES.resolve()).as_posix()


def test_librispeech_reads_the_tree_of_its_archives():
    dataset = open_format("librispeech", FIXTURES / "librispeech", "train-clean-100")
    assert [sample["id"] for sample in dataset] == ["103-1240-0000", "103-1240-0001"]
    first = dataset[0]
    assert texts(first) == ("Please transcribe the speech.", "chapter one missus rachel lynde is surprised")
    assert first["reference"] == "chapter one missus rachel lynde is surprised"
    assert sound(first) == "librispeech/LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac"
    assert dataset.where(1).endswith("103-1240.trans.txt:2")
    assert dataset.missing_media() == []
    assert pickle.loads(pickle.dumps(dataset))[1] == dataset[1]  # loader workers that are spawned
    ((_, waveform),) = media_parts(MediaDecoding().decode_sample(first))
    assert waveform.rate == 16000


def test_the_960_hours_of_librispeech_are_its_three_training_parts():
    dataset = open_format("librispeech", FIXTURES / "librispeech")
    assert dataset.split == "train-960"
    assert [sample["id"] for sample in dataset] == ["103-1240-0000", "103-1240-0001", "1001-134707-0000", "20-205-0000"]
    inner = open_format("librispeech", FIXTURES / "librispeech" / "LibriSpeech", "test-other")
    assert [sample["reference"] for sample in inner] == ["lobsters and lobsters"]


def test_librispeech_may_keep_its_capitals_and_be_asked_otherwise():
    dataset = open_format(
        "librispeech", FIXTURES / "librispeech", "dev-clean", case="as-is", instruction="What is said?"
    )
    assert texts(dataset[0]) == ("What is said?", "GO DO YOU HEAR")
    with pytest.raises(MokaError, match="option case is 'upper'; allowed are lower, as-is"):
        open_format("librispeech", FIXTURES / "librispeech", "dev-clean", case="upper")


def test_an_absent_part_of_librispeech_is_reported_with_its_archive(editable):
    root = editable("librispeech")
    shutil.rmtree(root / "LibriSpeech/train-other-500")
    with pytest.raises(MokaError, match=r"Unpack train-other-500\.tar\.gz") as error:
        open_format("librispeech", root)
    assert str(root / "LibriSpeech/train-other-500/SPEAKER/CHAPTER") in str(error.value)


def test_gigaspeech_takes_the_cut_segments_of_one_subset():
    dataset = open_format("gigaspeech", FIXTURES / "gigaspeech", "train")
    assert [sample["id"] for sample in dataset] == ["YOU0000000315_S0000660", "AUD0000000003_S0000016"]
    assert [sample["reference"] for sample in dataset] == [
        "as they're leaving can kash pull zahra aside really quickly",
        "the house was empty",
    ]
    assert [sound(sample) for sample in dataset] == [
        "gigaspeech/segments/YOU0000000315_S0000660.wav",
        "gigaspeech/segments/AUD0000000003_S0000016.flac",
    ]
    assert dataset.notes == ("1 utterance without speech (<SIL>, <MUSIC>, <NOISE>, <OTHER>) left out",)
    assert dataset.missing_media() == []
    assert dataset.where(1).endswith("GigaSpeech.json: record 2, segment 1")
    assert pickle.loads(pickle.dumps(dataset))[1] == dataset[1]


def test_gigaspeech_chooses_another_subset_and_its_own_for_kept_out_splits():
    root = FIXTURES / "gigaspeech"
    assert len(open_format("gigaspeech", root, subset="{XL}")) == 3
    assert [s["id"] for s in open_format("gigaspeech", root, subset="s")] == ["AUD0000000003_S0000016"]
    assert [s["id"] for s in open_format("gigaspeech", root, "validation")] == ["POD1000000004_S0000000"]
    with pytest.raises(MokaError, match=r"no segment of subset \{TEST\}"):
        open_format("gigaspeech", root, "test")
    with pytest.raises(MokaError, match="option subset is 'XXL'; allowed are XS, S, M, L, XL"):
        open_format("gigaspeech", root, subset="XXL")


def test_gigaspeech_turns_punctuation_tags_into_characters_on_request():
    dataset = open_format("gigaspeech", FIXTURES / "gigaspeech", punctuation="keep", case="as-is")
    assert dataset[0]["reference"] == "AS THEY'RE LEAVING, CAN KASH PULL ZAHRA ASIDE REALLY QUICKLY?"


def test_gigaspeech_in_parquet_has_the_clips_themselves(table_cache):
    root = FIXTURES / "gigaspeech" / "parquet"
    dataset = open_format("gigaspeech", root)
    cut = open_format("gigaspeech", FIXTURES / "gigaspeech")
    assert [(s["id"], s["reference"]) for s in dataset] == [(s["id"], s["reference"]) for s in cut]
    assert dataset.notes == cut.notes
    assert sound(dataset[1])[:4] == b"RIFF"
    assert dataset.where(1).endswith(": row 3")
    ((_, waveform),) = media_parts(MediaDecoding().decode_sample(dataset[1]))
    assert (waveform.rate, len(waveform.samples)) == (16000, 4000)


def test_parquet_files_in_several_folders_must_be_chosen_from(tmp_path):
    for folder in ("m", "xs"):
        (tmp_path / folder).mkdir()
        shutil.copy(FIXTURES / "gigaspeech/parquet/train-00000-of-00001.parquet", tmp_path / folder)
    with pytest.raises(MokaError, match=r"several folders of .* hold train tables: m, xs"):
        open_format("gigaspeech", tmp_path)


def test_salmonn_asks_its_own_question_or_that_of_the_task():
    dataset = open_format("salmonn", FIXTURES / "salmonn")
    assert [sample["category"] for sample in dataset] == ["asr", "QA", "gender_recognition"]
    assert [texts(sample) for sample in dataset] == [
        ("Recognize the speech and give me the transcription.", "chapter one missus rachel lynde is surprised"),
        ("Who is surprised?", "Rachel Lynde."),
        ("What is the gender of the speaker?", "Female."),
    ]
    assert [sample["reference"] for sample in dataset] == [texts(sample)[1] for sample in dataset]
    flac = "salmonn/LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac"
    assert [sound(sample) for sample in dataset] == [flac] * 3  # one path is published with a leading slash
    assert len({sample["id"] for sample in dataset}) == 3
    assert dataset.missing_media() == []


def test_salmonn_leaves_out_other_corpora_unless_all_are_asked_for():
    kept = open_format("salmonn", FIXTURES / "salmonn")
    assert kept.notes[1:] == ("1 record of other corpora than LibriSpeech left out of salmonn_stage2_data.json",)
    every = open_format("salmonn", FIXTURES / "salmonn", corpus="all")
    assert (len(every), len(every.notes)) == (4, 1)
