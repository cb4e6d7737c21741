"""Opening a published layout: its mistakes are reported, records are read when needed, and the page of formats is true."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path

import pytest

from moka.data.formats import FORMATS, describe_formats, open_format
from moka.data.formats.base import Format, Rows
from moka.data.formats.dataset import FormatDataset
from moka.data.formats.files import JsonRecords
from moka.data.schema import media_parts
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"
PAGE = Path(__file__).parents[3] / "docs" / "formats.md"


def dataset_of(root, items, make, **options):
    format = Format("tiny", "", ("image",), ("train",), "", {"id": "", "image": ""}, read=lambda *_: None)
    return FormatDataset(format, "train", Rows(items, make, lambda i: f"tiny.json: record {i + 1}", root), **options)


def make(record):
    part = {"type": "image", "image": record["image"]}
    return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "audiocap"}, ["Format 'audiocap' is not known", "llava-conversations", "Did you mean 'audiocaps'?"]),
        ({"split": "vla"}, ["format audiocaps: split 'vla'", "train, val, test", "Did you mean 'val'?"]),
        ({"questoin": "?"}, ["option 'questoin'", "question, audio", "Did you mean 'question'?"]),
        ({"root": None}, ["format audiocaps: root is missing"]),
        ({"root": "nowhere/at-all"}, ["root 'nowhere/at-all' does not exist"]),
        ({"media_root": "nowhere"}, ["media_root 'nowhere' is not a folder"]),
    ],
)
def test_each_mistake_of_opening_is_reported_with_what_is_allowed(given, words):
    name = given.pop("name", "audiocaps")
    with pytest.raises(MokaError) as error:
        open_format(name, given.pop("root", FIXTURES / "audiocaps"), **given)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_takes_the_options_that_it_lists(name):
    format = FORMATS[name]
    assert format.name == name
    assert pickle.loads(pickle.dumps(format)) is not None  # data sets keep it, and are sent to loader workers
    inspect.signature(format.read).bind(Path(), format.splits[0], **{o: d for o, (d, _, _) in format.options.items()})


@pytest.mark.parametrize("name", ["llava-conversations", "audiocaps", "a-okvqa", "video-llava-video", "llava-instruct"])
def test_a_dataset_can_be_sent_to_spawned_loader_workers(name):
    dataset = open_format(name, FIXTURES / name)
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


def test_what_a_reader_raises_is_reported_with_the_place_of_the_record(tmp_path):
    def refuse(record):
        raise MokaError("field 'label' is 7; 0 or 1 is expected.")

    with pytest.raises(MokaError, match=r"^tiny\.json: record 2: field 'label' is 7"):
        dataset_of(tmp_path, [{}, {}], refuse)[1]
    with pytest.raises(MokaError, match=r"^tiny\.json: record 1: field 'image' is missing; the record has 'id'"):
        dataset_of(tmp_path, [{"id": 1}], make)[0]
    with pytest.raises(MokaError, match=r"^tiny\.json: record 1: is not a record of format tiny \(TypeError"):
        dataset_of(tmp_path, [None], make)[0]


def test_an_index_error_inside_a_record_does_not_end_the_loop_over_the_data_set(tmp_path):
    dataset = dataset_of(tmp_path, [[], []], lambda record: record[0])
    with pytest.raises(MokaError, match="IndexError"):
        list(dataset)
    with pytest.raises(IndexError):
        dataset[2]


def test_samples_are_checked_and_paths_stay_under_the_media_root(tmp_path):
    inside, other = tmp_path / "inside", tmp_path / "other"
    inside.mkdir()
    other.mkdir()
    (inside / "a.png").write_bytes(b"x")
    dataset = dataset_of(inside, [{"image": "a.png"}, {"image": "../b.png"}, {"image": b"PNG"}, {"image": ""}], make)
    assert list(media_parts(dataset[0])) == [("image", str(inside.resolve() / "a.png"))]
    assert dataset[0]["id"] == "tiny.json: record 1"
    assert list(media_parts(dataset[-2])) == [("image", b"PNG")]
    with pytest.raises(MokaError, match=r"tiny\.json: record 2: image path '\.\./b\.png' .* outside the media root"):
        dataset[1]
    with pytest.raises(MokaError, match=r"tiny\.json: record 4: messages\[0\]\.content\[0\]\.image"):
        dataset[3]
    moved = dataset_of(inside, [{"image": "a.png"}], make, media_root=other)
    assert moved.missing_media() == [f"tiny.json: record 1: image {other.resolve() / 'a.png'}: does not exist"]


def test_an_answer_is_required_unless_reported_otherwise(tmp_path):
    def ask(record):
        return {"messages": [{"role": "user", "content": "?"}]}

    assert dataset_of(tmp_path, [{}], ask, require_answer=False)[0]["messages"][0]["role"] == "user"
    with pytest.raises(MokaError, match="no assistant message"):
        dataset_of(tmp_path, [{}], ask)[0]


ROWS = [{"id": i, "text": 'a "quoted" \\ {brace} ]' + "é" * i, "deep": [[{"x": [1]}], {}]} for i in range(6)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_array_gives_the_records_that_json_would(tmp_path, indent, mark):
    path = tmp_path / "rows.json"
    path.write_text(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False), "utf-8")
    records = JsonRecords(path)
    assert len(records) == len(ROWS)
    assert [records[i] for i in (3, 0, -1)] == [ROWS[3], ROWS[0], ROWS[-1]]
    assert list(records) == ROWS
    assert records.where(2) == f"{path}: record 3"


def test_json_lines_are_reported_by_their_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"id": 1}\n\n{"id": 2}\n{"id": \n', "utf-8")
    records = JsonRecords(path)
    assert [records[0], records[1]] == [{"id": 1}, {"id": 2}]
    assert records.where(1) == f"{path}:3"
    with pytest.raises(MokaError, match=r"rows\.json:4: is not valid JSON"):
        records[2]


def test_a_json_array_keeps_no_record_in_memory(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "x" * 100_000} for _ in range(5)]))
    records = JsonRecords(path)
    assert len(pickle.dumps(records)) < 2_000
    assert records[4]["text"] == "x" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 bytes"),
        ("[]", "an empty array"),
        ("[ ]", "an empty array"),
        ('"text"', "begins with"),
        ('[{"a": 1}, {"b": "x', "ends inside record 2: the file is cut"),
        ('[{"a": 1},', "ends inside record 2: the file is cut"),
        ("[1, 2]", "after 0 records comes b'1, 2'"),
        ('[{"a": 1} {"b": 2}]', "after 1 records comes b''"),
        ('[{"a": 1}, 3, {"b": 2}]', "after 1 records comes b', 3,'"),
        ('[{"a": 1}] [', "continues after its JSON array"),
        ('{"rows": [\n{"a": 1}]}', "neither a JSON array of records nor JSONL"),
    ],
)
def test_a_file_that_has_no_records_is_reported_when_it_is_opened(tmp_path, text, words):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(MokaError) as error:
        JsonRecords(path)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)


def test_a_record_that_is_not_json_is_reported_with_its_position(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"b": 1 2}]')
    records = JsonRecords(path)
    assert records[0] == {"a": 1}
    with pytest.raises(MokaError, match=r"rows\.json: record 2: is not valid JSON"):
        records[1]


def test_the_page_of_formats_is_the_one_that_the_formats_describe():
    introduction, generated = PAGE.read_text("utf-8").split("describe_formats(). -->\n\n")
    assert "open_format(" in introduction
    assert generated == describe_formats(), (
        "write the output of moka.data.formats.describe_formats() into docs/formats.md"
    )
    assert [line[3:] for line in generated.splitlines() if line.startswith("## ")] == list(FORMATS)


EXPERIMENTAL = ["video-llava-image", "video-llava-video", "music-avqa-reasoning", "salmonn"]


def test_layouts_that_were_not_checked_are_experimental_where_they_are_used():
    assert [name for name, format in FORMATS.items() if format.experimental] == EXPERIMENTAL
    for name in ("salmonn", "music-avqa-reasoning"):
        assert "experimental" in open_format(name, FIXTURES / name).notes[0]


DEEP = "[" * 100_000
MANY = "9" * 5000


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("messages", "train.json", '[{"id": ' + MANY + "}]"),
        ("messages", "train.jsonl", '{"id": ' + MANY + "}"),
        ("salmonn", "salmonn_stage2_data.json", DEEP),
        ("salmonn", "salmonn_stage2_data.json", '{"annotation": [' + MANY + "]}"),
        ("ave", "trainSet.txt", b"\xff\xfe"),
        ("librispeech", "dev-clean/1/2/1-2.trans.txt", b"1-2-0000 \xff"),
        ("mme", "existence/a.txt", b"\xff"),
        ("pope", "coco_pope_random.json", '{"label": ' + MANY + "}"),
        ("audiocaps", "train.csv", b"audiocap_id,youtube_id,start_time,caption\n1,\xff,0,x\n"),
        ("audiocaps", "train.csv", "audiocap_id,youtube_id,start_time,caption\n1,x,0\n"),
        ("mmbench", "MMBench_DEV_EN.tsv", "index\tquestion\tA\tB\timage\n1\t\x00\rx\n"),
        ("music-avqa", "avqa-train.json", json.dumps([{"question_id": 1, "anser": "yes", "templ_values": DEEP}])),
    ],
)
def test_files_that_a_parser_refuses_are_one_clear_error(tmp_path, name, file, content):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = {"librispeech": {"split": "dev-clean"}, "pope": {"splits": "random"}}.get(name, {})
    with pytest.raises(MokaError, match=path.name):
        list(open_format(name, tmp_path, **options))
