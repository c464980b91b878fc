"""Takes delimited text apart, a block at a time: each line is part of a row, is set aside with a reason, or is empty.

- A line ends in a line feed; a carriage return before it belongs to the end. Empty lines are not rows.
- A field that begins with the quote goes on to the next quote that is not doubled; separators and ends of lines in it
  are its own. After it comes a separator or the end of the line. Any other quote is an ordinary character.
- An empty field is null.
- Of a row that cannot be taken apart the first line alone is set aside, and reading goes on with the next line: a quote
  that is never closed costs one line, not the rest of the file.

Blocks without a fault are parsed by Arrow; the others by Python, row by row, with the same outcome.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

MAX_LINE = 1 << 23
"""Bytes of a row at most."""

SHOWN = 1000
"""Characters of a malformed row that are kept."""

TOO_FEW = "malformed row: missing columns"
TOO_MANY = "malformed row: too many columns"
NOT_CLOSED = "malformed row: quote is not closed"
AFTER_QUOTE = "malformed row: text after a closing quote"
NOT_UTF8 = "malformed row: invalid encoding"
TOO_LONG = "malformed row: line size over maximum"

_STAND_IN = b"\x1f"
"""Replaces a separator of several bytes, because Arrow takes one byte; not where the text itself holds it."""

_UNDECODED = re.compile("[\udc80-\udcff]")
"""Python's characters for bytes that are not UTF-8 ("surrogateescape")."""


@dataclass(frozen=True)
class Form:
    """How the rows of a file are written."""

    columns: tuple[str, ...]
    separator: str
    quote: str
    """One character, or '' where quotes are ordinary."""
    header: bool = True
    """Whether the first line names the columns, and is not a row."""
    encoding: str = "utf-8"


class SetAside(NamedTuple):
    """A row that could not be taken apart."""

    line: int
    reason: str
    row: str


@dataclass
class Parsed:
    """The rows of a block."""

    columns: list[pa.Array]
    """A string array per column."""
    lines: np.ndarray
    """int64: the line where each row begins."""
    bad: list[SetAside] = field(default_factory=list)
    num_bytes: int = 0
    """How far the rows reach; the rest belongs before the next block."""
    num_lines: int = 0
    """Line feeds in these bytes."""


def parse_block(block: bytes, first_line: int, form: Form, *, is_last: bool) -> Parsed:
    """The whole rows at the start of a block that begins with line `first_line`; all of them where it is the last."""
    parsed = _parse_faultless(block, first_line, form, is_last=is_last)
    return parsed or _parse_each(block, first_line, form, is_last=is_last)


def set_aside(line: int, reason: str, row: str) -> SetAside:
    """A row with as much of its text as is kept, in characters that can be written."""
    shown = row[:SHOWN] + ("…" if len(row) > SHOWN else "")
    return SetAside(line, reason, shown.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


# ---- all at once -----------------------------------------------------------------------------------------------------


def _parse_faultless(block: bytes, first_line: int, form: Form, *, is_last: bool) -> Parsed | None:
    """As `_parse_each`, where Arrow reads the block by the same rules; else None."""
    separator, quote = form.separator.encode(), form.quote.encode()
    if len(block) > MAX_LINE or len(quote) > 1 or b"\0" in block or block.count(b"\r") != block.count(b"\r\n"):
        return None
    if block.startswith(b"\xef\xbb\xbf"):  # a byte order mark inside the file is text, but Arrow would drop it
        return None
    quotes = _places(block, quote) if quote and quote in block else np.zeros(0, dtype=np.int64)
    if len(separator) > 1:
        if _STAND_IN in block or len(quotes):
            return None
        end = len(block) if is_last else block.rfind(b"\n") + 1
        body, separator = block[:end].replace(separator, _STAND_IN), _STAND_IN
    else:
        end = _end_of_rows(block, quotes, is_last)
        body, quotes = block[:end], quotes[quotes < end]
        if not _quotes_are_regular(body, quotes, separator):
            return None
    num_lines = int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord("\n")))
    if not _is_utf8(body):
        return None
    table = _read_with_arrow(body, form.columns, separator, quote if len(quotes) else b"")
    if table is None:
        return None
    columns = [column.combine_chunks() for column in table.columns]
    parsed = Parsed(columns, np.arange(first_line, first_line + table.num_rows), [], end, num_lines)
    if table.num_rows == num_lines + (not body.endswith(b"\n")):
        return parsed  # each line is a row
    return _with_lines(parsed, body, first_line, form, separator, quotes)


def _read_with_arrow(body: bytes, columns: Sequence[str], separator: bytes, quote: bytes) -> pa.Table | None:
    """The rows that have as many fields as there are columns; None where Arrow cannot say."""
    kinds = {name: pa.string() for name in columns}
    try:
        return pa.csv.read_csv(
            pa.BufferReader(body),
            pa.csv.ReadOptions(use_threads=False, column_names=columns, block_size=len(body) + 1),
            pa.csv.ParseOptions(
                delimiter=separator.decode(),
                quote_char=quote.decode() or False,
                newlines_in_values=bool(quote),
                invalid_row_handler=lambda row: "skip",
            ),
            pa.csv.ConvertOptions(column_types=kinds, strings_can_be_null=True, null_values=[""]),
        )
    except pa.ArrowInvalid:
        return None


def _with_lines(
    parsed: Parsed, body: bytes, first_line: int, form: Form, separator: bytes, quotes: np.ndarray
) -> Parsed | None:
    """Number the rows where some lines are empty, begin no row, or have too few or too many fields."""
    # A row ends at a line feed outside quotes: one with an even number of quotes before it.
    feeds = _places(body, b"\n")
    stops = feeds[np.searchsorted(quotes, feeds) % 2 == 0]
    if not body.endswith(b"\n"):
        stops = np.append(stops, len(body))
    # Lines with nothing, or only a carriage return, before the feed are not rows.
    starts = np.concatenate([[0], stops[:-1] + 1])
    has_return = np.frombuffer(body, np.uint8)[np.maximum(stops - 1, 0)] == ord("\r")
    is_row = stops - starts > has_return
    starts, stops = starts[is_row], stops[is_row]
    # A row has one field more than separators outside quotes.
    separators = _places(body, separator)
    separators = separators[np.searchsorted(quotes, separators) % 2 == 0]
    num_fields = np.searchsorted(separators, stops) - np.searchsorted(separators, starts) + 1
    is_good = num_fields == len(form.columns)
    # The feeds before a row give its line. Where Arrow counted other rows, or a bad row has several lines, the block is
    # left to `_parse_each`.
    before = np.searchsorted(feeds, starts)
    if is_good.sum() != len(parsed.lines) or (np.searchsorted(feeds, stops) != before)[~is_good].any():
        return None
    lines = first_line + before
    for row in np.flatnonzero(~is_good).tolist():
        text = _without_return(body[starts[row] : stops[row]].decode())
        if len(form.separator.encode()) > 1:
            text = text.replace(_STAND_IN.decode(), form.separator)
        reason = TOO_FEW if num_fields[row] < len(form.columns) else TOO_MANY
        parsed.bad.append(set_aside(int(lines[row]), reason, text))
    parsed.lines = lines[is_good]
    return parsed


def _end_of_rows(block: bytes, quotes: np.ndarray, is_last: bool) -> int:
    """The end of the last whole row, if quotes open and close fields by turns."""
    if is_last:
        return len(block)
    if not len(quotes):
        return block.rfind(b"\n") + 1
    feeds = _places(block, b"\n")
    outside = feeds[np.searchsorted(quotes, feeds) % 2 == 0]
    return int(outside[-1]) + 1 if len(outside) else 0


def _quotes_are_regular(body: bytes, quotes: np.ndarray, separator: bytes) -> bool:
    """Whether quotes open and close fields by turns: before each that opens, and after each that closes, a field ends;
    a closing and an opening one next to each other stand for a quote in the field."""
    if not len(quotes):
        return True
    if len(quotes) % 2:
        return False
    # A closing quote right before an opening one is a doubled quote inside a field: drop both.
    opening, closing = quotes[0::2], quotes[1::2]
    is_doubled = opening[1:] == closing[:-1] + 1
    opening = opening[np.concatenate([[True], ~is_doubled])]
    closing = closing[np.concatenate([~is_doubled, [True]])]
    # The bytes before and after are taken from the body with a line feed put at both ends.
    padded = np.frombuffer(b"\n" + body + b"\n", np.uint8)
    before, after = padded[opening], padded[closing + 2]
    at_start = (before == ord("\n")) | (before == separator[0])
    at_end = (after == ord("\n")) | (after == ord("\r")) | (after == separator[0])
    return bool(at_start.all() and at_end.all())


def _is_utf8(body: bytes) -> bool:
    try:
        return body.isascii() or bool(body.decode())
    except UnicodeDecodeError:
        return False


def _places(block: bytes, byte: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(block, np.uint8) == byte[0])


# ---- row by row ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a text: fields, or the reason why it is set aside; an empty line has neither."""

    start: int
    stop: int
    """The line feed that ends it, or the end of the text."""
    fields: list[str]
    reason: str | None


def split_rows(text: str, form: Form, *, is_last: bool) -> Iterator[Row]:
    """The rows of a text, one after the other; without `is_last` a row that the text may end within is left out.

    >>> [row.fields for row in split_rows('a,"b,' + chr(10) + 'c"' + chr(10), Form(("x", "y"), ",", '"'), is_last=True)]
    [['a', 'b,\\nc']]
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        if end < 0 and not is_last:
            return
        row = _split_row(text, start, len(text) if end < 0 else end, form, is_last)
        if row is None:
            return
        yield row
        start = row.stop + 1


def split_line(line: str, separator: str, quote: str) -> list[str] | None:
    """The fields of a line that stands alone, as a header does; None where its quotes are not those of fields.

    >>> split_line('"a,b",c', ",", '"')
    ['a,b', 'c']
    """
    if not quote or quote not in line:
        return line.split(separator)
    fields, _, reason = _split_quoted(line, 0, len(line), separator, quote, len(line))
    return fields if reason is None else None


def _split_row(text: str, start: int, end: int, form: Form, is_last: bool) -> Row | None:
    """The row at `start`, whose first line ends at `end`; None where the text may end within it."""

    def faulty(reason: str) -> Row:
        return Row(start, end, [], reason)

    stop, line = end, _without_return(text[start:end])
    if not line:
        return Row(start, end, [], None)
    if _num_bytes(line) > MAX_LINE:
        return faulty(TOO_LONG)
    reason: str | None = None
    if form.quote and form.quote in line:
        fields, stop, reason = _split_quoted(text, start, end, form.separator, form.quote, len(form.columns))
        if stop > end and _num_bytes(text[start:stop]) > MAX_LINE:
            reason = NOT_CLOSED
        elif stop == len(text) and not is_last and reason != TOO_MANY:
            return None
    else:
        fields = line.split(form.separator)
    whole = text[start:stop] if reason is None else line
    if _UNDECODED.search(whole):
        return faulty(NOT_UTF8)
    if reason is None and len(fields) != len(form.columns):
        reason = TOO_FEW if len(fields) < len(form.columns) else TOO_MANY
    return Row(start, stop, fields, None) if reason is None else faulty(reason)


def _split_quoted(
    text: str, start: int, end: int, separator: str, quote: str, num_columns: int
) -> tuple[list[str], int, str | None]:
    """The fields of a row, where it stops, and what is wrong with it; `end` is the end of its first line."""
    fields: list[str] = []
    here = start
    while len(fields) <= num_columns:
        if text.startswith(quote, here):
            value, here = _closing_quote(text, here + 1, quote)
            if here < 0:
                return fields, len(text), NOT_CLOSED
            fields.append(value)
            if here > end:
                end = text.find("\n", here)
                end = len(text) if end < 0 else end
            if text.startswith(separator, here):
                here += len(separator)
                continue
            if here == end or (here == end - 1 and text[here] == "\r"):
                return fields, end, None
            return fields, end, AFTER_QUOTE
        following = text.find(separator, here, end)
        if following < 0:
            fields.append(_without_return(text[here:end]))
            return fields, end, None
        fields.append(text[here:following])
        here = following + len(separator)
    return fields, here, TOO_MANY


def _closing_quote(text: str, here: int, quote: str) -> tuple[str, int]:
    """The value of a field that a quote has opened, and the place after its closing quote; -1 where there is none."""
    parts = []
    while True:
        found = text.find(quote, here)
        if found < 0:
            return "", -1
        if not text.startswith(quote, found + 1):
            parts.append(text[here:found])
            return "".join(parts), found + 1
        parts.append(text[here : found + 1])
        here = found + 2


def _without_return(line: str) -> str:
    return line[:-1] if line.endswith("\r") else line


def _num_bytes(text: str) -> int:
    """Bytes of a text; where it cannot have as many as a row may, its characters."""
    return len(text) if len(text) * 4 <= MAX_LINE else len(text.encode("utf-8", "surrogateescape"))


def _parse_each(block: bytes, first_line: int, form: Form, *, is_last: bool) -> Parsed:
    text = block.decode("utf-8", "surrogateescape")
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[SetAside] = []
    line, here, done = first_line, 0, 0
    for row in split_rows(text, form, is_last=is_last):
        line += text.count("\n", here, row.start)
        here, done = row.start, min(row.stop + 1, len(text))
        if row.reason is not None:
            bad.append(set_aside(line, row.reason, _without_return(text[row.start : row.stop])))
        elif row.fields:
            rows.append(row.fields)
            lines.append(line)
    columns = [pa.array([value or None for value in values], pa.string()) for values in zip(*rows, strict=True)]
    return Parsed(
        columns or [pa.nulls(0, pa.string()) for _ in form.columns],
        np.array(lines, dtype=np.int64),
        bad,
        len(block) if done == len(text) else len(text[:done].encode("utf-8", "surrogateescape")),
        text.count("\n", 0, done),
    )
