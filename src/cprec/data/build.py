"""Builds canonical tables from sources: everything that concerns all rows, as Ibis expressions in the table engine.

    sources -> rows judged -> duplicates, repeats, k-core -> items, and interactions in parts by hash of user

Steps that look at one user at a time (order, ties, splits, sequences) come after, part by part, in numpy.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow.parquet as pq

from cprec.data.config import ConnectionSource, PublicSource, RecBoleSource, Rules, TableSource
from cprec.data.dataset import NUM_SLOTS, TIE, finish_part, part_path, read_manifest, write_manifest
from cprec.data.engine import TableEngine, connect
from cprec.data.interactions import join_time
from cprec.data.judging import EMPTIED, REJECTED, Judge, RejectedRows
from cprec.data.sources import connections, memory, public, tables
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.tables import SourceTables
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
    SCHEMA_VERSION,
    TIMESTAMP,
    TITLE,
    USER_ID,
)

PART_EVENTS = 1 << 20
"""About how many events a part holds; a part is what one process has in memory."""

Source = TableSource | RecBoleSource | PublicSource | ConnectionSource | MemorySource
"""One domain of one platform, in whatever form its rows have."""

LOADERS: dict[type, Callable[[TableEngine, Any], SourceTables]] = {
    TableSource: tables.load,
    RecBoleSource: tables.load,
    PublicSource: public.load,
    ConnectionSource: connections.load,
    MemorySource: memory.load,
}
"""Kind of source -> the function that reads its rows, as Ibis tables of an engine."""


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
        RejectedRows(folder / REJECTED, rules.strict) as rejected,
    ):
        builders = [
            _DomainBuilder(opened, source, rules, seed, rejected, tell)
            for source in sorted(sources, key=lambda source: source.domain)
        ]
        for builder in builders:
            builder.read()
        for group in _core_groups(builders, rules):
            _apply_core(group, rules)
        parts = num_parts or _num_parts(sum(builder.num_events for builder in builders))
        for builder in builders:
            builder.write(folder, parts)
    write_manifest(folder, _manifest(builders, rules, seed, parts))


def _check(sources: Sequence[Source], num_parts: int | None) -> None:
    if not sources:
        raise ConfigError("no source of data is given")
    domains = [source.domain for source in sources]
    twice = sorted({domain for domain in domains if domains.count(domain) > 1})
    if twice:
        raise ConfigError(f"domain {twice[0]!r} has more than one source; give all its files to one source")
    if num_parts is not None and not (1 <= num_parts <= NUM_SLOTS and num_parts & (num_parts - 1) == 0):
        raise ConfigError(f"num_parts={num_parts}: expected a power of two from 1 to {NUM_SLOTS}")


def _num_parts(num_events: int) -> int:
    """The smallest power of two that gives parts of at most `PART_EVENTS` events on average, at most `NUM_SLOTS`."""
    return min(NUM_SLOTS, 1 << (-(-num_events // PART_EVENTS) - 1).bit_length())


def _manifest(builders: Sequence[_DomainBuilder], rules: Rules, seed: int, num_parts: int) -> dict[str, Any]:
    """The content of `dataset.json`; `strict` is not among the rules, because it changes nothing in what is written."""
    return {
        "schema_version": SCHEMA_VERSION,
        "rules": {
            "min_user_events": rules.k_core,
            "min_item_events": rules.k_core,
            "core_scope": rules.k_core_scope,
            "tie_order": rules.tie_order,
            "seed": seed,
            "deduplicate": rules.deduplicate,
            "drop_consecutive_repeats": rules.drop_consecutive_repeats,
        },
        "num_parts": num_parts,
        "domains": {builder.domain: builder.about() for builder in builders},
        "sources": [entry for builder in builders for entry in builder.files],
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


# ---- one domain ------------------------------------------------------------------------------------------------------


@dataclass
class _DomainBuilder:
    """Builds the tables of one domain; each method is one step."""

    engine: TableEngine
    source: Source
    rules: Rules
    seed: int
    rejected_rows: RejectedRows
    tell: Callable[[str], None]
    counts: list[dict[str, Any]] = field(default_factory=list)
    """How many events, users and items each rule left."""
    rejected: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, Any]] = field(default_factory=list)
    num_items: int = 0
    titles: dict[str, Any] = field(default_factory=dict)
    """How cleaning changed the titles."""

    @property
    def domain(self) -> str:
        return self.source.domain

    @property
    def num_events(self) -> int:
        return int(self.counts[-1]["events"])

    def read(self) -> None:
        """Read and judge the rows, and apply the rules that look at single users: `items` and `events`."""
        self.tell(f"{self.domain}: reading")
        self.tables = LOADERS[type(self.source)](self.engine, self.source)
        self._tell_of_numbers()
        with self.engine.translated_errors(f"reading domain {self.domain!r}"):
            self._count("read", self.tables.interactions)
            judge = Judge(self.engine, self.domain, self.tables, self.rejected_rows, self.tell, self.num_events)
            self.items, events = judge.judge()
        self.rejected, self.titles = judge.rejected, judge.titles
        self.files = _source_files(self.domain, self.tables)
        self.events = self._in_order(events)
        self._count("usable")
        if self.rules.deduplicate:
            self._deduplicate()

    def _tell_of_numbers(self) -> None:
        """Tell of ratings, prices and positions that are not numbers, and of commas taken for the decimal sign."""
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
                    f"note: {self.domain}: {numbers.num_unread - numbers.num_unclear:,} values of {name} are not "
                    f"numbers, as {numbers.unread!r}, and are left out"
                )

    # ---- rules that look at single users ----

    def _in_order(self, events: Any) -> Any:
        """Add the columns that order a user's events: `order`, the source's own, and the key of shuffled ties."""
        has_times, columns = self.tables.has_times, self.tables.columns["interactions"]
        has_fractions = bool(self.engine.value(events[MICROSECOND].max()))
        if "order" in columns:  # positions of the source, which may repeat or be absent
            order = _place_of_user(events, "position", "sequence")
        else:
            order = events["sequence"].cast("int64")
        events = events.mutate(order.name(ORDER)).drop("position", "sequence")
        if not has_times and TIMESTAMP not in columns:
            events = events.mutate(_place_of_user(events, ORDER).name(TIMESTAMP))
        if has_fractions and not has_times:  # only the order of positions counts: they need no fractions
            place = {"group_by": events[USER_ID], "order_by": [events[TIMESTAMP], events[MICROSECOND]]}
            events = events.mutate(ibis.dense_rank().over(**place).cast("int64").name(TIMESTAMP))
        if not (has_fractions and has_times):
            events = events.drop(MICROSECOND)  # 0 everywhere, and added again when the events are written
        if self.rules.tie_order == "shuffle":
            events = self._with_tie_key(events)
        return self.engine.materialise(events)

    def _with_tie_key(self, events: Any) -> Any:
        """Add the key of shuffled ties: eight digits of a hash of seed, domain, user, item and place in the source."""
        key = ibis.literal(f"{self.seed}\x1f{self.source.platform}\x1f{self.domain}\x1f")
        events = events.mutate(place=_place_of_user(events, ORDER))  # does not change with other users' rows
        for name in (USER_ID, ITEM_ID, "place"):
            key = key + events[name].cast("string") + "\x1f"
        return events.mutate(key.hexdigest("md5").substr(0, 8).name(TIE)).drop("place")

    def _deduplicate(self) -> None:
        """Of events of one user, item and time the first in the source stays."""
        events, key = self.events, [USER_ID, ITEM_ID, *self._time_columns]
        several = self.engine.materialise(events.group_by(key).having(events.count() > 1).aggregate())
        has_several = self.engine.value(several.count())
        if has_several:
            among = events.semi_join(several, key)
            among = among.mutate(place=ibis.row_number().over(group_by=key, order_by=ORDER))
            first = among.filter(among["place"] == 0).drop("place")
            self._replace(events.anti_join(several, key).union(first))
        self.engine.discard(several)
        self._count("without exact duplicates", has_changed=has_several)

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
        sizes = before.aggregate(before=before.count()).cross_join(self.events.aggregate(after=self.events.count()))
        size = self.engine.row(sizes)
        self.engine.discard(before)
        return int(size["before"] - size["after"])

    # ---- counting and writing ----

    def _count(self, rule: str, table: Any = None, *, has_changed: bool = True, **more: int) -> None:
        """Enter what a rule left; where it changed nothing, as many as before."""
        table = self.events if table is None else table
        if has_changed:
            sizes = {"events": table.count(), "users": table[USER_ID].nunique(), "items": table[ITEM_ID].nunique()}
            found = self.engine.row(table.aggregate(**sizes))
        else:
            found = {name: self.counts[-1][name] for name in ("events", "users", "items")}
        if self.counts:
            found = {"removed": self.counts[-1]["events"] - found["events"], **found}
        self.counts.append({"rule": rule, **found, **more})

    def count_core(self, repeats: int, rare: int) -> None:
        """Enter what the repeated rules left."""
        rule = "without consecutive repeats, with enough events"
        has_changed = repeats + rare > 0
        self._count(rule, has_changed=has_changed, consecutive_repeats=repeats, too_few_events=rare)
        if not self.num_events:
            steps = "; ".join(f"{step['rule']}: {step['events']:,} events" for step in self.counts)
            raise DataError(f"nothing is left of domain {self.domain!r} ({steps}): lower k_core={self.rules.k_core}")

    def write(self, folder: Path, num_parts: int) -> None:
        """Write the items, and the events in parts."""
        kept = self.items.filter(self.items["reason"].isnull())
        if self.rules.k_core > 1:
            kept = kept.semi_join(self.events, ITEM_ID)
        texts = {TITLE: kept["clean"], BRAND: kept["clean_brand"], CATEGORIES: kept["clean_categories"]}
        kept = kept.select(ITEM_ID, **texts, description=kept[DESCRIPTION], price=kept[PRICE]).order_by(ITEM_ID)
        path = part_path(folder, "items", self.domain, 0)
        self.engine.write_parquet(kept, path)
        self.num_items = pq.read_metadata(path).num_rows
        events = self.events.mutate(part=(self._slot() // (NUM_SLOTS // num_parts)).cast("int32"))
        if MICROSECOND not in events.columns:
            events = events.mutate(ibis.literal(0, "int32").name(MICROSECOND))
        self.engine.write_parts(events, part_path(folder, "interactions", self.domain, 0).parent, "part")
        self.engine.discard(self.events)
        self._tell_what_is_left()

    def _slot(self) -> Any:
        """The slot of each event's user, as `dataset.slot_of` counts it."""
        digest = (ibis.literal(f"{self.source.platform}\x1f") + self.events[USER_ID]).hexdigest("md5")
        digits = [ibis.literal("0123456789abcdef").find(digest.substr(place, 1)) for place in range(3)]
        return digits[0] * 256 + digits[1] * 16 + digits[2]

    def _tell_what_is_left(self) -> None:
        last, num_rejected = self.counts[-1], self.rejected.total()
        self.tell(
            f"{self.domain}: {last['events']:,} events of {last['users']:,} users, {self.num_items:,} items"
            + (f"; {num_rejected:,} rows rejected, see {REJECTED}" if num_rejected else "")
            + (f", of them {emptied:,} for: {EMPTIED}" if (emptied := self.rejected[EMPTIED]) else "")
        )

    def about(self) -> dict[str, Any]:
        """The domain's entry in the manifest."""
        read, last = self.tables, self.counts[-1]
        return {
            "platform": self.source.platform,
            "has_times": read.has_times,
            "timestamps": read.time_format,
            "columns": {name: dict(columns) for name, columns in read.columns.items()},
            "num_items": self.num_items,
            "num_users": last["users"],
            "num_events": last["events"],
            "counts": self.counts,
            "titles": self.titles,
            "rejected": dict(sorted(self.rejected.items())),
            **{f"unread_{name}s": numbers.num_unread for name, numbers in read.numbers.items()},
            "decimal_commas": [name for name, numbers in read.numbers.items() if numbers.comma],
        }


def _place_of_user(events: Any, *order: str) -> Any:
    """Where each event stands among its user's, by some columns, from 0."""
    columns = [events[name] for name in order]
    return ibis.row_number().over(group_by=events[USER_ID], order_by=columns).cast("int64")


def _source_files(domain: str, tables: SourceTables) -> list[dict[str, Any]]:
    files = [
        {"domain": domain, "table": what, "path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for what, path in tables.files
    ]
    return files + [
        {"domain": domain, "table": name.rpartition("/")[2], "path": name, "sha256": sha256}
        for name, sha256 in tables.hashes.items()
    ]


# ---- rules that look at all users ------------------------------------------------------------------------------------


def _core_groups(builders: Sequence[_DomainBuilder], rules: Rules) -> list[list[_DomainBuilder]]:
    """The domains whose events of a user count together."""
    groups: dict[str, list[_DomainBuilder]] = {}
    for builder in builders:
        key = builder.domain if rules.k_core_scope == "domain" else builder.source.platform
        groups.setdefault(key, []).append(builder)
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
            for builder in group:
                counts = builder.counts_of(ITEM_ID)
                rare[builder.domain] += builder.keep_frequent(ITEM_ID, counts, rules.k_core)
        if rare.total() == num_rare:
            break
    for builder in group:
        builder.count_core(repeats[builder.domain], rare[builder.domain])
