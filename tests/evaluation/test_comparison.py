"""Tables of compared methods, from runs that are made up: nothing is trained."""

import json
import statistics

import pytest

from moka.errors import MokaError
from moka.evaluation.comparison import comparison_table, read_comparison, summarise, write_comparison

COMMAND = "moka compare my.yaml --methods lora,moka --seeds 2"


def record(same, overall, n=200):
    return {"parameters": 1234, "n": n, "scores": {"same": same, "overall": overall}}


def comparison(lora, moka, **changes):
    """A comparison of two methods with two seeds; lora and moka are seed -> record."""
    found = {"lora": lora, "moka": moka}
    return {
        "data": "data/test.jsonl",
        "seeds": [42, 43],
        "matched_parameters": True,
        "command": COMMAND,
        "missing": [{"method": m, "seed": s} for s in (42, 43) for m in found if s not in found[m]],
        "methods": {m: {"adapter": {"r": 8}, **summarise(runs)} for m, runs in found.items()},
        **changes,
    }


COMPLETE = comparison(
    {42: record(0.5, 0.4), 43: record(0.7, 0.6)},
    {42: record(0.8, 0.7), 43: record(0.8, 0.9)},
)
PAIRED = "Overall less that of moka, paired by seed, in points: lora -30.0 ± 0.0 (2 seeds)."  # of COMPLETE
PART = comparison({42: record(0.5, 0.4)}, {})


def test_mean_and_sample_standard_deviation_are_over_seeds():
    summary = COMPLETE["methods"]["lora"]
    assert summary["mean"]["overall"] == pytest.approx(0.5)
    assert summary["spread"]["overall"] == pytest.approx(statistics.stdev([0.4, 0.6]))
    assert summary["runs"]["same"] == [0.5, 0.7]
    assert summary["seeds"] == [42, 43]


def test_table_names_deviation_seeds_n_and_matching():
    table = comparison_table(COMPLETE)
    for words in ("mean ± sample standard deviation over seeds 42, 43", "N = 200", "match MokA's", "data/test.jsonl"):
        assert words in table.title
    assert list(table.header) == ["method", "r", "adapter parameters", "same", "overall"]
    assert [list(row) for row in table.rows] == [
        ["lora", "8", "1,234", "60.0 ± 14.1", "50.0 ± 14.1"],
        ["moka", "8", "1,234", "80.0 ± 0.0", "80.0 ± 14.1"],
    ]
    assert table.notes == [PAIRED]
    assert "ranks as configured" in comparison_table({**COMPLETE, "matched_parameters": False}).title


def test_differences_are_taken_within_a_seed():
    # The seeds differ by 30 points, the methods within a seed by 10 and 12: unpaired, that could not be seen.
    pairs = comparison({42: record(0, 0.4), 43: record(0, 0.7)}, {42: record(0, 0.5), 43: record(0, 0.82)})
    (note,) = comparison_table(pairs).notes
    assert note == "Overall less that of moka, paired by seed, in points: lora -11.0 ± 1.4 (2 seeds)."
    part = comparison({42: record(0, 0.4), 43: record(0, 0.7)}, {43: record(0, 0.5)})
    assert all("paired" not in note for note in comparison_table(part).notes)
    renamed = {**pairs, "methods": {"lora": pairs["methods"]["lora"], "moka_mean": pairs["methods"]["moka"]}}
    assert "that of lora" in comparison_table(renamed).notes[0]
    assert "moka_mean +11.0 ± 1.4" in comparison_table(renamed).notes[0]


def test_one_seed_claims_no_deviation():
    one = comparison({42: record(0.5, 0.4)}, {42: record(0.8, 0.7)}, seeds=[42], missing=[])
    table = comparison_table(one)
    assert "±" not in table.title
    assert "one seed, 42" in table.title
    assert list(table.rows[0][3:]) == ["50.0", "40.0"]


def test_unfinished_comparison_names_the_missing_runs():
    table = comparison_table(PART)
    assert [list(row) for row in table.rows] == [["lora", "8", "1,234", "50.0", "40.0"], ["moka", "8", "-", "-", "-"]]
    (note,) = table.notes
    assert note == "Missing: 3 of 4 runs: moka (seed 42), lora (seed 43), moka (seed 43)."
    nothing = comparison_table(comparison({}, {}))
    assert "no run finished" in nothing.title
    assert [list(row) for row in nothing.rows] == [["lora", "8", "-", "-"], ["moka", "8", "-", "-"]]


def test_data_of_a_published_format_is_named_in_words():
    title = comparison_table({**COMPLETE, "data": [{"format": "ave", "root": "data/ave"}, "more.jsonl"]}).title
    assert title.startswith("format=ave root=data/ave + more.jsonl: ")


def test_files_hold_the_table_and_the_command(tmp_path):
    paths = write_comparison(tmp_path / "new", COMPLETE)
    assert [path.name for path in paths] == ["comparison.json", "comparison.md", "comparison.tex"]
    assert json.loads(paths[0].read_text())["command"] == COMMAND
    markdown, latex = paths[1].read_text(), paths[2].read_text()
    assert "| lora | 8 | 1,234 | 60.0 ± 14.1 | 50.0 ± 14.1 |" in markdown
    assert markdown.index("| moka") < markdown.index(COMMAND)
    assert r"lora & 8 & 1,234 & 60.0 $\pm$ 14.1 & 50.0 $\pm$ 14.1 \\" in latex
    assert f"% {COMMAND}" in latex
    assert r"accuracy in \%" in latex
    assert r"\textbf" not in latex
    assert read_comparison(tmp_path / "new") == COMPLETE


def test_an_older_result_is_read_with_the_names_of_now(tmp_path):
    old = {**COMPLETE, "methods": {"multiple_lora": COMPLETE["methods"]["lora"], "moka": COMPLETE["methods"]["moka"]}}
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    assert list(read_comparison(tmp_path)["methods"]) == ["uni_modal_lora", "moka"]
    (tmp_path / "comparison.json").write_text(json.dumps({**old, "format": 2}))
    assert list(read_comparison(tmp_path)["methods"]) == ["multiple_lora", "moka"]


def test_method_names_are_escaped_in_latex():
    methods = {"uni_modal_lora": COMPLETE["methods"]["lora"]}
    assert r"uni\_modal\_lora & 8" in comparison_table({**COMPLETE, "methods": methods}).latex()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no comparison"),
        ("{", "damaged"),
        ("[]", "no comparison"),
        ('{"settings": {}, "scores": {}}', "two levels up"),
        (json.dumps({**COMPLETE, "methods": {}}), "no comparison"),
        (json.dumps({**COMPLETE, "methods": {"moka": 3}}), "no comparison"),
    ],
)
def test_folder_without_a_comparison_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(MokaError, match=words):
        read_comparison(tmp_path)


def test_comparisons_without_a_command_or_missing_runs_named_can_be_read(tmp_path):
    old = {key: value for key, value in COMPLETE.items() if key not in ("command", "missing")}
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    table = comparison_table(read_comparison(tmp_path))
    assert table.notes == [PAIRED]
    assert "```" not in table.markdown()
