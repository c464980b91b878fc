"""How items are ranked that came after training, by recommenders that read titles and by a blend of them.

    python benchmarks/new_items.py DATA DOMAIN [NAME ...] [--share 0.1] [--seed 0] [--networks FOLDER]

`DATA` is a folder that `cprec prepare` wrote. A share of the domain's items is drawn by the seed and held back: the
catalogue and the events are without them while the parts `NAME ...` of a blend are made and its weights chosen, on
validation queries for the other items. Then all held-back items come at once, by their titles alone, and all test
queries are asked for the full catalogue, items of the history left out. Prints NDCG@10 of queries whose target was held
back and of the others with 95 % intervals, and the share of held-back items in the lists. `unaware` is the blend that
does not look at new titles, `reading` the one whose parts read them where they can, and nothing is guessed by similar
titles. `--networks` keeps what is trained.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import sparse

from cprec.blend import Entries, best_setting, made_parts
from cprec.data.catalogue import Catalogue
from cprec.data.dataset import read_split
from cprec.data.queries import ranking_queries
from cprec.data.splits import Split
from cprec.evaluate.statistics import bootstrap_interval, compare_pair
from cprec.rank.blend import Blend, BlendedParts, shares
from cprec.ranks import count_rankings, ndcg
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import TEST
from cprec.scoring import ScoringRecommender, StoredRecommender
from cprec.tune import validation_queries

PARTS = ("transition graph (titles)", "EASE", "popularity", "titles", "SASRec (titles x3)")
K, POOL, BATCH = 10, 100, 256


class Reading(Blend):
    """A blend whose parts read the titles of new items where they can; the others say nothing of them."""

    @cached_property
    def _alike_ML(self) -> sparse.csr_array:
        num_new = int((self._place_N < 0).sum())
        return sparse.csr_array((num_new, len(self.learnt.rows_of(self.domain))))


class Unaware(Reading):
    """A blend that does not look at the titles of new items."""

    _grown: Mapping[str, ScoringRecommender] = {}  # type: ignore[assignment]


def without(split: Split, held_back: np.ndarray) -> Split:
    """The split without some rows of the catalogue and their events."""
    kept, catalogue = ~held_back, split.catalogue
    columns = {name: getattr(catalogue, name)[kept] for name in ("domain", "item_id", "title", "brand", "categories")}
    of_events = kept[split.interactions.item]
    log = split.interactions.select(of_events)
    log = replace(log, item=(np.cumsum(kept) - 1)[log.item])
    less = Catalogue(domains=catalogue.domains, **columns)
    return replace(split, catalogue=less, interactions=log, part=split.part[of_events])


def entries_of(
    parts: Mapping[str, StoredRecommender],
    catalogue: Catalogue,
    domain: str,
    queries: Sequence[RankingQuery],
    targets: Sequence[str],
) -> Entries:
    """The best items of each part for each query, with what all parts say of them."""
    first, made = catalogue.rows_of(domain)[0], []
    for start in range(0, len(queries), BATCH):
        asked = queries[start : start + BATCH]
        ranked = [part.rank(asked, POOL) for part in parts.values()]
        pools = [
            sorted(set().union(*(one.item_ids[:POOL] for one in of_query))) for of_query in zip(*ranked, strict=True)
        ]
        query_N = np.repeat(np.arange(len(asked)), [len(pool) for pool in pools])
        ids = [item for pool in pools for item in pool]
        place_N = catalogue.find(domain, ids) - first
        target_N = np.array(targets[start : start + BATCH], dtype=object)[query_N]
        share_N = {name: shares(part, domain, asked)[query_N, place_N] for name, part in parts.items()}
        made.append((start + query_N, np.array(ids, dtype=object) == target_N, share_N))
    none = np.zeros(sum(len(query_N) for query_N, _, _ in made))
    return Entries(
        query_N=np.concatenate([query_N for query_N, _, _ in made]),
        is_target_N=np.concatenate([is_target_N for _, is_target_N, _ in made]),
        log_prob_N=none,
        item_head_N=none,
        share_N={name: np.concatenate([share_N[name] for _, _, share_N in made]) for name in parts},
        of_parts_N=np.ones(len(none), dtype=bool),
        num_queries=len(queries),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("domain")
    parser.add_argument("names", nargs="*", default=PARTS)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks")
    asked = parser.parse_args()
    domain, split = asked.domain, read_split(asked.data)
    rows = split.catalogue.rows_of(domain)
    drawn = np.random.default_rng(asked.seed).choice(rows, round(asked.share * len(rows)), replace=False)
    less = without(split, np.isin(np.arange(len(split.catalogue)), drawn))
    with tempfile.TemporaryDirectory() as folder:
        parts, _ = made_parts(asked.names, less, domain, asked.seed, Path(asked.networks or folder))
    queries, targets = validation_queries(less, domain, 8000, asked.seed)
    setting = best_setting(entries_of(parts, less.catalogue, domain, queries, targets), (0.0,), (0.0,))
    print({name: weight for name, (weight, _) in setting.parts.items()})

    all_queries = split.queries(domain, TEST, max_history=max(1, len(split.interactions)))
    queries, targets = ranking_queries(split, all_queries, np.arange(len(all_queries)))
    new_ids = set(split.catalogue.item_id[drawn].tolist())
    is_new_Q = np.array([target in new_ids for target in targets])

    def judged(name: str, recommender: Recommender) -> np.ndarray:
        rankings = [
            ranking
            for start in range(0, len(queries), BATCH)
            for ranking in recommender.rank(queries[start : start + BATCH], K)
        ]
        value_Q = ndcg(*count_rankings(rankings, targets), K)
        listed = [item in new_ids for ranking in rankings for item in ranking.item_ids[:K]]
        told = [
            "{:.4f} [{:.4f}, {:.4f}]".format(*bootstrap_interval(value_Q[of]))
            for of in (is_new_Q, ~is_new_Q, is_new_Q | True)
        ]
        print(f"{name}: new {told[0]}, others {told[1]}, all {told[2]}, {np.mean(listed):.3f} of lists new", flush=True)
        return value_Q

    print(
        f"{domain}: {len(new_ids):,} of {len(rows):,} items held back, targets of {is_new_Q.sum():,} of "
        f"{len(queries):,} queries"
    )
    for name, part in parts.items():
        if (grown := part.with_catalogue(split.catalogue)) is not None:
            judged(name, grown)
    kinds = {"blend, unaware": Unaware, "blend, reading": Reading, "blend": Blend}
    value_of_Q = {}
    for name, kind in kinds.items():
        blend = kind.of(setting, domain, parts, less.catalogue).with_catalogue(split.catalogue)
        value_of_Q[name] = judged(name, BlendedParts(blend))
    for better, worse in (("blend", "blend, unaware"), ("blend", "blend, reading")):
        for name, of in (("new", is_new_Q), ("others", ~is_new_Q), ("all", is_new_Q | True)):
            test = compare_pair(value_of_Q[better][of], value_of_Q[worse][of], seed=0)
            print(f"{better} less {worse}, {name}: {test.mean:+.4f} ({test.low:+.4f} to {test.high:+.4f})")


if __name__ == "__main__":
    main()
