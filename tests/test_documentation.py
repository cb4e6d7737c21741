"""The commands and links of README and documentation are those that there are."""

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

from moka.cli.main import COMMANDS, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The calls of `moka` in the blocks of a page, as words, without what a shell would take."""
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # a text of several lines
                continue
            for start, word in enumerate(words):
                called = word == "moka" and (start == 0 or words[start - 1] == "-m" or "=" in words[start - 1])
                if called and words[start + 1 : start + 2] and words[start + 1] in COMMANDS:
                    yield list(takewhile(lambda one: not set(one) <= set("|;&<>"), words[start + 1 :]))


def test_commands_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_has_options_that_there_are(page, capsys):
    wrong = []
    for words in commands(page):
        try:
            parse(words)
        except SystemExit as ended:
            wrong += [f"moka {shlex.join(words)}: {capsys.readouterr().err}"] if ended.code else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_between_pages_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists() or target == "configuration.md", f"{page.name}: {target}"
