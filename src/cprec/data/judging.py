"""Judges the rows of one domain: each can be used, or is set aside with a reason."""

from __future__ import annotations

import functools
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.cleaning import clean_title, has_word, one_line
from cprec.data.engine import TableEngine
from cprec.data.sources.tables import SourceTables
from cprec.data.sources.times import COARSER, OUT_OF_RANGE
from cprec.errors import DataError
from cprec.schema import BRAND, CATEGORIES, DESCRIPTION, ITEM_ID, MICROSECOND, PRICE, RATING, TIMESTAMP, TITLE, USER_ID

REJECTED = "rejected.parquet"

NO_USER = "no user id"
NO_ITEM = "no item id"
BAD_TIME = "timestamp cannot be read"
UNKNOWN_ITEM = "item is not in the items table"
TITLELESS_ITEM = "item has no title"
NO_TITLE = "title without a word"
EMPTIED = "title without a word once it is cleaned"
TWICE = "item id occurs before"
CONFLICT = "item id occurs before with another title"

MAX_EXAMPLES = 3
"""Rows or titles that a message shows."""

MISSING_IDS = ("NULL", "null", "None", "none", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "\\N", "undefined")
"""Ids that are probably none: what programs write for a missing value."""

PROBLEM = "problem"
"""Column of a source's tables, if it has one: why a row cannot be used, or null."""

_KEPT_FIELDS = (USER_ID, ITEM_ID, "time_text", RATING, TITLE, BRAND, CATEGORIES, DESCRIPTION, PRICE)
"""Fields of a row that `rejected.parquet` shows, where the row has them."""

_SCHEMA = pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())])


class RejectedRows:
    """`rejected.parquet` while it is written; memory holds one batch."""

    def __init__(self, path: Path, strict: bool) -> None:
        self._strict = strict
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")

    def __enter__(self) -> RejectedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, batches: Iterable[pa.RecordBatch]) -> Counter[str]:
        """Keep rows (file, line, reason, row) and count them by reason. Raises DataError at the first one if strict."""
        counts: Counter[str] = Counter()
        for batch in batches:
            rows = pa.Table.from_batches([batch]).select(_SCHEMA.names).cast(_SCHEMA)
            if rows.num_rows and self._strict:
                first = rows.slice(0, 1).to_pylist()[0]
                raise DataError(
                    f"{first['file']}, line {first['line']}: {first['reason']}: {first['row']} (strict stops at the "
                    "first bad row)"
                )
            self._writer.write_table(rows)
            for entry in rows["reason"].value_counts().to_pylist():
                counts[entry["values"]] += entry["counts"]
        return counts


@dataclass
class Judge:
    """Judges the rows of a domain, keeps those that cannot be used, and tells what a reader of the log should know."""

    engine: TableEngine
    domain: str
    tables: SourceTables
    rejected_rows: RejectedRows
    tell: Callable[[str], None]
    num_events: int
    """Rows of the log that could be taken apart."""
    rejected: Counter[str] = field(default_factory=Counter)
    """How many rows were set aside, by reason."""
    titles: dict[str, Any] = field(default_factory=dict)
    """How cleaning changed the titles."""

    def judge(self) -> tuple[Any, Any]:
        """All items with their clean text and a reason to reject them, or null; and the usable events.

        Raises DataError where most rows of a table cannot be used.
        """
        items = self.engine.materialise(self.tables.items)
        num_items = self.engine.value(items.count())
        self._set_aside_malformed("interactions", self.num_events)
        self._set_aside_malformed("items", num_items)
        items = self._judge_items(items, num_items)
        events = self._judge_interactions(self.tables.interactions, items)
        self._tell_of_ids(events, items.filter(items["reason"].isnull()))
        return items, events

    # ---- items ----

    def _judge_items(self, items: Any, num_items: int) -> Any:
        items = self._join_texts(items, TITLE, ("clean", "before"), _clean_titles)
        for name in (BRAND, CATEGORIES):
            if name in self.tables.columns["items"]:
                items = self._join_texts(items, name, (f"clean_{name}",), lambda raw: [_clean_or_none(raw)])
            else:
                items = items.mutate(ibis.null("string").name(f"clean_{name}"))
        # Of several rows with one id the first that has a title stays.
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
        self._set_aside(items, "items", (ITEM_ID, TITLE), num_items, lenient=(TWICE, CONFLICT))
        self._count_cleaned(items.filter(items["reason"].isnull()))
        return items

    def _join_texts(
        self, items: Any, name: str, new_names: Sequence[str], make: Callable[[list[str]], list[list[str | None]]]
    ) -> Any:
        """Add columns that Python makes of a column of text; each distinct text is looked at once."""
        distinct = items.select(items[name].name("raw")).filter(items[name].notnull()).distinct()
        schema = pa.schema([(each, pa.string()) for each in ("raw", *new_names)])

        def made() -> Iterator[pa.RecordBatch]:
            for batch in self.engine.batches(distinct):
                columns = [pa.array(column, pa.string()) for column in make(batch["raw"].to_pylist())]
                yield pa.record_batch([batch["raw"].cast(pa.string()), *columns], schema=schema)

        pairs = self.engine.from_batches(pa.RecordBatchReader.from_batches(schema, made()))
        return items.left_join(pairs, items[name] == pairs["raw"]).drop("raw")

    def _count_cleaned(self, items: Any) -> None:
        """Count the titles of usable items that cleaning changed, and tell of them."""
        changed = items.filter(items["before"].notnull())
        self.titles = {"changed": int(self.engine.value(changed.count())), "examples": [], "made_equal": 0}
        if not self.titles["changed"]:
            return
        first = self.engine.to_arrow(changed.order_by("sequence").select("before", "clean").head(MAX_EXAMPLES))
        self.titles["examples"] = [[row["before"], row["clean"]] for row in first.to_pylist()]
        # Items of one clean title that had several titles before.
        alike = items.semi_join(changed, "clean")
        spellings = ibis.coalesce(alike["before"], alike["clean"]).nunique()
        alike = alike.group_by("clean").aggregate(n=alike.count(), spellings=spellings)
        several = alike.filter(alike["spellings"] > 1)
        equal = self.titles["made_equal"] = int(self.engine.value(several["n"].sum()) or 0)
        shown = "; ".join(_change(before, after) for before, after in self.titles["examples"])
        self.tell(
            f"note: {self.domain}: titles that cleaning changed: {self.titles['changed']:,}, as {shown}"
            + (f"; items that it gave one title with others: {equal:,}" if equal else "")
        )

    # ---- events ----

    def _judge_interactions(self, log: Any, items: Any) -> Any:
        """The usable events; the others are set aside."""
        good_items = items.filter(items["reason"].isnull())
        usable = log.filter(~_is_blank(log[USER_ID]), ~_is_blank(log[ITEM_ID]), log[TIMESTAMP].notnull())
        if PROBLEM in log.columns:
            usable = usable.filter(usable[PROBLEM].isnull())
        columns = (USER_ID, ITEM_ID, TIMESTAMP, MICROSECOND, RATING, "position", "sequence")
        events = self.engine.materialise(usable.semi_join(good_items.select(ITEM_ID), ITEM_ID).select(*columns))
        if self.engine.value(events.count()) == self.num_events:
            return events
        known = (
            items.filter(~_is_blank(items[ITEM_ID]))
            .group_by(ITEM_ID)
            .aggregate(has_title=items["reason"].isnull().any())
            .rename(known_id=ITEM_ID)
        )
        log = log.left_join(known, log[ITEM_ID] == known["known_id"])
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
        self._set_aside(bad, "interactions", (USER_ID, ITEM_ID, "time_text"), self.num_events, known_items=good_items)
        return events

    def _tell_of_ids(self, events: Any, items: Any) -> None:
        """Tell of ids that look as if a program had lost them; they are kept as they stand."""
        for name, table, rows in ((USER_ID, events, "events"), (ITEM_ID, items, "items")):
            is_rounded = table[name].lower().like("_%e%") & table[name].re_search(r"^\d(\.\d+)?[eE]\+?\d+$")
            odd = table.filter(table[name].isin(MISSING_IDS) | is_rounded)
            counts = self.engine.row(odd.aggregate(n=odd.count(), example=odd[name].max()))
            if counts["n"]:
                self.tell(
                    f"note: {self.domain}: {counts['n']:,} {rows} have an id such as {counts['example']!r}, which is "
                    "taken as it stands: is it a missing value, or a number that a spreadsheet has rounded?"
                )

    # ---- rows that cannot be used ----

    def _set_aside_malformed(self, what: str, num_rows: int) -> None:
        """Keep the rows that could not be taken apart; refuse the table where the `num_rows` others are fewer."""
        found: Counter[str] = Counter()
        example: dict[str, Any] = {}
        for malformed in (table for name, table in self.tables.malformed if name == what):
            ordered = malformed.order_by("line")
            found += self.rejected_rows.add(self.engine.batches(ordered))
            if not example and found:
                example = self.engine.to_arrow(ordered.head(1)).to_pylist()[0]
        if found.total() > num_rows:
            key = self.tables.keys.get(what)
            hint = (
                ". Is the separator right, and are fields that hold it in quotes? Set "
                f"{key}separator=... and {key}quote=..."
            )
            raise DataError(
                f"{example['file']}: {found.total():,} of {found.total() + num_rows:,} rows of the {what} of domain "
                f"{self.domain!r} cannot be taken apart into the fields of the header, as line {example['line']} "
                f"({example['reason']}): {example['row']!r}{hint if key else ''}"
            )
        self.rejected += found
        if not num_rows:
            names = ", ".join(sorted({str(path) for kind, path in self.tables.files if kind == what}))
            raise DataError(f"the {what} of domain {self.domain!r} have no rows{f' ({names})' if names else ''}")

    def _set_aside(
        self,
        table: Any,
        what: str,
        shown: Sequence[str],
        num_rows: int,
        *,
        lenient: tuple[str, ...] = (),
        known_items: Any = None,
    ) -> None:
        """Keep the rows that have a reason; refuse the table where one reason, unless `lenient`, holds of most of its
        `num_rows` rows. Messages show the columns `shown`, and some of the `known_items`."""
        bad = table.filter(table["reason"].notnull()).order_by("sequence")
        texts = (_field_text(name, bad[name]) for name in bad.columns if name in _KEPT_FIELDS)
        text = functools.reduce(operator.add, texts)
        counts = self.rejected_rows.add(self.engine.batches(bad.select("file", "line", "reason", row=text)))
        for reason, count in sorted(counts.items()):
            if count * 2 > num_rows and reason not in lenient:
                rows = bad.filter(bad["reason"] == reason).select("file", "line", *shown).head(MAX_EXAMPLES)
                examples = self.engine.to_arrow(rows).to_pylist()
                raise DataError(
                    f"{examples[0]['file']}: {count:,} of {num_rows:,} rows of the {what} of domain {self.domain!r} "
                    f"cannot be used{self._explain(what, reason, examples, shown, known_items)}"
                )
        self.rejected += counts

    def _explain(
        self, what: str, reason: str, examples: list[dict[str, Any]], shown: Sequence[str], known_items: Any
    ) -> str:
        """Why most rows of a table cannot be used, with examples, and what to do: the rest of a sentence."""
        if reason == BAD_TIME or reason in (OUT_OF_RANGE, *COARSER.values()):
            return self._explain_time(reason, ", ".join(repr(row["time_text"]) for row in examples))
        ids = ", ".join(repr(row[ITEM_ID]) for row in examples)
        if reason == UNKNOWN_ITEM:
            first = known_items.order_by("sequence").select(ITEM_ID).head(MAX_EXAMPLES)
            known = self.engine.to_arrow(first)[ITEM_ID].to_pylist()
            return (
                f", because the items table has no such item: {ids}. It has {', '.join(map(repr, known))}: are the "
                "right columns mapped to item_id in both?"
            )
        if reason in (NO_TITLE, EMPTIED, TITLELESS_ITEM):
            return (
                f", because {'they have' if what == 'items' else 'their items have'} no title with a word in it "
                f"({ids}). Titles are what a language model reads: map the column that holds them with "
                f"{self.tables.keys.get('items', '')}columns.title=COLUMN"
            )
        lines = ", ".join(str(row["line"]) for row in examples)
        if reason in (NO_USER, NO_ITEM):
            column = USER_ID if reason == NO_USER else ITEM_ID
            return (
                f", because {column} is empty (lines {lines}). Is the right column mapped: "
                f"{self.tables.keys.get(what, '')}columns.{column}=COLUMN?"
            )
        values = "; ".join(", ".join(f"{name}={row[name]!r}" for name in shown) for row in examples)
        return f": {reason} (lines {lines}: {values})"

    def _explain_time(self, reason: str, values: str) -> str:
        if reason == BAD_TIME:
            return (
                f", because their timestamp cannot be read: {values}. Accepted are seconds since 1970 or finer units "
                "(timestamps=seconds, milliseconds, microseconds, nanoseconds), ISO dates as 2014-07-23 or "
                "2014-07-23T18:00:00 (timestamps=iso), or the order of rows alone (timestamps=order)"
            )
        return (
            f": {reason}: {values}. They were read as {self.tables.time_format}: say timestamps=seconds, "
            "milliseconds, microseconds, nanoseconds, iso or order"
        )


def _clean_or_none(raw: list[str]) -> list[str | None]:
    return [clean_title(text) or None for text in raw]


def _clean_titles(raw: list[str]) -> list[list[str | None]]:
    """Clean titles, None where no word is left; and the titles of which cleaning changed more than white space."""
    clean = [clean_title(title) for title in raw]
    before = [one_line(old) if old != new and has_word(old) else None for old, new in zip(raw, clean, strict=True)]
    return [
        [title if has_word(title) else None for title in clean],
        [old if old != new else None for old, new in zip(before, clean, strict=True)],
    ]


def _problem(table: Any) -> list[tuple[Any, Any]]:
    """The source's own reason to reject a row, as the first of the cases."""
    return [(table[PROBLEM].notnull(), table[PROBLEM])] if PROBLEM in table.columns else []


def _is_blank(column: Any) -> Any:
    return column.isnull() | (column.strip() == "")


def _field_text(name: str, column: Any) -> Any:
    """`name=value; ` for a row that is set aside; nothing for a field that is absent."""
    label = TIMESTAMP if name == "time_text" else name
    return ibis.coalesce(ibis.literal(f"{label}=") + column.cast("string") + "; ", "")


def _change(before: str, after: str, most: int = 60) -> str:
    """A title before and after cleaning, in quotes, with invisible characters spelt out; of a long one the part that
    changed.

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
