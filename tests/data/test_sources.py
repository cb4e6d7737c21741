"""From what a configuration names to samples with decoded media: embedded tasks, JSONL files, formats, lists of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from torch.utils.data import DataLoader

from moka.data import BadMediaPolicy, Collator, EncodedDataset, MediaDecoding, open_source
from moka.data.audio_segments import AudioWindows
from moka.data.media_io import BadMediaError
from moka.data.sources import attribution, open_samples
from moka.demo.digit_tasks import EmbeddedTask
from moka.errors import MokaError
from moka.modeling import MokaProcessor
from moka.modeling.media import Waveform

VISUAL = {"encoder": {"type": "conv-image", "image_size": 8, "num_tokens": 2}, "type_ids": [1, 2], "tokens": 2}
AUDIO = {"encoder": {"type": "conv-audio", "frames": 8, "num_tokens": 3}, "type_ids": [3], "tokens": 3}
IGNORE = -100


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    return MokaProcessor(
        tiny_tokenizer, {"visual": VISUAL, "audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml"
    )


def line(number, answer="seven", **media):
    content = [{"type": kind, kind: path} for kind, path in media.items()]
    content.append({"type": "text", "text": "which digit is spoken"})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": f"s{number}", "messages": messages})


@pytest.fixture
def folder(tmp_path):
    """Six samples with a grey picture and a tone each, all different."""
    (tmp_path / "media").mkdir()
    lines = []
    for number in range(6):
        Image.new("L", (10, 8), 40 * number).save(tmp_path / "media" / f"{number}.png")
        samples = 0.3 * np.sin(np.arange(1600) * (number + 1) / 20)
        soundfile.write(tmp_path / "media" / f"{number}.wav", samples.astype(np.float32), 8000)
        lines.append(line(number, image=f"media/{number}.png", audio=f"media/{number}.wav"))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def formats():
    return Path(__file__).parent / "formats" / "fixtures"


def media(sample):
    return [part[part["type"]] for part in sample["messages"][0]["content"] if part["type"] != "text"]


def test_embedded_source_is_the_task(processor):
    source = open_source("embedded:audio-visual-text", "test", size=8, seed=3)
    task = EmbeddedTask("audio-visual-text", "test", size=8, seed=3)
    assert len(source) == len(task) == 8
    assert [s["messages"][-1] for s in (source[i] for i in range(8))] == [task[i]["messages"][-1] for i in range(8)]
    stage_one = open_source("embedded:audio-visual-text", "train", size=4, stage=1)
    assert stage_one[0]["messages"] != open_source("embedded:audio-visual-text", "train", size=4)[0]["messages"]
    with pytest.raises(MokaError, match="audio-visual-text"):
        open_source("embedded:audio-visual-txt", "train")
    assert "MNIST" in attribution("embedded:audio-visual-text")
    assert attribution("a.jsonl") == "- a.jsonl\n"


def test_jsonl_source_decodes_its_media(folder):
    source = open_source(str(folder / "train.jsonl"), "train")
    assert len(source) == 6
    picture, sound = media(source[3])
    assert picture.getpixel((0, 0)) == 120
    assert isinstance(sound, Waveform)
    assert sound.rate == 8000
    np.testing.assert_allclose(sound.samples, 0.3 * np.sin(np.arange(1600) * 4 / 20), atol=1e-3)


def test_size_takes_the_first_samples(folder):
    path = str(folder / "train.jsonl")
    some = open_source(path, "train", size=2)
    assert [some[i]["id"] for i in range(len(some))] == ["s0", "s1"]
    assert len(open_source(path, "train", size=100)) == 6
    with pytest.raises(IndexError):
        some[2]


def test_media_root_may_be_elsewhere(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    (lists / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    path = str(lists / "train.jsonl")
    assert media(open_source(path, "train", media_root=str(folder))[1])[0].getpixel((0, 0)) == 40
    with pytest.raises(MokaError, match=r"train\.jsonl:1: image .*0\.png"):
        open_source(path, "train")


def test_missing_media_are_reported_before_training(folder):
    (folder / "media" / "2.png").unlink()
    (folder / "media" / "4.wav").write_bytes(b"")
    (folder / "media" / "5.wav").unlink()
    with pytest.raises(MokaError) as caught:
        open_source(str(folder / "train.jsonl"), "train")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'train.jsonl'}:3: image {folder / 'media' / '2.png'}: ")
    assert "and 2 more: 3 media files are missing in all" in message
    assert "data.on_bad_media=skip or substitute" in message


def test_substitutes_are_other_samples_and_the_same_every_time(folder):
    (folder / "media" / "2.png").unlink()
    (folder / "media" / "4.png").write_bytes(b"no picture")
    path, options = str(folder / "train.jsonl"), {"policy": BadMediaPolicy("substitute", 0.5)}
    source = open_source(path, "train", **options, report_path=folder / "bad.jsonl")
    ids = [source[i]["id"] for i in range(6)]
    assert [ids[i] for i in (0, 1, 3, 5)] == ["s0", "s1", "s3", "s5"]
    assert {ids[2], ids[4]} <= {"s0", "s1", "s3", "s5"}
    again = open_source(path, "train", **options)
    assert [again[i]["id"] for i in reversed(range(6))] == ids[::-1]
    report = [json.loads(record) for record in (folder / "bad.jsonl").read_text().splitlines()]
    assert [(record["index"], record["id"]) for record in report] == [(2, "s2"), (4, "s4")]
    tight = open_source(path, "train", policy=BadMediaPolicy("substitute", 0.01))
    assert tight[2]["id"] in ("s0", "s1", "s3", "s5")
    with pytest.raises(MokaError, match="budget"):
        tight[4]


def test_a_damaged_file_stops_under_the_error_policy(folder):
    (folder / "media" / "4.png").write_bytes(b"no picture")  # there, and not empty
    source = open_source(str(folder / "train.jsonl"), "train")
    with pytest.raises(BadMediaError, match=r"'s4'.*4\.png"):
        source[4]


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(MokaError, match=r"none\.jsonl"):
        open_source(str(tmp_path / "none.jsonl"), "train")


def test_batches_from_a_jsonl_file(folder, processor):
    dataset = EncodedDataset(open_source(str(folder / "train.jsonl"), "train"), processor, None)
    collator = Collator(processor)
    assert collator.padding_side == "left"
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collator))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    first = batches[0]
    assert type(first) is dict
    assert first["pixel_values"].shape == (4, 1, 8, 8)
    assert first["input_features"].shape == (4, 14, 8)
    assert [(row == 1).sum().item() for row in first["mm_token_type_ids"]] == [2] * 4
    assert [(row == 3).sum().item() for row in first["mm_token_type_ids"]] == [3] * 4
    for row in first["labels"]:
        assert processor.decode(row[row != IGNORE]) == "seven"


def test_list_of_sources_is_joined_in_order(folder):
    (folder / "more.jsonl").write_text(line(9, image="media/0.png") + "\n")
    root = {"format": "messages", "root": str(folder), "file": "train.jsonl"}
    joined = open_source([root, str(folder / "more.jsonl")], "train")
    assert [joined[i]["id"] for i in range(len(joined))] == ["s0", "s1", "s2", "s3", "s4", "s5", "s9"]
    assert media(joined[6])[0].size == (10, 8)
    assert "more.jsonl" in joined.dataset.where(6)
    assert len(open_source([root, str(folder / "more.jsonl")], "train", size=3)) == 3


def test_missing_files_of_every_joined_source_are_reported(folder):
    (folder / "more.jsonl").write_text(line(9, image="media/gone.png") + "\n")
    with pytest.raises(MokaError, match=r"gone\.png"):
        open_source([str(folder / "train.jsonl"), str(folder / "more.jsonl")], "train")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"root": "x"}, "no 'format'"),
        ({"format": "ave"}, "no 'root'"),
        ({"format": "avee", "root": "x"}, "Did you mean 'ave'"),
        ({"format": "librispeech", "root": "x"}, "names no split"),
        ({"format": "pope", "root": "x"}, "none of it goes by 'train'. It has test"),
        ({"format:pope": None, "root:x": None}, "a space after each colon"),
        ({"format": "ave", "root": "x", "spilt": "train"}, "Did you mean 'split'"),
    ],
)
def test_wrong_sources_are_reported(source, words):
    with pytest.raises(MokaError, match=words):
        open_source(source, "train")


def test_format_gets_the_split_that_the_run_asks_for(formats):
    splits = {
        split: open_source({"format": "ave", "root": str(formats / "ave")}, split) for split in ("train", "validation")
    }
    ids = {split: {dataset.dataset[i]["id"] for i in range(len(dataset))} for split, dataset in splits.items()}
    assert ids["train"]
    assert ids["validation"]
    assert not ids["train"] & ids["validation"]


@pytest.mark.parametrize(
    ("name", "split"), [("mmbench", "dev"), ("mmau", "test-mini"), ("pope", "test"), ("ave", "test")]
)
def test_test_data_are_the_split_with_published_answers(formats, name, split):
    samples = open_samples({"format": name, "root": str(formats / name)}, "test")
    assert samples.split == split
    assert samples[0]["reference"]


def test_sound_comes_as_windows(folder):
    windows = AudioWindows(count=3, seconds=0.05, every=0.05, first=0.025)
    decodings = (MediaDecoding(), MediaDecoding(audio_windows=windows))
    full, cut = (open_source(str(folder / "train.jsonl"), "train", decoding=one)[2] for one in decodings)
    assert [len(window.samples) for window in media(cut)[1]] == [400, 400, 400]
    np.testing.assert_array_equal(media(cut)[1][1].samples, media(full)[1].samples[400:800])


def test_what_readers_leave_out_is_known_of_joined_and_decoded_sets(formats):
    root = {"format": "gigaspeech", "root": str(formats / "gigaspeech"), "split": "train"}
    single = open_samples(root, "train").notes
    assert single
    assert open_source([root, root], "train", size=1).notes == (*single, *single)


@pytest.mark.parametrize("source", [None, [], [None], ["x.jsonl", 3], {}, ""])
def test_what_is_no_source_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}) + "\n")
    with pytest.raises(MokaError, match="data source"):
        open_samples(source, "train")
