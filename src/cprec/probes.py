"""Probes of user vectors: what a linear map finds in what a recommender makes of a history.

Three questions, after the probes of playlist vectors by Papreja, Venkateswara and Panchanathan (2019): how long the
history is, whether its events are in their order, and which category most of its items have. A probe is fitted on one
half of the users and judged on the other. What it finds is in the vector. Whether scores use it is another question,
and a probe that is not linear may find more.

Suffixes: U users, E examples, V items, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.evaluate.statistics import bootstrap_interval
from cprec.progress import say
from cprec.recommender import Recommender
from cprec.systems.dot_product import DotProductRecommender
from cprec.systems.signals import recent

MIN_USERS = 20
"""Users that a probe needs."""
PENALTY = 1.0
"""Weight of the squared coefficients of standardised vectors beside summed losses: the default of scikit-learn."""
CONSTANT = 1e-6
"""A direction that varies by no more than this share of its size says nothing: sums in another order differ as much."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe found, with a 95 % bootstrap interval over the users that it was judged on."""

    asks: str
    """length, order or category."""
    measure: str
    """R2 or accuracy."""
    value: float
    low: float
    high: float
    chance: float
    """The value without the vector."""
    num_users: int
    """Users that it was judged on."""

    def __str__(self) -> str:
        interval = f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.asks}: {self.measure} {interval}, chance {self.chance:.3f}, {self.num_users:,} users"


def probe(
    recommender: Recommender, histories: Ragged, users: Sequence[str] | None = None, *, seed: int = 0
) -> dict[str, Probe]:
    """Probes, by what they ask, of histories of item numbers in the recommender's domain, one for each user.

    They ask about the latest events, as many as the model reads; users without any are left out. Given the names of the
    users (platform/user_id), a model that has learnt vectors of its training users is asked for these. The order is
    always asked about without names: what else a model knows of a user's events, their times, would give it away.

    - length: R2 of ridge regression on the logarithm of the number of events. Chance is 0, that of the mean. The
      interval takes the spread of lengths as it is.
    - order: accuracy of logistic regression that tells histories from the same events in another order, drawn by
      `seed`. Users with two different items take part, each with both. Chance is 0.5.
    - category: accuracy of multinomial logistic regression on the most frequent category of the items, of equal ones
      the first by name; items without a category do not count. Chance is the share of the category that most users have
      in the first half; one that nobody has there is a miss.

    A probe that the histories cannot answer (too few users, all of one length, no categories) is left out, and a
    message says so. Raises ConfigError for recommenders without user vectors, and for names that do not match.
    """
    if not isinstance(recommender, DotProductRecommender):
        raise ConfigError(
            f"{recommender.name} has no user vectors: probes need a system that ranks by products of the vectors of "
            "users and items, such as SASRec or LightGCN"
        )
    if users is not None and len(users) != len(histories):
        raise ConfigError(f"{len(users):,} names of users for {len(histories):,} histories: give one for each, or none")
    asked = np.flatnonzero(histories.lengths)
    read, num_users = recent(histories.take(asked), recommender.max_length), len(asked)
    names = [""] * num_users if users is None else [users[row] for row in asked.tolist()]
    vectors_UD = _vectors(recommender, read, names) if num_users else np.empty((0, 0))
    generator = np.random.default_rng(seed)
    is_first_U = generator.permutation(num_users) < num_users / 2
    found = (
        _length(read, vectors_UD, is_first_U),
        _order(recommender, read, is_first_U, generator),
        _category(recommender, read, vectors_UD, is_first_U),
    )
    return {each.asks: each for each in found if each is not None}


def _vectors(recommender: DotProductRecommender, histories: Ragged, users: Sequence[str]) -> np.ndarray:
    """The vectors of users, those of several heads side by side: float64[U, D]."""
    return recommender.encode(histories, users).flatten(1).double().cpu().numpy()


def _length(read: Ragged, vectors_UD: np.ndarray, is_first_U: np.ndarray) -> Probe | None:
    lengths_U = np.log(read.lengths)
    if not _can_ask("length", lengths_U, is_first_U):
        return None
    x_ED, judged_UD = _standardised(vectors_UD, is_first_U)
    away_U = lengths_U - lengths_U[is_first_U].mean()
    weight_D = np.linalg.solve(x_ED.T @ x_ED + PENALTY * np.eye(x_ED.shape[1]), x_ED.T @ away_U[is_first_U])
    left_U = away_U[~is_first_U] - judged_UD @ weight_D
    return _probe("length", "R2", 1 - left_U**2 / (away_U[~is_first_U] ** 2).mean(), 0.0)


def _order(
    recommender: DotProductRecommender, read: Ragged, is_first_U: np.ndarray, generator: np.random.Generator
) -> Probe | None:
    is_other = read.values != np.repeat(read.values[read.offsets[:-1]], read.lengths)
    can_change = np.unique(read.row_of[is_other])
    read, is_first_U = read.take(can_change), is_first_U[can_change]
    if not _can_ask("order", np.arange(len(read)), is_first_U):
        return None
    nameless = [""] * len(read)
    versions = [_vectors(recommender, rows, nameless) for rows in (read, shuffled(read, generator))]
    is_right_E = _classified(np.concatenate(versions), np.repeat([0, 1], len(read)), np.tile(is_first_U, 2))
    return _probe("order", "accuracy", is_right_E.reshape(2, -1).mean(0), 0.5)


def _category(
    recommender: DotProductRecommender, read: Ragged, vectors_UD: np.ndarray, is_first_U: np.ndarray
) -> Probe | None:
    rows = recommender.catalogue.rows_of(recommender.domain)
    user, category = most_frequent(read, recommender.catalogue.categories[rows].astype(str))
    is_first_U = is_first_U[user]
    if not _can_ask("category", category, is_first_U):
        return None
    is_largest_U = category[~is_first_U] == np.bincount(category[is_first_U]).argmax()
    is_right_U = _classified(vectors_UD[user], category, is_first_U)
    return _probe("category", "accuracy", is_right_U.astype(float), float(is_largest_U.mean()))


def _can_ask(asks: str, answer_U: np.ndarray, is_first_U: np.ndarray) -> bool:
    """Whether there are enough users, and different answers in each half; where not, that is said."""
    if len(answer_U) < MIN_USERS:
        say(f"no probe of {asks}: there are {len(answer_U)} users to ask about it, and {MIN_USERS} are needed")
        return False
    if any(len(np.unique(half)) < 2 for half in (answer_U[is_first_U], answer_U[~is_first_U])):
        say(f"no probe of {asks}: it is the same for all users of one half")
        return False
    return True


def _probe(asks: str, measure: str, value_U: np.ndarray, chance: float) -> Probe:
    value, low, high = bootstrap_interval(value_U)
    return Probe(asks=asks, measure=measure, value=value, low=low, high=high, chance=chance, num_users=len(value_U))


def shuffled(rows: Ragged, generator: np.random.Generator) -> Ragged:
    """Rows in an order drawn among all others; each must have two different values.

    >>> shuffled(Ragged.of([[1, 2], [3, 3, 3, 4]]), np.random.default_rng(0)).values[:2].tolist()
    [2, 1]
    """
    values, row_of, is_same = rows.values, rows.row_of, np.ones(len(rows), dtype=bool)
    while is_same.any():
        drawn = rows.values[np.lexsort((generator.random(len(values)), row_of))]
        values = np.where(is_same[row_of], drawn, values)
        is_same = np.bincount(row_of, weights=values != rows.values) == 0
    return Ragged(values, rows.offsets)


def most_frequent(rows: Ragged, labels_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with a labelled item, rising, and the most frequent label of each, as its place among the sorted labels;
    of equal ones the first. An empty label is none.

    >>> row, label = most_frequent(Ragged.of([[0, 1, 1], [2], [0, 1]]), np.array(["tea", "mug", ""]))
    >>> row.tolist(), label.tolist()
    ([0, 2], [1, 1])
    """
    names, label_V = np.unique(labels_V, return_inverse=True)
    is_known = labels_V[rows.values] != ""
    pairs = rows.row_of[is_known] * len(names) + label_V[rows.values[is_known]]
    pairs, counts = np.unique(pairs, return_counts=True)
    row, label = np.divmod(pairs, len(names))
    order = np.lexsort((label, -counts, row))
    found, first = np.unique(row[order], return_index=True)
    return found, label[order][first]


def _standardised(vectors_ED: np.ndarray, is_first_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both halves, less the mean of the first and in its standard deviations; 0 in directions that do not vary."""
    first_ED = vectors_ED[is_first_E]
    deviation_D = first_ED.std(0)
    deviation_D[deviation_D <= CONSTANT * np.abs(first_ED).max(0)] = np.inf
    standard_ED = (vectors_ED - first_ED.mean(0)) / deviation_D
    return standard_ED[is_first_E], standard_ED[~is_first_E]


def _classified(vectors_ED: np.ndarray, class_E: np.ndarray, is_first_E: np.ndarray) -> np.ndarray:
    """Whether logistic regression on the first half is right about each example of the other: bool[E]."""
    x_ED, judged_ED = _standardised(vectors_ED, is_first_E)
    classes, own_E = np.unique(class_E[is_first_E], return_inverse=True)
    own_EC = np.eye(len(classes))[own_E]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Summed cross-entropy and the penalty, which spares the intercepts, the last row; and the gradient."""
        weight_DC, bias_C = np.split(flat.reshape(-1, len(classes)), [-1])
        log_EC = log_softmax(x_ED @ weight_DC + bias_C, axis=1)
        wrong_EC = np.exp(log_EC) - own_EC
        gradient = np.concatenate([x_ED.T @ wrong_EC + PENALTY * weight_DC, wrong_EC.sum(0, keepdims=True)])
        return PENALTY / 2 * (weight_DC**2).sum() - (log_EC * own_EC).sum(), gradient.ravel()

    start = np.zeros((x_ED.shape[1] + 1) * len(classes))
    weight_DC, bias_C = np.split(minimize(loss, start, jac=True, method="L-BFGS-B").x.reshape(-1, len(classes)), [-1])
    chosen_E: np.ndarray = classes[(judged_ED @ weight_DC + bias_C).argmax(1)]
    return chosen_E == class_E[~is_first_E]
