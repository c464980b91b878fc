"""Builds canonical tables from sources: everything that concerns all rows, as Ibis expressions in the table engine.

    sources -> rows judged -> duplicates, repeats, k-core -> items, and interactions in parts by hash of user

What concerns one user at a time (order, ties, splits, sequences) comes after, part by part, in numpy.
"""

from __future__ import annotations

import functools
import json
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.cleaning import clean_title, has_word, one_line
from cprec.data.config import ConnectionSource, PublicSource, RecBoleSource, Rules, TableSource
from cprec.data.dataset import MANIFEST, NUM_SLOTS, TIE, finish_part, part_path, read_manifest
from cprec.data.engine import TableEngine, connect
from cprec.data.interactions import join_time
from cprec.data.sources import connections, memory, public, recbole, tables
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.tables import COARSER, OUT_OF_RANGE, SourceTables
from cprec.errors import ConfigError, DataError
from cprec.files import whole_folder
from cprec.provenance import file_sha256
from cprec.schema import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    MICROSECOND,
    ORDER,
    PRICE,
    RATING,
    SCHEMA_VERSION,
    TIMESTAMP,
    TITLE,
    USER_ID,
)

REJECTED = "rejected.parquet"

PART_EVENTS = 1 << 20
"""About how many events a part holds; a part is what one process has in memory."""

NO_USER = "no user id"
NO_ITEM = "no item id"
BAD_TIME = "timestamp cannot be read"
UNKNOWN_ITEM = "item is not in the items table"
TITLELESS_ITEM = "item has no title"
NO_TITLE = "title without a word"
EMPTIED = "title without a word once it is cleaned"
TWICE = "item id occurs before"
CONFLICT = "item id occurs before with another title"

MAX_TITLES_SHOWN = 3

NO_ID = ("NULL", "null", "None", "none", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "\\N", "undefined")
"""Ids that are probably none: what programs write for a missing value."""

PROBLEM = "problem"
"""Column of a source's tables, if it has one: why a row cannot be used, or null."""


Source = TableSource | RecBoleSource | PublicSource | ConnectionSource | MemorySource
"""One domain of one platform, in whatever form its rows have."""

LOADERS: dict[type, Callable[[TableEngine, Any], SourceTables]] = {
    TableSource: tables.load,
    RecBoleSource: recbole.load,
    PublicSource: public.load,
    ConnectionSource: connections.load,
    MemorySource: memory.load,
}
"""What reads the rows of each kind of source, as Ibis tables of an engine."""


def build_dataset(sources: Sequence[Source], folder: str | Path, rules: Rules, **settings: Any) -> Path:
    """`build_tables`, and every part put in order: canonical tables without a split."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: choose another folder, or delete it")
    with whole_folder(folder) as unfinished:
        build_tables(sources, unfinished, rules, **settings)
        for part in range(read_manifest(unfinished)["num_parts"]):
            finish_part(unfinished, part)
    return folder


def build_tables(
    sources: Sequence[Source],
    folder: Path,
    rules: Rules,
    *,
    seed: int = 0,
    engine: str = "duckdb",
    memory_limit: str | None = None,
    spill: str | Path | None = None,
    num_parts: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Read sources, reject what cannot be used, apply the rules, and write canonical tables into a folder.

    Rules, per domain: events of one user, item and time count once (`deduplicate`, the first in the source stays); an
    event of the same item as the user's event before is left out (`drop_consecutive_repeats`); users and items with
    fewer than `k_core` events are left out (0 or 1: none are). The last two repeat until nothing changes, so that
    both hold of the result. Where there is a minimum, items without events leave the catalogue. With
    `k_core_scope="pooled"` a user's events of all domains of the platform count together.

    `tie_order` orders a user's events of equal time: as in the `source`, by `item_id`, or by a `shuffle` that depends
    on `seed`, user, item and source order alone. Positions of a domain without real times are kept as given, or, where
    some have fractions, numbered for each user.

    Rejected rows go to `rejected.parquet` and are counted by reason; `strict` stops at the first one. `progress` is
    told of each step. The parts (`num_parts`, a power of two; None: about a million events each) hold the same users in
    every domain, in no order yet: `finish_part` orders them. The manifest `dataset.json` is written last.

    Raises DataError for files or columns that are missing, for a domain more than half of whose rows are rejected for
    one reason, and where nothing is left; ConfigError for domains given twice.
    """
    _check(sources, num_parts)
    tell = progress or (lambda message: None)
    with (
        connect(engine, memory_limit=memory_limit, spill=folder if spill is None else spill) as opened,
        _RejectedRows(folder / REJECTED, rules.strict) as rejected,
    ):
        builders = [
            _DomainBuilder(opened, source, rules, seed, rejected, tell)
            for source in sorted(sources, key=lambda source: source.domain)
        ]
        for builder in builders:
            builder.read()
        for group in _core_groups(builders, rules):
            _apply_core(group, rules)
        num_events = sum(builder.num_events for builder in builders)
        parts = num_parts or min(NUM_SLOTS, 1 << (-(-num_events // PART_EVENTS) - 1).bit_length())
        for builder in builders:
            builder.write(folder, parts)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "rules": _recorded(rules, seed),
        "num_parts": parts,
        "domains": {builder.domain: builder.about() for builder in builders},
        "sources": [entry for builder in builders for entry in builder.files],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(sources: Sequence[Source], num_parts: int | None) -> None:
    if not sources:
        raise ConfigError("no source of data is given")
    domains = [source.domain for source in sources]
    twice = sorted({domain for domain in domains if domains.count(domain) > 1})
    if twice:
        raise ConfigError(f"domain {twice[0]!r} has more than one source; give all its files to one source")
    if num_parts is not None and not (1 <= num_parts <= NUM_SLOTS and num_parts & (num_parts - 1) == 0):
        raise ConfigError(f"num_parts={num_parts}: expected a power of two from 1 to {NUM_SLOTS}")


def _recorded(rules: Rules, seed: int) -> dict[str, Any]:
    """The rules under the names that manifests have; `strict` changes nothing in what is written."""
    return {
        "min_user_events": rules.k_core,
        "min_item_events": rules.k_core,
        "core_scope": rules.k_core_scope,
        "tie_order": rules.tie_order,
        "seed": seed,
        "deduplicate": rules.deduplicate,
        "drop_consecutive_repeats": rules.drop_consecutive_repeats,
    }


def count_times(
    folder: Path, engine: str, memory_limit: str | None = None, spill: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct times of all events of a folder that `build_tables` wrote, in microseconds, rising, and how many
    events each has; for domains with real times."""
    with connect(engine, memory_limit=memory_limit, spill=folder if spill is None else spill) as opened:
        events = opened.read_parquet(folder / "interactions" / "*" / "part-*.parquet")
        key = [TIMESTAMP, MICROSECOND]
        table = opened.to_arrow(events.group_by(key).aggregate(n=events.count()).order_by(key))
    timestamp, microsecond, counts = (table[name].to_numpy() for name in (*key, "n"))
    return join_time(timestamp, microsecond, has_times=True), counts


# ---- rejected rows ---------------------------------------------------------------------------------------------------

_REJECTED_SCHEMA = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())]
)


class _RejectedRows:
    """`rejected.parquet` while it is written; memory holds one batch."""

    def __init__(self, path: Path, strict: bool) -> None:
        self._strict = strict
        self._writer = pq.ParquetWriter(path, _REJECTED_SCHEMA, compression="zstd")

    def __enter__(self) -> _RejectedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, batches: Iterable[pa.RecordBatch]) -> Counter[str]:
        """Keep rows (file, line, reason, row) and count them by reason. Raises DataError at the first one if strict."""
        counts: Counter[str] = Counter()
        for batch in batches:
            rows = pa.Table.from_batches([batch]).select(_REJECTED_SCHEMA.names).cast(_REJECTED_SCHEMA)
            if rows.num_rows and self._strict:
                raise DataError(_describe_first(rows))
            self._writer.write_table(rows)
            for entry in rows["reason"].value_counts().to_pylist():
                counts[entry["values"]] += entry["counts"]
        return counts


def _describe_first(rows: pa.Table) -> str:
    row = rows.slice(0, 1).to_pylist()[0]
    return f"{row['file']}, line {row['line']}: {row['reason']}: {row['row']} (strict stops at the first bad row)"


# ---- one domain ------------------------------------------------------------------------------------------------------


@dataclass
class _DomainBuilder:
    """Builds the tables of one domain; each method is one step."""

    engine: TableEngine
    source: Source
    rules: Rules
    seed: int
    rejected_rows: _RejectedRows
    tell: Callable[[str], None]
    counts: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, Any]] = field(default_factory=list)
    num_items: int = 0
    titles: dict[str, Any] = field(default_factory=dict)
    """What cleaning made of the titles."""

    @property
    def domain(self) -> str:
        return self.source.domain

    @property
    def num_events(self) -> int:
        return int(self.counts[-1]["events"])

    def read(self) -> None:
        """Read and judge the rows, and apply the rules that look at single users: `items` and `events`."""
        self.tell(f"{self.domain}: reading")
        self.tables = tables = LOADERS[type(self.source)](self.engine, self.source)
        self._tell_of_numbers()
        with self.engine.translated_errors(f"reading domain {self.domain!r}"):
            items = self.engine.materialise(tables.items)
            self._set_aside_malformed("interactions", tables.interactions)
            self._set_aside_malformed("items", items)
            self.items = self._judge_items(items)
            events = self._judge_interactions(tables.interactions)
            self._tell_of_ids(events)
        self.files = _source_files(self.domain, tables)
        self.events = self._in_order(events)
        self._count("usable")
        if self.rules.deduplicate:
            self._deduplicate()

    def _tell_of_numbers(self) -> None:
        """Say what is no number in ratings, prices and positions, and where a comma is taken for the decimal sign."""
        for name, numbers in self.tables.numbers.items():
            key = self.tables.keys.get("items" if name == PRICE else "interactions", "")
            setting = f"; say which it is: {key}decimal=. or {key}decimal=," if key else ""
            if numbers.comma:
                self.tell(f"note: {self.domain}: the comma in {name} is the decimal sign, as in {numbers.comma!r}")
            if numbers.num_unclear:
                self.tell(
                    f"note: {self.domain}: {numbers.num_unclear:,} values of {name} are another number with a decimal "
                    f"point than with a decimal comma, as {numbers.unclear!r}, and are left out{setting}"
                )
            if numbers.num_unread > numbers.num_unclear:
                self.tell(
                    f"note: {self.domain}: {numbers.num_unread - numbers.num_unclear:,} values of {name} are no "
                    f"numbers, as {numbers.unread!r}, and are left out"
                )

    def _tell_of_ids(self, events: Any) -> None:
        """Say which ids look as if a program had lost them; they are kept as they stand."""
        items = self.items.filter(self.items["reason"].isnull())
        for name, table, rows in ((USER_ID, events, "events"), (ITEM_ID, items, "items")):
            is_rounded = table[name].lower().like("_%e%") & table[name].re_search(r"^\d(\.\d+)?[eE]\+?\d+$")
            odd = table.filter(table[name].isin(NO_ID) | is_rounded)
            counts = self.engine.to_arrow(odd.aggregate(n=odd.count(), example=odd[name].max())).to_pylist()[0]
            if counts["n"]:
                self.tell(
                    f"note: {self.domain}: {counts['n']:,} {rows} have an id such as {counts['example']!r}, which is "
                    "taken as it stands: is it a missing value, or a number that a spreadsheet has rounded?"
                )

    # ---- judging rows ----

    def _judge_items(self, items: Any) -> Any:
        """All items with their clean text and a reason to reject them, or none."""
        import ibis

        items = self._add_clean(items, TITLE, "clean", has_word, "before")
        items = self._add_clean(self._add_clean(items, BRAND, "clean_brand"), CATEGORIES, "clean_categories")
        same_id = {"group_by": items[ITEM_ID], "order_by": [items["clean"].isnull(), items["sequence"]]}
        items = items.mutate(
            place=ibis.row_number().over(**same_id), kept_title=items["clean"].first(include_null=True).over(**same_id)
        )
        reason = ibis.cases(
            *_problem(items),
            (_is_blank(items[ITEM_ID]), NO_ITEM),
            (items["clean"].isnull() & items["before"].notnull(), EMPTIED),
            (items["clean"].isnull(), NO_TITLE),
            ((items["place"] > 0) & (items["clean"] != items["kept_title"]), CONFLICT),
            (items["place"] > 0, TWICE),
            else_=ibis.null("string"),
        )
        items = self.engine.materialise(items.mutate(reason=reason).drop("place", "kept_title"))
        self._set_aside(items, "items", (ITEM_ID, TITLE), self.engine.value(items.count()), lenient={TWICE, CONFLICT})
        self._count_cleaned(items.filter(items["reason"].isnull()))
        return items

    def _add_clean(
        self,
        items: Any,
        name: str,
        clean_name: str,
        is_good: Callable[[str], bool] = bool,
        before_name: str | None = None,
    ) -> Any:
        """Add the clean form of a column of text, null where nothing good is left, each distinct text once.

        `before_name` names a column for the text before, where cleaning took more of it than white space.
        """
        text = items.select(items[name].name("raw")).filter(items[name].notnull()).distinct()
        names = ["raw", clean_name, *([before_name] if before_name else [])]
        schema = pa.schema([(each, pa.string()) for each in names])

        def cleaned() -> Iterator[pa.RecordBatch]:
            for batch in self.engine.batches(text):
                raw = batch["raw"].to_pylist()
                clean = [clean_title(title) for title in raw]
                columns = [[title if is_good(title) else None for title in clean]]
                if before_name:
                    changed = [
                        old if old != new and is_good(old) else None for old, new in zip(raw, clean, strict=True)
                    ]
                    lines = [None if old is None else one_line(old) for old in changed]
                    columns.append([old if old != new else None for old, new in zip(lines, clean, strict=True)])
                arrays = [batch["raw"].cast(pa.string()), *(pa.array(column, pa.string()) for column in columns)]
                yield pa.record_batch(arrays, schema=schema)

        pairs = self.engine.from_batches(pa.RecordBatchReader.from_batches(schema, cleaned()))
        return items.left_join(pairs, items[name] == pairs["raw"]).drop("raw")

    def _count_cleaned(self, items: Any) -> None:
        """Count and tell what cleaning made of the titles of usable items."""
        import ibis

        changed = items.filter(items["before"].notnull())
        self.titles = {"changed": int(self.engine.value(changed.count())), "examples": [], "made_equal": 0}
        if not self.titles["changed"]:
            return
        first = self.engine.to_arrow(changed.order_by("sequence").select("before", "clean").head(MAX_TITLES_SHOWN))
        self.titles["examples"] = [[row["before"], row["clean"]] for row in first.to_pylist()]
        alike = items.semi_join(changed, "clean")
        spellings = ibis.coalesce(alike["before"], alike["clean"]).nunique()
        alike = alike.group_by("clean").aggregate(n=alike.count(), spellings=spellings)
        several = alike.filter(alike["spellings"] > 1)
        self.titles["made_equal"] = int(self.engine.value(several["n"].sum()) or 0)
        shown = "; ".join(_change(before, after) for before, after in self.titles["examples"])
        equal = self.titles["made_equal"]
        self.tell(
            f"note: {self.domain}: titles that cleaning changed: {self.titles['changed']:,}, as {shown}"
            + (f"; items that it gave one title with others: {equal:,}" if equal else "")
        )

    def _judge_interactions(self, log: Any) -> Any:
        """The usable events; the others are set aside."""
        import ibis

        good_items = self.items.filter(self.items["reason"].isnull()).select(ITEM_ID)
        usable = log.filter(~_is_blank(log[USER_ID]), ~_is_blank(log[ITEM_ID]), log[TIMESTAMP].notnull())
        if PROBLEM in log.columns:
            usable = usable.filter(usable[PROBLEM].isnull())
        columns = (USER_ID, ITEM_ID, TIMESTAMP, MICROSECOND, RATING, "position", "sequence")
        events = self.engine.materialise(usable.semi_join(good_items, ITEM_ID).select(*columns))
        num_rows = self.counts[0]["events"]
        if self.engine.value(events.count()) == num_rows:
            return events
        items = self.items
        status = (
            items.filter(~_is_blank(items[ITEM_ID]))
            .group_by(ITEM_ID)
            .aggregate(has_title=items["reason"].isnull().any())
            .rename(known_id=ITEM_ID)
        )
        log = log.left_join(status, log[ITEM_ID] == status["known_id"])
        reason = ibis.cases(
            *_problem(log),
            (_is_blank(log[USER_ID]), NO_USER),
            (_is_blank(log[ITEM_ID]), NO_ITEM),
            (log[TIMESTAMP].isnull(), BAD_TIME),
            (log["known_id"].isnull(), UNKNOWN_ITEM),
            (~log["has_title"], TITLELESS_ITEM),
            else_=ibis.null("string"),
        )
        log = log.mutate(reason=reason)
        bad = self.engine.materialise(log.filter(log["reason"].notnull()))
        self._set_aside(bad, "interactions", (USER_ID, ITEM_ID, "time_text"), num_rows)
        return events

    def _set_aside(
        self, table: Any, what: str, shown: Sequence[str], num_rows: int, *, lenient: set[str] | None = None
    ) -> None:
        """Keep the rows that have a reason; refuse the table where one reason holds of most of its `num_rows` rows."""
        bad = table.filter(table["reason"].notnull()).order_by("sequence")
        parts = [_field_text(name, bad[name]) for name in bad.columns if name in _SHOWN_FIELDS]
        text = functools.reduce(operator.add, parts)
        counts = self.rejected_rows.add(self.engine.batches(bad.select("file", "line", "reason", row=text)))
        for reason, count in sorted(counts.items()):
            if count * 2 > num_rows and reason not in (lenient or set()):
                raise DataError(self._explain(table, what, reason, count, num_rows, shown))
        self.rejected += counts

    def _set_aside_malformed(self, what: str, table: Any) -> None:
        """Keep the rows that could not be taken apart; refuse the table where they are most of it."""
        if what == "interactions":
            self._count("read", table)
        num_rows = self.counts[0]["events"] if what == "interactions" else self.engine.value(table.count())
        found: Counter[str] = Counter()
        example: dict[str, Any] = {}
        for name, malformed in self.tables.malformed:
            if name != what:
                continue
            ordered = malformed.order_by("line")
            found += self.rejected_rows.add(self.engine.batches(ordered))
            if not example and found:
                example = self.engine.to_arrow(ordered.head(1)).to_pylist()[0]
        if found.total() > num_rows:
            raise DataError(
                f"{example['file']}: {found.total():,} of {found.total() + num_rows:,} rows of the {what} of domain "
                f"{self.domain!r} cannot be taken apart into the fields of the header, as line {example['line']} "
                f"({example['reason']}): {example['row']!r}{self._separator_hint(what)}"
            )
        self.rejected += found
        if not num_rows:
            names = ", ".join(sorted({str(path) for kind, path in self.tables.files if kind == what}))
            raise DataError(f"the {what} of domain {self.domain!r} have no rows{f' ({names})' if names else ''}")

    def _separator_hint(self, what: str) -> str:
        key = self.tables.keys.get(what)
        if not key:
            return ""
        return (
            ". Is the separator right, and are fields that hold it in quotes? Set "
            f"{key}separator=... and {key}quote=..."
        )

    def _explain(self, table: Any, what: str, reason: str, count: int, total: int, shown: Sequence[str]) -> str:
        """Why most rows of a table cannot be used, with examples and what to do."""
        bad = table.filter(table["reason"] == reason).order_by("sequence")
        examples = self.engine.to_arrow(bad.select("file", "line", *shown).head(3)).to_pylist()
        head = (
            f"{examples[0]['file']}: {count:,} of {total:,} rows of the {what} of domain {self.domain!r} cannot be used"
        )
        if reason in (OUT_OF_RANGE, *COARSER.values()):
            values = ", ".join(repr(row["time_text"]) for row in examples)
            return (
                f"{head}: {reason}: {values}. They were read as {self.tables.time_format}: say timestamps=seconds, "
                "milliseconds, microseconds, nanoseconds, iso or order"
            )
        if reason == BAD_TIME:
            values = ", ".join(repr(row["time_text"]) for row in examples)
            return (
                f"{head}, because their timestamp cannot be read: {values}. Accepted are seconds since 1970 or "
                "finer units (timestamps=seconds, milliseconds, microseconds, nanoseconds), ISO dates as 2014-07-23 or "
                "2014-07-23T18:00:00 (timestamps=iso), or the order of rows alone (timestamps=order)"
            )
        if reason == UNKNOWN_ITEM:
            values = ", ".join(repr(row[ITEM_ID]) for row in examples)
            good = self.items.filter(self.items["reason"].isnull()).order_by("sequence").select(ITEM_ID).head(3)
            known = self.engine.to_arrow(good)[ITEM_ID].to_pylist()
            return (
                f"{head}, because the items table has no such item: {values}. It has "
                f"{', '.join(map(repr, known))}: are the right columns mapped to item_id in both?"
            )
        if reason in (NO_TITLE, EMPTIED, TITLELESS_ITEM):
            return (
                f"{head}, because {'they have' if what == 'items' else 'their items have'} no title with a word in it "
                f"({', '.join(repr(row[ITEM_ID]) for row in examples)}). Titles are what a language model reads: map "
                f"the column that holds them with {self.tables.keys.get('items', '')}columns.title=COLUMN"
            )
        lines = ", ".join(str(row["line"]) for row in examples)
        key = self.tables.keys.get(what, "")
        if reason in (NO_USER, NO_ITEM):
            column = USER_ID if reason == NO_USER else ITEM_ID
            return (
                f"{head}, because {column} is empty (lines {lines}). Is the right column mapped: "
                f"{key}columns.{column}=COLUMN?"
            )
        values = "; ".join(", ".join(f"{name}={row[name]!r}" for name in shown) for row in examples)
        return f"{head}: {reason} (lines {lines}: {values})"

    # ---- rules that look at single users ----

    def _in_order(self, events: Any) -> Any:
        """Name what orders a user's events: `order`, the source's own, and the key of shuffled ties."""
        import ibis

        tables = self.tables
        has_fractions = bool(self.engine.value(events[MICROSECOND].max()))
        if "order" in tables.columns["interactions"]:  # positions of the source, which may repeat or be absent
            by_source = {"group_by": events[USER_ID], "order_by": [events["position"], events["sequence"]]}
            order = ibis.row_number().over(**by_source).cast("int64")
        else:
            order = events["sequence"].cast("int64")
        events = events.mutate(order.name(ORDER)).drop("position", "sequence")
        if not tables.has_times and TIMESTAMP not in tables.columns["interactions"]:
            place = {"group_by": events[USER_ID], "order_by": events[ORDER]}
            events = events.mutate(timestamp=ibis.row_number().over(**place).cast("int64"))
        if has_fractions and not tables.has_times:  # only the order of positions counts: they need no fractions
            place = {"group_by": events[USER_ID], "order_by": [events[TIMESTAMP], events[MICROSECOND]]}
            events = events.mutate(ibis.dense_rank().over(**place).cast("int64").name(TIMESTAMP))
        if not (has_fractions and tables.has_times):
            events = events.drop(MICROSECOND)  # 0 everywhere, and added again when the events are written
        if self.rules.tie_order == "shuffle":
            key = ibis.literal(f"{self.seed}\x1f{self.source.platform}\x1f{self.domain}\x1f")
            place = {"group_by": events[USER_ID], "order_by": events[ORDER]}
            events = events.mutate(place=ibis.row_number().over(**place))  # does not change with other users' rows
            for name in (USER_ID, ITEM_ID, "place"):
                key = key + events[name].cast("string") + "\x1f"
            events = events.mutate(key.hexdigest("md5").substr(0, 8).name(TIE)).drop("place")
        return self.engine.materialise(events)

    def _deduplicate(self) -> None:
        """Of events of one user, item and time the first in the source stays."""
        import ibis

        events, key = self.events, [USER_ID, ITEM_ID, *self._time_columns]
        several = events.group_by(key).having(events.count() > 1).aggregate()
        several = self.engine.materialise(several)
        if self.engine.value(several.count()):
            among = events.semi_join(several, key)
            among = among.mutate(place=ibis.row_number().over(group_by=key, order_by=ORDER))
            first = among.filter(among["place"] == 0).drop("place")
            self._replace(events.anti_join(several, key).union(first))
        self.engine.discard(several)
        self._count("without exact duplicates")

    def drop_repeats(self) -> int:
        """Leave out events of the same item as the user's event before; returns how many."""
        order = [self.events[name] for name in self._event_order]
        window = {"group_by": self.events[USER_ID], "order_by": order}
        events = self.events.mutate(previous=self.events[ITEM_ID].lag().over(**window))
        kept = events.filter(events["previous"].isnull() | (events["previous"] != events[ITEM_ID]))
        return self._replace(kept.drop("previous"))

    def keep_frequent(self, name: str, counts: Any, minimum: int) -> int:
        """Leave out events whose user or item has a smaller count (columns `name`, n); returns how many."""
        rare = self.engine.materialise(counts.filter(counts["n"] < minimum).select(name))
        removed = self._replace(self.events.anti_join(rare, name)) if self.engine.value(rare.count()) else 0
        self.engine.discard(rare)
        return removed

    def counts_of(self, name: str) -> Any:
        """How many events each user or item has: columns `name`, n."""
        return self.events.group_by(name).aggregate(n=self.events.count())

    @property
    def _event_order(self) -> list[str]:
        """A user's events: by time, then by the chosen order of ties, and at last as in the source."""
        return [
            *self._time_columns,
            *{"source": [], "item_id": [ITEM_ID], "shuffle": [TIE]}[self.rules.tie_order],
            ORDER,
        ]

    @property
    def _time_columns(self) -> list[str]:
        return [name for name in (TIMESTAMP, MICROSECOND) if name in self.events.columns]

    def _replace(self, expression: Any) -> int:
        """Put other events in the place of `events`; returns how many fewer they are."""
        before, self.events = self.events, self.engine.materialise(expression)
        removed = self.engine.value(before.count()) - self.engine.value(self.events.count())
        self.engine.discard(before)
        return int(removed)

    # ---- counting and writing ----

    def _count(self, rule: str, table: Any = None, **more: int) -> None:
        table = self.events if table is None else table
        sizes = {"events": table.count(), "users": table[USER_ID].nunique(), "items": table[ITEM_ID].nunique()}
        found = self.engine.to_arrow(table.aggregate(**sizes)).to_pylist()[0]
        if self.counts:
            found = {"removed": self.counts[-1]["events"] - found["events"], **found}
        self.counts.append({"rule": rule, **found, **more})

    def count_core(self, repeats: int, rare: int) -> None:
        """Enter what the repeated rules left."""
        rule = "without consecutive repeats, with enough events"
        self._count(rule, consecutive_repeats=repeats, too_few_events=rare)
        if not self.num_events:
            steps = "; ".join(f"{step['rule']}: {step['events']:,} events" for step in self.counts)
            raise DataError(f"nothing is left of domain {self.domain!r} ({steps}): lower k_core={self.rules.k_core}")

    def write(self, folder: Path, num_parts: int) -> None:
        """Write the items, and the events in parts."""
        import ibis

        items = self.items
        kept = items.filter(items["reason"].isnull())
        if self.rules.k_core > 1:
            kept = kept.semi_join(self.events, ITEM_ID)
        texts = {TITLE: kept["clean"], BRAND: kept["clean_brand"], CATEGORIES: kept["clean_categories"]}
        kept = kept.select(ITEM_ID, **texts, description=kept[DESCRIPTION], price=kept[PRICE]).order_by(ITEM_ID)
        path = part_path(folder, "items", self.domain, 0)
        self.engine.write_parquet(kept, path)
        self.num_items = pq.read_metadata(path).num_rows
        digest = (ibis.literal(f"{self.source.platform}\x1f") + self.events[USER_ID]).hexdigest("md5")
        digits = [ibis.literal("0123456789abcdef").find(digest.substr(place, 1)) for place in range(3)]
        slot = digits[0] * 256 + digits[1] * 16 + digits[2]
        events = self.events.mutate(part=(slot // (NUM_SLOTS // num_parts)).cast("int32"))
        if MICROSECOND not in events.columns:
            events = events.mutate(ibis.literal(0, "int32").name(MICROSECOND))
        target = part_path(folder, "interactions", self.domain, 0).parent
        self.engine.write_parts(events, target, "part")
        self.engine.discard(self.events)
        last = self.counts[-1]
        num_rejected = self.rejected.total()
        self.tell(
            f"{self.domain}: {last['events']:,} events of {last['users']:,} users, {self.num_items:,} items"
            + (f"; {num_rejected:,} rows rejected, see {REJECTED}" if num_rejected else "")
            + (f", of them {emptied:,} for: {EMPTIED}" if (emptied := self.rejected[EMPTIED]) else "")
        )

    def about(self) -> dict[str, Any]:
        """What the manifest says of the domain."""
        tables, last = self.tables, self.counts[-1]
        return {
            "platform": self.source.platform,
            "has_times": tables.has_times,
            "timestamps": tables.time_format,
            "columns": {name: dict(columns) for name, columns in tables.columns.items()},
            "num_items": self.num_items,
            "num_users": last["users"],
            "num_events": last["events"],
            "counts": self.counts,
            "titles": self.titles,
            "rejected": dict(sorted(self.rejected.items())),
            **{f"unread_{name}s": numbers.num_unread for name, numbers in tables.numbers.items()},
            "decimal_commas": [name for name, numbers in tables.numbers.items() if numbers.comma],
        }


# ---- rules that look at all users ------------------------------------------------------------------------------------


def _core_groups(builders: Sequence[_DomainBuilder], rules: Rules) -> list[list[_DomainBuilder]]:
    """The domains whose events of a user count together."""
    if rules.k_core_scope == "domain":
        return [[builder] for builder in builders]
    groups: Mapping[str, list[_DomainBuilder]] = {builder.source.platform: [] for builder in builders}
    for builder in builders:
        groups[builder.source.platform].append(builder)
    return list(groups.values())


def _apply_core(group: Sequence[_DomainBuilder], rules: Rules) -> None:
    """Drop consecutive repeats and rare users and items until nothing changes."""
    if not (rules.drop_consecutive_repeats or rules.k_core > 1):
        return
    repeats, rare = Counter[str](), Counter[str]()
    while True:
        num_rare = rare.total()
        for builder in group:
            if rules.drop_consecutive_repeats:
                repeats[builder.domain] += builder.drop_repeats()
        if rules.k_core > 1:
            counts = functools.reduce(lambda one, other: one.union(other), [b.counts_of(USER_ID) for b in group])
            counts = group[0].engine.materialise(counts.group_by(USER_ID).aggregate(n=counts["n"].sum()))
            for builder in group:
                rare[builder.domain] += builder.keep_frequent(USER_ID, counts, rules.k_core)
            group[0].engine.discard(counts)
        if rules.k_core > 1:
            for builder in group:
                counts = builder.counts_of(ITEM_ID)
                rare[builder.domain] += builder.keep_frequent(ITEM_ID, counts, rules.k_core)
        if rare.total() == num_rare:
            break
    for builder in group:
        builder.count_core(repeats[builder.domain], rare[builder.domain])


def _problem(table: Any) -> list[tuple[Any, Any]]:
    """The source's own reason to reject a row, as the first of the cases."""
    return [(table[PROBLEM].notnull(), table[PROBLEM])] if PROBLEM in table.columns else []


def _change(before: str, after: str, most: int = 60) -> str:
    """What became of a title, in quotes, with what is invisible spelt out; of a long one the part that changed.

    >>> _change("a pot  for tea", "a pot for tea")
    "'a pot  for tea' -> 'a pot for tea'"
    >>> _change("x" * 50 + "5\u201d", "x" * 50 + "5", most=8)
    "...'xxx5\u201d' -> ...'xxx5'"
    """
    start = max(0, len(os.path.commonprefix([before, after])) - most // 2)
    start = 0 if len(before) <= most else start

    def shown(title: str) -> str:
        part = title[start : start + most]
        return "..." * (start > 0) + repr(part) + "..." * (start + most < len(title))

    return f"{shown(before)} -> {shown(after)}"


def _is_blank(column: Any) -> Any:
    return column.isnull() | (column.strip() == "")


_SHOWN_FIELDS = (USER_ID, ITEM_ID, "time_text", RATING, TITLE, BRAND, CATEGORIES, DESCRIPTION, PRICE)


def _field_text(name: str, column: Any) -> Any:
    """`name=value; ` for a row set aside; nothing for a field that is absent."""
    import ibis

    label = TIMESTAMP if name == "time_text" else name
    return ibis.coalesce(ibis.literal(f"{label}=") + column.cast("string") + "; ", "")


def _source_files(domain: str, tables: SourceTables) -> list[dict[str, Any]]:
    files = [
        {
            "domain": domain,
            "table": what,
            "path": str(path),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for what, path in tables.files
    ]
    return files + [
        {"domain": domain, "table": name.rpartition("/")[2], "path": name, "sha256": sha256}
        for name, sha256 in tables.hashes.items()
    ]
