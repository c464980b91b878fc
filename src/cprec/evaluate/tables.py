"""From saved rankings to numbers: metrics of every query, means with intervals, slices, lists, paired differences.

Neither the model nor torch is needed. Suffixes: Q queries, N items of the domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, compress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from cprec import ranks
from cprec.data.splits import Split
from cprec.data.titles import title_vectors
from cprec.evaluate import metrics
from cprec.evaluate.questions import Protocol, Questions
from cprec.evaluate.rankings import SavedRankings
from cprec.evaluate.results import (
    BLENDED,
    BY_HEAD,
    FULL,
    GENERATED,
    Arm,
    Cost,
    Difference,
    Generated,
    Interval,
    Kind,
    Metric,
    Proofs,
    Slice,
    model_of,
    together,
)
from cprec.evaluate.slices import ordered, training_events
from cprec.evaluate.statistics import bootstrap_interval, compare_pairs

Columns = Mapping[str, np.ndarray]
"""A value of each query, by the name it has in `metrics.parquet`."""


# ---- metrics of queries ----------------------------------------------------------------------------------------------


def metrics_of(rankings: pa.Table, protocol: Protocol, k: int, pool: str) -> dict[str, np.ndarray]:
    """Metrics of each query of a protocol from its saved rankings; the pool `full` leaves out items marked as seen."""
    if pool == FULL:
        rankings = rankings.filter(pc.invert(rankings["seen"]))
    query = pc.index_in(rankings["query_id"], pa.array([query.query_id for query in protocol.queries], pa.string()))
    is_target = pc.equal(rankings["item_id"], pa.array(protocol.target, pa.string()).take(query))
    row, num_queries = query.to_numpy(), len(protocol.queries)
    better, tied = ranks.count(row, rankings["score"].to_numpy(), is_target.to_numpy(), num_queries)
    columns: dict[str, np.ndarray] = {"num_better": better, "num_tied": tied}
    columns["num_valid"] = np.bincount(row, minlength=num_queries)
    for cut in sorted({1, 5, k}):
        columns[f"recall@{cut}"] = ranks.recall(better, tied, cut)
    for cut in sorted({5, k}):
        columns[f"ndcg@{cut}"] = ranks.ndcg(better, tied, cut)
    columns[f"precision@{k}"] = ranks.precision(better, tied, k)
    columns[f"map@{k}"] = ranks.average_precision(better, tied, k)
    return columns | {"mrr": ranks.reciprocal_rank(better, tied)}


def means_of(columns: Columns, users: Sequence[str], pool: str, seed: int) -> dict[Metric, Interval]:
    """Mean of each metric with its interval. Queries of one of the `users` go together."""
    shown = [name for name in columns if "@" in name or name == "mrr"]
    return {Metric.of(name, pool): interval(columns[name], users, seed) for name in shown}


def interval(values_Q: np.ndarray, users: Sequence[str], seed: int) -> Interval:
    """A mean with its 95 % bootstrap interval."""
    return Interval(*bootstrap_interval(values_Q, groups=_groups(users), seed=seed))


def _groups(users: Sequence[str]) -> Sequence[str] | None:
    """The users, where one of them has several queries."""
    return users if len(set(users)) < len(users) else None


# ---- an arm ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An arm's results, and the values of each query that they are means of."""

    arm: Arm
    stochastic: bool
    """Another seed would give other numbers."""
    values: Mapping[str, Columns]
    """By pool."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Turns the saved rankings of a domain's arms into results."""

    questions: Questions
    protocols: Sequence[Protocol]
    main: Metric
    """What arms are compared by; its pool leads."""
    lists: Lists
    seed: int

    def results_of(
        self, name: str, kind: Kind, rankings: Mapping[str, SavedRankings], *, stochastic: bool = False
    ) -> Judged:
        """Results of an arm from its rankings by protocol; of a protocol that it was not asked there are none."""
        main, k, full = self.main.pool, self.main.k, rankings[FULL]
        assert k is not None
        values: dict[str, Columns] = {}
        cells: dict[Metric, Interval] = {}
        seconds: dict[str, float] = {}
        for protocol in self.protocols:
            if (saved := rankings.get(protocol.name)) is None:
                continue
            for pool in sorted(protocol.pools, key=lambda pool: pool != main):  # the leading one first
                values[pool] = metrics_of(saved.table, protocol, k, pool)
                if pool != GENERATED:
                    cells |= means_of(values[pool], protocol.user, pool, self.seed)
            seconds[main if protocol.name == FULL else protocol.name] = saved.seconds
        num_queries = len(self.questions.queries)
        arm = Arm(
            name=name,
            kind=kind,
            metrics=cells,
            seconds={pool: spent for pool, spent in seconds.items() if pool != GENERATED},
            cost=Cost(milliseconds_per_query=1000 * full.seconds / max(1, num_queries), **full.cost),
            lists=self.lists.measures(full.table, k, main),
            slices=sliced(values[main], self.questions, self.main, self.seed),
            proofs=proofs_of(full.table, num_queries),
            found_of_exact=full.found_of_exact,
            generated=_generated(values[GENERATED], seconds[GENERATED]) if GENERATED in values else None,
        )
        return Judged(arm=arm, stochastic=stochastic, values=values)

    def table(self, judged: Sequence[Judged]) -> pa.Table:
        """Metrics of every query: a row for each query, arm and pool."""
        asked = {pool: protocol for protocol in self.protocols for pool in protocol.pools}
        parts = []
        for one in judged:
            about = {"domain": self.questions.domain, "arm": one.arm.name, "kind": one.arm.kind}
            for pool, columns in one.values.items():
                queries, users = asked[pool].queries, asked[pool].user
                same = about | {"protocol": pool, "stochastic": one.stochastic}
                repeated = {name: [value] * len(queries) for name, value in same.items()}
                query_ids = [query.query_id for query in queries]
                parts.append(pa.table({"query_id": query_ids, "user_id": users, **repeated, **columns}))
        return pa.concat_tables(parts)


def sliced(columns: Columns, questions: Questions, main: Metric, seed: int) -> dict[str, dict[str, Slice]]:
    """NDCG@K and Recall@K in each group of each slice, with the number of its queries."""
    shown = (replace(main, name="ndcg"), replace(main, name="recall"))

    def of(inside: np.ndarray) -> Slice:
        users = list(compress(questions.user, inside))
        cells = {metric: interval(columns[str(metric)][inside], users, seed) for metric in shown}
        return Slice(num_queries=len(users), metrics=cells)

    return {
        name: {group: of(group_Q == group) for group in ordered(group_Q)} for name, group_Q in questions.slices.items()
    }


def proofs_of(rankings: pa.Table, num_queries: int) -> Proofs | None:
    """What is proven of an arm's rankings, None where nothing is said of it. A query without any item is not proven."""
    if "gap" not in rankings.column_names:
        return None
    first = rankings.filter(np.asarray(rankings["rank"]) == 1)
    gap = first["gap"].to_numpy()
    wide = gap[(gap > 0) & np.isfinite(gap)]
    return Proofs(
        proven=float((gap == 0).sum()) / num_queries,
        mean_gap=float(wide.mean()) if len(wide) else 0.0,
        expanded=float(first["expanded"].to_numpy().sum()) / num_queries,
    )


def _generated(columns: Columns, seconds: float) -> Generated:
    hit, valid = columns["recall@1"], columns["num_valid"] > 0
    return Generated(
        valid_ratio=metrics.valid_ratio(columns["num_valid"]),
        hit_rate_all=float(hit.mean()),
        hit_rate_valid=float(hit[valid].mean()) if valid.any() else 0.0,
        seconds=seconds,
    )


# ---- lists -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What is known of a domain's items to judge lists of them by."""

    item_id: pa.Array
    count_N: np.ndarray
    """Training users of each item."""
    num_users: int
    titles: csr_array
    """TF-IDF vectors of titles."""

    @classmethod
    def of(cls, split: Split, domain: str) -> Lists:
        mine = split.catalogue.rows_of(domain)
        pairs = np.unique(np.stack(training_events(split, domain)), axis=1)
        return cls(
            item_id=split.catalogue.arrow_ids(domain),
            count_N=np.bincount(pairs[1], minlength=len(mine)),
            num_users=max(1, len(np.unique(pairs[0]))),
            titles=title_vectors(split.catalogue.titles_of(domain)),
        )

    def measures(self, rankings: pa.Table, k: int, pool: str) -> dict[str, float]:
        """Coverage, Gini index, novelty in bits, tail share and diversity of the first K of each list, means over the
        lists that have a value; what no list has (diversity, where all hold one item) is left out."""
        if pool == FULL:
            rankings = rankings.filter(pc.invert(rankings["seen"]))
        query_ids = rankings["query_id"].unique()
        list_of = pc.index_in(rankings["query_id"], query_ids).to_numpy().astype(np.int64)
        item = pc.fill_null(pc.index_in(rankings["item_id"], self.item_id), -1).to_numpy().astype(np.int64)
        kept = metrics.first_k(list_of, k) & (item >= 0)  # an oracle may name what the data left out
        list_of, item, size = list_of[kept], item[kept], len(query_ids)
        if not size:
            return {}
        means = {
            "novelty": metrics.novelty(list_of, item, size, self.count_N, self.num_users),
            "tail_share": metrics.tail_share(list_of, item, size, self.count_N),
            "diversity": metrics.intra_list_diversity(list_of, item, size, self.titles),
        }
        return {
            "coverage": metrics.coverage(item, len(self.count_N)),
            "gini": metrics.gini(np.bincount(item, minlength=len(self.count_N))),
            **{name: float(np.nanmean(values)) for name, values in means.items() if not np.isnan(values).all()},
        }


# ---- differences -----------------------------------------------------------------------------------------------------


def paired(judged: Sequence[Judged], users: Sequence[str], main: Metric, seed: int) -> list[Difference]:
    """Differences in the main metric on the same queries. p values are corrected over all pairs of arms; bounds and
    random are left out. Seeds of one model stand together."""
    named = {one.arm.name: one for one in judged}
    members = together(name for name, one in named.items() if one.arm.kind != "bound" and model_of(name) != "random")
    values = {
        rival: np.stack([named[name].values[main.pool][str(main)] for name in own]) for rival, own in members.items()
    }
    models = {rival: model_of(own[0]) for rival, own in members.items() if named[own[0]].arm.kind == "model"}
    pairs = _told(values, models)
    # The best was picked from the same data, so that all pairs count in the correction.
    every = [*pairs, *(pair for pair in combinations(members, 2) if pair not in pairs and pair[::-1] not in pairs)]
    stochastic = {rival: named[own[0]].stochastic for rival, own in members.items()}
    found = compare_pairs(values, every, groups=_groups(users), seed=seed, stochastic=stochastic)
    return [Difference(a=a, b=b, metric=main, test=test) for (a, b), test in zip(pairs, found, strict=False)]


def _told(values: Mapping[str, np.ndarray], models: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs that a report tells of: each model and the baselines and the models before it; where there are no
    models, the best baseline and the others. `models` has their names without seeds.

    Where models have blends, these are told in place of the models: with the baselines, the blends before and the
    model alone, and its item head. A model alone is then told with the models before it.
    """
    if not models:
        best = max(values, key=lambda rival: float(values[rival].mean()), default="")
        return [(best, rival) for rival in values if rival != best]
    blends = [name for name, model in models.items() if model.endswith(BLENDED)]
    alone = [name for name in models if name not in blends]
    baselines = [name for name in values if name not in models]
    leading, pairs = blends or alone, []
    for number, a in reversed(list(enumerate(leading))):
        own = [name for name in alone if models[name].removesuffix(BY_HEAD) + BLENDED == models[a]]
        pairs += [(a, b) for b in (*baselines, *leading[:number], *own)]
    if blends:
        pairs += [(a, b) for number, a in reversed(list(enumerate(alone))) for b in alone[:number]]
    return pairs
