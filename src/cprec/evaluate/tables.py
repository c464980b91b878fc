"""From saved rankings to numbers: metrics of every query, means with intervals, slices, lists, paired differences.

Neither the model nor torch is needed. Suffix Q: queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from cprec import ranks
from cprec.evaluate import metrics
from cprec.evaluate.questions import FULL
from cprec.evaluate.seeds import model_of, together
from cprec.evaluate.slices import ordered
from cprec.evaluate.statistics import adjusted, bootstrap_interval, compare_pair, permutations_for

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_array

    from cprec.data.splits import Split
    from cprec.evaluate.evaluate import Entrant
    from cprec.evaluate.questions import Questions


def metrics_of(rankings: pa.Table, questions: Questions, k: int, protocol: str = FULL) -> dict[str, np.ndarray]:
    """Metrics of each query from saved rankings; `full` leaves out what is marked as seen."""
    import pyarrow.compute as pc

    asked = questions.of(protocol)
    if protocol == FULL:
        rankings = rankings.filter(pc.invert(rankings["seen"]))
    query, item = _places(rankings, [query.query_id for query in asked])
    answers = dict(zip((query.query_id for query in questions.queries), questions.target, strict=True))
    targets = np.array([answers[query.query_id] for query in asked], dtype=object)
    better, tied = ranks.count(query, rankings["score"].to_numpy(), item == targets[query], len(asked))
    columns: dict[str, np.ndarray] = {"num_better": better, "num_tied": tied}
    columns["num_valid"] = np.bincount(query, minlength=len(asked))
    for cut in sorted({1, 5, k}):
        columns[f"recall@{cut}"] = ranks.recall(better, tied, cut)
    for cut in sorted({5, k}):
        columns[f"ndcg@{cut}"] = ranks.ndcg(better, tied, cut)
    columns[f"precision@{k}"] = ranks.precision(better, tied, k)
    columns[f"map@{k}"] = ranks.average_precision(better, tied, k)
    return columns | {"mrr": ranks.reciprocal_rank(better, tied)}


def _places(rankings: pa.Table, query_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The number of the query of each row, and its item: int64[N], object[N] of str."""
    row_of = {name: row for row, name in enumerate(query_ids)}
    query = np.array([row_of[name] for name in rankings["query_id"].to_pylist()], dtype=np.int64)
    return query, rankings["item_id"].to_numpy(zero_copy_only=False)


def means_of(columns: Mapping[str, np.ndarray], users: Sequence[str] | None, seed: int) -> dict[str, dict[str, float]]:
    """Mean of each metric with its interval: `mean`, `low`, `high`. Queries of one of the `users` go together."""
    shown = [name for name in columns if "@" in name or name == "mrr"]
    return {name: interval(columns[name], users, seed) for name in shown}


def interval(values_Q: np.ndarray, users: Sequence[str] | None, seed: int) -> dict[str, float]:
    """A mean with its 95 % bootstrap interval."""
    mean, low, high = bootstrap_interval(values_Q, groups=_groups(users), seed=seed)
    return {"mean": mean, "low": low, "high": high}


def _groups(users: Sequence[str] | None) -> Sequence[str] | None:
    """The users, where one of them has several queries."""
    return users if users is not None and len(set(users)) < len(users) else None


def sliced(columns: Mapping[str, np.ndarray], questions: Questions, k: int, seed: int) -> dict[str, Any]:
    """NDCG@K and Recall@K in each group of each slice, with the number of its queries."""
    out: dict[str, Any] = {}
    for name, group_Q in questions.slices.items():
        out[name] = {}
        for group in ordered(questions.slices, name):
            inside = group_Q == group
            users = [user for user, mine in zip(questions.user, inside, strict=True) if mine]
            cells = {metric: interval(columns[metric][inside], users, seed) for metric in (f"ndcg@{k}", f"recall@{k}")}
            out[name][group] = {"num_queries": int(inside.sum()), **cells}
    return out


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What is known of a domain's items to judge lists of them by. Suffix N: items of the domain."""

    row_of: Mapping[str, int]
    count_N: np.ndarray
    """Training users of each item."""
    num_users: int
    titles: csr_array
    """TF-IDF vectors of titles."""

    @classmethod
    def of(cls, split: Split, domain: str, titles: csr_array) -> Lists:
        mine, log = split.catalogue.rows_of(domain), split.train
        chosen = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
        pairs = np.unique(np.stack([log.user[chosen], log.item[chosen] - mine[0]]), axis=1)
        return cls(
            row_of={str(item): row for row, item in enumerate(split.catalogue.item_id[mine])},
            count_N=np.bincount(pairs[1], minlength=len(mine)),
            num_users=max(1, len(np.unique(pairs[0]))),
            titles=titles,
        )

    def measures(self, rankings: pa.Table, k: int, *, exclude_seen: bool) -> dict[str, float]:
        """Coverage, Gini index, novelty in bits, tail share and diversity of the first K of each list, means over the
        lists that have a value; what no list has (diversity, where all hold one item) is left out."""
        import pyarrow.compute as pc

        if exclude_seen:
            rankings = rankings.filter(pc.invert(rankings["seen"]))
        query_ids = rankings["query_id"].to_pylist()
        number = {name: row for row, name in enumerate(dict.fromkeys(query_ids))}
        list_of = np.array([number[name] for name in query_ids], dtype=np.int64)
        item = np.array([self.row_of.get(name, -1) for name in rankings["item_id"].to_pylist()], dtype=np.int64)
        kept = metrics.first_k(list_of, k) & (item >= 0)  # an oracle may name what the data left out
        list_of, item, size = list_of[kept], item[kept], len(number)
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


def paired(
    entrants: Sequence[Entrant], per_query: Mapping[str, np.ndarray], users: Sequence[str], metric: str, seed: int
) -> list[dict[str, Any]]:
    """Differences on the same queries: each model to the baselines and the models before it; where there are no models,
    the best baseline to the others. Seeds of one model stand together. p values are corrected over all pairs of arms;
    bounds and random are left out."""
    kind_of = {entrant.name: entrant.kind for entrant in entrants}
    stochastic = {entrant.name: entrant.stochastic for entrant in entrants}
    members = together(name for name, kind in kind_of.items() if kind != "bound" and model_of(name) != "random")
    values = {rival: np.stack([per_query[name] for name in own]) for rival, own in members.items()}
    models = [rival for rival, own in members.items() if kind_of[own[0]] == "model"]
    pairs = [
        (a, b)
        for a in reversed(models)
        for b in members
        if a != b and (b not in models or models.index(b) < models.index(a))
    ]
    if not models and members:
        best = max(members, key=lambda rival: float(values[rival].mean()))
        pairs = [(best, rival) for rival in members if rival != best]
    # The best was picked from the same data, so that all pairs count in the correction.
    every = [*pairs, *(pair for pair in combinations(members, 2) if pair not in pairs and pair[::-1] not in pairs)]
    found = [
        compare_pair(
            values[a],
            values[b],
            groups=_groups(users),
            permutations=permutations_for(len(every)),
            seed=seed,
            stochastic=(stochastic[members[a][0]], stochastic[members[b][0]]),
        )
        for a, b in every
    ]
    return [
        {"a": a, "b": b, "metric": metric, **asdict(line), "claim": line.claim}
        for (a, b), line in zip(pairs, adjusted(found), strict=False)
    ]
