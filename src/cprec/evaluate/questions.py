"""The questions of an evaluation: queries, their answers, frozen candidate sets, new items and slices."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cprec.errors import ConfigError, DataError
from cprec.evaluate.candidates import POPULARITY, UNIFORM, draw_candidates, read_candidates, write_candidates
from cprec.evaluate.saved import read_saved
from cprec.evaluate.slices import slices_of
from cprec.progress import say, track
from cprec.provenance import file_sha256
from cprec.recommender import RankingQuery
from cprec.schema import TRAIN, Item

if TYPE_CHECKING:
    from cprec.data.splits import Split
    from cprec.evaluate.config import EvaluateConfig

FULL, FULL_WITH_SEEN, GENERATED, NEW_ITEMS = "full", "full_with_seen", "generate", "new_items"
SAMPLED = {UNIFORM: "candidates_uniform", POPULARITY: "candidates_popularity"}
"""Protocols by the names they have in files. The candidates of `SAMPLED` are drawn as its key says."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The queries of a domain with their answers, in one order."""

    domain: str
    queries: list[RankingQuery]
    """Over the full catalogue, items of the history uncounted: one ranking says what it is with and without them."""
    target: list[str]
    user: list[str]
    """User ids, as the log has them."""
    candidates: Mapping[str, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    """How they are drawn -> the candidates of each query."""
    slices: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Slice -> the group of each query."""
    new_items: frozenset[str] = frozenset()
    """Items of the domain that never occur in training."""
    notes: Sequence[str] = ()
    """What a reader of the numbers should know."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hashes of queries, histories and answers as asked, and of each file of candidates."""

    def of(self, protocol: str) -> list[RankingQuery]:
        """The queries as a protocol asks them: all of them, but those for new items alone where these are ranked."""
        for how, name in SAMPLED.items():
            if protocol == name:
                pairs = zip(self.queries, self.candidates[how], strict=True)
                return [replace(query, uncounted=frozenset(), candidates=mine) for query, mine in pairs]
        if protocol == GENERATED:
            return self.of(SAMPLED[UNIFORM])
        if protocol == NEW_ITEMS:
            return [
                replace(query, uncounted=frozenset(), exclude=query.uncounted, allow=self.new_items)
                for query, target in zip(self.queries, self.target, strict=True)
                if target in self.new_items
            ]
        return self.queries

    def table(self) -> pa.Table:
        """The queries with their answers and slices, one row each."""
        columns = {"query_id": [query.query_id for query in self.queries], "user_id": self.user, "target": self.target}
        return pa.table(columns | {name: pa.array(groups, pa.string()) for name, groups in self.slices.items()})


def read_questions(config: EvaluateConfig, split: Split, domain: str) -> Questions:
    """The queries of a domain and their candidate sets, which are drawn and frozen on first use.

    A query has fewer candidates where its user had nearly all items, or where the target's title is part of most
    others; how many such there are is said.

    Raises ConfigError for a domain without queries, and DataError where frozen candidates are of other queries.
    """
    path = Path(config.data) / "queries" / domain / f"{config.part}.parquet"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: name {domain!r} in target_domains of `cprec prepare`")
    rows = read_saved(path, "prepare the data again").to_pylist()
    files = {UNIFORM: _frozen(config, split, domain, rows, UNIFORM)}
    try:
        files[POPULARITY] = _frozen(config, split, domain, rows, POPULARITY)
    except ConfigError as error:  # few trained items: the domain is evaluated all the same
        say(f"{domain}: no candidates by popularity: {error}")
    if config.max_queries and config.max_queries < len(rows):
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[: config.max_queries])
        rows = [rows[number] for number in chosen]
    drawn = {how: read_candidates(file) for how, file in files.items()}
    queries = []
    for row in rows:
        history = tuple(Item(d, i) for d, i in zip(row["history_domain"], row["history_item"], strict=True))
        seen = frozenset(item.item_id for item in history if item.domain == domain)
        user = f"{row['platform']}/{row['user_id']}"
        queries.append(
            RankingQuery(query_id=row["query_id"], domain=domain, history=history, user=user, uncounted=seen)
        )
    target = [row["target"] for row in rows]
    mine = split.catalogue.rows_of(domain)
    is_new = np.bincount(split.interactions.item[split.events(TRAIN)], minlength=len(split.catalogue))[mine] == 0
    asked = "\n".join(
        f"{query.query_id}\t{item}\t{' '.join(f'{event.domain}/{event.item_id}' for event in query.history)}"
        for query, item in zip(queries, target, strict=True)
    )
    return Questions(
        domain=domain,
        queries=queries,
        target=target,
        user=[row["user_id"] for row in rows],
        candidates={how: [sets[query.query_id] for query in queries] for how, sets in drawn.items()},
        slices=slices_of(
            split,
            domain,
            [query.user or "" for query in queries],
            split.catalogue.find(domain, target),
            np.array([sum(item.domain == domain for item in query.history) for query in queries], dtype=np.int64),
            np.array([item in query.uncounted for query, item in zip(queries, target, strict=True)], dtype=bool),
        ),
        notes=_small_sets(config, rows, drawn),
        new_items=frozenset(map(str, split.catalogue.item_id[mine][is_new])),
        sha256={
            "queries": hashlib.sha256(asked.encode()).hexdigest(),
            **{SAMPLED[how]: file_sha256(file) for how, file in files.items()},
        },
    )


def _small_sets(
    config: EvaluateConfig, rows: Sequence[Mapping[str, Any]], drawn: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[str]:
    """How many queries have fewer candidates than were asked for, by how they are drawn."""
    notes = []
    for how, sets in drawn.items():
        sizes = np.array([len(sets[row["query_id"]]) for row in rows], dtype=np.int64)
        few = sizes[sizes < config.num_candidates]
        if few.size:
            alone = f", {np.sum(few == 1):,} of them the target alone" if (few == 1).any() else ""
            notes.append(
                f"candidates ({how}): fewer than num_candidates={config.num_candidates} for {few.size:,} of "
                f"{len(rows):,} queries ({few.min()} at least{alone}), for no more are outside their users' "
                "histories with titles that can be told apart"
            )
    return notes


def _frozen(config: EvaluateConfig, split: Split, domain: str, rows: Sequence[Mapping[str, Any]], how: str) -> Path:
    """The file with the candidates of all queries of a domain, drawn if it is not there."""
    drawn_by = "" if how == UNIFORM else f"_{how}"
    name = f"candidates{config.num_candidates}{drawn_by}_{config.part}_seed{config.seed}.parquet"
    frozen = Path(config.data) / "queries" / domain / name
    if not frozen.is_file():
        mine = split.catalogue.rows_of(domain)
        titles = [str(title) for title in split.catalogue.title[mine]]
        log = split.interactions
        of_domain = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
        had: dict[tuple[str, str], list[int]] = {}
        for user, item in zip(log.user[of_domain], log.item[of_domain] - mine[0], strict=True):
            key = (str(log.platforms[log.user_platform[user]]), str(log.user_id[user]))
            had.setdefault(key, []).append(int(item))
        weights = None
        if how == POPULARITY:
            trained = of_domain & split.events(TRAIN)
            weights = np.bincount(log.item[trained] - mine[0], minlength=len(mine))
            if np.count_nonzero(weights) < config.num_candidates:
                raise ConfigError(
                    f"num_candidates={config.num_candidates}, but only {np.count_nonzero(weights)} items have training "
                    "events"
                )
        target = split.catalogue.find(domain, [row["target"] for row in rows]) - mine[0]
        sets = []
        with track(len(rows), f"{domain}: candidate sets, {how}", unit="queries") as progress:
            for row, position in zip(rows, target, strict=True):
                taken = np.array(had[row["platform"], row["user_id"]])
                drawn = draw_candidates(
                    row["query_id"], int(position), taken, titles, config.num_candidates, config.seed, weights
                )
                sets.append([str(item) for item in split.catalogue.item_id[mine[0] + drawn]])
                progress.advance()
        write_candidates(frozen, [row["query_id"] for row in rows], sets)
    known = read_candidates(frozen)
    if known.keys() != {row["query_id"] for row in rows} or any(
        row["target"] not in known[row["query_id"]] for row in rows
    ):
        raise DataError(f"{frozen} holds candidates of other queries than those asked: delete it, and it is drawn anew")
    return frozen
