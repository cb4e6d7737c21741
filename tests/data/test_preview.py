"""`moka data show` shows what `encode` gives: every token once, with its modality, interaction group and label."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from moka.data.preview import counts, show, spans, table
from moka.modeling import MokaProcessor

VISUAL = {"encoder": {"type": "conv-image", "image_size": 8, "num_tokens": 2}, "type_ids": [1, 2], "tokens": 2}
AUDIO = {"encoder": {"type": "conv-audio", "frames": 8, "num_tokens": 3}, "type_ids": [3], "tokens": 3}
IGNORE = -100


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    return MokaProcessor(
        tiny_tokenizer, {"visual": VISUAL, "audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml"
    )


@pytest.fixture(scope="module")
def sample():
    image = Image.new("L", (8, 8))

    def user(*media, text):
        return {"role": "user", "content": [*media, {"type": "text", "text": text}]}

    picture, film = {"type": "image", "image": image}, {"type": "video", "video": [image] * 4}
    messages = [
        user(picture, picture, film, text="which digit\nis <image> written"),
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        user(picture, text="the same \x1b[31m sound"),
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    return {"id": "a", "messages": messages}


@pytest.fixture(scope="module")
def shown(processor, sample):
    encoded = processor.encode(sample["messages"])
    return encoded, spans(encoded, processor, sample)


def test_spans_spell_out_the_encoded_sample(shown):
    encoded, rows = shown
    ids, labels, groups = [], [], []
    for row in rows:
        assert row.start == len(ids)
        ids += [row.token_id] * row.count
        labels += [row.supervised] * row.count
        groups += [row.interaction] * row.count
    assert ids == encoded["input_ids"]
    assert labels == [label != IGNORE for label in encoded["labels"]]
    assert groups == encoded["interaction_ids"]


def test_each_medium_is_one_span_and_a_literal_placeholder_is_text(shown, processor):
    _, rows = shown
    media = [row for row in rows if row.modality != "text"]
    assert [(row.text, row.interaction) for row in media] == [
        ("<image x2>", 1),
        ("<image x2>", 1),
        ("<video x8>", 1),
        ("<image x2>", 2),
    ]
    text = "".join(row.text for row in rows if row.modality == "text")
    assert "is <image> written" in text
    learnt = [row.token_id for row in rows if row.supervised]
    assert processor.decode(learnt) == "sevenyes"


def test_without_the_sample_neighbouring_media_of_a_kind_are_one_span(shown, processor):
    encoded, _ = shown
    rows = spans(encoded, processor)
    assert [row.text for row in rows if row.modality != "text"] == ["<image x4>", "<video x8>", "<image x2>"]


def printed(rows, **console):
    file = io.StringIO()
    show(rows, "data.train[0]: sample 'a'", Console(file=file, width=100, **console))
    return file.getvalue()


def test_a_pipe_gets_a_table_with_all_of_it(shown):
    encoded, rows = shown
    out = printed(rows)
    title, head, *lines, total, end = out.splitlines()
    assert end == ""
    assert title == "data.train[0]: sample 'a'"
    assert head.split() == ["position", "id", "modality", "interaction", "supervised", "token"]
    assert lines == table(rows)[1:]
    labels = []
    for line in lines:
        position, _, modality, _, supervised, token = line.split(None, 5)
        first, _, last = position.partition("-")
        labels += [supervised == "yes"] * (int(last or first) - int(first) + 1)
        assert isinstance(json.loads(token), str)
        assert modality in ("text", "image", "video")
    assert labels == [label != IGNORE for label in encoded["labels"]]
    assert total == counts(rows)
    assert f"{len(encoded['input_ids'])} tokens: " in total
    assert "6 image" in total
    assert f"; {sum(labels)} supervised" in total
    assert "\x1b" not in out


def test_no_color_gets_the_table_on_a_terminal_too(shown, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "position  id" in printed(shown[1], force_terminal=True)


def test_a_terminal_gets_colours_and_nothing_of_the_data_drives_it(shown, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = printed(shown[1], force_terminal=True, color_system="standard")
    assert "legend" in out
    assert "<video x8>" in out
    assert "\x1b[31m" not in out  # of the question
    assert "\\u001b" in out
    # Exactly the supervised tokens are underlined, besides the word of the legend.
    underlined = [piece.split("m", 1) for piece in out.split("\x1b[")[1:]]
    words = [text for codes, text in underlined if "4" in codes.split(";")]
    learnt = "".join(row.text for row in shown[1] if row.supervised)
    assert "".join(words) == "supervised" + learnt
