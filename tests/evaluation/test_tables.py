"""Tables as Markdown, LaTeX and terminal text."""

import pytest

from moka.evaluation import score
from moka.evaluation.benchmarks.table import HEADER, score_table
from moka.evaluation.tables import PLAIN_WIDTH, Table, escape_latex

TABLE = Table(
    "50 % of a_b", ["name", "score"], [["x & y", "1 ± 2"], ["[z]", "a|b"]], ["<event> counts"], command="moka x"
)


def test_latex_prints_every_character_as_it_is():
    assert escape_latex(r"a_b & 5% #1 $x {y} ~^ \ <event> ±") == (
        r"a\_b \& 5\% \#1 \$x \{y\} \textasciitilde{}\textasciicircum{} \textbackslash{} "
        r"\textless{}event\textgreater{} $\pm$"
    )


def test_latex_is_a_booktabs_table():
    lines = TABLE.latex().splitlines()
    assert lines[0] == "% moka x"
    assert r"\caption{50 \% of a\_b. \textless{}event\textgreater{} counts}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert [line for line in lines if line.endswith(r"\\")] == [
        r"name & score \\",
        r"x \& y & 1 $\pm$ 2 \\",
        r"{}[z] & a\textbar{}b \\",
    ]
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_markdown_keeps_its_columns_and_shows_tags_and_command():
    text = TABLE.markdown()
    assert "| name | score |\n|---|---:|\n| x & y | 1 ± 2 |\n| [z] | a\\|b |\n" in text
    assert "&lt;event> counts" in text
    assert text.endswith("```sh\nmoka x\n```\n")


def test_terminal_shows_brackets_and_keeps_its_width():
    text = TABLE.terminal()
    assert "[z]" in text
    assert "<event> counts" in text
    assert all(len(line) <= PLAIN_WIDTH for line in text.splitlines())


@pytest.mark.parametrize("format", ["table", "markdown", "latex"])
def test_score_table_has_both_denominators_and_the_protocol(format):
    records = [
        {"id": 1, "prediction": "yes", "reference": "yes", "category": "random"},
        {"id": 2, "prediction": "maybe", "reference": "yes", "category": "random"},
    ]
    table = score_table(score("pope", records))
    assert tuple(table.header) == HEADER
    assert list(table.rows[0]) == [
        "random",
        "accuracy, %",
        "50.00",
        "[9.45, 90.55]",
        "100.00",
        "[20.65, 100.00]",
        "2",
        "1",
    ]
    assert [row[0] for row in table.rows if row[0]] == ["random", "overall"]
    text = table.text(format)
    for word in ("N = 2 records, 1 unparsable", "Protocol strict, version 1", "50.00", "100.00"):
        assert word in text


def test_undefined_figure_is_a_dash():
    record = {"id": 1, "prediction": "no", "reference": "no", "category": "random"}
    rows = score_table(score("pope", [record])).rows
    assert list(rows[1])[:6] == ["", "precision, %", "-", "-", "-", "-"]
