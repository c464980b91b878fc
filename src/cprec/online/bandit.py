"""Diag-LinUCB on clusters of users, after Online Matching (Yi et al. 2023).

A user is a few weights w on the clusters of user vectors nearest to theirs, and the reward of an item is linear in w.
Each edge of a cluster c and an item v has its own coefficient t, learnt from two sums over events with rewards r:

    w(u, c)     softmax over the M nearest clusters of -|u - centre(c)|^2 / temperature
    n(c, v)     sum of w(u, c)^2
    b(c, v)     sum of w(u, c) r
    t(c, v)     (L m + b) / (L + n), with the mean m and the precision L of a prior
    score       mean + alpha deviation = sum over c of w t + alpha sqrt(sum over c of w^2 / (L + n))

This is LinUCB (Li et al. 2010) with nothing off the diagonal of its matrix, so that nothing is inverted, and sums of
several machines are added up, in any order. With M = 1 it is LinUCB itself. With more, every edge takes the whole
reward for its own: for a user halfway between two clusters, means tend to twice the rewards that such users gave.

Deviations: the body of the paper was not at hand; the equations are those that descriptions of it agree on. There,
weights are a softmax of inner products; here of distances, which is the same for vectors and centres of length one. A
cluster has edges to the items nearest to it there; here to all, and `posterior` takes candidates. LinUCB's prior is m =
0 and L = 1, our defaults. Suffixes: U users, E events, K clusters, M the nearest, D width, V items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cprec.errors import ConfigError, DataError
from cprec.systems.clusters import k_means

ROUNDS = 20
"""Rounds of k-means."""


@dataclass(frozen=True, eq=False)
class UserClusters:
    """Centres of user vectors, and how users are weights on the nearest of them."""

    centre_KD: np.ndarray
    num_nearest: int
    temperature: float
    """In squared distances: the lower it is, the more of the weight has the nearest cluster."""

    def weights(self, users_UD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest clusters of users, nearest first and the first of equals, and their weights, which sum to one:
        int64[U, M], float[U, M]."""
        users = _checked(users_UD, self.centre_KD.shape[1])
        # The squared length of the user is missing: it is the same for all clusters.
        distance_UK = (self.centre_KD**2).sum(1) - 2 * users @ self.centre_KD.T
        cluster_UM = np.argsort(distance_UK, axis=1, kind="stable")[:, : self.num_nearest]
        distance_UM = np.take_along_axis(distance_UK, cluster_UM, axis=1)
        weight_UM = np.exp((distance_UM[:, :1] - distance_UM) / self.temperature)
        return cluster_UM, weight_UM / weight_UM.sum(1, keepdims=True)


def cluster_users(
    users_UD: np.ndarray, num_clusters: int, num_nearest: int = 3, temperature: float | None = None, *, seed: int = 0
) -> UserClusters:
    """Clusters by k-means, begun at a seeded sample of the users.

    `temperature` is the mean squared distance from the own centre unless given, so that the scale of vectors does not
    matter. Raises ConfigError for settings that do not fit the users, DataError for vectors that are none.
    """
    users = _checked(users_UD)
    distinct = np.unique(users, axis=0)
    if not 1 <= num_nearest <= num_clusters <= len(distinct):
        raise ConfigError(
            f"num_nearest={num_nearest} and num_clusters={num_clusters} for {len(distinct):,} different user vectors: "
            "expected 1 <= num_nearest <= num_clusters <= vectors"
        )
    start_KD = np.random.default_rng(seed).permutation(distinct)[:num_clusters]
    centres, own_U = k_means(torch.from_numpy(users), torch.from_numpy(start_KD), ROUNDS, moves_empty=True)
    centre_KD = centres.numpy()
    if temperature is None:  # where every user is a centre, any will do
        temperature = float(((users - centre_KD[own_U.numpy()]) ** 2).sum(1).mean()) or 1.0
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} must be above 0, in squared distances of user vectors")
    return UserClusters(centre_KD, num_nearest, temperature)


def _checked(users_UD: np.ndarray, width: int | None = None) -> np.ndarray:
    users = np.asarray(users_UD, dtype=float)
    if users.ndim != 2 or not users.shape[1] or width not in (None, users.shape[1]):
        raise DataError(f"user vectors of shape {users.shape}: expected one row a user, of width {width or 'D'}")
    if not np.isfinite(users).all():
        raise DataError(f"the vector of user {int((~np.isfinite(users)).any(1).argmax())} is not finite")
    return users


class Posterior(NamedTuple):
    """What is believed of the rewards of items: independent normal distributions, [U, V] each."""

    mean_UV: np.ndarray
    """Minus infinity for an item that must not be shown."""
    deviation_UV: np.ndarray
    """In standard deviations of a single reward."""

    def upper(self, alpha: float) -> np.ndarray:
        """Upper confidence bounds; with 0 the greedy means."""
        return self.mean_UV + alpha * self.deviation_UV


class DiagLinUCB:
    """The two sums of all edges, 16 bytes each, and what follows from them."""

    def __init__(
        self, clusters: UserClusters, num_items: int, *, prior_mean: float = 0.0, prior_precision: float = 1.0
    ) -> None:
        if not prior_precision > 0:
            raise ConfigError(f"prior_precision={prior_precision} must be above 0: it counts as that many events")
        self.clusters, self.prior_mean, self.prior_precision = clusters, prior_mean, prior_precision
        self.count_KV, self.reward_KV = np.zeros((2, len(clusters.centre_KD), num_items))

    def update(self, users_ED: np.ndarray, items_E: np.ndarray, rewards_E: np.ndarray) -> None:
        """Learn who was shown which item, by number, with which reward. Each item of a slate is an event.

        Raises DataError, and learns nothing, for items that are not there and rewards that are not finite.
        """
        num_items = self.count_KV.shape[1]
        if not len(users_ED) == len(items_E) == len(rewards_E):
            raise DataError(f"{len(users_ED)} users, {len(items_E)} items, {len(rewards_E)} rewards: expected one each")
        for event in np.flatnonzero(~((items_E >= 0) & (items_E < num_items) & np.isfinite(rewards_E)))[:1]:
            raise DataError(
                f"event {event} has item {items_E[event]} and reward {rewards_E[event]}: expected an item from 0 to "
                f"{num_items - 1} (`extend` adds new ones) and a finite reward"
            )
        cluster_EM, weight_EM = self.clusters.weights(users_ED)
        edges = cluster_EM, items_E[:, None]
        np.add.at(self.count_KV, edges, weight_EM**2)
        np.add.at(self.reward_KV, edges, weight_EM * rewards_E[:, None])

    def merge(self, other: DiagLinUCB) -> None:
        """Learn what another one over the same clusters and items has learnt from other events."""
        same = np.array_equal(self.clusters.centre_KD, other.clusters.centre_KD)
        if not same or self.count_KV.shape != other.count_KV.shape:
            raise ConfigError("sums over other clusters or items cannot be added: both need the same ones")
        self.count_KV += other.count_KV
        self.reward_KV += other.reward_KV

    def extend(self, num_new: int) -> None:
        """Add items after the last one. They have the prior."""
        self.count_KV, self.reward_KV = np.pad([self.count_KV, self.reward_KV], ((0, 0), (0, 0), (0, num_new)))

    def posterior(self, users_UD: np.ndarray, items: np.ndarray | None = None) -> Posterior:
        """Of all items; or of some by number, int64[N] for all users or int64[U, N], which then take the place of V:
        such as the first N of a recommender's rankings. U x M x V numbers exist at once."""
        cluster_UM, weight_UM = self.clusters.weights(users_UD)
        edges = cluster_UM if items is None else (cluster_UM[:, :, None], np.atleast_2d(items)[:, None])
        precision_UMV = self.prior_precision + self.count_KV[edges]
        coefficient_UMV = (self.prior_precision * self.prior_mean + self.reward_KV[edges]) / precision_UMV
        mean_UV = np.einsum("um,umv->uv", weight_UM, coefficient_UMV)
        return Posterior(mean_UV, np.sqrt(np.einsum("um,umv->uv", weight_UM**2, 1 / precision_UMV)))
