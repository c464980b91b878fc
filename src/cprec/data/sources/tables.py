"""Interaction logs and items in Parquet, CSV, TSV or JSON-lines files, with a mapping of columns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.data.config import INTERACTION_FIELDS, ITEM_FIELDS, DecimalSign, TableFiles, TableSource
from cprec.data.sources.files import DELIMITED, JSON_LINES, PARQUET, find_files, suffix_of
from cprec.data.sources.numbers import Numbers, read_numbers
from cprec.errors import DataError
from cprec.schema import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    ORDER,
    PRICE,
    RATING,
    TIMESTAMP,
    TITLE,
    USER_ID,
)

if TYPE_CHECKING:
    from cprec.data.engine import TableEngine

DEFAULT_NAMES: dict[str, tuple[str, ...]] = {
    USER_ID: ("user_id", "user", "userId", "uid", "reviewerID", "customer_id", "visitorid"),
    ITEM_ID: ("item_id", "item", "itemId", "iid", "parent_asin", "asin", "product_id", "movieId", "itemid"),
    TIMESTAMP: ("timestamp", "time", "datetime", "date", "unixReviewTime", "event_time"),
    RATING: ("rating", "ratings", "overall", "stars", "score"),
    ORDER: ("order", "position"),
    TITLE: ("title", "item_title", "name", "item_name", "product_name", "movie_title"),
    BRAND: ("brand", "store"),
    CATEGORIES: ("categories", "category", "genres", "genre", "class"),
    DESCRIPTION: ("description",),
    PRICE: ("price",),
}
"""Names under which a column is found without being mapped, the first one that is there; upper and lower case alike."""

CLEANED = (TITLE, BRAND, CATEGORIES)
MAX_TITLE = 10_000
"""Characters of an item's text at most: a longer title rejects the item, longer brands and categories are left out."""
LONG_TITLE = f"title of more than {MAX_TITLE:,} characters"

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar", "::": "two colons"}

_OWN_NAMES = ("line_in_file", "source_file", "sequence", "problem")


@dataclass(frozen=True)
class SourceTables:
    """What a source gives: Ibis tables with every row of its files, ids and times as the files have them."""

    items: Any
    """item_id, title, brand, categories, description (text), price (float64), file (text), line, sequence (int64), and
    problem (text): why the row cannot be used, or null."""
    interactions: Any
    """user_id, item_id (text), timestamp (int64 seconds, null where it could not be parsed), microsecond (int32: what
    the time has beyond seconds), time_text (text), rating (float64), position (decimal, the source's own order, or
    null), file (text), line, sequence (int64), and problem (text): why the row cannot be used, or null."""
    malformed: tuple[tuple[str, Any], ...] = ()
    """(items or interactions, table) of the rows that could not be taken apart: file, line, reason, row."""
    has_times: bool = True
    """False where the timestamps only order one user's events."""
    time_format: str = "seconds"
    """How the timestamps were read."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Per table (items, interactions) the source column of each canonical one."""
    files: tuple[tuple[str, Path], ...] = ()
    """(items or interactions, file) of every file read."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by name, of a source that reads no files."""
    numbers: Mapping[str, Numbers] = field(default_factory=dict)
    """How rating, price and order were read."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """What stands before the settings of a table (items, interactions) where each has its own, as `items.`."""


@dataclass(frozen=True)
class RawTable:
    """The rows of a source's files, under the names that the files use."""

    what: str
    """interactions or items."""
    table: Any
    columns: tuple[str, ...]
    malformed: tuple[Any, ...]
    files: tuple[Path, ...]
    key: str = ""
    """What stands before the names of this table's settings, as `items.`."""
    decimal: DecimalSign = "auto"
    """Before the decimals of numbers in text."""


def load(engine: TableEngine, source: TableSource) -> SourceTables:
    """The rows of all files. Raises DataError for a missing file or column, or a separator that cannot be right."""
    forms = source.forms()
    read = {name: read_files(engine, source.domain, name, form) for name, form in forms.items()}
    log = read["interactions"]
    return canonical_tables(
        engine,
        source.domain,
        log,
        read.get("items", log),
        forms["interactions"].columns,
        source.timestamps,
        items_in_log=source.items is None,
        item_mapping=forms["items"].columns if "items" in forms else None,
    )


def read_files(
    engine: TableEngine, domain: str, what: str, form: TableFiles, *, typed_header: bool = False
) -> RawTable:
    """All files of a table, one after the other, with `source_file`, `line_in_file` and `sequence`.

    `typed_header` is RecBole's: names end in a colon and a type, which is left out. A column that has one of our own
    names gets a `_` behind it.
    """
    from cprec.data.text_files import LINE, UTF8

    key = "" if typed_header else f"{what}."
    patterns, encoding, quote = form.path, form.encoding or UTF8, form.quote or ""
    files = find_files(domain, what, patterns)
    columns: tuple[str, ...] = ()
    read: list[tuple[Any, Any | None]] = []
    for number, path in enumerate(files):
        kind = suffix_of(path)
        bad = None
        if kind in PARQUET:
            try:
                table = engine.read_parquet(path)
            except DataError as error:
                raise DataError(f"{error}; it is damaged or no Parquet file: write or fetch it again") from None
            table = table.rename({_free(name): name for name in table.columns if name != LINE})
            names = tuple(name for name in table.columns if name != LINE)
        elif kind in JSON_LINES:
            keys = _json_keys(path, form.columns, encoding)
            table, bad = engine.read_json_lines(path, keys, encoding=encoding)
            table = table.rename({_free(name): str(name) for name in keys})
            names = tuple(map(_free, keys))
        else:
            between = form.separator or DELIMITED[kind]
            names = form.names or _header(path, between, quote, typed_header, encoding, key)
            names = tuple(map(_free, names))
            table, bad = engine.read_delimited(
                path, names, separator=between, quote=quote, header=not form.names, encoding=encoding
            )
        if number == 0:
            columns = names
        elif missing := [name for name in columns if name not in names and kind not in JSON_LINES]:
            raise DataError(
                f"{path} has no column {', '.join(missing)}, which {files[0]} has; it has {', '.join(names)}"
            )
        columns = (*columns, *(name for name in names if name not in columns)) if kind in JSON_LINES else columns
        read.append((table, bad))
    return replace(raw_table(what, files, columns, read), key=key, decimal=form.decimal or "auto")


def _free(name: str) -> str:
    """A column's name where it is none of ours."""
    return f"{name}_" if name.lower() in _OWN_NAMES else str(name)


def raw_table(
    what: str, files: Sequence[Path], columns: Sequence[str], read: Sequence[tuple[Any, Any | None]]
) -> RawTable:
    """One table of what an engine read from files: (rows, malformed rows) of each."""
    import ibis

    from cprec.data.text_files import LINE

    tables, malformed = [], []
    for number, (path, (table, bad)) in enumerate(zip(files, read, strict=True)):
        numbered = table.mutate(
            ibis.literal(str(path)).name("source_file"),
            (ibis.literal(number).cast("int64") * (1 << 40) + table[LINE]).name("sequence"),
        )
        tables.append(_with_columns(numbered, columns))
        if bad is not None:
            malformed.append(
                bad.select(ibis.literal(str(path)).name("file"), bad[LINE].cast("int64").name("line"), "reason", "row")
            )
    for name in columns:  # ids, say, that are numbers in one file and text in another
        if len({table[name].type().copy(nullable=True) for table in tables}) > 1:
            tables = [table.mutate(_as_text(table[name]).name(name)) for table in tables]
    whole = ibis.union(*tables) if len(tables) > 1 else tables[0]
    return RawTable(what, whole, tuple(columns), tuple(malformed), tuple(files))


def _with_columns(table: Any, columns: Sequence[str]) -> Any:
    import ibis

    from cprec.data.text_files import LINE

    absent = [ibis.null("string").name(name) for name in columns if name not in table.columns]
    return table.mutate(*absent).select(*columns, LINE, "source_file", "sequence")


def _header(path: Path, separator: str, quote: str, typed: bool, encoding: str, key: str) -> tuple[str, ...]:
    """The names in the first line of a delimited file; `key` stands before the names of its settings."""
    from cprec.data.text_files import first_line

    line = first_line(path, encoding)
    if told := re.fullmatch(r'"?sep=(.)"?', line.strip(" ,;\t")) or re.fullmatch("sep=([,;\t])", line):
        raise DataError(
            f"{path}: the first line, {line!r}, is a note for Excel: delete it"
            + (f", and set {key}separator={json.dumps(told[1])} if that is not the separator already" if key else "")
        )
    names = _split(line, separator, quote)
    if names is None:
        raise DataError(
            f"{path}: the header {line[:200]!r} has a quote that is not closed; names stand on one line"
            + (f'. Set {key}quote="" if quotes are ordinary characters in this file' if key else "")
        )
    if len(names) == 1:
        found = {other: len(_split(line, other, quote) or ()) for other in SEPARATORS if other != separator}
        other = max(found, key=lambda candidate: found[candidate])
        if found[other] > 1:
            raise DataError(
                f"{path}: with {SEPARATORS.get(separator, repr(separator))} as separator the header is the single "
                f"column {line!r}; it looks as if {SEPARATORS[other]} separates the fields"
                + (f": set {key}separator={json.dumps(other)}" if key else "")
            )
    if typed:
        names = [name.partition(":")[0] for name in names]
    if not line.strip():
        raise DataError(f"{path}: the first line is empty, and should name the columns")
    if not all(names):
        raise DataError(
            f"{path}: column {names.index('') + 1} of the header {line!r} has no name{_no_header(names, key)}"
        )
    lower = [name.lower() for name in names]
    twice = sorted({name for name in names if lower.count(name.lower()) > 1})
    if twice:
        raise DataError(
            f"{path}: the header names {' and '.join(twice)}{' twice' if len(twice) == 1 else ''}; give each column a "
            f"name of its own (upper and lower case count as the same){_no_header(names, key)}"
        )
    return tuple(names)


_DATUM = re.compile(r"[+-]?\d+([.,]\d+)*|\d{4}-\d\d?-\d\d?([ T].*)?")


def _no_header(names: Sequence[str], key: str) -> str:
    """A hint for names that look like a row: numbers or dates; none where `key` says that there is no such setting."""
    if not key or not any(_DATUM.fullmatch(name.strip()) for name in names):
        return ""
    return (
        f". That looks like a row: where a file has no header, say what its {len(names)} columns are, in order, as "
        f"{key}names=user_id,item_id,timestamp for three"
    )


def _split(line: str, separator: str, quote: str) -> list[str] | None:
    from cprec.data.delimited import split_line

    names = split_line(line, separator, quote)
    return None if names is None else [name.strip() for name in names]


_SCALARS = (USER_ID, ITEM_ID, TIMESTAMP, TITLE)
"""What is one value, never a list or an object."""


def _json_keys(path: Path, mapping: Mapping[str, str], encoding: str) -> tuple[str, ...]:
    """The keys of the first 1,000 objects of a JSON-lines file, and optional ones that are mapped; of keys that differ
    in case only, one."""
    from cprec.data.text_files import LINE, Scalar, first_lines

    lines = [line for line in first_lines(path, 1000, encoding) if line.strip()]
    objects = [value for value in map(_json_object, lines) if value is not None]
    if not objects or lines[0].lstrip().startswith("["):
        shown = f"line 1 is not a JSON object: {lines[0][:80]!r}" if lines else "there is no line in it"
        select = ".[]" if lines and lines[0].lstrip().startswith("[") else "."
        raise DataError(
            f"{path}: {shown}; the file must hold one object per line: convert it, with "
            f"`jq -c '{select}' {path.name} > new.jsonl`, say"
        )
    scalars = {mapping.get(name) for name in _SCALARS}
    scalars.update(alias for name in _SCALARS if name not in mapping for alias in DEFAULT_NAMES[name])
    wanted = {alias for aliases in DEFAULT_NAMES.values() for alias in aliases} | set(mapping.values())
    keys: dict[str, str] = {}
    for key in dict.fromkeys(key for value in objects for key in value):
        if key and "\0" not in key and key.lower() != LINE and (key.lower() not in keys or key in wanted):
            keys[key.lower()] = key
    for name, key in mapping.items():  # an optional key may be rare
        if name not in _SCALARS:
            keys.setdefault(key.lower(), key)
    lower = {name.lower() for name in scalars if name}
    return tuple(Scalar(key) if key.lower() in lower else key for key in keys.values())


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line, parse_int=str)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- canonical columns -----------------------------------------------------------------------------------------------


def canonical_tables(
    engine: TableEngine,
    domain: str,
    log: RawTable,
    catalogue: RawTable,
    mapping: Mapping[str, str],
    timestamps: str,
    *,
    items_in_log: bool,
    item_mapping: Mapping[str, str] | None = None,
) -> SourceTables:
    """Name the columns of a log and of its items canonically, and read the numbers and timestamps.

    `item_mapping` is the items' own where it is not the log's.
    """
    import ibis

    log_columns = find_columns(domain, log, INTERACTION_FIELDS, mapping, required=(USER_ID, ITEM_ID))
    item_mapping = mapping if item_mapping is None else item_mapping
    item_columns = find_columns(domain, catalogue, ITEM_FIELDS, item_mapping, required=(ITEM_ID, TITLE))
    if TIMESTAMP not in log_columns and timestamps != "order":
        raise _missing_column(domain, log, TIMESTAMP, "; or say timestamps=order if a user's rows stand in order")

    for raw, found in ((log, log_columns), (catalogue, item_columns)):
        _check_kinds(domain, raw, found)
    table = log.table
    raw_time = table[log_columns[TIMESTAMP]] if TIMESTAMP in log_columns else table["sequence"]
    time_format = timestamps
    if timestamps == "auto":
        time_format = _detect_time_format(engine, domain, log, log_columns[TIMESTAMP])
    timestamp, microsecond = _times(engine, raw_time, time_format)
    order = log_columns.get(ORDER)
    ordered_by_time = order is not None and _is_moment(table[order].type())
    numbers = {
        name: read_numbers(engine, raw.table, column, raw.decimal)
        for name, raw, column in (
            (RATING, log, log_columns.get(RATING)),
            (ORDER, log, None if ordered_by_time else order),
            (PRICE, catalogue, item_columns.get(PRICE)),
        )
    }
    position = _position(engine, _or_null(table, order), numbers[ORDER].values)
    interactions = table.select(
        _as_text(table[log_columns[USER_ID]]).name("user_id"),
        _as_text(table[log_columns[ITEM_ID]]).name("item_id"),
        timestamp.name("timestamp"),
        microsecond.name("microsecond"),
        raw_time.cast("string").name("time_text"),
        numbers[RATING].values.name("rating"),
        _or_null(table, "problem" if "problem" in log.columns else None).name("problem"),
        position.name("position"),
        table["source_file"].name("file"),
        table["line_in_file"].cast("int64").name("line"),
        table["sequence"],
    )
    problem = _time_problem(interactions[TIMESTAMP], time_format, is_guessed=timestamps == "auto")
    interactions = interactions.mutate(problem=ibis.coalesce(interactions["problem"], problem))
    table = catalogue.table
    items = table.select(
        *(_as_text(_or_null(table, item_columns.get(name))).name(name) for name in ITEM_FIELDS[:-1]),
        numbers[PRICE].values.name(PRICE),
        table["source_file"].name("file"),
        table["line_in_file"].cast("int64").name("line"),
        table["sequence"],
    )
    is_long = ibis.coalesce(items[TITLE].length() > MAX_TITLE, False)
    items = items.mutate(
        *(ibis.ifelse(items[name].length() > MAX_TITLE, None, items[name]).name(name) for name in CLEANED),
        problem=ibis.ifelse(is_long, LONG_TITLE, ibis.null("string")),
    )
    if items_in_log:  # each event repeats its item: the first row that has a title stands for it
        titled = ibis.coalesce(items[TITLE], "") != ""
        first = ibis.row_number().over(group_by=items[ITEM_ID], order_by=[~titled, items["sequence"]])
        items = items.mutate(first.name("place")).filter(ibis._.place == 0, ibis._[ITEM_ID].notnull()).drop("place")
    return SourceTables(
        items=items,
        interactions=interactions,
        malformed=tuple(
            (raw.what, table) for raw in ((log,) if items_in_log else (log, catalogue)) for table in raw.malformed
        ),
        has_times=time_format != "order",
        time_format=time_format,
        columns={"interactions": log_columns, "items": item_columns},
        files=(
            *(("interactions", path) for path in log.files),
            *(() if items_in_log else (("items", path) for path in catalogue.files)),
        ),
        numbers=numbers,
        keys={"interactions": log.key, "items": catalogue.key},
    )


def find_columns(
    domain: str, raw: RawTable, fields: Sequence[str], mapping: Mapping[str, str], required: Sequence[str]
) -> dict[str, str]:
    """The source column of each canonical one: the one mapped, or the first default name that is there.

    Databases fold names to upper or lower case: a name that is not there exactly so is found in another case.

    Raises DataError for a required column that is not found, and where several could be meant.
    """
    found: dict[str, str] = {}
    for name in fields:
        wanted = (mapping[name],) if name in mapping else DEFAULT_NAMES[name]
        columns = next(filter(None, (_named(raw.columns, alias) for alias in wanted)), [])
        if len(columns) > 1:
            raise DataError(
                f"{raw.files[0]}: {' and '.join(map(repr, columns))} of the {raw.what} of domain {domain!r} may each "
                f"be meant by {name}: give the columns different names, or map the right one: "
                f"{raw.key}columns.{name}=COLUMN"
            )
        if columns:
            found[name] = columns[0]
        elif name in mapping or name in required:
            raise _missing_column(domain, raw, name, "", mapping.get(name))
    return found


def _named(columns: Sequence[str], name: str) -> list[str]:
    """The columns of a name, or, where there is none, of that name in another case."""
    return [other for other in columns if other == name] or [
        other for other in columns if other.lower() == name.lower()
    ]


def _missing_column(domain: str, raw: RawTable, name: str, otherwise: str, mapped: str | None = None) -> DataError:
    looked_for = repr(mapped) if mapped else " or ".join(map(repr, DEFAULT_NAMES[name]))
    hint = ""
    if raw.what == "items" and name == TITLE:
        hint = "; every item needs a title, because it is what a language model reads"
    no_header = _no_header(raw.columns, raw.key)
    return DataError(
        f"{raw.files[0]}: no column for {name} (looked for {looked_for}); the {raw.what} of domain {domain!r} have "
        f"{', '.join(map(repr, raw.columns))}"
        + (no_header or f". Map it: {raw.key}columns.{name}=COLUMN{otherwise}{hint}")
    )


def _or_null(table: Any, column: str | None) -> Any:
    import ibis

    return ibis.null("string") if column is None else table[column]


def _check_kinds(domain: str, raw: RawTable, found: Mapping[str, str]) -> None:
    """Raise DataError where what must be one value is a list, a struct or bytes."""
    for name in _SCALARS:
        if name not in found:
            continue
        kind = raw.table[found[name]].type()
        is_joined = name == TITLE and kind.is_array() and kind.value_type.is_string()
        if not is_joined and (kind.is_nested() or kind.is_binary()):
            raise DataError(
                f"{raw.files[0]}: column {found[name]!r} holds {kind}, and {name} (domain {domain!r}) must be text or "
                f"numbers: write it as such, or map another column: {raw.key}columns.{name}=COLUMN"
            )


def _as_text(value: Any) -> Any:
    """A column as text; lists of text are joined by commas, and whole numbers have no decimal point."""
    import ibis

    kind = value.type()
    if kind.is_array():
        return value.cast("array<string>").join(", ")
    if kind.is_floating():  # ids that were read beside missing ones: 12345.0, and NaN where there is none
        exact = _exact(value)
        whole = ibis.ifelse(exact == exact.floor(), exact, ibis.null("float64")).cast("int64").cast("string")
        is_none = value.isnan() | value.isinf()
        return ibis.coalesce(whole, ibis.ifelse(is_none, ibis.null("string"), value.cast("string")))
    text = value.cast("string")
    return text.re_replace(r"\.0+$", "") if kind.is_decimal() and kind.scale != 0 else text


def _exact(number: Any) -> Any:
    """A float where its whole part has all its digits, else null: of NaN and infinity too, which have no floor."""
    import ibis

    # Parquet's statistics know no NaN, and engines that trust them take the comparison alone for true.
    return ibis.ifelse(~number.isnan() & (number.abs() < EXACT), number, ibis.null("float64")).cast("float64")


def _position(engine: TableEngine, value: Any, number: Any) -> Any:
    """The source's own order: numbers with all their digits, and times as microseconds.

    `number` is what the text of the column was read as, with the decimal sign that it has.
    """
    import ibis

    kind = value.type()
    if _is_moment(kind):
        seconds, microsecond = _times(engine, value, "iso")
        value = seconds * 10**6 + microsecond
    elif kind.is_string():  # a float lacks digits of a long whole number
        whole = ibis.ifelse(value.re_search(r"^\s*[+-]?\d+\s*$"), value, ibis.null("string"))
        return ibis.coalesce(whole.try_cast(POSITION), number.try_cast(POSITION))
    return value.try_cast(POSITION)


def _is_moment(kind: Any) -> bool:
    return bool(kind.is_timestamp() or kind.is_date())


# ---- timestamps ------------------------------------------------------------------------------------------------------

EXACT = 2.0**53
"""Whole numbers below have all their digits as a float."""
MIN_SECONDS = 1e8
"""Smaller numbers (before March 1973) are no times of a log: auto takes them for positions, and asks."""
MAX_SECONDS = 1e11
"""Larger numbers (from the year 5138 on) are no seconds: auto takes them for a finer unit, each for 1,000 times as
large ones."""
PER_SECOND = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
POSITION = "decimal(38, 9)"
"""Positions may have all the digits of an int64, or a fraction."""
LATEST_SECONDS = 4_102_444_800
"""The year 2100: from then on, and before 1970, no event has happened."""
MIXED_SHARE = 0.1
"""Where more of the times than this are of another format, auto asks; fewer are rejected row by row."""

OUT_OF_RANGE = "timestamp before 1970 or after 2099"
COARSER = {
    "milliseconds": "timestamp in seconds among milliseconds",
    "microseconds": "timestamp in a coarser unit among microseconds",
    "nanoseconds": "timestamp in a coarser unit among nanoseconds",
}
TOO_EARLY = "timestamp before March 1973, which auto takes for none"


def _moment(value: Any) -> Any:
    """A column as times, null where a value is no date."""
    return value if value.type().is_timestamp() else value.try_cast("timestamp('UTC')")


def _times(engine: TableEngine, value: Any, time_format: str) -> tuple[Any, Any]:
    """int64 seconds since 1970 UTC, or positions, and int32 microseconds beyond them; null where a value is not of the
    format."""
    import ibis

    if time_format == "iso":
        moment = _moment(value)
        return moment.truncate("s").epoch_seconds().cast("int64"), engine.microsecond(moment).cast("int32")
    number = value.try_cast("float64")
    if time_format == "order":  # positions may have more digits than a float
        floor = _exact(number).floor()
        timestamp = ibis.coalesce(floor.cast("int64"), value.try_cast("int64"))
        return timestamp, ibis.coalesce(_rest(number - floor, 1), 0).cast("int32")
    per_second = PER_SECOND[time_format]
    seconds = number / per_second
    floor = _exact(seconds).floor()
    rest = _rest(number - floor * per_second, per_second)
    if time_format == "nanoseconds":  # they have more digits than a float, and no fraction
        whole = value.try_cast("int64")
        beyond = whole % per_second
        exact = ((whole - beyond) / per_second).round()
        floor = ibis.ifelse(whole >= 0, exact, floor)
        rest = (beyond / 1000).floor()
    # Where there is a number but no time can be as large, it is told from what cannot be read.
    timestamp = ibis.ifelse(floor.isnull() & (seconds.abs() < 1e300), LATEST_SECONDS, floor.cast("int64"))
    return timestamp, rest.cast("int32")


def _rest(rest: Any, per_second: int) -> Any:
    """A part of a second in whole microseconds, the nearest of the same second."""
    return (rest * (10**6 / per_second)).round().clip(0, 999_999)


def _time_problem(seconds: Any, time_format: str, *, is_guessed: bool) -> Any:
    """Why a time cannot be that of an event, or null."""
    import ibis

    none = ibis.null("string")
    if time_format == "order":
        return none
    cases = [((seconds < 0) | (seconds >= LATEST_SECONDS), OUT_OF_RANGE)]
    if time_format in COARSER:
        cases.append((seconds < MIN_SECONDS, COARSER[time_format]))
    if time_format == "seconds" and is_guessed:
        cases.append((seconds < MIN_SECONDS, TOO_EARLY))
    return ibis.cases(*cases, else_=none)


def _detect_time_format(engine: TableEngine, domain: str, log: RawTable, column: str) -> str:
    """seconds, a finer unit, or iso: what most values are. Raises DataError where they are of several formats, of none,
    or look like positions."""
    import ibis

    value = log.table[column]
    kind = value.type()
    if kind.is_timestamp() or kind.is_date():
        return "iso"
    number = value.try_cast("float64")
    size = number.abs()
    families = {
        unit: (size >= MIN_SECONDS * per_second) & (size < MAX_SECONDS * per_second)
        for unit, per_second in PER_SECOND.items()
    }
    if kind.is_string():
        families["iso"] = _moment(ibis.ifelse(number.isnull(), value, ibis.null("string"))).notnull()
    counted = {name: holds.sum() for name, holds in families.items()}
    summary = engine.to_arrow(log.table.aggregate(numbers=number.count(), middle=size.median(), **counted)).to_pylist()
    counts = {name: summary[0][name] or 0 for name in families}
    numbers, middle = summary[0]["numbers"], summary[0]["middle"]

    def example(holds: Any) -> str:
        return repr(engine.value(value.cast("string").min(where=holds)))

    where = f"{log.files[0]}: the values of {column} (domain {domain!r})"
    best, *others = sorted(counts, key=lambda name: -counts[name])
    for other in others:
        if counts[other] > MIXED_SHARE * (counts[best] + counts[other]):
            raise DataError(
                f"{where} are of two formats: {counts[best]:,} {best} (as {example(families[best])}) and "
                f"{counts[other]:,} {other} (as {example(families[other])}); write all of them alike, or choose one "
                f"with timestamps={best}, which rejects the others"
            )
    if counts.get("iso", 0) > numbers or not numbers or middle is None:
        return "iso"  # where nothing can be parsed, rows are rejected one by one, and the message shows some
    if middle < MIN_SECONDS:
        fix = "If they only order a user's events, say timestamps=order; if they are times, say timestamps=seconds"
        exact = _exact(number)
        is_day = (exact >= 19_700_101) & (exact < 21_000_101) & (exact == exact.floor())
        if engine.value(is_day.sum()) * 2 > numbers:
            fix = f"If they are dates, as {example(is_day)} seems to be, write them as 2014-07-23"
        raise DataError(f"{where} are around {middle:,.0f}: as seconds since 1970 that is no time of a log. {fix}")
    return best
