"""A file of histories in, a file of lists out.

A file is read, ranked and written `USERS_AT_ONCE` users at a time, so memory does not grow with it. What cannot be used
is left out, counted, and listed in `OUTPUT.rejected.csv`. Each list is kept in `OUTPUT.lists` under what it was made of
(the history, the model, the settings), so the same command after a kill, or after the file was mended, ranks only the
users whose lists are not there. The output appears when it is whole.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cprec import __version__
from cprec.errors import ConfigError, DataError, UnknownItemError
from cprec.provenance import TOKENIZER, WEIGHTS, FileHashes, model_hashes
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.serve.config import RecommendConfig
from cprec.serve.engine import Baseline, Engine, reads_nothing
from cprec.serve.histories import ROWS_AT_ONCE, USER, Row, count_rows, read_histories

T = TypeVar("T")

COLUMNS = (USER, "rank", "item_id", "title", "score", "source")
REJECTED_COLUMNS = ("file", "line", USER, "item_id", "reason")
MODEL, POPULARITY = "model", "popularity"
"""Where a list is from: column `source`."""
UNKNOWN_ITEM = "item is not in the catalogue"
AMBIGUOUS = "title is spelt otherwise, and may mean several items"
NO_EVENT = "no event of the history can be read, and the model has no popularity.parquet"
NOTHING_LEFT = "no item is left outside the history"
USERS_AT_ONCE = ROWS_AT_ONCE
"""Users of a batch: what a kill may cost."""
ROW_GROUP = 100_000
"""Rows of a Parquet output that are in memory."""


class Recommends(Engine, Protocol):
    """What this stage needs of a recommender."""

    def recommend(
        self, history: Sequence[Any], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> Sequence[Any]: ...


def answer_file(config: RecommendConfig, recommender: Recommends, popular: Baseline | None) -> None:
    """See `recommend`."""
    from cprec.progress import say, track

    assert config.input and config.output
    source, output = Path(config.input), Path(config.output)
    domain = config.domain or recommender.domain
    if domain is None or domain not in recommender.catalogue.domains:
        raise ConfigError(f"domain={domain!r}: name one of {', '.join(recommender.catalogue.domains)}")
    num_rows = count_rows(source)
    if (old := _beside(output, ".parts")).is_dir():
        say(f"{old} is of an earlier version, and is not read: remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        lists = opened.enter_context(_Lists(_beside(output, ".lists"), _made_of(config, domain)))
        rejected = opened.enter_context(_Rejected(_beside(output, ".rejected.csv"), source, config.strict))
        writer = opened.enter_context(_Writer(output))
        progress = opened.enter_context(track(num_rows, "recommending", unit="users"))
        answers = _Answers(config, domain, recommender, popular, lists, rejected)
        for rows in _chunks(read_histories(source), USERS_AT_ONCE):
            writer.write(answers.of(rows))
            progress.advance(len(rows))
        answers.require_some()
        rejected.finish()
        writer.finish()
        lists.is_kept = bool(rejected.counts)
    say(f"{output}: {answers.summary()}")
    if rejected.counts:
        what = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(rejected.counts.items()))
        say(f"{rejected.path} lists what was left out ({what})")
    if lists.path.exists():
        say(f"{lists.path} keeps the lists: once {source} is mended, only changed users are ranked. Or remove it")


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


class _Answers:
    """Histories to lists, and what is counted meanwhile."""

    def __init__(
        self,
        config: RecommendConfig,
        domain: str,
        recommender: Recommends,
        popular: Baseline | None,
        lists: _Lists,
        rejected: _Rejected,
    ) -> None:
        self._config, self._domain, self._recommender = config, domain, recommender
        self._lists, self._rejected = lists, rejected
        self._popular: list[tuple[str, float]] | None = None
        if popular is not None:
            query = RankingQuery(query_id="", domain=domain, history=())
            self._popular = _best(popular.rank([query], config.k)[0], config.k)
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
        queries = {number: self._query(items) for number, (_, items) in enumerate(users)}
        by_model = {n: query for n, query in queries.items() if not reads_nothing(self._recommender, query)}
        found = self._ranked([by_model[n] for n in by_model])
        self._counts["repeats"] += self._lists.count_repeats(row.user for row, _ in users)
        out: list[dict[str, Any]] = []
        for number, (row, _) in enumerate(users):
            is_model = number in by_model
            best = found[_key(by_model[number])] if is_model else self._popular
            if not best:
                self._rejected.add(row.line, row.user or "", "", NO_EVENT if best is None else NOTHING_LEFT)
                continue
            self._counts[MODEL if is_model else POPULARITY] += 1
            self._counts["shorter"] += len(best) < self._config.k
            out += self._rows(row.user, best, MODEL if is_model else POPULARITY)
        return out

    def require_some(self) -> None:
        """Raise DataError where the file has events and the catalogue knows none of them."""
        if self._counts["unknown"] and not self._counts["known"]:
            raise DataError(
                f"{self._config.input}: none of its {self._counts['unknown']:,} events is an item of "
                f"{', '.join(self._recommender.catalogue.domains)}, as {self._first_unknown}. Is it the right file, "
                "and do its histories hold the ids or titles of this model's catalogue?"
            )

    def summary(self) -> str:
        """What the output holds, in words."""
        model, popular = self._counts[MODEL], self._counts[POPULARITY]
        told = f"up to {self._config.k} recommendations for each of {model + popular:,} users"
        if popular:
            told += f", {popular:,} of them popular items, for want of a history"
        if self._counts["shorter"]:
            told += f"; shorter lists, since fewer items are left: {self._counts['shorter']:,}"
        if self._counts["repeats"]:
            told += f"; rows with the {USER} of a row before, and a list of their own: {self._counts['repeats']:,}"
        return told

    def _items(self, row: Row) -> tuple[Item, ...]:
        """The items of a history that the catalogue knows."""
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
        """The item that a text means, or why it means none."""
        catalogue = self._recommender.catalogue
        try:
            found = catalogue.item_of(self._domain, text) or catalogue.item_of(self._domain, text.strip())
        except UnknownItemError:
            return AMBIGUOUS
        return found or UNKNOWN_ITEM

    def _query(self, items: tuple[Item, ...]) -> RankingQuery:
        seen = [item.item_id for item in items if item.domain == self._domain and self._config.exclude_seen]
        exclude = self._recommender.catalogue.of_equal_text(self._domain, seen, self._recommender.item_fields)
        return RankingQuery(query_id="", domain=self._domain, history=items, exclude=exclude)

    def _ranked(self, queries: Sequence[RankingQuery]) -> dict[bytes, list[tuple[str, float]]]:
        """The lists of some queries by their keys; those that are not there yet are made, and kept."""
        wanted = {_key(query): query for query in queries}
        found = self._lists.find(list(wanted))
        missing = [key for key in wanted if key not in found]
        rankings = self._recommender.rank([wanted[key] for key in missing], self._config.k) if missing else []
        made = {key: _best(each, self._config.k) for key, each in zip(missing, rankings, strict=True)}
        self._lists.keep(made)
        return found | made

    def _rows(self, user: str | None, best: Sequence[tuple[str, float]], source: str) -> Iterator[dict[str, Any]]:
        catalogue = self._recommender.catalogue
        titles = catalogue.title[catalogue.find(self._domain, [item_id for item_id, _ in best])]
        for rank, ((item_id, score), title) in enumerate(zip(best, titles, strict=True), 1):
            values = (user, rank, item_id, str(title), score, source)
            yield dict(zip(COLUMNS, values, strict=True))


def _best(ranking: Any, k: int) -> list[tuple[str, float]]:
    return list(zip(ranking.item_ids[:k], ranking.scores[:k], strict=True))


def _key(query: RankingQuery) -> bytes:
    """What a list is kept under, beside the model and the settings: its history."""
    events = [(item.domain, item.item_id) for item in query.history]
    return hashlib.sha256(json.dumps(events).encode()).digest()


def _made_of(config: RecommendConfig, domain: str) -> str:
    """A hash of what decides a list beside the history: the files of the model, and the settings."""
    hashes = FileHashes(config.model)
    files = model_hashes(config.model, (*WEIGHTS, *TOKENIZER, "cprec.json", "items/*/*.parquet"), hashes)
    hashes.save()
    about = [__version__, domain, config.k, config.exclude_seen, files]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class _Lists:
    """The lists that were made, by the hash of their history; those made of something else are dropped."""

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
        self._file = sqlite3.connect(self.path, timeout=0)
        self._file.execute("PRAGMA locking_mode = EXCLUSIVE")  # what is locked stays so until it is closed
        self._file.execute("BEGIN EXCLUSIVE")
        self._file.execute("CREATE TABLE IF NOT EXISTS made_of (sha256 TEXT)")
        self._file.execute("CREATE TABLE IF NOT EXISTS lists (history BLOB PRIMARY KEY, best TEXT) WITHOUT ROWID")
        self._file.execute("CREATE TEMP TABLE users (user_id TEXT PRIMARY KEY) WITHOUT ROWID")
        if self._file.execute("SELECT sha256 FROM made_of").fetchall() != [(made_of,)]:
            self._file.execute("DELETE FROM lists")
            self._file.execute("DELETE FROM made_of")
            self._file.execute("INSERT INTO made_of VALUES (?)", (made_of,))
        self._file.commit()

    def __enter__(self) -> _Lists:
        return self

    def __exit__(self, *_: object) -> None:
        holds_some = self._file.execute("SELECT count(*) FROM lists").fetchone() != (0,)
        self._file.close()
        if not (self.is_kept and holds_some):
            self.path.unlink()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, float]]]:
        """Those that are there."""
        found = {}
        for key in keys:
            row = self._file.execute("SELECT best FROM lists WHERE history = ?", (key,)).fetchone()
            if row is not None:
                found[key] = [(item_id, score) for item_id, score in json.loads(row[0])]
        return found

    def keep(self, made: dict[bytes, list[tuple[str, float]]]) -> None:
        """All of them or, after a kill, none."""
        with self._file:
            rows = ((key, json.dumps(best)) for key, best in made.items())
            self._file.executemany("INSERT INTO lists VALUES (?, ?)", rows)

    def count_repeats(self, users: Iterator[str | None]) -> int:
        """How many of some users have been here before."""
        names = [(name,) for name in users]
        added = self._file.executemany("INSERT OR IGNORE INTO users VALUES (?)", names).rowcount if names else 0
        return len(names) - added


class _Rejected:
    """The file of what was left out, written aside; there is none where nothing was."""

    def __init__(self, path: Path, source: Path, strict: bool) -> None:
        self.path, self._source, self._strict = path, source, strict
        self.counts: Counter[str] = Counter()
        self._aside = path.with_name(path.name + ".incomplete")

    def __enter__(self) -> _Rejected:
        self._file = open(self._aside, "w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(REJECTED_COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def add(self, line: int, user: str, item: str, reason: str) -> None:
        """Raises DataError if strict."""
        if self._strict:
            who = f", user {user!r}" if user else ""
            what = f": {item!r}" if item else ""
            raise DataError(f"{self._source}, line {line}{who}: {reason}{what} (strict stops at the first)")
        self.counts[reason] += 1
        self._rows.writerow((self._source, line, user, item, reason))

    def finish(self) -> None:
        self._file.close()
        if self.counts:
            os.replace(self._aside, self.path)
        else:
            self.path.unlink(missing_ok=True)


class _Writer:
    """The output, written aside: it appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(path.name + ".incomplete")
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> _Writer:
        if self._path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            types = {"rank": pa.int64(), "score": pa.float64()}
            self._schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
            self._out: Any = pq.ParquetWriter(self._aside, self._schema)
            return self
        self._out = open(self._aside, "w", newline="", encoding="utf-8")
        if self._path.suffix == ".csv":
            csv.writer(self._out).writerow(COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._aside.unlink(missing_ok=True)

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self._path.suffix == ".parquet":
            self._rows += rows
            if len(self._rows) >= ROW_GROUP:
                self._flush()
        elif self._path.suffix == ".csv":
            csv.DictWriter(self._out, COLUMNS).writerows(rows)
        else:
            self._out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self) -> None:
        if self._rows:
            self._flush()
        self._out.close()
        os.replace(self._aside, self._path)

    def _flush(self) -> None:
        import pyarrow as pa

        self._out.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


def _chunks(rows: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk
