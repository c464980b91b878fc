"""Tables of text as Markdown, and text as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence

LATEX = {"\\": r"\textbackslash{}", "<": r"$<$", ">": r"$>$", "*": r"$^{*}$", "~": r"\textasciitilde{}", "^": r"\^{}"}
LATEX |= {char: f"\\{char}" for char in "&%$#_{}"}


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None = None) -> str:
    """A table whose first column stands left and the others right, one row of it bold.

    >>> print(markdown_rows(["", "NDCG"], [["a|b", "0.1"], ["c", ""]], bold=0))
    | | NDCG |
    | --- | ---: |
    | **a\\|b** | **0.1** |
    | c | |
    """
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for number, row in enumerate(rows):
        cells = [cell.replace("|", "\\|").replace("*", "\\*") for cell in row]
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if number == bold else cells)
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is; a minus before a number is one.

    >>> latex_text("50%_of A&B: -0.01")
    '50\\\\%\\\\_of A\\\\&B: $-$0.01'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(LATEX.get(char, char) for char in text))
