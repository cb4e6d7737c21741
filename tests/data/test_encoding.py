"""Samples as model inputs: text shortened to fit, samples that cannot be used replaced and counted, batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from moka.data import Collator, EncodedDataset
from moka.errors import MokaError
from moka.modeling import MokaProcessor
from moka.modeling.media import Waveform

VISUAL = {"encoder": {"type": "conv-image", "image_size": 8, "num_tokens": 2}, "type_ids": [1, 2], "tokens": 2}
AUDIO = {"encoder": {"type": "conv-audio", "frames": 8, "num_tokens": 3}, "type_ids": [3], "tokens": 3}
IGNORE = -100
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    return MokaProcessor(
        tiny_tokenizer, {"visual": VISUAL, "audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml"
    )


def chat(question, answer="seven", number=0):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"m{number}", "messages": messages}


def text_of(processor, encoded):
    return processor.tokenizer.decode(encoded["input_ids"])


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
    with pytest.raises(MokaError, match=r"20 draws; the last, 'm\d': no supervised token"):
        dataset[0]


def test_what_the_user_must_fix_is_no_reason_to_drop(tiny_tokenizer, processor):
    seeing = MokaProcessor(tiny_tokenizer, {"visual": VISUAL}, len(tiny_tokenizer))
    sound = {"type": "audio", "audio": Waveform(np.zeros(800, np.float32), 8000)}
    dataset = EncodedDataset([chat([sound])], seeing, MAX_LENGTH)
    with pytest.raises(MokaError, match="no encoder for audio"):
        dataset[0]
    assert dataset.dropped == {}


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
