"""Canonical tables: built from sources, cleaned and counted, and read back.

    DATA/dataset.json                                  what was read, which rules held, what they left
    DATA/items/domain=D/part-0.parquet                 item_id, title, brand, categories, description, price
    DATA/interactions/domain=D/part-0.parquet          user_id, item_id, timestamp, rating, order, split
    DATA/rejected.parquet                              file, line, reason, row

Rows of interactions are sorted by user, time and tie order. What concerns all rows runs as Ibis expressions in the
table engine; what concerns one user at a time (splits, sequences) is numpy, elsewhere.
"""

from __future__ import annotations

import functools
import json
import operator
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue, clean_title, has_word, read_parts
from cprec.data.engine import TableEngine, connect
from cprec.data.interactions import Interactions, stable_order
from cprec.data.sources.tables import SourceTables
from cprec.data.splits import Split, SplitSpec
from cprec.errors import ConfigError, DataError
from cprec.provenance import file_sha256
from cprec.schema import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    ORDER,
    PRICE,
    RATING,
    SCHEMA_VERSION,
    SPLIT,
    SPLITS,
    TIMESTAMP,
    TITLE,
    USER_ID,
    DomainInfo,
)

MANIFEST = "dataset.json"
REJECTED = "rejected.parquet"

TieOrder = Literal["source", "item_id", "shuffle"]

NO_USER = "no user id"
NO_ITEM = "no item id"
BAD_TIME = "timestamp cannot be read"
UNKNOWN_ITEM = "item is not in the items table"
TITLELESS_ITEM = "item has no title"
NO_TITLE = "title without a word"
TWICE = "item id occurs before"

TIE = "tie"
"""Column of shuffled tie keys, there only where tie_order is shuffle."""


class Source(Protocol):
    """One domain of one platform, in whatever form its rows have."""

    @property
    def domain(self) -> str: ...

    @property
    def platform(self) -> str: ...

    def load(self, engine: TableEngine) -> SourceTables:
        """The rows as Ibis tables of a connection."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What `build_dataset` does to the rows; see there."""

    min_user_events: int
    min_item_events: int
    tie_order: TieOrder
    seed: int
    deduplicate: bool
    drop_consecutive_repeats: bool
    strict: bool

    @property
    def has_core(self) -> bool:
        return max(self.min_user_events, self.min_item_events) > 1


def build_dataset(
    sources: Sequence[Source],
    folder: str | Path,
    *,
    min_user_events: int = 5,
    min_item_events: int = 5,
    tie_order: TieOrder = "source",
    seed: int = 0,
    deduplicate: bool = True,
    drop_consecutive_repeats: bool = True,
    strict: bool = False,
    engine: str = "duckdb",
    memory_limit: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Read sources, reject what cannot be used, apply the rules, and write canonical tables into a new folder.

    Rules, per domain: events of one user, item and time count once (`deduplicate`, the first in the source stays); an
    event of the same item as the user's event before is left out (`drop_consecutive_repeats`); users and items with
    fewer events than the minimum are left out (0 or 1: no minimum). The last two repeat until nothing changes, so that
    both hold of the result. Where a minimum is set, items without events leave the catalogue.

    `tie_order` orders a user's events of equal time: as in the `source`, by `item_id`, or by a `shuffle` that depends
    on `seed`, user, item and source order alone. Times of a domain without real times are kept as given.

    Rejected rows go to `rejected.parquet` and are counted by reason; `strict` stops at the first one. `progress` is
    told of each step. The tables are written aside and the folder renamed at the end, so an interrupted run leaves
    nothing that looks complete.

    Raises DataError for files or columns that are missing, for a domain more than half of whose rows are rejected for
    one reason, and where nothing is left; ConfigError for a folder that is in use and for domains given twice.
    """
    rules = Rules(
        min_user_events=min_user_events,
        min_item_events=min_item_events,
        tie_order=tie_order,
        seed=seed,
        deduplicate=deduplicate,
        drop_consecutive_repeats=drop_consecutive_repeats,
        strict=strict,
    )
    folder = Path(folder)
    _check(sources, folder, rules)
    tell = progress or (lambda message: None)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        manifest = _build(sources, unfinished, rules, engine, memory_limit, tell)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check(sources: Sequence[Source], folder: Path, rules: Rules) -> None:
    if not sources:
        raise ConfigError("no source of data is given")
    domains = [source.domain for source in sources]
    twice = sorted({domain for domain in domains if domains.count(domain) > 1})
    if twice:
        raise ConfigError(f"domain {twice[0]!r} has more than one source; give all its files to one source")
    if rules.tie_order not in get_args(TieOrder):
        raise ConfigError(f"tie_order={rules.tie_order!r}: expected {', '.join(get_args(TieOrder))}")
    for name in ("min_user_events", "min_item_events"):
        if getattr(rules, name) < 0:
            raise ConfigError(f"{name}={getattr(rules, name)} must be at least 0")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: choose another folder, or delete it")


def _build(
    sources: Sequence[Source],
    folder: Path,
    rules: Rules,
    engine_name: str,
    memory_limit: str | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    domains, files, rejected = {}, [], []
    for source in sorted(sources, key=lambda source: source.domain):
        # One connection per domain: what it held in memory is gone before the next one is read.
        with connect(engine_name, memory_limit=memory_limit, spill=folder / "spill") as engine:
            result = _DomainBuilder(engine, source, rules, folder, tell).build()
        domains[source.domain] = result.about
        files += result.files
        rejected.append(result.rejected)
    pq.write_table(pa.concat_tables(rejected), folder / REJECTED, compression="zstd")
    shutil.rmtree(folder / "spill", ignore_errors=True)
    return {
        "schema_version": SCHEMA_VERSION,
        "rules": {key: value for key, value in asdict(rules).items() if key != "strict"},
        "domains": domains,
        "sources": files,
    }


_REJECTED_SCHEMA = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())]
)


@dataclass(frozen=True)
class _Built:
    about: dict[str, Any]
    files: list[dict[str, Any]]
    rejected: pa.Table


@dataclass
class _DomainBuilder:
    """Builds the tables of one domain; each method is one step."""

    engine: TableEngine
    source: Source
    rules: Rules
    folder: Path
    tell: Callable[[str], None]
    counts: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[pa.Table] = field(default_factory=list)

    @property
    def domain(self) -> str:
        return self.source.domain

    def build(self) -> _Built:
        tables = self.source.load(self.engine)
        items, interactions = self._materialise_sources(tables)
        items = self._judge_items(items)
        events = self._judge_interactions(interactions, items, tables)
        if not tables.has_times and TIMESTAMP not in tables.columns["interactions"]:
            events = events.mutate(timestamp=events[ORDER])
        events = self._apply_rules(events)
        num_items = self._write(items, events)
        reasons = pa.concat_tables(self.rejected, promote_options="default") if self.rejected else _none_rejected()
        by_reason = reasons.group_by("reason").aggregate([([], "count_all")]).to_pylist()
        last = self.counts[-1]
        about = {
            "platform": self.source.platform,
            "has_times": tables.has_times,
            "timestamps": tables.time_format,
            "columns": {name: dict(columns) for name, columns in tables.columns.items()},
            "num_items": num_items,
            "num_users": last["users"],
            "num_events": last["events"],
            "counts": self.counts,
            "rejected": {row["reason"]: row["count_all"] for row in sorted(by_reason, key=lambda row: row["reason"])},
        }
        self.tell(
            f"{self.domain}: {last['events']:,} events of {last['users']:,} users, {num_items:,} items"
            + (f"; {reasons.num_rows:,} rows rejected, see {REJECTED}" if reasons.num_rows else "")
        )
        return _Built(about, _source_files(self.domain, tables), reasons.cast(_REJECTED_SCHEMA))

    def _materialise_sources(self, tables: SourceTables) -> tuple[Any, Any]:
        with self.engine.translated_errors(f"reading domain {self.domain!r}"):
            items = self.engine.materialise(tables.items)
            interactions = self.engine.materialise(tables.interactions)
        for what, table in (("interactions", interactions), ("items", items)):
            num_rows = self._value(table.count())
            self._set_aside_malformed(what, tables, num_rows)
            if not num_rows:
                names = ", ".join(sorted({str(path) for kind, path in tables.files if kind == what}))
                raise DataError(f"the {what} of domain {self.domain!r} have no rows{f' ({names})' if names else ''}")
        return items, interactions

    # ---- judging rows ------------------------------------------------------------------------------------------------

    def _judge_items(self, items: Any) -> Any:
        """All items with their clean text and a reason to reject them, or none."""
        import ibis

        self.tell(f"{self.domain}: checking items and events")
        items = self._add_clean(items, TITLE, "clean", has_word)
        items = self._add_clean(self._add_clean(items, BRAND, "clean_brand"), CATEGORIES, "clean_categories")
        same_id = {"group_by": items[ITEM_ID], "order_by": [items["clean"].isnull(), items["sequence"]]}
        items = items.mutate(place=ibis.row_number().over(**same_id))
        reason = ibis.cases(
            (_is_blank(items[ITEM_ID]), NO_ITEM),
            (items["clean"].isnull(), NO_TITLE),
            (items["place"] > 0, TWICE),
            else_=ibis.null("string"),
        )
        items = self.engine.materialise(items.mutate(reason=reason).drop("place"))
        self._set_aside(items, "items", (ITEM_ID, TITLE), lenient={TWICE})
        return items

    def _add_clean(self, items: Any, name: str, clean_name: str, is_good: Callable[[str], bool] = bool) -> Any:
        """Add the clean form of a column of text, null where nothing good is left, each distinct text once."""
        text = items[name].name("raw")
        raw = self.engine.to_arrow(items.select(text).filter(items[name].notnull()).distinct())["raw"]
        clean = [text if is_good(text) else None for text in map(clean_title, raw.to_pylist())]
        pairs = pa.table({"raw": raw, clean_name: pa.array(clean, pa.string())})
        cleaned = self.engine.from_arrow(pairs)
        return items.left_join(cleaned, items[name] == cleaned["raw"]).drop("raw")

    def _judge_interactions(self, log: Any, items: Any, tables: SourceTables) -> Any:
        """The usable events, with their order within the user."""
        import ibis

        self._count("read", log)
        status = (
            items.filter(items["reason"].isnull() | (items["reason"] == NO_TITLE))
            .group_by(ITEM_ID)
            .aggregate(has_title=items["reason"].isnull().any())
            .rename(known_id=ITEM_ID)
        )
        log = log.left_join(status, log[ITEM_ID] == status["known_id"])
        reason = ibis.cases(
            (_is_blank(log[USER_ID]), NO_USER),
            (_is_blank(log[ITEM_ID]), NO_ITEM),
            (log[TIMESTAMP].isnull(), BAD_TIME),
            (log["known_id"].isnull(), UNKNOWN_ITEM),
            (~log["has_title"], TITLELESS_ITEM),
            else_=ibis.null("string"),
        )
        log = self.engine.materialise(log.mutate(reason=reason).drop("known_id", "has_title"))
        self._set_aside(log, "interactions", (USER_ID, ITEM_ID, "time_text"), items=items)
        events = log.filter(log["reason"].isnull())
        by_source = {"group_by": events[USER_ID], "order_by": [events["position"], events["sequence"]]}
        events = events.mutate(ibis.row_number().over(**by_source).cast("int64").name(ORDER))
        return events.select(USER_ID, ITEM_ID, TIMESTAMP, RATING, ORDER)

    def _set_aside(
        self, table: Any, what: str, shown: Sequence[str], *, lenient: set[str] | None = None, items: Any = None
    ) -> None:
        """Keep the rows that have a reason; refuse the table where one reason holds of most rows."""
        bad = table.filter(table["reason"].notnull()).order_by("sequence")
        parts = [_field_text(name, bad[name]) for name in bad.columns if name in _SHOWN_FIELDS]
        text = functools.reduce(operator.add, parts)
        rows = self.engine.to_arrow(bad.select("file", "line", "reason", row=text))
        if not rows.num_rows:
            return
        if self.rules.strict:
            raise DataError(_describe_first(rows))
        total = self._value(table.count())
        for count in rows.group_by("reason").aggregate([([], "count_all")]).to_pylist():
            if count["count_all"] * 2 > total and count["reason"] not in (lenient or set()):
                raise DataError(self._explain(table, what, count["reason"], count["count_all"], total, shown, items))
        self.rejected.append(rows)

    def _set_aside_malformed(self, what: str, tables: SourceTables, num_rows: int) -> None:
        """Keep the rows that could not be taken apart; refuse the table where they are most of it."""
        found = [self.engine.to_arrow(table.order_by("line")) for name, table in tables.malformed if name == what]
        rows = pa.concat_tables([_none_rejected(), *(table.cast(_REJECTED_SCHEMA) for table in found)])
        if not rows.num_rows:
            return
        if self.rules.strict:
            raise DataError(_describe_first(rows))
        if rows.num_rows > num_rows:
            first = rows.slice(0, 1).to_pylist()[0]
            raise DataError(
                f"{first['file']}: {rows.num_rows:,} of {rows.num_rows + num_rows:,} rows of the {what} of domain "
                f"{self.domain!r} cannot be taken apart into the fields of the header, as line {first['line']} "
                f"({first['reason']}): {first['row']!r}. Is the separator right, and are fields that hold it in "
                "quotes? Set separator=... and quote=..."
            )
        self.rejected.append(rows)

    def _explain(
        self, table: Any, what: str, reason: str, count: int, total: int, shown: Sequence[str], items: Any
    ) -> str:
        """Why most rows of a table cannot be used, with examples and what to do."""
        bad = table.filter(table["reason"] == reason).order_by("sequence")
        examples = self.engine.to_arrow(bad.select("file", "line", *shown).head(3)).to_pylist()
        head = (
            f"{examples[0]['file']}: {count:,} of {total:,} rows of the {what} of domain {self.domain!r} cannot be used"
        )
        if reason == BAD_TIME:
            values = ", ".join(repr(row["time_text"]) for row in examples)
            return (
                f"{head}, because their timestamp cannot be read: {values}. Accepted are seconds or milliseconds since "
                "1970 (timestamps=seconds, milliseconds), ISO dates as 2014-07-23 or 2014-07-23T18:00:00 "
                "(timestamps=iso), or the order of rows alone (timestamps=order)"
            )
        if reason == UNKNOWN_ITEM:
            values = ", ".join(repr(row[ITEM_ID]) for row in examples)
            good = items.filter(items["reason"].isnull()).order_by("sequence").select(ITEM_ID).head(3)
            known = self.engine.to_arrow(good)[ITEM_ID].to_pylist()
            return (
                f"{head}, because the items table has no such item: {values}. It has "
                f"{', '.join(map(repr, known))}: are the right columns mapped to item_id in both?"
            )
        if reason in (NO_TITLE, TITLELESS_ITEM):
            return (
                f"{head}, because {'they have' if what == 'items' else 'their items have'} no title with a word in it "
                f"({', '.join(repr(row[ITEM_ID]) for row in examples)}). Titles are what a language model reads: map "
                "the column that holds them with columns.title=COLUMN"
            )
        column = USER_ID if reason == NO_USER else ITEM_ID
        lines = ", ".join(str(row["line"]) for row in examples)
        return (
            f"{head}, because {column} is empty (lines {lines}). Is the right column mapped: columns.{column}=COLUMN?"
        )

    # ---- rules -------------------------------------------------------------------------------------------------------

    def _apply_rules(self, events: Any) -> Any:
        import ibis

        rules = self.rules
        if rules.tie_order == "shuffle":
            key = ibis.literal(f"{rules.seed}\x1f{self.source.platform}\x1f{self.domain}\x1f")
            for name in (USER_ID, ITEM_ID, ORDER):
                key = key + events[name].cast("string") + "\x1f"
            events = events.mutate(key.hexdigest("md5").substr(0, 8).name(TIE))
        events = self.engine.materialise(events)
        self._count("usable", events)
        if rules.deduplicate:
            same = {"group_by": [USER_ID, ITEM_ID, TIMESTAMP], "order_by": ORDER}
            first = events.mutate(place=ibis.row_number().over(**same))
            events = self._replace(events, first.filter(first["place"] == 0).drop("place"))
            self._count("without exact duplicates", events)
        size = self._value(events.count())
        num_repeats = num_outside = 0
        while size:
            before = size
            if rules.drop_consecutive_repeats:
                window = {"group_by": events[USER_ID], "order_by": [events[name] for name in self._event_order]}
                previous = events.mutate(previous=events[ITEM_ID].lag().over(**window))
                kept = previous.filter(previous["previous"].isnull() | (previous["previous"] != previous[ITEM_ID]))
                events = self._replace(events, kept.drop("previous"))
                num_repeats += size - (size := self._value(events.count()))
            start = size
            for name, minimum in ((USER_ID, rules.min_user_events), (ITEM_ID, rules.min_item_events)):
                if minimum > 1:
                    counted = events.mutate(size=events.count().over(group_by=events[name]))
                    events = self._replace(events, counted.filter(counted["size"] >= minimum).drop("size"))
            size = self._value(events.count())
            num_outside += start - size
            if size == before:
                break
        if rules.drop_consecutive_repeats or rules.has_core:
            self._count("without consecutive repeats, with enough events", events)
            self.counts[-1] |= {"consecutive_repeats": num_repeats, "too_few_events": num_outside}
        if not size:
            steps = "; ".join(f"{step['rule']}: {step['events']:,} events" for step in self.counts)
            raise DataError(
                f"nothing is left of domain {self.domain!r} ({steps}): lower the minimum number of events of a "
                f"user ({rules.min_user_events}) and of an item ({rules.min_item_events}): k_core in `cprec prepare`"
            )
        return events

    @property
    def _event_order(self) -> list[str]:
        """A user's events: by time, then by the chosen order of ties, and at last as in the source."""
        return [TIMESTAMP, *{"source": [], "item_id": [ITEM_ID], "shuffle": [TIE]}[self.rules.tie_order], ORDER]

    def _replace(self, old: Any, expression: Any) -> Any:
        new = self.engine.materialise(expression)
        self.engine.discard(old)
        return new

    # ---- counting and writing ----------------------------------------------------------------------------------------

    def _count(self, rule: str, events: Any) -> None:
        sizes = {"events": events.count(), "users": events[USER_ID].nunique(), "items": events[ITEM_ID].nunique()}
        self.counts.append({"rule": rule, **self.engine.to_arrow(events.aggregate(**sizes)).to_pylist()[0]})

    def _value(self, scalar: Any) -> int:
        return int(self.engine.value(scalar))

    def _write(self, items: Any, events: Any) -> int:
        """Write both tables and return the number of items."""
        kept = items.filter(items["reason"].isnull())
        if self.rules.has_core:
            kept = kept.semi_join(events, ITEM_ID)
        texts = {TITLE: kept["clean"], BRAND: kept["clean_brand"], CATEGORIES: kept["clean_categories"]}
        kept = kept.select(ITEM_ID, **texts, description=kept[DESCRIPTION], price=kept[PRICE]).order_by(ITEM_ID)
        part = Path(f"domain={self.domain}", "part-0.parquet")
        self.engine.write_parquet(kept, self.folder / "items" / part)
        self.engine.write_parquet(events.order_by(USER_ID, *self._event_order), self.folder / "interactions" / part)
        return int(pq.read_metadata(self.folder / "items" / part).num_rows)


def _is_blank(column: Any) -> Any:
    return column.isnull() | (column.strip() == "")


_SHOWN_FIELDS = (USER_ID, ITEM_ID, "time_text", RATING, TITLE, BRAND, CATEGORIES, DESCRIPTION, PRICE)


def _field_text(name: str, column: Any) -> Any:
    """`name=value; ` for a row set aside; nothing for a field that is absent."""
    import ibis

    label = TIMESTAMP if name == "time_text" else name
    return ibis.coalesce(ibis.literal(f"{label}=") + column.cast("string") + "; ", "")


def _describe_first(rows: pa.Table) -> str:
    row = rows.slice(0, 1).to_pylist()[0]
    return f"{row['file']}, line {row['line']}: {row['reason']}: {row['row']} (strict stops at the first bad row)"


def _none_rejected() -> pa.Table:
    return _REJECTED_SCHEMA.empty_table()


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


# ---- reading back ----------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `dataset.json` holds. Raises DataError where it is missing or of another version."""
    path = Path(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no data folder: there is no {MANIFEST} in it; run `cprec prepare` first"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the data again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: prepare the data again"
        )
    return dict(manifest)


def read_domains(folder: str | Path) -> dict[str, DomainInfo]:
    """What is known of each domain of a data folder."""
    domains = read_manifest(folder)["domains"]
    return {name: DomainInfo(name, about["platform"], about["has_times"]) for name, about in sorted(domains.items())}


def read_dataset(folder: str | Path) -> tuple[Catalogue, Interactions, dict[str, DomainInfo]]:
    """Catalogue, interactions and domains of a data folder."""
    catalogue, interactions, domains, _ = _read(Path(folder))
    return catalogue, interactions, domains


def read_split(folder: str | Path) -> Split:
    """The split that `write_split` put into a data folder. Raises DataError where there is none."""
    spec = read_manifest(folder).get("split")
    catalogue, interactions, domains, part = _read(Path(folder))
    if spec is None or part is None:
        raise DataError(f"{folder} has no split yet: run `cprec prepare` to its end")
    return Split(catalogue, interactions, part, SplitSpec(**spec), domains)


def write_split(folder: str | Path, split: Split) -> None:
    """Add the column `split` to the interactions of a data folder, and the split's parameters to `dataset.json`.

    `split` must be made from what `read_dataset` gives for this folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    names = pa.array(SPLITS)
    event_domain = split.catalogue.domain[split.interactions.item]
    for index, domain in enumerate(split.catalogue.domains):
        # Events of one domain stand in the order of the file: both are sorted by user, time and tie order.
        part = names.take(pa.array(split.part[event_domain == index]))
        path = folder / "interactions" / f"domain={domain}" / "part-0.parquet"
        table = read_parts(path.parent)
        if SPLIT in table.column_names:
            table = table.drop_columns([SPLIT])
        aside = path.with_suffix(".tmp")
        pq.write_table(table.append_column(SPLIT, part), aside, compression="zstd")
        aside.replace(path)
    manifest["split"] = asdict(split.spec)
    aside = folder / f"{MANIFEST}.tmp"
    aside.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(folder / MANIFEST)


def _read(folder: Path) -> tuple[Catalogue, Interactions, dict[str, DomainInfo], np.ndarray | None]:
    """Catalogue, interactions, domains, and the part of each event where there is a split."""
    domains = read_domains(folder)
    catalogue = Catalogue.read(folder)
    if set(catalogue.domains) != set(domains):
        raise DataError(
            f"{folder}: {MANIFEST} names the domains {', '.join(domains)}, but items has {', '.join(catalogue.domains)}"
        )
    tables = [read_parts(folder / "interactions" / f"domain={name}") for name in catalogue.domains]
    platforms = tuple(sorted({info.platform for info in domains.values()}))
    user_platform, user_id, user = _number_users(
        platforms, [platforms.index(domains[name].platform) for name in catalogue.domains], tables
    )
    item = np.concatenate(
        [_item_rows(catalogue, name, table) for name, table in zip(catalogue.domains, tables, strict=True)]
    )
    timestamp = _column(tables, TIMESTAMP, pa.int64()).to_numpy()
    order = _event_order(read_manifest(folder)["rules"]["tie_order"], catalogue, tables, user, item, timestamp)
    interactions = Interactions(
        platforms=platforms,
        user_platform=user_platform,
        user_id=user_id,
        user=user[order],
        item=item[order],
        timestamp=timestamp[order],
        rating=_column(tables, RATING, pa.float64()).fill_null(float("nan")).to_numpy()[order],
    )
    part = None
    if all(SPLIT in table.column_names for table in tables):
        part = pc.index_in(_column(tables, SPLIT, pa.string()), pa.array(SPLITS)).to_numpy()[order].astype(np.int8)
    return catalogue, interactions, domains, part


def _number_users(
    platforms: Sequence[str], platform_of: Sequence[int], tables: Sequence[pa.Table]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users sorted by (platform, user id): their platform, their id, and the user of each event, table after table."""
    platform, ids, rows = [], [], {}
    start = 0
    for number in range(len(platforms)):
        columns = {i: t[USER_ID].cast(pa.string()) for i, t in enumerate(tables) if platform_of[i] == number}
        known = pc.unique(pa.chunked_array([pc.unique(column) for column in columns.values()]))
        known = known.take(pc.array_sort_indices(known))
        for index, column in columns.items():
            rows[index] = pc.index_in(column, known).to_numpy().astype(np.int64) + start
        platform.append(np.full(len(known), number, dtype=np.int16))
        ids.append(known.to_numpy(zero_copy_only=False).astype(object))
        start += len(known)
    return np.concatenate(platform), np.concatenate(ids), np.concatenate([rows[index] for index in sorted(rows)])


def _event_order(
    tie_order: str,
    catalogue: Catalogue,
    tables: Sequence[pa.Table],
    user: np.ndarray,
    item: np.ndarray,
    timestamp: np.ndarray,
) -> np.ndarray:
    """Events by (user, time, tie order), as rows of the tables put one after the other.

    Within a domain that is the order of its table. Events of one time in two domains are ordered by item id or by the
    shuffle where that is the tie order; no source tells their order, so with source order the domain's name decides.
    """
    keys = [user, timestamp]
    if tie_order == "item_id":
        keys.append(np.unique(catalogue.item_id, return_inverse=True)[1][item])
    elif tie_order == "shuffle":
        digits = np.frombuffer("".join(_column(tables, TIE, pa.string()).to_pylist()).encode(), dtype=np.uint8)
        values = (digits & 15) + 9 * (digits >> 6)  # hexadecimal digits: 0-9 are 0x30-0x39, a-f are 0x61-0x66
        keys.append(values.reshape(-1, 8).astype(np.int64) @ (16 ** np.arange(7, -1, -1)))
    order = stable_order(*keys)
    of_table = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])[order]
    for index, name in enumerate(catalogue.domains):
        if not (np.diff(order[of_table == index]) > 0).all():
            raise DataError(f"the interactions of domain {name!r} are not sorted by user, time and ties; prepare again")
    return order


def _item_rows(catalogue: Catalogue, domain: str, table: pa.Table) -> np.ndarray:
    """The catalogue row of each event."""
    rows = catalogue.rows_of(domain)
    found = pc.index_in(table[ITEM_ID].cast(pa.string()), pa.array(catalogue.item_id[rows], pa.string()))
    if found.null_count:
        raise DataError(
            f"the interactions of domain {domain!r} hold items that are not in its catalogue; prepare again"
        )
    return found.to_numpy().astype(np.int64) + rows[0]


def _column(tables: Sequence[pa.Table], name: str, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for table in tables for chunk in table[name].cast(kind).chunks], kind)
