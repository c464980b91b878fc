"""Why an item has its score: what each part of a blend adds, against an average item of the domain.

A recommender that gives an item 5 times the score of an average one adds weight * log 5. So the parts of one item sum
up to how far its score lies above an average item's, and what moves all items alike counts for none.
Suffixes: Q queries, N items of the domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

THE_MODEL = "language model"
"""The part that is no recommender of its own: what the others leave of the score."""


def effects_of(
    weights: Mapping[str, float],
    priors: Mapping[str, np.ndarray],
    places: Sequence[int],
    scores: Sequence[float],
    num_items: int,
) -> list[dict[str, float]]:
    """What each part adds to the score of one item per query, by the parts' names, those of `weights`.

    `priors` are the weighted log-scores of all parts but the model, float64[Q, N]; `places` are the items, by column,
    and `scores` theirs. The model's average is chance, one in `num_items`, those of the domain.
    """
    rows = np.arange(len(places))
    of_parts = {name: prior_QN[rows, places] for name, prior_QN in priors.items()}
    out = {}
    for name, weight in weights.items():
        if name == THE_MODEL:
            others_Q = np.sum(list(of_parts.values()), axis=0) if of_parts else 0.0
            out[name] = np.asarray(scores) - others_Q + weight * np.log(num_items)
        else:
            average_Q = np.exp(priors[name] / weight).mean(axis=1)
            out[name] = of_parts[name] - weight * np.log(average_Q)
    return [{name: float(effect_Q[row]) for name, effect_Q in out.items()} for row in rows]
