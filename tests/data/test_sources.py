"""From a name to batches: embedded tasks and JSONL files, with samples that cannot be used replaced and counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from moka.data import Collator, EncodedDataset, open_source
from moka.data.media import BadMediaError
from moka.data.sources import attribution, notes_of, open_samples
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


def chat(question, answer="seven", number=0):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"m{number}", "messages": messages}


def text_of(processor, encoded):
    return processor.tokenizer.decode(encoded["input_ids"])


# --- open_source


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
    path, options = str(folder / "train.jsonl"), {"on_bad_media": "substitute", "bad_media_budget": 0.5}
    source = open_source(path, "train", **options, report_path=folder / "bad.jsonl")
    ids = [source[i]["id"] for i in range(6)]
    assert [ids[i] for i in (0, 1, 3, 5)] == ["s0", "s1", "s3", "s5"]
    assert {ids[2], ids[4]} <= {"s0", "s1", "s3", "s5"}
    again = open_source(path, "train", **options)
    assert [again[i]["id"] for i in reversed(range(6))] == ids[::-1]
    report = [json.loads(record) for record in (folder / "bad.jsonl").read_text().splitlines()]
    assert [(record["index"], record["id"]) for record in report] == [(2, "s2"), (4, "s4")]
    tight = open_source(path, "train", on_bad_media="substitute", bad_media_budget=0.01)
    assert tight[2]["id"] in ("s0", "s1", "s3", "s5")
    with pytest.raises(MokaError, match="budget"):
        tight[4]
    with pytest.raises(MokaError, match="Did you mean 'substitute'"):
        open_source(path, "train", on_bad_media="subsitute")


def test_a_damaged_file_stops_under_the_error_policy(folder):
    (folder / "media" / "4.png").write_bytes(b"no picture")  # there, and not empty
    source = open_source(str(folder / "train.jsonl"), "train")
    with pytest.raises(BadMediaError, match=r"'s4'.*4\.png"):
        source[4]


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(MokaError, match=r"none\.jsonl"):
        open_source(str(tmp_path / "none.jsonl"), "train")


# --- EncodedDataset


@pytest.fixture
def mixed():
    """Ten samples: 1 blank, 4 too long by its pictures, 7 without any answer, 8 long by its text only."""
    samples = [chat(f"which digit {number}", number=number) for number in range(10)]
    samples[1] = chat("which digit", answer=" ", number=1)
    pictures = [{"type": "image", "image": Image.new("L", (8, 8))}] * 30
    samples[4] = chat([*pictures, {"type": "text", "text": "which digit"}], number=4)
    samples[7]["messages"].pop()
    samples[8] = chat("which digit is spoken " * 30, number=8)
    return samples


MAX_LENGTH = 48


def test_samples_that_cannot_be_used_are_replaced_and_counted(mixed, processor, tmp_path):
    report = tmp_path / "dropped.jsonl"
    dataset = EncodedDataset(mixed, processor, MAX_LENGTH, seed=1, report_path=report)
    encoded = [dataset[i] for i in range(len(dataset))]
    assert sorted(dataset.dropped) == [1, 4, 7]
    assert "no supervised token" in dataset.dropped[1]
    assert "media spans are never cut" in dataset.dropped[4]
    assert "no supervised token" in dataset.dropped[7]
    records = [json.loads(record) for record in report.read_text().splitlines()]
    assert {(r["index"], r["id"], r["reason"]) for r in records if r["action"] == "replaced"} == {
        (i, f"m{i}", reason) for i, reason in dataset.dropped.items()
    }
    (cut,) = [r for r in records if r["action"] == "shortened"]
    tokens = len(processor.encode(mixed[8]["messages"])["input_ids"])
    assert (cut["index"], cut["id"]) == (8, "m8")
    assert cut["reason"] == f"its {tokens} tokens were cut to {MAX_LENGTH}: the end of its text is lost"
    assert len(records) == 4
    assert "cut_from" not in encoded[8]
    usable = {text_of(processor, encoded[i]) for i in (0, 2, 3, 5, 6, 8, 9)}
    assert len(usable) == 7
    for index in (1, 4, 7):
        assert text_of(processor, encoded[index]) in usable
    for one in encoded:
        assert len(one["input_ids"]) <= MAX_LENGTH
        assert any(label != IGNORE for label in one["labels"])
    assert len(encoded[8]["input_ids"]) == MAX_LENGTH  # text was shortened
    for index in (0, 2, 9):
        assert encoded[index]["input_ids"] == processor.encode(mixed[index]["messages"])["input_ids"]


def test_replacements_depend_on_seed_and_index_only(mixed, processor):
    def texts(seed, order):
        dataset = EncodedDataset(mixed, processor, MAX_LENGTH, seed=seed)
        return {i: text_of(processor, dataset[i]) for i in order}

    forward = texts(1, range(10))
    assert texts(1, reversed(range(10))) == forward
    assert texts(1, [4]) == {4: forward[4]}
    assert any(texts(seed, range(10)) != forward for seed in range(2, 6))


def test_loader_workers_share_the_count(mixed, processor, tmp_path):
    plain = EncodedDataset(mixed, processor, MAX_LENGTH)
    expected = [text_of(processor, plain[i]) for i in range(10)]
    dataset = EncodedDataset(mixed, processor, MAX_LENGTH, report_path=tmp_path / "dropped.jsonl")
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert [text_of(processor, one) for one in loader] == expected
    assert dataset.dropped == plain.dropped
    assert len(plain.dropped) == 3


def test_indices_are_those_of_a_list(mixed, processor):
    dataset = EncodedDataset(mixed, processor, MAX_LENGTH)
    assert dataset[-1]["input_ids"] == dataset[9]["input_ids"]
    assert dataset[-6]["input_ids"] == dataset[4]["input_ids"]  # and so has the same substitute
    assert len(list(dataset)) == 10
    with pytest.raises(IndexError):
        dataset[10]


def test_nothing_usable_is_an_error(processor):
    dataset = EncodedDataset([chat("one", answer="", number=i) for i in range(3)], processor, MAX_LENGTH)
    with pytest.raises(MokaError, match=r"20 samples in a row cannot be used; the last, m\d: no supervised token"):
        dataset[0]


def test_what_the_user_must_fix_is_no_reason_to_drop(tiny_tokenizer, processor):
    seeing = MokaProcessor(tiny_tokenizer, {"visual": VISUAL}, len(tiny_tokenizer))
    sound = {"type": "audio", "audio": Waveform(np.zeros(800, np.float32), 8000)}
    dataset = EncodedDataset([chat([sound])], seeing, MAX_LENGTH)
    with pytest.raises(MokaError, match="no encoder for audio"):
        dataset[0]
    assert dataset.dropped == {}


# --- the full way


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_pads_where_it_is_reported(processor, side):
    encoded = [processor.encode(chat(words)["messages"]) for words in ("one", "which digit is spoken")]
    batch = Collator(processor, side)(encoded)
    short, long = (len(one["input_ids"]) for one in encoded)
    pad = slice(0, long - short) if side == "left" else slice(short, long)
    assert not batch["attention_mask"][0, pad].any()
    assert batch["attention_mask"].sum() == short + long
    assert (batch["labels"][0, pad] == IGNORE).all()
    kept = batch["attention_mask"][0].bool()
    assert torch.equal(batch["input_ids"][0][kept], torch.tensor(encoded[0]["input_ids"]))


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
        ([], "list of data sources is empty"),
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
    windows = {"count": 3, "seconds": 0.05, "every": 0.05, "first": 0.025}
    full, cut = (open_source(str(folder / "train.jsonl"), "train", audio_windows=w)[2] for w in (None, windows))
    assert [len(window.samples) for window in media(cut)[1]] == [400, 400, 400]
    np.testing.assert_array_equal(media(cut)[1][1].samples, media(full)[1].samples[400:800])


def test_what_readers_leave_out_is_known_of_joined_and_decoded_sets(formats):
    root = {"format": "gigaspeech", "root": str(formats / "gigaspeech"), "split": "train"}
    single = notes_of(open_samples(root, "train"))
    assert single
    assert notes_of(open_source([root, root], "train", size=1)) == (*single, *single)
