"""Files of histories as rows: one user each, with the events that can be looked up and what was left out.

CSV and JSON lines are split as `cprec prepare` splits logs, and ids become text by the same rule. A row or an event
that cannot be used is left out with a reason; the others are not affected.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.delimited import SHOWN, Form
from cprec.data.text_files import KEY_TWICE, NO_OBJECT, first_line, parsed_blocks, text_blocks
from cprec.errors import DataError
from cprec.schema import id_text

USER, HISTORY = "user_id", "history"
SEPARATOR = "|"
ROWS_AT_ONCE = 512
NOT_TEXT = (pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)

NO_USER = "no user id"
NO_ITEM = "no item id"
NO_VALUE = "neither an id nor a title"
NO_LIST = "history is no list"


@dataclass(frozen=True)
class Row:
    """A row of a file of histories."""

    line: int
    """Where it begins in a text file, or its number in a Parquet file; from 1 on."""
    user: str | None
    """None if the row cannot be used; `left_out` says why."""
    events: tuple[str, ...] = ()
    """Ids or titles, oldest first."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Pairs of a text that was left out and the reason."""


def count_rows(path: Path) -> int:
    """The number of rows of a file. Raises DataError if it cannot be read, or lacks a column."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    if path.suffix == ".parquet":
        return int(_parquet(path).metadata.num_rows)
    if path.suffix == ".csv":
        return sum(len(block.lines) + len(block.bad) for block in parsed_blocks(path, _form(path)))
    keys: dict[str, None] = {}
    count = 0
    for _, line in _lines(path):
        count += 1
        if isinstance(value := _object(line), dict):
            keys |= dict.fromkeys(value)
    if count:  # a key may be absent from a row whose value is null, but not from all
        _check_columns(path, list(keys), "no object names it; the keys are")
    return count


class PartReader:
    """The rows of a file that `count_rows` has checked, `size` to a part; only malformed rows may come earlier in it.

    Parts in rising order are read in one pass. Rows of other parts are passed over, and of a Parquet file whole row
    groups.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._next: int | None = None

    def part(self, number: int) -> list[Row]:
        """The rows of a part, in order. Parts count from 0."""
        if self._next is None or number < self._next:
            self._rows, self._next = _rows_from(self._path, number * self._size), number
        skipped = (number - self._next) * self._size
        self._next = number + 1
        return [row() for row in itertools.islice(self._rows, skipped, skipped + self._size)]


UnreadRow = Callable[[], Row]
"""Makes a row, which takes most of the time, once it is asked for."""


def _rows_from(path: Path, first: int) -> Iterator[UnreadRow]:
    if path.suffix == ".parquet":
        return _parquet_rows(path, first)
    return itertools.islice(_csv_rows(path) if path.suffix == ".csv" else _json_rows(path), first, None)


def _csv_rows(path: Path) -> Iterator[UnreadRow]:
    form = _form(path)
    for block in parsed_blocks(path, form):
        for line, reason, row in block.bad:
            yield partial(Row, line, None, left_out=((row, reason),))
        columns = (block.columns[form.columns.index(name)].to_pylist() for name in (USER, HISTORY))
        for line, user, history in zip(block.lines.tolist(), *columns, strict=True):
            yield partial(_row, line, user, history)


def _json_rows(path: Path) -> Iterator[UnreadRow]:
    for number, line in _lines(path):
        yield partial(_json_row, number, line)


def _json_row(number: int, line: bytes) -> Row:
    value = _object(line)
    if isinstance(value, dict):
        return _row(number, value.get(USER), value.get(HISTORY))
    return Row(number, None, left_out=((line.decode("utf-8", "replace")[:SHOWN], value),))


def _parquet_rows(path: Path, first: int) -> Iterator[UnreadRow]:
    file = _parquet(path)
    # Row groups that end before the first row wanted are not read.
    ends = np.cumsum([0, *(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))])
    group = int(np.searchsorted(ends, first, side="right")) - 1
    number = int(ends[group])
    for batch in file.iter_batches(
        ROWS_AT_ONCE, row_groups=list(range(group, file.num_row_groups)), columns=[USER, HISTORY]
    ):
        number += len(batch)
        if number <= first:
            continue
        start = max(0, first - (number - len(batch)))
        columns = (batch[name][start:].to_pylist() for name in (USER, HISTORY))
        for line, (user, history) in enumerate(zip(*columns, strict=True), number - len(batch) + start + 1):
            yield partial(_row, line, user, history)


def _row(line: int, user: Any, history: Any) -> Row:
    try:
        name = id_text(user)
    except TypeError:
        name = None
    if name is None:
        return Row(line, None, left_out=(("" if user is None else str(user), NO_USER),))
    if isinstance(history, str):
        history = _listed(history)
    elif isinstance(history, dict):
        return Row(line, None, left_out=((str(history)[:SHOWN], NO_LIST),))
    elif not isinstance(history, Sequence):
        history = [] if history is None else [history]
    events, left_out = [], []
    for event in history:
        try:
            text = id_text(event)
        except TypeError:
            left_out.append((str(event)[:SHOWN], NO_VALUE))
            continue
        if text is None:
            left_out.append(("", NO_ITEM))
        else:
            events.append(text)
    return Row(line, name, tuple(events), tuple(left_out))


def _listed(text: str) -> Sequence[Any]:
    """The events of a cell: a list as JSON or Python write it, or texts between separators."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        for read in (_json, ast.literal_eval):
            try:
                found = read(inner)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list):
                return found
    return text.split(SEPARATOR) if inner else []


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file that are not blank, and their numbers."""
    number, rest = 0, b""
    for block in text_blocks(path):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            number += 1
            if not line.isspace() and line:
                yield number, line
    if rest.strip():
        yield number + 1, rest


def _object(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or the reason why there is none."""
    try:
        value = _json(line)
    except _Twice:
        return KEY_TWICE
    except (ValueError, RecursionError):
        return NO_OBJECT
    return value if isinstance(value, dict) else NO_OBJECT


class _Twice(ValueError):
    pass


def _json(text: str | bytes) -> Any:
    """Read JSON with numbers as the text that `id_text` makes of them; whole numbers keep all their digits."""
    return json.loads(
        text,
        parse_int=str,
        parse_float=lambda number: id_text(float(number)),
        parse_constant=lambda _: None,
        object_pairs_hook=_once,
    )


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice
    return found


# ---- columns ---------------------------------------------------------------------------------------------------------


def _form(path: Path) -> Form:
    line = first_line(path)
    if not line.strip():
        raise DataError(f"{path} has no header: its first line must name the columns {USER} and {HISTORY}")
    columns = next(csv.reader([line]))
    _check_columns(path, columns, "the header has")
    return Form(tuple(columns), ",", '"')


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    schema = file.schema_arrow
    _check_columns(path, schema.names, "it has")
    for name in (USER, HISTORY):
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name == HISTORY and not pa.types.is_map(kind) and hasattr(kind, "value_type"):
            kind = kind.value_type
        if any(check(kind) for check in NOT_TEXT):
            raise DataError(
                f"{path}: column {name!r} holds {schema.field(name).type}: write {USER} as text or numbers, and "
                f"{HISTORY} as a list of them"
            )
    return file


def _check_columns(path: Path, columns: Iterable[str], which: str) -> None:
    names = list(columns)
    missing = [name for name in (USER, HISTORY) if name not in names]
    if missing:
        raise DataError(
            f"{path}: there is no column {' and none '.join(missing)}; {which} "
            f"{', '.join(map(repr, names)) or 'none'}. Each row needs {USER} and {HISTORY} (ids or titles, oldest "
            f"first; in CSV separated by {SEPARATOR})"
        )
    twice = [name for name in (USER, HISTORY) if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: column {twice[0]} is there twice: give each a name of its own")
