"""Files of one Python literal a line, as some public data sets have in place of JSON."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cprec.data.delimited import NOT_UTF8, SHOWN, TOO_LONG
from cprec.data.engine import TableEngine
from cprec.data.text_files import LINE, text_blocks
from cprec.schema import id_text

BATCH = 1 << 15
"""Rows that are parsed at once."""

MAX_LITERAL = 1 << 20
"""Bytes of a line at most: Python needs some five hundred times the memory of a line that is all brackets."""

NO_DICT = "malformed row: no dict as Python spells it"


def python_literal(line: str) -> dict[str, Any]:
    """The dict that a line of Python spells. Raises ValueError for anything else.

    >>> python_literal("{'asin': 'B1', u'price': 4.99, 'also': ['B2', 'B3']}")
    {'asin': 'B1', 'price': 4.99, 'also': ['B2', 'B3']}
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backslash before an ordinary letter, which only warns
            value = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(type(error).__name__) from None
    if not isinstance(value, dict):
        raise ValueError("no dict")
    return value


def as_text(value: Any) -> str | None:
    """A value as text: lists (and lists of lists) joined by a comma, None where there is nothing or a dict.

    >>> as_text([["Beauty", "Skin Care"], "Gifts"])
    'Beauty, Skin Care, Gifts'
    """
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, (list, tuple, set)):
        texts = [text for text in map(as_text, value) if text]
        return ", ".join(sorted(texts) if isinstance(value, set) else texts)
    if isinstance(value, (int, float)):  # 12.0 is the id 12, as in every other form
        return id_text(value)
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def read_lines(engine: TableEngine, path: Path, columns: Sequence[str]) -> tuple[Any, Any]:
    """One dict a line, the given keys as text: (rows, malformed rows), shaped as `TableEngine.read_json_lines` does.

    An empty line is not a row. Raises DataError for a file of another kind, and for a compressed one that ends early.
    """
    schema = pa.schema([*((name, pa.string()) for name in columns), (LINE, pa.int64())])
    bad: list[tuple[int, str, str]] = []
    rows = engine.from_batches(pa.RecordBatchReader.from_batches(schema, _batches(path, columns, schema, bad)))
    fields = pa.schema([(LINE, pa.int64()), ("reason", pa.string()), ("row", pa.string())])
    values = zip(*bad, strict=True) if bad else [[], [], []]
    return rows, engine.from_arrow(pa.table([pa.array(column) for column in map(list, values)], schema=fields))


def _batches(
    path: Path, columns: Sequence[str], schema: pa.Schema, bad: list[tuple[int, str, str]]
) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[Any, ...]] = []

    def batch() -> pa.RecordBatch:
        values = zip(*rows, strict=True) if rows else [[] for _ in schema]
        return pa.record_batch(
            [pa.array(column, kind) for column, kind in zip(values, schema.types, strict=True)], schema
        )

    for number, line in enumerate(_lines(path), start=1):
        reason = TOO_LONG if len(line) > MAX_LITERAL else None
        try:
            text = line.decode("utf-8", "replace" if reason else "strict")
            if not text.strip(" \t\r"):
                continue
            if reason is None:
                record = python_literal(text)
                row = [as_text(record.get(name)) for name in columns]
                "".join(value for value in row if value).encode()  # raises for a lone surrogate, which is not text
                rows.append((*row, number))
        except UnicodeError:
            reason = NOT_UTF8
        except (ValueError, RecursionError):
            reason = NO_DICT
        if reason is not None:
            bad.append((number, reason, line[: 4 * SHOWN].decode("utf-8", "replace")[:SHOWN].rstrip("\r")))
        if len(rows) >= BATCH:
            yield batch()
            rows.clear()
    yield batch()


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends; one that is too long is cut at the first byte too many."""
    rest = b""
    for block in text_blocks(path):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        rest = rest[: MAX_LITERAL + 1]
    if rest:
        yield rest
