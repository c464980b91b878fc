"""The questions of an evaluation: queries, their answers, frozen candidate sets, new items and slices.

The evaluation makes its ranking queries here and nowhere else. Suffixes: Q queries, N items of the domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cprec.data.queries import sampled_rows
from cprec.data.splits import Split
from cprec.errors import ConfigError, DataError
from cprec.evaluate.candidates import POPULARITY, UNIFORM, draw_candidates
from cprec.evaluate.results import (
    CANDIDATES_POPULARITY,
    CANDIDATES_UNIFORM,
    FULL,
    FULL_WITH_SEEN,
    GENERATED,
    NEW_ITEMS,
)
from cprec.evaluate.saved import read_saved, write_saved
from cprec.evaluate.slices import events_of_users, slices_of, training_events
from cprec.progress import say, track
from cprec.provenance import file_sha256
from cprec.recommender import RankingQuery
from cprec.schema import Item

SAMPLED = {UNIFORM: CANDIDATES_UNIFORM, POPULARITY: CANDIDATES_POPULARITY}
"""How candidates are drawn -> the protocol that ranks them."""
USER_EVENTS = "user events"
"""The column of `queries.parquet` with the training events of each query's user."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of asking: which queries, and what is reported of their rankings."""

    name: str
    """As the files of its rankings are called."""
    queries: Sequence[RankingQuery]
    target: Sequence[str]
    user: Sequence[str]
    """Of each query."""
    num_items: int
    """Items that are ranked for a query, at most."""
    pools: tuple[str, ...]
    """Pools that metrics are made for. A ranking of the full catalogue serves two: with seen items, and without."""
    written: bool = False
    """Answers are written freely, which not all can do."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The queries of a domain with their answers, in one order."""

    domain: str
    queries: Sequence[RankingQuery]
    """Over the full catalogue, items of the history uncounted: one ranking says what it is with and without them."""
    target: Sequence[str]
    user: Sequence[str]
    """User ids, as the log has them."""
    num_items: int = 0
    """Items of the domain."""
    num_candidates: int = 0
    candidates: Mapping[str, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    """How they are drawn -> the candidates of each query."""
    slices: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Slice -> the group of each query."""
    user_events: Sequence[int] = ()
    """Training events of each query's user, in all domains of the platform; none where slices are not made."""
    new_items: frozenset[str] = frozenset()
    """Items of the domain that never occur in training."""
    notes: Sequence[str] = ()
    """What a reader of the numbers should know."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hashes of queries, histories and answers as asked, and of each file of candidates."""

    def protocols(self, *, generate: bool = False) -> list[Protocol]:
        """All ways of asking, the full catalogue first; with `generate` models also write freely."""
        full = Protocol(
            name=FULL,
            queries=self.queries,
            target=self.target,
            user=self.user,
            num_items=self.num_items,
            pools=(FULL, FULL_WITH_SEEN),
        )
        found = [full]
        for how, sets in self.candidates.items():
            pairs = zip(self.queries, sets, strict=True)
            queries = [replace(query, uncounted=frozenset(), candidates=mine) for query, mine in pairs]
            name = SAMPLED[how]
            found.append(replace(full, name=name, queries=queries, num_items=self.num_candidates, pools=(name,)))
        if chosen := [row for row, target in enumerate(self.target) if target in self.new_items]:
            asked = [self.queries[row] for row in chosen]
            new = Protocol(
                name=NEW_ITEMS,
                queries=[replace(q, uncounted=frozenset(), exclude=q.uncounted, allow=self.new_items) for q in asked],
                target=[self.target[row] for row in chosen],
                user=[self.user[row] for row in chosen],
                num_items=len(self.new_items),
                pools=(NEW_ITEMS,),
            )
            found.append(new)
        if generate:
            (uniform,) = (protocol for protocol in found if protocol.name == SAMPLED[UNIFORM])
            found.append(replace(uniform, name=GENERATED, pools=(GENERATED,), written=True))
        return found

    def table(self) -> pa.Table:
        """The queries with their answers and slices, one row each."""
        columns = {"query_id": [query.query_id for query in self.queries], "user_id": self.user, "target": self.target}
        columns |= {name: pa.array(groups, pa.string()) for name, groups in self.slices.items()}
        return pa.table(columns | ({USER_EVENTS: pa.array(self.user_events, pa.int64())} if self.user_events else {}))


Rows = Sequence[Mapping[str, Any]]
"""Queries as `cprec prepare` wrote them."""


def read_questions(
    data: str | Path,
    split: Split,
    domain: str,
    part: str,
    *,
    max_queries: int = 0,
    num_candidates: int = 20,
    seed: int = 0,
) -> Questions:
    """The queries of a domain and their candidate sets, which are drawn and frozen on first use.

    With `max_queries` the queries are a sample drawn by `seed`. A query has fewer candidates where its user had nearly
    all items, or where the target's title is part of most others; how many such there are is said.

    Raises ConfigError for a domain without queries, and DataError where frozen candidates are of other queries.
    """
    folder = Path(data, "queries", domain)
    mine = split.catalogue.rows_of(domain)
    events_N = np.bincount(training_events(split, domain)[1], minlength=len(mine))
    every = _read_rows(folder, part)
    files = _frozen_candidates(folder, split, domain, every, part, num_candidates, seed, events_N)
    drawn = {how: _read_candidates(file, every) for how, file in files.items()}
    rows = _sample(every, max_queries, seed)
    asked = _questions(domain, rows)
    return replace(
        asked,
        num_items=len(mine),
        num_candidates=num_candidates,
        candidates={how: [sets[query.query_id] for query in asked.queries] for how, sets in drawn.items()},
        slices=slices_of(split, domain, part, asked.queries, asked.target, events_N),
        user_events=events_of_users(split, asked.queries).tolist(),
        new_items=frozenset(map(str, split.catalogue.item_id[mine][events_N == 0])),
        notes=_small_sets(num_candidates, rows, drawn),
        sha256={"queries": _hash_of(asked), **{SAMPLED[how]: file_sha256(file) for how, file in files.items()}},
    )


def read_queries(data: str | Path, domain: str, part: str, *, max_queries: int = 0, seed: int = 0) -> Questions:
    """The questions of `read_questions`, without candidates and slices."""
    return _questions(domain, _sample(_read_rows(Path(data, "queries", domain), part), max_queries, seed))


def _questions(domain: str, rows: Rows) -> Questions:
    queries = []
    for row in rows:
        history = tuple(map(Item, row["history_domain"], row["history_item"]))
        query = RankingQuery(
            query_id=row["query_id"],
            domain=row["domain"],
            history=history,
            user=f"{row['platform']}/{row['user_id']}",
            uncounted=frozenset(item.item_id for item in history if item.domain == row["domain"]),
        )
        queries.append(query)
    targets, users = ([row[name] for row in rows] for name in ("target", "user_id"))
    return Questions(domain=domain, queries=queries, target=targets, user=users)


def _read_rows(folder: Path, part: str) -> Rows:
    path = folder / f"{part}.parquet"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: name {folder.name!r} in target_domains of `cprec prepare`")
    rows: Rows = read_saved(path, "prepare the data again").to_pylist()
    return rows


def _sample(rows: Rows, max_queries: int, seed: int) -> Rows:
    """At most so many rows, in their order; 0 keeps all."""
    return [rows[number] for number in sampled_rows(len(rows), max_queries, seed)]


def _hash_of(asked: Questions) -> str:
    """SHA-256 of queries, histories and answers."""
    lines = [
        f"{query.query_id}\t{item}\t{' '.join(f'{event.domain}/{event.item_id}' for event in query.history)}"
        for query, item in zip(asked.queries, asked.target, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _small_sets(num_candidates: int, rows: Rows, drawn: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """How many queries have fewer candidates than were asked for, by how they are drawn."""
    notes = []
    for how, sets in drawn.items():
        sizes = np.array([len(sets[row["query_id"]]) for row in rows], dtype=np.int64)
        few = sizes[sizes < num_candidates]
        if few.size:
            alone = f", {np.sum(few == 1):,} of them the target alone" if (few == 1).any() else ""
            notes.append(
                f"candidates ({how}): fewer than num_candidates={num_candidates} for {few.size:,} of "
                f"{len(rows):,} queries ({few.min()} at least{alone}), because no more items outside their users' "
                "histories have titles that can be told apart"
            )
    return notes


# ---- frozen candidates -----------------------------------------------------------------------------------------------


def _frozen_candidates(
    folder: Path, split: Split, domain: str, rows: Rows, part: str, size: int, seed: int, events_N: np.ndarray
) -> dict[str, Path]:
    """The files with the candidates of all queries, by how they are drawn; drawn now where they are not there.

    `events_N` are the training events of the domain's items. Candidates by popularity are left out where too few items
    have any.
    """
    files = {}
    for how, weights_N, drawn_by in ((UNIFORM, None, ""), (POPULARITY, events_N, f"_{POPULARITY}")):
        path = folder / f"candidates{size}{drawn_by}_{part}_seed{seed}.parquet"
        if not path.is_file():
            if weights_N is not None and (known := np.count_nonzero(weights_N)) < size:
                say(
                    f"{domain}: no candidates by popularity: num_candidates={size}, but only {known} items have "
                    "training events"
                )
                continue
            sets = _drawn(split, domain, rows, size, seed, weights_N, f"{domain}: candidate sets, {how}")
            columns = {"query_id": pa.array([row["query_id"] for row in rows], pa.string())}
            write_saved(pa.table(columns | {"candidates": pa.array(sets, pa.list_(pa.string()))}), path)
        files[how] = path
    return files


def _drawn(
    split: Split, domain: str, rows: Rows, size: int, seed: int, weights_N: np.ndarray | None, title: str
) -> list[list[str]]:
    """The candidates of every query, from outside of all that its user had in the domain."""
    log, mine = split.interactions, split.catalogue.rows_of(domain)
    of_domain = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
    had: dict[tuple[str, str], list[int]] = {}
    for user, item in zip(log.user[of_domain], log.item[of_domain] - mine[0], strict=True):
        key = (str(log.platforms[log.user_platform[user]]), str(log.user_id[user]))
        had.setdefault(key, []).append(int(item))
    titles = [str(title) for title in split.catalogue.title[mine]]
    target = split.catalogue.find(domain, [row["target"] for row in rows]) - mine[0]
    sets = []
    with track(len(rows), title, unit="queries") as progress:
        for row, position in zip(rows, target, strict=True):
            taken = np.array(had[row["platform"], row["user_id"]])
            drawn = draw_candidates(row["query_id"], int(position), taken, titles, size, seed, weights_N)
            sets.append([str(item) for item in split.catalogue.item_id[mine[0] + drawn]])
            progress.advance()
    return sets


def _read_candidates(path: Path, rows: Rows) -> Mapping[str, tuple[str, ...]]:
    """The candidates of each query by its id. Raises DataError where they are not those of the queries."""
    table = read_saved(path, "delete it, and it is drawn anew")
    known = dict(zip(table["query_id"].to_pylist(), map(tuple, table["candidates"].to_pylist()), strict=True))
    asked = {row["query_id"]: row["target"] for row in rows}
    if known.keys() != asked.keys() or any(target not in known[query] for query, target in asked.items()):
        raise DataError(f"{path} holds candidates of other queries than those asked: delete it, and it is drawn anew")
    return known
