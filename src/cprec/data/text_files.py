"""Reads delimited text and JSON lines into DuckDB, counting every row: each is kept, or set aside with a reason."""

from __future__ import annotations

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cprec.data.delimited import (
    MAX_LINE,
    NOT_UTF8,
    SHOWN,
    TOO_LONG,
    TOO_MANY,
    Form,
    Parsed,
    SetAside,
    parse_block,
    set_aside,
)
from cprec.errors import DataError

LINE = "line_in_file"
"""The column that readers add: the line where a row begins, counted from 1, which is the header where there is one."""

BLOCK_BYTES = 1 << 22
"""Bytes read at once."""

UTF8 = "utf-8"

NO_OBJECT = "malformed row: no JSON object"
KEY_TWICE = "malformed row: a key occurs twice"

_numbers = itertools.count()


class Scalar(str):
    """A key of JSON objects that holds one value (an id, a time): a list or an object counts as missing, and whole
    numbers have no decimal point."""


def read_delimited(connection: Any, path: Path, form: Form) -> tuple[str, str | None]:
    """A delimited text file, every column as text, into tables of a DuckDB connection.

    `cprec.data.delimited` has the rules. Returns the name of the table of rows, and of the table of malformed rows with
    columns `line_in_file`, `reason` and `row`; None where there are none. `line_in_file` is where a row begins.

    Raises DataError for a file of another encoding or kind as a whole, and for one that ends too early.
    """
    bad: list[SetAside] = []
    names = [f"c{number}" for number in range(len(form.columns))]
    schema = pa.schema([*((name, pa.string()) for name in names), (LINE, pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        for parsed in parsed_blocks(path, form):
            bad.extend(parsed.bad)
            yield pa.record_batch([*parsed.columns, pa.array(parsed.lines, pa.int64())], schema=schema)

    name = _load(connection, schema, batches())
    undecoded = [row.line for row in bad if row.reason == NOT_UTF8]
    if len(undecoded) > connection.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0]:
        fix = f"with `iconv -f windows-1252 -t utf-8 {path.name} > new{path.suffix}` if it comes from Windows, say"
        raise DataError(
            f"{path} is not {'UTF-8' if form.encoding == UTF8 else form.encoding}: {len(undecoded):,} rows, as line "
            f"{undecoded[0]}, cannot be read. Save it as UTF-8, {fix}; or set encoding=windows-1252, if that is it"
        )
    renamed = ", ".join(f"{old} AS {identifier(new)}" for old, new in zip(names, form.columns, strict=True))
    connection.execute(f"CREATE TEMP VIEW {name}_rows AS SELECT {renamed}, {LINE} FROM {name}")
    return f"{name}_rows", _malformed_table(connection, bad) if bad else None


def read_json_lines(connection: Any, path: Path, columns: Sequence[str], *, encoding: str = UTF8) -> tuple[str, str]:
    """One JSON object per line, the given keys as text (lists joined by a comma), into tables of a DuckDB connection.

    Columns that are a `Scalar` hold no lists and objects. Returns the names of the tables of rows and of malformed rows
    (`line_in_file`, `reason`, `row`): lines that are not a JSON object, or one that has a key twice.
    """
    # A unit separator cannot stand in JSON, so each line is one field.
    lines, bad = read_delimited(connection, path, Form(("json",), "\x1f", "", header=False, encoding=encoding))
    name = new_name()
    connection.execute(
        f"CREATE TEMP TABLE {name} AS SELECT {LINE}, CASE WHEN is_object THEN json END AS object, "
        "CASE WHEN NOT is_object THEN json END AS other FROM (SELECT *, CASE WHEN json_valid(json) THEN "
        f"json_type(json) = 'OBJECT' ELSE false END AS is_object FROM {lines}) "
        "WHERE is_object OR trim(json, chr(32) || chr(9) || chr(13)) <> ''"
    )
    connection.execute(f"DROP TABLE {lines.removesuffix('_rows')}")
    # Most lines have the same keys: each distinct list of them is looked at once.
    connection.execute(
        f"CREATE TEMP TABLE {name}_twice AS SELECT keys FROM (SELECT DISTINCT json_keys(object) AS keys FROM {name}) "
        "WHERE len(keys) <> len(list_distinct(keys))"
    )
    has_twice = connection.execute(f"SELECT count(*) > 0 FROM {name}_twice").fetchall()[0][0]
    is_twice = f"json_keys(object) IN (SELECT keys FROM {name}_twice)" if has_twice else "false"
    fields = ", ".join(f"{_json_text(column)} AS {identifier(column)}" for column in columns)
    connection.execute(
        f"CREATE TEMP VIEW {name}_rows AS SELECT {fields}, {LINE} FROM {name} "
        f"WHERE object IS NOT NULL AND NOT {is_twice}"
    )
    more = f"UNION ALL SELECT {LINE}, replace(reason, {quoted(TOO_MANY)}, {quoted(NO_OBJECT)}), row FROM {bad}"
    connection.execute(
        f"CREATE TEMP VIEW {name}_malformed AS SELECT {LINE}, "
        f"CASE WHEN object IS NULL THEN {quoted(NO_OBJECT)} ELSE {quoted(KEY_TWICE)} END AS reason, "
        f"coalesce(object, other)[:{SHOWN}] AS row FROM {name} WHERE object IS NULL OR {is_twice} {more if bad else ''}"
    )
    return f"{name}_rows", f"{name}_malformed"


def _json_text(key: str) -> str:
    """The value of a key as SQL text, or null."""
    value = "(object -> " + quoted("/" + key.replace("~", "~0").replace("/", "~1")) + ")"
    string = f"({value} ->> '$')"
    if not isinstance(key, Scalar):
        return (
            f"CASE json_type({value}) WHEN 'ARRAY' THEN array_to_string(({value} ->> '$[*]'), ', ') "
            f"WHEN 'NULL' THEN NULL ELSE {string} END"
        )
    number = f"try_cast({string} AS DOUBLE)"
    return (
        f"CASE json_type({value}) WHEN 'ARRAY' THEN NULL WHEN 'OBJECT' THEN NULL WHEN 'NULL' THEN NULL WHEN 'DOUBLE' "
        f"THEN CASE WHEN NOT isfinite({number}) THEN NULL WHEN abs({number}) < {2**53} AND {number} = floor({number}) "
        f"THEN {number}::BIGINT::VARCHAR ELSE {string} END ELSE {string} END"
    )


# ---- into the engine -------------------------------------------------------------------------------------------------


def _load(connection: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> str:
    """A table of batches that are made while the engine takes them; an error in making one is raised as it is."""
    raised: list[BaseException] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except BaseException as error:
            raised.append(error)
            raise

    name, reader = new_name(), new_name()
    connection.register(reader, pa.RecordBatchReader.from_batches(schema, watched()))
    try:
        connection.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM {reader}")
    except Exception as error:
        raise (raised[0] if raised else error) from None
    finally:
        connection.unregister(reader)
    return name


def _malformed_table(connection: Any, bad: Sequence[SetAside]) -> str:
    lines, reasons, texts = zip(*bad, strict=True)
    rows = pa.table({LINE: pa.array(lines, pa.int64()), "reason": reasons, "row": texts})
    return _load(connection, rows.schema, iter(rows.to_batches()))


def new_name() -> str:
    """A name that no table of this process has."""
    return f"cprec_{next(_numbers)}"


def quoted(value: str | Path) -> str:
    """A text literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name of SQL, in quotes."""
    return '"' + name.replace('"', '""') + '"'


# ---- from the file ---------------------------------------------------------------------------------------------------


def parsed_blocks(path: Path, form: Form) -> Iterator[Parsed]:
    """The rows of a file, a block at a time."""
    rest, line, is_skipping = b"", 1, form.header
    for block, is_last in _marked_last(text_blocks(path, form.encoding)):
        block = rest + block
        if is_skipping:
            end = block.find(b"\n") + 1
            if not end:
                rest = b""
                continue
            block, line, is_skipping = block[end:], line + 1, False
        parsed = parse_block(block, line, form, is_last=is_last)
        line += parsed.num_lines
        rest = block[parsed.num_bytes :]
        if len(rest) > MAX_LINE and b"\n" not in rest:
            parsed.bad.append(set_aside(line, TOO_LONG, rest[: 4 * SHOWN].decode("utf-8", "replace")))
            rest, is_skipping = b"", True
        yield parsed


def _marked_last(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each block, and whether it is the last."""
    held = next(blocks, b"")
    for block in blocks:
        yield held, False
        held = block
    yield held, True


def text_blocks(path: Path, encoding: str = UTF8) -> Iterator[bytes]:
    """The bytes of a text file, also of a compressed one, in blocks: in UTF-8, without a byte order mark.

    Where the first block has carriage returns and no line feed, those end lines, as they once did on a Macintosh.
    Bytes that cannot be decoded become one that UTF-8 does not have, so that their row is set aside.
    Raises DataError for a file of another encoding or kind, one that cannot be read, and one that ends too early.
    """
    check_kind(path)
    is_utf8 = codecs.lookup(encoding).name == UTF8
    if is_utf8:
        check_encoding(path)
    returns_end_lines = False
    for number, block in enumerate(_file_blocks(path) if is_utf8 else _decoded_blocks(path, encoding)):
        if number == 0:
            block = block.removeprefix(b"\xef\xbb\xbf")
            returns_end_lines = b"\r" in block and b"\n" not in block
        yield block.replace(b"\r", b"\n") if returns_end_lines else block


def _decoded_blocks(path: Path, encoding: str) -> Iterator[bytes]:
    """The blocks of a file of another encoding in UTF-8; a character may begin in one and end in the next."""
    decoder = codecs.getincrementaldecoder(encoding)(_UNDECODED)
    for block in itertools.chain(_file_blocks(path), [b""]):
        if text := decoder.decode(block, final=not block):
            yield text.encode(UTF8, _UNDECODED)


def _undecoded(error: UnicodeError) -> tuple[str | bytes, int]:
    """The stand-in for bytes, or half a character, that are not text: in UTF-8 it is a byte that never occurs."""
    assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
    return ("\udcff" if isinstance(error, UnicodeDecodeError) else b"\xff"), error.end


_UNDECODED = "cprec-undecoded"
codecs.register_error(_UNDECODED, _undecoded)


def _file_blocks(path: Path) -> Iterator[bytes]:
    is_gzip = path.suffix.lower() == ".gz"
    try:
        with open(path, "rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            while block := stream.read(BLOCK_BYTES):
                yield block
    except EOFError:
        raise DataError(
            f"{path} ends in the middle of its compressed data: it is incomplete; fetch it again. Nothing was used"
        ) from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: its compressed data are damaged ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


_KINDS = ((b"PAR1", "Parquet"), (b"PK\3\4", "a zip archive"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"))


def check_kind(path: Path) -> None:
    """Raise DataError for a file of another kind than its name says."""
    start = _start(path)
    is_gzip, is_named = start[:2] == b"\x1f\x8b", path.suffix.lower() == ".gz"
    if is_gzip and not is_named:
        raise DataError(f"{path} is compressed with gzip, but its name does not end in .gz: rename it")
    if is_named and not is_gzip:
        raise DataError(f"{path} is named .gz but is not compressed with gzip: rename it, or fetch it again")
    for mark, kind in _KINDS:
        if start.startswith(mark):
            raise DataError(f"{path} is not text but {kind}: give it the suffix of what it is, or unpack it")


def check_encoding(path: Path) -> None:
    """Raise DataError for a file whose start is not UTF-8."""
    start = _start(path)
    has_mark = start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:4] == b"\0\0\xfe\xff"
    if has_mark or (len(start) >= 4 and (not any(start[0::2]) or not any(start[1::2]))):  # every other byte is NUL
        raise DataError(
            f"{path} is UTF-16 or UTF-32: save it as UTF-8, with `iconv -f utf-16 -t utf-8 {path.name} > new.csv`, "
            "say, or set encoding=utf-16 or utf-32"
        )


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def first_line(path: Path, encoding: str = UTF8) -> str:
    """The first line of a text file, also of a compressed one, without its end and byte order mark."""
    return next(iter(first_lines(path, 1, encoding)), "")


def first_lines(path: Path, count: int, encoding: str = UTF8) -> list[str]:
    """Up to `count` lines of a text file, also of a compressed one. Raises DataError where it cannot be read."""
    lines: list[bytes] = []
    rest = b""
    for block in text_blocks(path, encoding):
        *whole, rest = (rest + block).split(b"\n")
        lines += whole[: count - len(lines)]
        if len(lines) == count or len(rest) > MAX_LINE:
            break
    if len(lines) < count and rest:
        lines.append(rest)
    return [line.decode("utf-8", "replace").removesuffix("\r") for line in lines]
