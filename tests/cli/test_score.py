"""``moka score``: a file of predictions in, figures out."""

import json
from pathlib import Path

import pytest

from moka.evaluation import BENCHMARKS, score

RECORDS = [
    {"id": "1", "prediction": "Yes.", "reference": "yes", "category": "random"},
    {"id": "2", "prediction": "I know not", "reference": "no", "category": "random"},
    {"id": "3", "prediction": "No</s>", "reference": "no", "category": "popular"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pope.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_table_says_figures_counts_and_protocol(moka, file):
    done = moka("score", "pope", file)
    assert done.code == 0, done.err
    for word in ("random", "popular", "overall", "accuracy, %", "66.67", "100.00", "N = 3 records, 1 unparsable"):
        assert word in done.out
    assert "Protocol strict, version 1" in done.out


def test_json_is_what_python_gives(moka, file):
    assert json.loads(moka("score", "pope", file, "--format", "json").out) == score("pope", RECORDS)
    both = json.loads(moka("score", "pope", file, "--format", "json", "--protocol", "both").out)
    assert both == {name: score("pope", RECORDS, name) for name in ("strict", "paper")}
    assert both["strict"]["unparsable"] == 1
    assert both["paper"]["unparsable"] == 0


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (".md", "| category | figure | all |"),
        (".tex", r"\toprule"),
        (".json", '"benchmark": "pope"'),
        (".txt", "overall"),
    ],
)
def test_output_is_written_by_its_ending_and_the_table_printed(moka, file, tmp_path, ending, words):
    output = tmp_path / f"table{ending}"
    done = moka("score", "pope", file, "--output", output)
    assert done.code == 0, done.err
    assert words in output.read_text()
    assert "overall" in done.out
    assert f"written: {output}" in done.out


def test_format_goes_before_the_ending(moka, file, tmp_path):
    assert moka("score", "pope", file, "--output", tmp_path / "x.out", "--format", "latex").code == 0
    assert r"\toprule" in (tmp_path / "x.out").read_text()


def test_list_names_every_benchmark_with_its_fields(moka):
    done = moka("score", "--list")
    assert done.code == 0
    for name in BENCHMARKS:
        assert name in done.out
    assert "prediction" in done.out


def test_blank_lines_and_a_byte_order_mark_do_not_count(moka, file):
    file.write_text("\ufeff" + file.read_text().replace("\n", "\n\n"), encoding="utf-8")
    assert json.loads(moka("score", "pope", file, "--format", "json").out)["n"] == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ("\n\n", ["blank lines only"]),
        ('{"id": 1}\nnot json\n', [":2:", "not valid JSON"]),
        ("[\n{}\n]\n", [":1:", "complete object"]),
        ("[" * 100000, [":1:", "not valid JSON"]),
        (b"\xff\xfe", [":1:", "UTF-8"]),
        ('{"id": 1}\n', [":1:", "'prediction'", "missing"]),
        ('{"id": 1, "predicton": "yes", "reference": "yes"}\n', ["Did you mean 'predicton'?"]),
        (json.dumps({**RECORDS[0], "reference": "maybe"}), [":1:", "'maybe'", "yes, no"]),
        ("\n".join(map(json.dumps, [*RECORDS, RECORDS[0]])), [":4:", "'1'", "pope.jsonl:1"]),
    ],
)
def test_bad_files_are_named_with_the_line(refused, file, content, words):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("score", "pope", file)
    assert "pope.jsonl" in line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["popes", "FILE"], ["'popes'", "Did you mean 'pope'?"]),
        (["pope", "FILE", "--protocol", "papier"], ["'papier'", "Did you mean 'paper'?"]),
        (["asr", "FILE", "--protocol", "paper"], ["asr", "strict"]),
        (["pope"], ["moka score BENCHMARK"]),
        ([], ["moka score --list"]),
        (["pope", "FILE", "--output", "table.doc"], ["'table.doc'", ".tex"]),
        (["pope", "FILE", "--output", "no/such/folder/x.md"], ["no/such/folder"]),
        (["pope", "nothing.jsonl"], ["nothing.jsonl", "does not exist"]),
    ],
)
def test_bad_command_lines_are_one_line(refused, file, arguments, words):
    line = refused("score", *(file if word == "FILE" else word for word in arguments))
    for word in words:
        assert word in line, line


def test_output_goes_through_links_and_devices_and_never_over_the_input(moka, refused, file, tmp_path):
    target = tmp_path / "kept.json"
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    assert moka("score", "pope", file, "--output", link).code == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["n"] == 3
    assert moka("score", "pope", file, "--output", "/dev/null", "--format", "json").code == 0
    assert Path("/dev/null").is_char_device()
    before = file.read_bytes()
    assert "--output" in refused("score", "pope", file, "--output", file, "--format", "json")
    assert file.read_bytes() == before
    assert "--output" in refused("score", "pope", file, "--output", "")
