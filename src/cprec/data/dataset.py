"""Canonical tables on disk: their layout, putting a part in order, and reading them back.

    DATA/dataset.json                                  what was read, which rules held, what they left
    DATA/items/domain=D/part-0.parquet                 item_id, title, brand, categories, description, price
    DATA/interactions/domain=D/part-N.parquet          user_id, item_id, timestamp, microsecond, rating, order, split
    DATA/rejected.parquet                              file, line, reason, row

Users are cut into `NUM_SLOTS` slots by a hash of platform and id, and slots into parts, so that part N holds the same
users in every domain. Rows are sorted by slot, platform, user, time and tie order: the parts one after the other are
the same rows in the same order, however many parts there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec
from cprec.data.interactions import Interactions, join_time, stable_order
from cprec.data.splits import Split
from cprec.errors import ConfigError, DataError
from cprec.files import whole_file, write_whole
from cprec.schema import (
    ITEM_ID,
    MICROSECOND,
    ORDER,
    RATING,
    SCHEMA_VERSION,
    SPLIT,
    SPLITS,
    TIMESTAMP,
    USER_ID,
    DomainInfo,
)

MANIFEST = "dataset.json"
POPULARITY = "popularity.parquet"
"""Training events of every item: domain, item_id, num_events. Of a data folder, and of the models made from it."""

NUM_SLOTS = 4096

TIE = "tie"
"""Column of shuffled tie keys, there only where tie_order is shuffle."""


def part_path(folder: Path, table: str, domain: str, part: int) -> Path:
    """The file of a part of `items` or `interactions`; a part without rows has none."""
    return folder / table / f"domain={domain}" / f"part-{part}.parquet"


def slot_of(platform: str, user_id: str) -> int:
    """Where a user stands among `NUM_SLOTS`: the first three hexadecimal digits of MD5(platform, unit separator, id).

    >>> slot_of("shop", "ann")
    3629
    """
    digest = hashlib.md5(f"{platform}\x1f{user_id}".encode(), usedforsecurity=False).digest()
    return digest[0] << 4 | digest[1] >> 4


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The content of `dataset.json`. Raises DataError where it is missing or of another version."""
    path = Path(folder, MANIFEST)
    if not Path(folder).is_dir():
        what = "is no folder" if Path(folder).exists() else "does not exist"
        raise DataError(f"{folder} {what}: give a data folder that `cprec prepare` wrote")
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


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `dataset.json`, whole, in place of the one that is there."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_domains(folder: str | Path) -> dict[str, DomainInfo]:
    """The domains of a data folder by name. Raises DataError for a folder of text, which has none."""
    domains = read_manifest(folder)["domains"]
    if not domains:
        raise DataError(f"{folder} holds text, without users and items: only pre-training reads it, for a base model")
    return {name: DomainInfo(name, about["platform"], about["has_times"]) for name, about in sorted(domains.items())}


def read_catalogue(folder: str | Path) -> Catalogue:
    """The catalogue of a data folder. Raises DataError where it has not the domains of the manifest."""
    domains, catalogue = read_domains(folder), Catalogue.read(folder)
    if set(catalogue.domains) != set(domains):
        raise DataError(
            f"{folder}: {MANIFEST} names the domains {', '.join(domains)}, but items has {', '.join(catalogue.domains)}"
        )
    return catalogue


def read_dataset(folder: str | Path) -> tuple[Catalogue, Interactions, dict[str, DomainInfo]]:
    """Catalogue, interactions and domains of a data folder, in memory as a whole."""
    catalogue = read_catalogue(folder)
    return catalogue, _read_log(Path(folder), catalogue).interactions, read_domains(folder)


def count_events(folder: str | Path, catalogue: Catalogue, domain: str) -> np.ndarray:
    """int64: how many events each item of a domain has, in the order of its rows; a part at a time."""
    ids = catalogue.arrow_ids(domain)
    counts = np.zeros(len(ids), dtype=np.int64)
    for path in part_path(Path(folder), "interactions", domain, 0).parent.glob("part-*.parquet"):
        column = pq.ParquetFile(path, read_dictionary=[ITEM_ID]).read([ITEM_ID])[ITEM_ID]
        found = pc.value_counts(column)
        places = pc.index_in(found.field("values").cast(pa.string()), ids).to_numpy(zero_copy_only=False)
        counts[places] += found.field("counts").to_numpy()
    return counts


def read_split(folder: str | Path, part: int | None = None, catalogue: Catalogue | None = None) -> Split:
    """The split of a data folder, or of one part of it. Raises DataError where there is none.

    `catalogue` is that of the folder where it has been read already.
    """
    spec = read_manifest(folder).get("split")
    log = _read_log(Path(folder), catalogue or read_catalogue(folder), part)
    if spec is None or (log.split is None and len(log.interactions)):
        raise DataError(f"{folder} has no split yet: run `cprec prepare` to its end")
    split = np.zeros(0, dtype=np.int8) if log.split is None else log.split
    return Split(log.catalogue, log.interactions, split, SplitSpec(**spec), read_domains(folder))


def data_folder(folder: str | Path) -> Path:
    """A data folder, or that of a run, whose data folder is `data`. Raises ConfigError for any other, and DataError for
    a folder of text."""
    for found in (Path(folder), Path(folder, "data")):
        if (found / MANIFEST).is_file():
            read_domains(found)
            return found
    raise ConfigError(f"{folder} is not a data folder: give one that `cprec prepare` wrote")


def event_files(folder: str | Path) -> list[str]:
    """The files that `read_split` reads, as paths in the folder: the manifest, each domain's items and its events."""
    tables = [
        path for name in ("items", "interactions") for path in sorted(Path(folder, name).glob("*/part-*.parquet"))
    ]
    return [MANIFEST, *(path.relative_to(folder).as_posix() for path in tables)]


def with_microsecond(events: pa.Table) -> pa.Table:
    """Events or queries with `microsecond`: folders of earlier versions have whole seconds, and no such column."""
    if MICROSECOND in events.column_names:
        return events
    return events.append_column(MICROSECOND, pa.array(np.zeros(events.num_rows, dtype=np.int32)))


def finish_part(
    folder: str | Path,
    part: int,
    split: Callable[[Catalogue, Interactions, dict[str, DomainInfo]], Split] | None = None,
    catalogue: Catalogue | None = None,
) -> Split | None:
    """Put the rows of a part in order, and with `split` say of each event what it is for; the files are replaced.

    `order` becomes the event's place among the user's events of the domain in the order of the source. Returns the
    split. It may be called again, with another split.
    """
    folder = Path(folder)
    log = _read_log(folder, catalogue or read_catalogue(folder), part, is_sorted=False)
    made = split(log.catalogue, log.interactions, read_domains(folder)) if split else None
    names = pa.array(SPLITS)
    starts = np.cumsum([0, *(table.num_rows for table in log.tables)])
    for number, (domain, table) in enumerate(zip(log.catalogue.domains, log.tables, strict=True)):
        of_domain = (log.row >= starts[number]) & (log.row < starts[number + 1])
        if not of_domain.any():
            continue
        table = table.take(pa.array(log.row[of_domain] - starts[number]))
        place = _places(log.interactions.user[of_domain], table[ORDER].to_numpy())
        table = table.set_column(table.column_names.index(ORDER), ORDER, pa.array(place))
        if SPLIT in table.column_names:
            table = table.drop_columns([SPLIT])
        if made is not None:
            table = table.append_column(SPLIT, names.take(pa.array(made.part[of_domain])))
        with whole_file(part_path(folder, "interactions", domain, part)) as unfinished:
            pq.write_table(table, unfinished, compression="zstd")
    return made


def _places(user: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where each event stands among its user's in the order of the source, from 0; `user` never falls."""
    by_source = stable_order(user, order)
    place = np.empty(len(user), dtype=np.int64)
    place[by_source] = np.arange(len(user)) - np.searchsorted(user, user[by_source])
    return place


# ---- the rows of one or all parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Log:
    """The content of the files: the tables of each domain, and their rows in order."""

    catalogue: Catalogue
    interactions: Interactions
    tables: list[pa.Table]
    row: np.ndarray
    """int64[num_events]: each event's row in the tables put one after the other."""
    split: np.ndarray | None
    """int8[num_events], None where the files have no split."""


_COLUMNS = {
    USER_ID: pa.string(),
    ITEM_ID: pa.string(),
    TIMESTAMP: pa.int64(),
    MICROSECOND: pa.int32(),
    RATING: pa.float64(),
    ORDER: pa.int64(),
}


def _read_log(folder: Path, catalogue: Catalogue, part: int | None = None, *, is_sorted: bool = True) -> _Log:
    """The events of a part, or of all; `is_sorted` demands that the files are in order."""
    manifest = read_manifest(folder)
    domains, tie_order = read_domains(folder), manifest["rules"]["tie_order"]
    parts = range(manifest["num_parts"]) if part is None else [part]
    tables = []
    for name in catalogue.domains:
        table = _read_parts(folder, name, parts, has_tie=tie_order == "shuffle")
        if part is None and table.num_rows != manifest["domains"][name]["num_events"]:
            raise DataError(
                f"{folder}: {MANIFEST} says {manifest['domains'][name]['num_events']:,} events of domain {name!r}, but "
                f"its files hold {table.num_rows:,}: one is missing or was changed; prepare the data again"
            )
        tables.append(table)
    platforms = tuple(sorted({info.platform for info in domains.values()}))
    user_platform, user_id, user = _number_users(
        platforms, [platforms.index(domains[name].platform) for name in catalogue.domains], tables
    )
    item, time = [], []
    for name, table in zip(catalogue.domains, tables, strict=True):
        item.append(_item_rows(catalogue, name, table))
        columns = table[TIMESTAMP].to_numpy(), table[MICROSECOND].to_numpy()
        time.append(join_time(*columns, domains[name].has_times))
    row = _event_order(tie_order, catalogue, tables, user, np.concatenate(item))
    if is_sorted:
        _check_sorted(folder, catalogue, tables, row)
    interactions = Interactions(
        platforms=platforms,
        user_platform=user_platform,
        user_id=user_id,
        user=user[row],
        item=np.concatenate(item)[row],
        time=np.concatenate(time)[row],
        rating=_column(tables, RATING).fill_null(float("nan")).to_numpy()[row],
    )
    return _Log(catalogue, interactions, tables, row, _split_codes(tables, row))


def _split_codes(tables: Sequence[pa.Table], row: np.ndarray) -> np.ndarray | None:
    """The part that each event plays: int8[num_events], in the order of `row`; None where the files have no split."""
    filled = [table for table in tables if table.num_rows]
    if not filled or any(SPLIT not in table.column_names for table in filled):
        return None
    return pc.index_in(_column(filled, SPLIT), pa.array(SPLITS)).to_numpy()[row].astype(np.int8)


def _read_parts(folder: Path, domain: str, parts: Sequence[int], *, has_tie: bool) -> pa.Table:
    """The rows of some parts of a domain's interactions, one part after the other."""
    columns = _COLUMNS | ({TIE: pa.string()} if has_tie else {})
    found = []
    for part in parts:
        path = part_path(folder, "interactions", domain, part)
        if not path.exists():
            continue  # no user of this part has events in this domain
        try:
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} cannot be read: {error}; prepare the data again") from None
        table = with_microsecond(table)
        names = [*columns, *([SPLIT] if SPLIT in table.column_names else [])]
        schema = pa.schema([(name, columns.get(name, pa.string())) for name in names])
        found.append(table.select(names).cast(schema))
    return pa.concat_tables(found) if found else pa.schema(list(columns.items())).empty_table()


def _number_users(
    platforms: Sequence[str], platform_of: Sequence[int], tables: Sequence[pa.Table]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users by (slot, platform, user id): their platform, their id, and the user of each event, table after table."""
    slots, platform, ids, rows = [], [], [], {}
    start = 0
    for number, name in enumerate(platforms):
        columns = {i: t[USER_ID] for i, t in enumerate(tables) if platform_of[i] == number}
        known = pc.unique(pa.chunked_array([pc.unique(column) for column in columns.values()], pa.string()))
        known = known.take(pc.array_sort_indices(known))
        for index, column in columns.items():
            rows[index] = pc.index_in(column, known).to_numpy().astype(np.int64) + start
        platform.append(np.full(len(known), number, dtype=np.int16))
        ids.append(known.to_numpy(zero_copy_only=False).astype(object))
        slots.append(np.array([slot_of(name, user) for user in ids[-1]], dtype=np.int64))
        start += len(known)
    # Users of one slot are in order by platform and id already, and a stable sort keeps that; `place` is the new row of
    # each user.
    order = np.argsort(np.concatenate(slots), kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    user = place[np.concatenate([rows[index] for index in sorted(rows)])]
    return np.concatenate(platform)[order], np.concatenate(ids)[order], user


def _event_order(
    tie_order: str, catalogue: Catalogue, tables: Sequence[pa.Table], user: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """Events by (user, time, tie order), as rows of the tables put one after the other.

    Events of one time in two domains are ordered by item id or by the shuffle where that is the tie order; no source
    tells their order, so with source order the domain's name decides.
    """
    keys = [user, _column(tables, TIMESTAMP).to_numpy(), _column(tables, MICROSECOND).to_numpy()]
    if tie_order == "item_id":
        keys.append(catalogue.item_id_rank[item])
    elif tie_order == "shuffle":
        # The tie keys are eight hexadecimal digits each. In ASCII 0-9 are 0x30-0x39 and a-f are 0x61-0x66: the lower
        # four bits are the value, or for a letter the value less 9.
        digits = np.frombuffer("".join(_column(tables, TIE).to_pylist()).encode(), dtype=np.uint8)
        values = (digits & 15) + 9 * (digits >> 6)
        keys.append(values.reshape(-1, 8).astype(np.int64) @ (16 ** np.arange(7, -1, -1)))
    keys += [catalogue.domain[item].astype(np.int64), _column(tables, ORDER).to_numpy()]
    return stable_order(*keys)


def _check_sorted(folder: Path, catalogue: Catalogue, tables: Sequence[pa.Table], row: np.ndarray) -> None:
    """Raise DataError unless the events of each domain stand in the order of its files."""
    starts = np.cumsum([0, *(table.num_rows for table in tables)])
    for number, name in enumerate(catalogue.domains):
        rows = row[(row >= starts[number]) & (row < starts[number + 1])]
        if not (np.diff(rows) > 0).all():
            raise DataError(
                f"{folder}: the interactions of domain {name!r} are not sorted by user, time and ties; prepare again"
            )


def _item_rows(catalogue: Catalogue, domain: str, table: pa.Table) -> np.ndarray:
    """The catalogue row of each event."""
    found = pc.index_in(table[ITEM_ID], catalogue.arrow_ids(domain))
    if found.null_count:
        raise DataError(
            f"the interactions of domain {domain!r} hold items that are not in its catalogue; prepare again"
        )
    return found.to_numpy().astype(np.int64) + int(catalogue.rows_of(domain)[0])


def _column(tables: Sequence[pa.Table], name: str) -> pa.ChunkedArray:
    kind = tables[0].schema.field(name).type
    return pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], kind)
