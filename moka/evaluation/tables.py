"""Tables as text: Markdown, LaTeX (booktabs) and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "|": r"\textbar{}", "…": r"\dots{}"},
}
PLAIN_WIDTH = 120  # columns, where the output is no terminal


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: one line above it.
        header: the columns' names.
        rows: as many cells as columns each.
        notes: lines below it.
        left: how many columns from the left hold words; the others are numbers, set to the right.
        emphasised: the numbers of the rows that sum up others; bold in the terminal.
        command: the command line that made it, where there is one.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: int = 1
    emphasised: frozenset[int] = frozenset()
    command: str | None = None

    def markdown(self) -> str:
        """As GitHub and MkDocs read it."""
        lines = [f"**{_cell(self.title)}**", "", _row(self.header), self._rule()]
        lines += [_row(row) for row in self.rows]
        for note in self.notes:
            lines += ["", _inline(note)]
        if self.command:
            lines += ["", "```sh", self.command, "```"]
        return "\n".join([*lines, ""])

    def _rule(self) -> str:
        return "|" + "".join("---|" if i < self.left else "---:|" for i in range(len(self.header)))

    def latex(self) -> str:
        """A table for the booktabs package, with title and notes as its caption, and the command as a comment."""
        columns = "l" * self.left + "r" * (len(self.header) - self.left)
        caption = " ".join([f"{self.title.rstrip('.')}.", *self.notes])
        lines = [f"% {_line(self.command)}"] if self.command else []
        lines += ["\\begin{table}", "\\centering", f"\\caption{{{escape_latex(caption)}}}"]
        lines += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
        lines += [_latex_row(self.header), "\\midrule", *(_latex_row(row) for row in self.rows)]
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])

    def rich(self) -> RichTable:
        """For a rich console; text that looks like markup is text."""
        table = RichTable(title=Text(self.title), caption=Text("\n".join(self.notes)))
        for i, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if i < self.left else "right", overflow="fold")
        for i, row in enumerate(self.rows):
            table.add_row(*(Text(cell) for cell in row), style="bold" if i in self.emphasised else None)
        return table

    def terminal(self) -> str:
        """The table as plain text in lines of at most `PLAIN_WIDTH` characters."""
        console = Console(width=PLAIN_WIDTH, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self.rich())
        return capture.get()

    def show(self) -> None:
        """Print it, as wide as the terminal."""
        console = Console()
        (console if console.is_terminal else Console(width=PLAIN_WIDTH)).print(self.rich())

    def text(self, format: str) -> str:
        """ "table", "markdown" or "latex"."""
        return {"table": self.terminal, "markdown": self.markdown, "latex": self.latex}[format]()


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in _line(text))


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """A note in Markdown: what looks like a tag stays visible."""
    return _line(text).replace("<", "&lt;")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(escape_latex(cell) for cell in cells) + r" \\"
    return f"{{}}{row}" if row.startswith("[") else row  # else LaTeX takes it for the argument of the line before
