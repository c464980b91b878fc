"""Files of one Python literal a line, as some public data sets have in place of JSON."""

from __future__ import annotations

import ast
import gzip
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.data.text_files import LINE, MAX_LINE, SHOWN, check_encoding
from cprec.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from cprec.data.engine import TableEngine

BATCH = 1 << 15
"""Rows that are parsed at once."""

Parse = Callable[[str], dict[str, Any]]


def python_literal(line: str) -> dict[str, Any]:
    """The dict that a line of Python spells. Raises ValueError for anything else.

    >>> python_literal("{'asin': 'B1', 'price': 4.99, 'also': ['B2', 'B3']}")
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
    """A value as text: lists (and lists of lists) joined by a comma, None where there is nothing.

    >>> as_text([["Beauty", "Skin Care"], "Gifts"])
    'Beauty, Skin Care, Gifts'
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple, set)):
        return ", ".join(text for text in map(as_text, value) if text)
    return str(value)


def read_lines(
    engine: TableEngine, path: Path, columns: Sequence[str], parse: Parse = python_literal
) -> tuple[Any, Any]:
    """One record a line, the given keys as text: (rows, malformed rows), shaped as `TableEngine.read_json_lines` does.

    A line that is empty is no row. Raises DataError for a compressed file that ends too early.
    """
    import pyarrow as pa

    check_encoding(path)
    schema = pa.schema([*((name, pa.string()) for name in columns), (LINE, pa.int64())])
    bad: list[dict[str, Any]] = []
    reader = pa.RecordBatchReader.from_batches(schema, _batches(path, columns, parse, schema, bad))
    rows = engine.from_batches(reader)
    fields = [(LINE, pa.int64()), ("reason", pa.string()), ("row", pa.string())]
    return rows, engine.from_arrow(pa.Table.from_pylist(bad, schema=pa.schema(fields)))


def _batches(
    path: Path, columns: Sequence[str], parse: Parse, schema: pa.Schema, bad: list[dict[str, Any]]
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rows: list[list[Any]] = []

    def batch() -> pa.RecordBatch:
        values = zip(*rows, strict=True) if rows else [[] for _ in schema]
        return pa.record_batch(
            [pa.array(column, kind) for column, kind in zip(values, schema.types, strict=True)], schema
        )

    for number, line in enumerate(_lines(path), start=1):
        try:
            if len(line) > MAX_LINE:
                raise ValueError("line size over maximum")
            text = line.decode("utf-8")
            if not text.strip():
                continue
            record = parse(text)
            rows.append([*(as_text(record.get(name)) for name in columns), number])
            "".join(value for value in rows[-1][:-1] if value).encode()  # a lone surrogate is no text
        except (ValueError, RecursionError) as error:
            if rows and rows[-1][-1] == number:
                rows.pop()
            reason = "invalid encoding" if isinstance(error, UnicodeError) else str(error)
            shown = line[:SHOWN].decode("utf-8", "replace").rstrip("\r\n")
            bad.append({LINE: number, "reason": f"malformed row: {reason}", "row": shown})
        if len(rows) >= BATCH:
            yield batch()
            rows.clear()
    yield batch()


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as raw:
            yield from gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path} ends too early or is damaged ({error}): fetch or write it again; nothing was used"
        ) from None
