"""What each recommender adds to a sum of log-scores, by weights of one half of the queries judged on the other.

    python benchmarks/parts.py DATA DOMAIN "transition graph (titles)" EASE popularity titles +SASRec "+ItemKNN"
                               [--queries 2000] [--floor 0.01]

`DATA` is a folder that `cprec prepare` wrote; the queries are those of validation. Names without a plus sign make the
sum; each name with one is added to it alone. A score counts as the logarithm of its share of the query's best, at least
of `floor`. Prints NDCG@10 over the full catalogue, items of the history left out, and what an addition changes, with
its paired 95 % interval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from cprec import lineup
from cprec.data.dataset import read_split
from cprec.evaluate.statistics import compare_pair
from cprec.rank.blend import shares
from cprec.ranks import ndcg
from cprec.tune import validation_queries

WEIGHTS = (0.0, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5)
BATCH = 256


def best_weights(log_PQN: np.ndarray, target_Q: np.ndarray) -> np.ndarray:
    """A weight for each part, one after the other and three times over, from the first part alone on."""
    weights = np.eye(len(log_PQN))[0]
    best = float(gains(weights, log_PQN, target_Q).mean())
    for _ in range(3):
        for part in range(len(weights)):
            for weight in WEIGHTS:
                tried = weights.copy()
                tried[part] = weight
                value = float(gains(tried, log_PQN, target_Q).mean()) if tried.any() else 0.0
                if value > best:
                    best, weights = value, tried
    return weights


def gains(weights: np.ndarray, log_PQN: np.ndarray, target_Q: np.ndarray) -> np.ndarray:
    """NDCG@10 of each query by the weighted sum; seen items have -inf in the first part, whose weight may be 0."""
    score_QN = np.tensordot(weights, np.where(np.isinf(log_PQN), 0.0, log_PQN), 1)
    score_QN[np.isinf(log_PQN[0])] = -np.inf
    own_Q1 = np.take_along_axis(score_QN, target_Q[:, None], 1)
    return ndcg((score_QN > own_Q1).sum(1), (score_QN == own_Q1).sum(1), 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("domain")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--floor", type=float, default=0.01)
    asked = parser.parse_args()
    split = read_split(asked.data)
    first = split.catalogue.rows_of(asked.domain)[0]
    queries, targets = validation_queries(split, asked.domain, asked.queries, seed=0)
    target_Q = split.catalogue.find(asked.domain, targets) - first
    logs = {}
    for name in (given.removeprefix("+") for given in asked.names):
        with tempfile.TemporaryDirectory() as folder:
            made = lineup.settings_of(name).make(split, asked.domain, seed=0, folder=Path(folder))
            batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
            share_QN = np.concatenate([shares(made, asked.domain, batch) for batch in batches])  # type: ignore[arg-type]
        logs[name] = np.log(np.maximum(share_QN, asked.floor))
        for row, query in enumerate(queries):
            logs[name][row, split.catalogue.find(asked.domain, sorted(query.exclude)) - first] = -np.inf
        print(f"{name}: {gains(np.ones(1), logs[name][None], target_Q).mean():.4f}")

    def judged(names: list[str]) -> np.ndarray:
        log_PQN = np.stack([logs[name] for name in names])
        out = np.empty(len(target_Q))
        for half in (0, 1):
            learnt, other = slice(half, None, 2), slice(1 - half, None, 2)
            weights = best_weights(log_PQN[:, learnt], target_Q[learnt])
            out[other] = gains(weights, log_PQN[:, other], target_Q[other])
            print("  " + ", ".join(f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True)))
        return out

    base = [name for name in asked.names if not name.startswith("+")]
    of_base = judged(base)
    print(f"{' + '.join(base)}: {of_base.mean():.4f}")
    for name in (given.removeprefix("+") for given in asked.names if given.startswith("+")):
        found = judged([*base, name])
        test = compare_pair(found, of_base, seed=0)
        print(f"and {name}: {found.mean():.4f}, {test.mean:+.4f} ({test.low:+.4f} to {test.high:+.4f})")


if __name__ == "__main__":
    main()
