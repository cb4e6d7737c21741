"""LLaVA-Instruct-150K and A-OKVQA in their published layouts."""

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
LLAVA, AOKVQA = FIXTURES / "llava-instruct", FIXTURES / "a-okvqa"


def image(dataset, index=0):
    ((kind, medium),) = media_parts(dataset[index])
    assert kind == "image"
    return Path(medium).relative_to(dataset.media_root.parent).as_posix()


def test_llava_instruct_finds_its_images_among_those_of_coco():
    dataset = open_format("llava-instruct", LLAVA)
    assert [sample["id"] for sample in dataset] == ["000000033471", "000000052846"]
    assert [image(dataset, i) for i in (0, 1)] == ["train2017/000000033471.jpg", "train2017/000000052846.jpg"]
    assert [message["role"] for message in dataset[0]["messages"]] == ["user", "assistant"] * 2
    assert dataset[0]["messages"][2]["content"] == [{"type": "text", "text": "Is anything else to be seen?"}]
    # A placeholder after the question is one before it.
    assert [part["type"] for part in dataset[1]["messages"][0]["content"]] == ["image", "text"]
    assert dataset[1]["messages"][0]["content"][1]["text"] == "Which colour is it?"
    assert dataset.missing_media() == []
    assert next(media_parts(MediaDecoding().decode_sample(dataset[0])))[1].size == (8, 6)


def test_the_images_of_llava_instruct_may_are_elsewhere(tmp_path):
    root, images = tmp_path / "llava", tmp_path / "images"
    root.mkdir()
    shutil.copy(LLAVA / "llava_instruct_150k.json", root)
    with pytest.raises(MokaError, match=r"media_root .*train2017' is not a folder"):
        open_format("llava-instruct", root)
    shutil.copytree(LLAVA / "train2017", images)
    assert open_format("llava-instruct", root, media_root=images).missing_media() == []
    shutil.copytree(LLAVA / "train2017", root / "coco" / "train2017")
    assert open_format("llava-instruct", root).missing_media() == []


def test_llava_instruct_says_a_bad_record_and_a_wrong_layout(tmp_path):
    (tmp_path / "detail_23k.json").write_text(json.dumps([{"id": "1", "image": "1.jpg"}]))
    with pytest.raises(MokaError, match=r"looked for .*llava_instruct_150k\.json, and found none"):
        open_format("llava-instruct", tmp_path)
    dataset = open_format("llava-instruct", tmp_path, file="detail_23k.json", media_root=tmp_path)
    with pytest.raises(MokaError, match=r"detail_23k\.json: record 1: field 'conversations' is missing"):
        dataset[0]


def test_a_okvqa_asks_with_lettered_options_and_answers_with_the_letter():
    dataset = open_format("a-okvqa", AOKVQA)
    (sample,) = dataset
    assert sample["id"] == "trainQuestion000000001"
    assert image(dataset).endswith("a-okvqa/train2017/000000299207.jpg")
    assert sample["messages"][0]["content"][1]["text"] == (
        "What might a box of this colour hold?\nA. sand\nB. coal\nC. toys\nD. water\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert sample["messages"][1]["content"] == [{"type": "text", "text": "D"}]
    assert sample["choices"] == ["sand", "coal", "toys", "water"]
    assert len(sample["direct_answers"]) == 10
    assert len(sample["rationales"]) == 3


def test_a_okvqa_may_answer_with_the_text_of_the_option():
    (sample,) = open_format("a-okvqa", AOKVQA, "val", answer="text")
    assert sample["messages"][1]["content"] == [{"type": "text", "text": "all"}]
    assert "letter" not in sample["messages"][0]["content"][1]["text"]
    with pytest.raises(MokaError, match=r"option answer is 'leter'; allowed are letter, text. Did you mean 'letter'"):
        open_format("a-okvqa", AOKVQA, answer="leter")


def test_the_splits_of_a_okvqa_have_their_own_images_and_the_test_split_has_no_answers(tmp_path):
    for split in ("train", "val", "test"):
        dataset = open_format("a-okvqa", AOKVQA, split, require_answer=False)
        assert f"/{split}2017/" in image(dataset)
        assert dataset.missing_media() == []
    assert [message["role"] for message in dataset[0]["messages"]] == ["user"]
    with pytest.raises(MokaError, match="has no assistant message"):
        open_format("a-okvqa", AOKVQA, "test")[0]
    root = tmp_path / "a-okvqa"
    root.mkdir()
    shutil.copy(AOKVQA / "aokvqa_v1p0_val.json", root)
    shutil.copytree(AOKVQA / "val2017", root / "coco" / "val2017")
    assert open_format("a-okvqa", root, "val").missing_media() == []
