"""Lists for a file of histories: how they are made, found again after the file was mended, and written.

Rows and events that cannot be used are left out, counted, and listed in `OUTPUT.rejected.csv`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import UnknownItemError
from cprec.files import whole_file
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.serve.engine import Baseline, Recommends, list_query, reads_nothing
from cprec.serve.histories import HISTORY, USER, Row

COLUMNS = (USER, "rank", "item_id", "title", "score", "source")
LISTS = pa.schema([(name, {"rank": pa.int64(), "score": pa.float64()}.get(name, pa.string())) for name in COLUMNS])
"""The columns of the output, and their types in Parquet."""
REJECTED_COLUMNS = ("file", "line", USER, "item_id", "reason")
MODEL, POPULARITY = "model", "popularity"
"""The sources of a list, in the column `source`."""
UNKNOWN_ITEM = "item is not in the catalogue"
AMBIGUOUS = "title is spelt otherwise, and may mean several items"
NO_EVENT = "no event of the history can be read, and the model has no popularity.parquet"
NOTHING_LEFT = "no item is left outside the history"
ROW_GROUP = 100_000
"""Rows of a Parquet output that are held in memory."""

Best = list[tuple[str, float]]
"""The items of a list with their scores, best first."""


@dataclass
class Answered:
    """What some rows of a file of histories came to."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the output, with the key of their list beside them (HISTORY)."""
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    """What was left out: line, user, item or row, reason."""
    counts: Counter[str] = field(default_factory=Counter)
    """Users by the source of their list, lists that are `shorter` than asked for, and events `known` and `unknown`."""
    first_unknown: str = ""
    """The first event that the catalogue does not know, in words."""


class Answers:
    """Turns the rows of a file of histories into the rows of a file of lists."""

    def __init__(
        self,
        recommender: Recommends,
        popular: Baseline | None,
        earlier: EarlierLists,
        *,
        domain: str,
        k: int,
        exclude_seen: bool,
    ) -> None:
        self._recommender, self._earlier = recommender, earlier
        self._domain, self._k, self._exclude_seen = domain, k, exclude_seen
        self._popular: Best | None = None
        if popular is not None:
            query = list_query(recommender, domain, ())
            self._popular = _best(popular.rank([query], k)[0], k)
        self._known: dict[str, Item | str] = {}

    def of(self, rows: Sequence[Row]) -> Answered:
        """The lists of some rows, which are ranked together, equal histories once."""
        out = Answered()
        users: list[tuple[Row, tuple[Item, ...]]] = []
        self._known.clear()
        for row in rows:
            if row.user is None:
                out.rejected.append((row.line, "", *row.left_out[0]))
                continue
            out.rejected += ((row.line, row.user, text, reason) for text, reason in row.left_out)
            users.append((row, self._items(row, out)))
        # Rank the users whose history the model can read; the others get the popular items.
        queries = [
            list_query(self._recommender, self._domain, items, exclude_seen=self._exclude_seen) for _, items in users
        ]
        by_model = {n: query for n, query in enumerate(queries) if not reads_nothing(self._recommender, query)}
        found = self._ranked(list(by_model.values()))
        for number, (row, _) in enumerate(users):
            key = _key(by_model[number]) if number in by_model else None
            best = self._popular if key is None else found[key]
            if not best:
                out.rejected.append((row.line, row.user or "", "", NO_EVENT if best is None else NOTHING_LEFT))
                continue
            source = POPULARITY if key is None else MODEL
            out.counts[source] += 1
            out.counts["shorter"] += len(best) < self._k
            out.rows += self._rows(row.user, best, source, key)
        return out

    def _items(self, row: Row, out: Answered) -> tuple[Item, ...]:
        found = []
        for text in row.events:
            if text not in self._known:
                self._known[text] = self._item(text)
            item = self._known[text]
            if isinstance(item, Item):
                out.counts["known"] += 1
                found.append(item)
                continue
            out.counts["unknown"] += 1
            out.first_unknown = out.first_unknown or f"{text!r} in line {row.line}"
            out.rejected.append((row.line, row.user or "", text, item))
        return tuple(found)

    def _item(self, text: str) -> Item | str:
        catalogue = self._recommender.catalogue
        try:
            found = catalogue.item_of(self._domain, text) or catalogue.item_of(self._domain, text.strip())
        except UnknownItemError:
            return AMBIGUOUS
        return found or UNKNOWN_ITEM

    def _ranked(self, queries: Sequence[RankingQuery]) -> dict[bytes, Best]:
        """The lists of some queries by their keys; those that no earlier run left are made."""
        wanted = {_key(query): query for query in queries}
        found = self._earlier.find(list(wanted))
        missing = [key for key in wanted if key not in found]
        rankings = self._recommender.rank([wanted[key] for key in missing], self._k) if missing else []
        return found | {key: _best(each, self._k) for key, each in zip(missing, rankings, strict=True)}

    def _rows(self, user: str | None, best: Best, source: str, key: bytes | None) -> Iterator[dict[str, Any]]:
        catalogue = self._recommender.catalogue
        titles = catalogue.title[catalogue.find(self._domain, [item_id for item_id, _ in best])]
        for rank, ((item_id, score), title) in enumerate(zip(best, titles, strict=True), 1):
            yield dict(zip((*COLUMNS, HISTORY), (user, rank, item_id, str(title), score, source, key), strict=True))


def _best(ranking: Ranking, k: int) -> Best:
    return list(zip(ranking.item_ids[:k], ranking.scores[:k], strict=True))


def _key(query: RankingQuery) -> bytes:
    """The key that a list is kept under: a hash of its history."""
    events = [(item.domain, item.item_id) for item in query.history]
    return hashlib.sha256(json.dumps(events).encode()).digest()


class EarlierLists:
    """The lists of an earlier run by the key of their history: an SQLite file, which any number of processes read."""

    def __init__(self, path: Path) -> None:
        # Immutable: no process writes it, so that none needs a lock, which network file systems may lack.
        address = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
        self._file = sqlite3.connect(address, uri=True) if path.exists() else None

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Best]:
        """The lists of these keys, as far as they are there."""
        found: dict[bytes, Best] = {}
        if self._file is not None:
            for key in keys:
                for (best,) in self._file.execute("SELECT best FROM lists WHERE history = ?", (key,)):
                    found[key] = [(item_id, score) for item_id, score in json.loads(best)]
        return found


def gather_lists(path: Path, parts: Iterable[pa.Table]) -> None:
    """Add the lists of parts to the file of earlier lists, all or none."""
    with whole_file(path) as unfinished:
        if path.exists():
            shutil.copyfile(path, unfinished)
        with closing(sqlite3.connect(unfinished)) as file, file:
            file.execute("CREATE TABLE IF NOT EXISTS lists (history BLOB PRIMARY KEY, best TEXT) WITHOUT ROWID")
            for table in parts:
                lists = _lists_of(table)
                file.executemany(
                    "INSERT OR REPLACE INTO lists VALUES (?, ?)", ((key, json.dumps(lists[key])) for key in lists)
                )


def _lists_of(table: pa.Table) -> dict[bytes, Best]:
    found: dict[bytes, Best] = {}
    columns = (table[name].to_pylist() for name in (HISTORY, "rank", "item_id", "score"))
    for key, rank, item_id, score in zip(*columns, strict=True):
        if key is not None:
            if rank == 1:
                found[key] = []  # of several users with this history, the last one's list, which is equal
            found[key].append((item_id, score))
    return found


class UserCount:
    """Counts the users who have had an earlier row. They go to disk where they are many."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("")
        self._file.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY) WITHOUT ROWID")

    def count_repeats(self, users: Sequence[str]) -> int:
        """How many of these users have had an earlier row."""
        names = [(name,) for name in users]
        added = self._file.executemany("INSERT OR IGNORE INTO users VALUES (?)", names).rowcount if names else 0
        return len(names) - added


@contextmanager
def rejected_writer(path: Path) -> Iterator[Callable[[list[list[Any]]], None]]:
    """Give a function that writes rows with the values of REJECTED_COLUMNS as CSV. There is no file without rows."""
    with whole_file(path) as unfinished:
        count = 0
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(REJECTED_COLUMNS)

            def write(rows: list[list[Any]]) -> None:
                nonlocal count
                count += len(rows)
                table.writerows(rows)

            yield write
    if not count:
        path.unlink()


@contextmanager
def list_writer(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Give a function that writes tables with COLUMNS, as CSV, JSONL or Parquet by the name of the file.

    The file appears whole at the end, or not at all.
    """
    with whole_file(path) as unfinished:
        if path.suffix == ".parquet":
            with pq.ParquetWriter(unfinished, LISTS) as groups:
                held: list[pa.Table] = []

                def write(table: pa.Table) -> None:
                    held.append(table)
                    if sum(map(len, held)) >= ROW_GROUP:
                        groups.write_table(pa.concat_tables(held))
                        held.clear()

                yield write
                if held:
                    groups.write_table(pa.concat_tables(held))
            return
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                rows = csv.DictWriter(file, COLUMNS)
                rows.writeheader()
                yield lambda table: rows.writerows(table.to_pylist())
            else:
                yield lambda table: file.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()
                )
