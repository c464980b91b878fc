"""The one model of a table that people read, for the terminal, pages, Markdown and LaTeX.

Nothing that a cell says can steer the terminal, or be taken for HTML, Markdown or LaTeX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

LATEX = {"\\": r"\textbackslash{}", "<": r"$<$", ">": r"$>$", "*": r"$^{*}$", "~": r"\textasciitilde{}", "^": r"\^{}"}
LATEX |= {char: f"\\{char}" for char in "&%$#_{}"}

Kind = Literal["", "model", "bound", "section"]
STYLES: Mapping[Kind, str] = {"": "", "model": "cyan", "bound": "dim", "section": "bold"}
"""How a kind of row looks in the terminal."""


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table."""

    text: str
    note: str = ""
    """Small print: an interval, a number of queries."""

    def __str__(self) -> str:
        return f"{self.text} {self.note}".rstrip()


@dataclass(frozen=True)
class Column:
    """The head of a column, and how its cells are set."""

    head: str
    note: str = ""
    """Small print below the head."""
    align: Literal["left", "right"] = "right"
    wrap: bool = False
    """Cells may be broken into lines, in the terminal."""


@dataclass(frozen=True)
class Row:
    """A row of cells, one for each column; a section has its name alone."""

    cells: tuple[Cell, ...]
    kind: Kind = ""
    best: bool = False

    @classmethod
    def of(cls, cells: Iterable[str | Cell], kind: Kind = "", *, best: bool = False) -> Row:
        return cls(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), kind, best)


@dataclass(frozen=True)
class Grid:
    """A table."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""

    @classmethod
    def of(
        cls,
        heads: Sequence[str | Column],
        rows: Iterable[Sequence[str | Cell]],
        *,
        caption: str = "",
        left: int = 1,
    ) -> Grid:
        """A table of these heads and rows, the first `left` columns set flush left."""
        columns = [
            head
            if isinstance(head, Column)
            else Column(head, align="left" if place < left else "right", wrap=place < left)
            for place, head in enumerate(heads)
        ]
        return cls(tuple(columns), tuple(map(Row.of, rows)), caption)

    def without_empty_columns(self) -> Grid:
        """The table without the columns in which no row has anything."""
        kept = [place for place in range(len(self.columns)) if any(row.cells[place].text for row in self.rows)]
        rows = tuple(replace(row, cells=tuple(row.cells[place] for place in kept)) for row in self.rows)
        return replace(self, columns=tuple(self.columns[place] for place in kept), rows=rows)

    # ---- terminal ----

    def for_terminal(self) -> Table:
        """The table for a console of rich."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column in self.columns:
            head = "\n".join(printable(part) for part in column.head.split("\n"))
            table.add_column(Text(head), justify=column.align, no_wrap=not column.wrap)
        indent = "  " if any(line.kind == "section" for line in self.rows) else ""
        for number, line in enumerate(self.rows):
            if line.kind == "section" and number:
                table.add_row()
            style = STYLES[line.kind] + (" bold" if line.best else "")
            first, *others = (plain(str(cell), style) for cell in line.cells)
            table.add_row(first if line.kind == "section" else plain(indent, style) + first, *others)
        return table

    # ---- for papers ----

    def markdown(self) -> str:
        """The table in Markdown, its best row bold.

        >>> rows = Row.of(["a|b", "0.1"], best=True), Row.of(["c", ""])
        >>> print(Grid((Column("", align="left"), Column("NDCG")), rows).markdown())
        | | NDCG |
        | --- | ---: |
        | **a\\|b** | **0.1** |
        | c | |
        """
        lines = [[column.head for column in self.columns]]
        lines.append(["---" if column.align == "left" else "---:" for column in self.columns])
        for line in self.rows:
            cells = [re.sub(r"([|*])", r"\\\1", printable(str(cell))) for cell in line.cells]
            lines.append([f"**{cell}**" if cell and line.best else cell for cell in cells])
        return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)

    def latex(self, below: Sequence[str] = ()) -> str:
        """The table in LaTeX, for a document that uses the package booktabs, with lines of text below it.

        Small print is set small. In the best row the cells without small print are bold.
        """
        lines = [" & ".join(latex_text(column.head) for column in self.columns) + r" \\", r"\midrule"]
        for line in self.rows:
            lines.append(" & ".join(_latex_cell(cell, line.best) for cell in line.cells) + r" \\")
        notes = [rf"\multicolumn{{{len(self.columns)}}}{{l}}{{{latex_text(text)}}} \\" for text in below]
        aligned = "".join(column.align[0] for column in self.columns)
        whole = [rf"\begin{{tabular}}{{{aligned}}}", r"\toprule", *lines, r"\bottomrule", *notes, r"\end{tabular}", ""]
        return "\n".join(whole)


def console_for(file: TextIO | None, width: int | None = None, *, least: int = 100) -> Console:
    """A console on a file, standard output if None. `width` in columns is the terminal's if None; without a
    terminal it is at least `least`."""
    console = Console(file=file, width=width, highlight=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=max(console.width, least), highlight=False)
    return console


def widest_fitting(grids: Sequence[Grid], console: Console) -> Grid:
    """The first table that is no wider than the console, or else the last. The widest come first."""
    room = console.options.update(max_width=10_000)  # measures what a table asks for, whatever the console's width
    return next(
        (g for g in grids if Measurement.get(console, room, g.for_terminal()).maximum <= console.width), grids[-1]
    )


def printable(text: str) -> str:
    """The text with a blank for each character that could steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def plain(text: str, style: str = "") -> Text:
    """Text for the terminal."""
    return Text(printable(text), style=style)


def print_line(console: Console, text: str, style: str = "", indent: int = 0) -> None:
    """Print text in lines that fit, all `indent` characters in and further ones three more."""
    for number, part in enumerate(plain(text).wrap(console, console.width - indent - 3)):
        console.print(Text(" " * (indent + 3 * bool(number)) + part.plain.rstrip(), style=style))


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is; a minus before a number is set as a minus.

    >>> latex_text("50%_of A&B: -0.01")
    '50\\\\%\\\\_of A\\\\&B: $-$0.01'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(LATEX.get(char, char) for char in printable(text)))


def _latex_cell(cell: Cell, best: bool) -> str:
    text = latex_text(cell.text)
    if cell.note:
        return rf"{text} {{\scriptsize {latex_text(cell.note)}}}"
    return rf"\textbf{{{text}}}" if text and best else text
