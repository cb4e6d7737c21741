"""Chat messages, LLaVA's conversations and ShareGPT: where media go, what stays text, and tables with encoded media."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from moka.data.formats import open_format
from moka.data.media import MediaDecoding
from moka.data.schema import media_parts
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"


def shown(message, root):
    """A message as one string, media in brackets, relative to the root."""
    parts = [part[part["type"]] if part["type"] == "text" else f"[{part[part['type']]}]" for part in message["content"]]
    return f"{message['role']}: " + " | ".join(parts).replace(f"{root.resolve()}/", "")


def chat(sample, root):
    return [shown(message, root) for message in sample["messages"]]


def write(root, record, name="train.json"):
    (root / name).write_text(json.dumps([record]))
    return root


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["messages", "llava-conversations", "sharegpt"])
def test_all_media_of_the_example_data_are_there_and_can_be_decoded(name):
    dataset = open_format(name, FIXTURES / name)
    assert dataset.missing_media() == []
    for sample in dataset:
        assert all(not isinstance(medium, str) for _, medium in media_parts(MediaDecoding(2).decode_sample(sample)))


def test_messages_are_read_from_lines_and_from_an_array():
    root = FIXTURES / "messages"
    train = open_format("messages", root)
    assert [(sample["id"], sample.get("category")) for sample in train] == [("m1", "counting"), ("m2", None)]
    assert chat(train[0], root) == [
        "user: [media/street.png] | [media/bell.wav] | How many bells ring?",
        "assistant: One.",
    ]
    assert chat(train[1], root)[1] == "user: What passes? | [media/cars.mp4]"
    validation = open_format("messages", root, "validation")
    assert chat(validation[0], root)[0] == "user: What does <image> mean?"
    assert train.where(1) == f"{root / 'train.jsonl'}:2"


def test_the_root_or_an_option_may_name_the_file_and_media_start_from_its_folder(tmp_path):
    root = FIXTURES / "messages"
    by_root = open_format("messages", root / "train.jsonl")
    assert list(by_root) == list(open_format("messages", root))
    assert list(open_format("messages", root, file="train.jsonl", split="mine")) == list(by_root)
    with pytest.raises(MokaError, match=r"absent\.json, and found none"):
        open_format("messages", root, file="absent.json")


def test_llava_media_go_before_the_text_one_each_and_other_placeholders_are_text():
    root = FIXTURES / "llava-conversations"
    dataset = open_format("llava-conversations", root)
    assert [sample["id"] for sample in dataset] == ["l1", "l2", "l3", "l4", "l5"]
    assert [chat(sample, root) for sample in dataset] == [
        [
            "user: [images/a.png] | What colour is it?",
            "assistant: Green.",
            "user: And the <image> tag?",
            "assistant: It is HTML: <image>.",
        ],
        ["user: First | [images/a.png] | , then | [images/b.png] | : what changed?", "assistant: The colour."],
        ["user: [images/b.png] | Describe it.", "assistant: A blue box."],
        ["user: What is 1 + 1?", "assistant: 2"],
        ["user: [videos/v.mp4] | [audios/s.wav] | What happens?", "assistant: It turns red."],
    ]


def test_the_text_around_a_medium_that_goes_before_it_stays_as_it_is(tmp_path):
    record = {"image": "a.png", "conversations": turns("Is  <image> a tag like <image>?\n", "Yes.")}
    assert chat(open_format("llava-conversations", write(tmp_path, record))[0], tmp_path)[0] == (
        "user: [a.png] | Is   a tag like <image>?"
    )


def test_sharegpt_media_stand_where_their_placeholders_are():
    root = FIXTURES / "sharegpt"
    dataset = open_format("sharegpt", root)
    assert [chat(sample, root) for sample in dataset] == [
        [
            "user: [images/1.png] | Who are they?",
            "assistant: Two boxes.",
            "user: And here? | [images/2.png]",
            "assistant: A white one.",
        ],
        ["user: [videos/1.mp4] | [audios/1.wav] | What is heard?", "assistant: A tone."],
        ["system: Be kind.", "user: Hello", "assistant: Hi!"],
    ]
    assert dataset[0]["id"] == "train.json: record 1"


def turns(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


MISTAKES = {
    "no placeholder": (
        {"image": "a.png", "conversations": turns("What?", "An <image>.")},
        "1 image file listed, but 0 <image> placeholders in the user's turns",
    ),
    "too few placeholders": (
        {"image": ["a.png", "b.png", "c.png"], "conversations": turns("<image>?", "x")},
        "3 image files listed, but 1 <image> placeholder in",
    ),
    "placeholder of another kind": (
        {"video": "a.mp4", "conversations": turns("<image>?", "x")},
        "1 video file listed, but 0 <video> placeholders",
    ),
    "one and many": (
        {"image": "a.png", "images": ["a.png"], "conversations": turns("<image>?", "x")},
        "media are under both 'image' and 'images'",
    ),
    "unknown role": ({"conversations": turns("?", "x", roles=("humam", "gpt"))}, "turn 0 is from 'humam'; allowed are"),
    "no turns": ({"conversations": []}, "a list with at least one turn"),
    "turn of a wrong type": ({"conversations": ["hi"]}, "turn 0 is 'hi'"),
    "no text": ({"conversations": [{"from": "human", "value": None}]}, "turn 0 has the text None"),
    "other layout": ({"id": "x", "question": "?"}, "field 'conversations' is missing; the record has 'id', 'question'"),
    "no answer": ({"conversations": turns("What?")}, "has no assistant message"),
}


@pytest.mark.parametrize("name", ["llava-conversations", "sharegpt"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_record_is_reported_with_file_and_position(name, mistake, tmp_path):
    record, words = MISTAKES[mistake]
    with pytest.raises(MokaError) as error:
        open_format(name, write(tmp_path, record))[0]
    assert str(error.value).startswith(f"{tmp_path / 'train.json'}: record 1: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_other_fields_stay_with_the_sample(tmp_path):
    root = write(tmp_path, {"id": 3, "source": "web", "category": "ocr", "conversations": turns("?", "x")})
    sample = open_format("llava-conversations", root)[0]
    assert {key: sample[key] for key in sample if key != "messages"} == {"id": "3", "source": "web", "category": "ocr"}


def test_media_listed_next_to_messages_fill_the_parts_without_one(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    sample = open_format("messages", write(tmp_path, {**record, "images": ["a.png", "b.png"]}))[0]
    assert chat(sample, tmp_path)[0] == "user: [a.png] | or | [b.png]"
    with pytest.raises(MokaError, match="placeholder without a medium"):
        open_format("messages", write(tmp_path, {**record, "images": ["a.png"]}))[0]
    with pytest.raises(MokaError, match="1 of the image files listed have no part"):
        open_format("messages", write(tmp_path, {**record, "images": ["a.png", "b.png", "c.png"]}))[0]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder as the Hub has data sets: Parquet shards whose images are embedded bytes, marked as images."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("table")
    rows = {
        "id": ["p1", "p2", "p3"],
        "images": [[{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}], [], []],
        "conversations": [turns("<image><image>Compare.", "Red, blue."), turns("2 + 2?", "4"), turns("3 + 3?", "6")],
    }
    kept = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    (root / "data").mkdir()
    kept.select([0, 1]).to_parquet(root / "data" / "train-00000-of-00002.parquet")
    kept.select([2]).to_parquet(root / "data" / "train-00001-of-00002.parquet")
    return root


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch, request):
    if not {"table", "parquet"} & set(request.fixturenames):
        return
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("how", ["root", "hub", "stream", "file"])
def test_tables_give_encoded_images_that_decode_to_their_pixels(table, how, tmp_path):
    name = "llava-conversations"
    if how == "root":
        dataset = open_format(name, table)
    elif how == "hub":
        dataset = open_format(name, hub=str(table), split="train")
    elif how == "stream":
        dataset = open_format(name, hub=str(table), streaming=True, take=2)
    else:
        dataset = open_format(name, table, file="data/train-00000-of-00002.parquet")
    assert [sample["id"] for sample in dataset] == ["p1", "p2", "p3"][: 2 if how in ("stream", "file") else 3]
    assert list(media_parts(dataset[0])) == [("image", png("red")), ("image", png("blue"))]
    assert chat(dataset[1], table) == ["user: 2 + 2?", "assistant: 4"]
    assert dataset.missing_media() == []
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.fixture
def parquet():
    pytest.importorskip("datasets")
    return pytest.importorskip("pyarrow.parquet")


def test_a_parquet_column_of_messages_is_read_past_its_nulls(tmp_path, parquet):
    import pyarrow

    content = [
        {"type": "image", "text": None, "image": {"bytes": png("red"), "path": "a.png"}},
        {"type": "text", "text": "What?", "image": None},
    ]
    answer = [{"type": "text", "text": "Red.", "image": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "train.parquet")
    sample = open_format("messages", tmp_path)[0]
    assert list(media_parts(sample)) == [("image", png("red"))]
    assert sample["messages"][1]["content"] == [{"type": "text", "text": "Red."}]
    assert sample["id"] == "train.parquet: row 1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": "en"}, "go with option hub"),
        ({"hub": "a/b", "streaming": True}, "streaming: true and take: N go together"),
        ({"hub": "a/b", "take": 3}, "streaming: true and take: N go together"),
        ({"hub": "a/b", "streaming": True, "take": 0}, "option take is 0"),
        ({"hub": "a/b", "file": "a.json"}, "hub and file name two sources"),
    ],
)
def test_options_that_do_not_go_together_are_reported(options, words, tmp_path):
    with pytest.raises(MokaError, match=words):
        open_format("sharegpt", tmp_path, **options)


def test_a_table_that_cannot_be_opened_is_reported_in_one_line(table):
    with pytest.raises(MokaError, match="split 'test' cannot be opened by `datasets`") as error:
        open_format("sharegpt", hub=str(table), split="test")
    assert "\n" not in str(error.value)


def test_without_datasets_the_way_to_install_it_is_reported(monkeypatch, table):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MokaError, match=r"pip install 'moka-peft\[data\]'"):
        open_format("sharegpt", hub=str(table))
