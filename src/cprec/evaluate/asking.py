"""Entrants, and how they are asked: batch by batch, and what saved rankings already answer is not asked again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from cprec.data.queries import sampled_rows
from cprec.errors import CPRecError
from cprec.evaluate.questions import Protocol
from cprec.evaluate.rankings import SavedRankings, rankings_path, read_rankings, table_of, write_rankings
from cprec.evaluate.results import FULL, FoundOfExact, Kind
from cprec.progress import say, track
from cprec.recommender import Ranking, RankingQuery, Recommender

SAMPLE = 100
"""Queries whose exact lists a beam's are compared with."""
BATCH = 256
"""Queries handed to a recommender at once."""
EXACT = "exact"

Rank = Callable[[Sequence[RankingQuery], int], list[Ranking]]
"""See `Recommender.rank`."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A recommender that is ready to rank."""

    recommender: Recommender
    modes: Mapping[str, Rank] = field(default_factory=dict)
    """The same model in other modes: `generate` writes freely; `exact`, where a beam is to be compared with it."""
    cost: Mapping[str, Any] = field(default_factory=dict)
    """num_parameters and train_seconds, where there are any."""
    scores_once: bool = False
    """Whether a batch asked under another protocol, right after the first, costs no second scoring."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A recommender in a table."""

    name: str
    kind: Kind
    open: Callable[[], Opened]
    """Reads a model or trains a baseline, before ranking is timed. It is called only where saved rankings are missing,
    and what it returns is let go once they are made. Raises Unsuitable where nothing can be made of the data."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Changes when its rankings may: saved ones are used again only where it is the same. As JSON can hold it."""
    stochastic: bool = False
    """Its training draws, so that another seed would give it other numbers."""
    trained_on: tuple[str, ...] = ()
    """Hashes of the token shards that a model was trained on; a baseline learns from the split itself."""


def saved_rankings(
    entrant: Entrant, protocols: Sequence[Protocol], asked: Mapping[str, Any], output_dir: str, domain: str
) -> dict[str, SavedRankings]:
    """The rankings of an entrant by protocol: saved ones that answer the same questions, others made and saved now."""
    answers = json.loads(json.dumps({**asked, "identity": dict(entrant.identity)}))
    found = {}
    for protocol in protocols:
        path = rankings_path(output_dir, domain, entrant.name, protocol.name)
        saved = read_rankings(path)
        if saved is not None and saved.answers == answers:
            say(f"{path}: answers the same questions, reused")
            found[protocol.name] = saved
    missing = [protocol for protocol in protocols if protocol.name not in found]
    if not missing:
        return found
    opened = entrant.open()
    # Who scores a batch once for all protocols is asked for them together. A model that reads prompts anew for each
    # takes long: what it has finished stays after an interruption.
    for _, group in groupby(
        missing, lambda protocol: "" if opened.scores_once and not protocol.models_only else protocol.name
    ):
        made = _ask(entrant, opened, list(group), answers, domain)
        for name, rankings in made.items():
            write_rankings(rankings_path(output_dir, domain, entrant.name, name), rankings)
        found |= made
    return found


def _ask(
    entrant: Entrant, opened: Opened, protocols: Sequence[Protocol], answers: Mapping[str, Any], domain: str
) -> dict[str, SavedRankings]:
    """Rank the queries of some protocols, batch by batch, each batch under every protocol that asks for its queries.

    Raises CPRecError for a score that is not finite.
    """
    k = answers["k"]
    most = max((protocol.queries for protocol in protocols), key=len)
    place = {query.query_id: number for number, query in enumerate(most)}
    rankings: dict[str, list[Ranking]] = {protocol.name: [] for protocol in protocols}
    seconds = dict.fromkeys(rankings, 0.0)
    title = f"{domain}: {entrant.name}" + (f", {protocols[0].name}" if len(protocols) == 1 else "")
    with track(sum(len(protocol.queries) for protocol in protocols), title, unit="queries") as progress:
        for first in range(0, len(most), BATCH):
            for protocol in protocols:
                done = len(rankings[protocol.name])
                asked = protocol.queries[done : done + BATCH]
                if batch := [query for query in asked if place[query.query_id] < first + BATCH]:
                    start = time.perf_counter()
                    rankings[protocol.name] += opened.modes.get(protocol.name, opened.recommender.rank)(batch, k)
                    seconds[protocol.name] += time.perf_counter() - start
                    progress.advance(len(batch))
    made = {}
    for protocol in protocols:
        assert [r.query_id for r in rankings[protocol.name]] == [query.query_id for query in protocol.queries]
        if broken := [r.query_id for r in rankings[protocol.name] if not all(map(math.isfinite, r.scores))]:
            raise CPRecError(f"{entrant.name} gave query {broken[0]!r} a score that is not finite: its model is broken")
        table = table_of(rankings[protocol.name], protocol, domain)
        beam = protocol.name == FULL and EXACT in opened.modes
        made[protocol.name] = SavedRankings(
            table=table,
            answers=answers,
            seconds=round(seconds[protocol.name], 3),
            cost=opened.cost,
            trained_on=entrant.trained_on,
            found_of_exact=_found_of_exact(entrant, opened, protocol, table, answers) if beam else None,
        )
    return made


def _found_of_exact(
    entrant: Entrant, opened: Opened, protocol: Protocol, rankings: pa.Table, answers: Mapping[str, Any]
) -> FoundOfExact:
    """The share of the exact top K, seen items aside, that an arm's lists hold, on a sample of queries."""
    chosen = [protocol.queries[row] for row in sampled_rows(len(protocol.queries), SAMPLE, answers["seed"])]
    say(f"{entrant.name}: exact lists of {len(chosen)} queries to compare with")
    exact = opened.modes[EXACT](chosen, answers["k"])
    listed = set(zip(rankings["query_id"].to_pylist(), rankings["item_id"].to_pylist(), strict=True))
    best = [
        {(r.query_id, item) for item in r.item_ids if item not in q.uncounted}
        for q, r in zip(chosen, exact, strict=True)
    ]
    shares = [len(listed & mine) / len(mine) for mine in best if mine]
    return FoundOfExact(share=float(np.mean(shares)) if shares else 1.0, num_queries=len(chosen))
