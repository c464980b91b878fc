"""Lists for a file of histories: how they are made, kept between runs, and written.

Rows and events that cannot be used are left out, counted, and listed in `OUTPUT.rejected.csv`. Each list is kept in
`OUTPUT.lists` under a hash of its history, for one model and its settings. So the same command after a kill, or after
the file was mended, ranks only the users whose lists are missing.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cprec import __version__
from cprec.errors import DataError, UnknownItemError
from cprec.files import aside, publish, whole_file
from cprec.provenance import ITEM_HEAD, TOKENIZER, WEIGHTS, FileHashes, model_hashes
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.serve.engine import Baseline, Recommends, list_query, reads_nothing
from cprec.serve.histories import USER, Row

COLUMNS = (USER, "rank", "item_id", "title", "score", "source")
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


class Answers:
    """Turns the rows of a file of histories into the rows of a file of lists, and counts both."""

    def __init__(
        self,
        recommender: Recommends,
        popular: Baseline | None,
        lists: ListStore,
        rejected: Rejected,
        *,
        domain: str,
        k: int,
        exclude_seen: bool,
    ) -> None:
        self._recommender, self._lists, self._rejected = recommender, lists, rejected
        self._domain, self._k, self._exclude_seen = domain, k, exclude_seen
        self._popular: Best | None = None
        if popular is not None:
            query = list_query(recommender, domain, ())
            self._popular = _best(popular.rank([query], k)[0], k)
        self._counts: Counter[str] = Counter()
        self._known: dict[str, Item | str] = {}

    def of(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The rows of the output for some rows of the input."""
        users: list[tuple[Row, tuple[Item, ...]]] = []
        self._known.clear()
        for row in rows:
            if row.user is None:
                self._rejected.add(row.line, "", *row.left_out[0])
                continue
            for text, reason in row.left_out:
                self._rejected.add(row.line, row.user, text, reason)
            users.append((row, self._items(row)))
        # Rank the users whose history the model can read; the others get the popular items.
        queries = [
            list_query(self._recommender, self._domain, items, exclude_seen=self._exclude_seen) for _, items in users
        ]
        by_model = {n: query for n, query in enumerate(queries) if not reads_nothing(self._recommender, query)}
        found = self._ranked(list(by_model.values()))
        self._counts["repeats"] += self._lists.count_repeats(row.user for row, _ in users)
        out: list[dict[str, Any]] = []
        for number, (row, _) in enumerate(users):
            is_model = number in by_model
            best = found[_key(by_model[number])] if is_model else self._popular
            if not best:
                self._rejected.add(row.line, row.user or "", "", NO_EVENT if best is None else NOTHING_LEFT)
                continue
            self._counts[MODEL if is_model else POPULARITY] += 1
            self._counts["shorter"] += len(best) < self._k
            out += self._rows(row.user, best, MODEL if is_model else POPULARITY)
        return out

    def require_some(self) -> None:
        """Raise DataError if the file has events and the catalogue knows none of them."""
        if self._counts["unknown"] and not self._counts["known"]:
            raise DataError(
                f"{self._rejected.source}: none of its {self._counts['unknown']:,} events is an item of "
                f"{', '.join(self._recommender.catalogue.domains)}, as {self._first_unknown}. Is it the right file, "
                "and do its histories hold the ids or titles of this model's catalogue?"
            )

    def summary(self) -> str:
        """Describe the output in words."""
        model, popular = self._counts[MODEL], self._counts[POPULARITY]
        told = f"up to {self._k} recommendations for each of {model + popular:,} users"
        if popular:
            told += f", {popular:,} of them popular items, for want of a history"
        if self._counts["shorter"]:
            told += f"; shorter lists, since fewer items are left: {self._counts['shorter']:,}"
        if self._counts["repeats"]:
            told += f"; rows with the {USER} of a row before, and a list of their own: {self._counts['repeats']:,}"
        return told

    def _items(self, row: Row) -> tuple[Item, ...]:
        found = []
        for text in row.events:
            if text not in self._known:
                self._known[text] = self._item(text)
            item = self._known[text]
            if isinstance(item, Item):
                self._counts["known"] += 1
                found.append(item)
                continue
            self._counts["unknown"] += 1
            if self._counts["unknown"] == 1:
                self._first_unknown = f"{text!r} in line {row.line}"
            self._rejected.add(row.line, row.user or "", text, item)
        return tuple(found)

    def _item(self, text: str) -> Item | str:
        catalogue = self._recommender.catalogue
        try:
            found = catalogue.item_of(self._domain, text) or catalogue.item_of(self._domain, text.strip())
        except UnknownItemError:
            return AMBIGUOUS
        return found or UNKNOWN_ITEM

    def _ranked(self, queries: Sequence[RankingQuery]) -> dict[bytes, Best]:
        """The lists of some queries by their keys; those that are missing are made and kept."""
        wanted = {_key(query): query for query in queries}
        found = self._lists.find(list(wanted))
        missing = [key for key in wanted if key not in found]
        rankings = self._recommender.rank([wanted[key] for key in missing], self._k) if missing else []
        made = {key: _best(each, self._k) for key, each in zip(missing, rankings, strict=True)}
        self._lists.keep(made)
        return found | made

    def _rows(self, user: str | None, best: Sequence[tuple[str, float]], source: str) -> Iterator[dict[str, Any]]:
        catalogue = self._recommender.catalogue
        titles = catalogue.title[catalogue.find(self._domain, [item_id for item_id, _ in best])]
        for rank, ((item_id, score), title) in enumerate(zip(best, titles, strict=True), 1):
            yield dict(zip(COLUMNS, (user, rank, item_id, str(title), score, source), strict=True))


def _best(ranking: Ranking, k: int) -> Best:
    return list(zip(ranking.item_ids[:k], ranking.scores[:k], strict=True))


def _key(query: RankingQuery) -> bytes:
    """The key that a list is kept under: a hash of its history."""
    events = [(item.domain, item.item_id) for item in query.history]
    return hashlib.sha256(json.dumps(events).encode()).digest()


def made_of(model: str, domain: str, k: int, exclude_seen: bool) -> str:
    """A hash of everything but the history that decides a list: the files of the model folder, and the settings."""
    hashes = FileHashes(model)
    patterns = (*WEIGHTS, *TOKENIZER, *ITEM_HEAD, "cprec.json", "blend.json", "items/*/*.parquet")
    files = model_hashes(model, patterns, hashes)
    hashes.save()
    about = [__version__, domain, k, exclude_seen, files]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class ListStore:
    """A file of the lists that were made, by the hash of their history. Lists of another model or of other settings,
    which `made_of` tells, are dropped."""

    def __init__(self, path: Path, made_of: str) -> None:
        self.path = path
        self.is_kept = True
        """Whether the file stays for another run."""
        try:
            self._open(made_of)
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{path} cannot be used ({error}): wait if another command writes the same output, or remove it to "
                "rank all users anew"
            ) from None

    def _open(self, made_of: str) -> None:
        # Another command that writes the same output is refused at once, not waited for.
        self._file = sqlite3.connect(self.path, timeout=0)
        self._file.execute("PRAGMA locking_mode = EXCLUSIVE")  # a lock is kept until the file is closed
        self._file.execute("BEGIN EXCLUSIVE")
        self._file.execute("CREATE TABLE IF NOT EXISTS made_of (sha256 TEXT)")
        self._file.execute("CREATE TABLE IF NOT EXISTS lists (history BLOB PRIMARY KEY, best TEXT) WITHOUT ROWID")
        self._file.execute("CREATE TEMP TABLE users (user_id TEXT PRIMARY KEY) WITHOUT ROWID")
        if self._file.execute("SELECT sha256 FROM made_of").fetchall() != [(made_of,)]:
            self._file.execute("DELETE FROM lists")
            self._file.execute("DELETE FROM made_of")
            self._file.execute("INSERT INTO made_of VALUES (?)", (made_of,))
        self._file.commit()

    def __enter__(self) -> ListStore:
        return self

    def __exit__(self, *_: object) -> None:
        holds_some = self._file.execute("SELECT count(*) FROM lists").fetchone() != (0,)
        self._file.close()
        if not (self.is_kept and holds_some):
            self.path.unlink()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Best]:
        """The lists of these keys, as far as they are kept."""
        found = {}
        for key in keys:
            for (best,) in self._file.execute("SELECT best FROM lists WHERE history = ?", (key,)):
                found[key] = [(item_id, score) for item_id, score in json.loads(best)]
        return found

    def keep(self, made: dict[bytes, Best]) -> None:
        """Keep lists: all of them or, after a kill, none."""
        with self._file:
            self._file.executemany("INSERT INTO lists VALUES (?, ?)", ((key, json.dumps(made[key])) for key in made))

    def count_repeats(self, users: Iterator[str | None]) -> int:
        """How many of these users have had an earlier row."""
        names = [(name,) for name in users]
        added = self._file.executemany("INSERT OR IGNORE INTO users VALUES (?)", names).rowcount if names else 0
        return len(names) - added


class Rejected:
    """The file of everything that was left out; there is none if nothing was."""

    def __init__(self, path: Path, source: Path, strict: bool) -> None:
        self.path, self.source, self._strict = path, source, strict
        self.counts: Counter[str] = Counter()
        self._aside = aside(path)

    def __enter__(self) -> Rejected:
        self._file = open(self._aside, "w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(REJECTED_COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def add(self, line: int, user: str, item: str, reason: str) -> None:
        """Note a row or event that is left out. Raises DataError if strict."""
        if self._strict:
            who = f", user {user!r}" if user else ""
            what = f": {item!r}" if item else ""
            raise DataError(f"{self.source}, line {line}{who}: {reason}{what} (strict stops at the first)")
        self.counts[reason] += 1
        self._rows.writerow((self.source, line, user, item, reason))

    def finish(self) -> None:
        """Give the file its name."""
        self._file.close()
        if self.counts:
            publish(self._aside, self.path)
        else:
            self.path.unlink(missing_ok=True)


@contextmanager
def list_writer(path: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Give a function that writes rows with the values of COLUMNS, as CSV, JSONL or Parquet by the name of the file.

    The file appears whole at the end, or not at all.
    """
    with whole_file(path) as unfinished:
        if path.suffix == ".parquet":
            types = {"rank": pa.int64(), "score": pa.float64()}
            schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
            held: list[dict[str, Any]] = []
            with pq.ParquetWriter(unfinished, schema) as groups:

                def write(rows: list[dict[str, Any]]) -> None:
                    held.extend(rows)
                    if len(held) >= ROW_GROUP:
                        groups.write_table(pa.Table.from_pylist(held, schema))
                        held.clear()

                yield write
                if held:
                    groups.write_table(pa.Table.from_pylist(held, schema))
            return
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                table = csv.DictWriter(file, COLUMNS)
                table.writeheader()
                yield table.writerows
            else:
                yield lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
