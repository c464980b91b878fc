"""Clusters of points by k-means (Lloyd 1982). Suffixes: N points, K clusters, D width."""

from __future__ import annotations

import torch


def k_means(
    points_ND: torch.Tensor, centre_KD: torch.Tensor, num_rounds: int, *, moves_empty: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of points after some rounds from those given, and the cluster of each point: [K, D], int64[N].

    A centre that is nearest to no point stays where it is, or, with `moves_empty`, begins anew at one of the points
    farthest from their centres, so that no cluster is wasted.
    """
    for _ in range(num_rounds):
        cluster_N = nearest(points_ND, centre_KD)
        size_K = torch.bincount(cluster_N, minlength=len(centre_KD))
        sum_KD = torch.zeros_like(centre_KD).index_add_(0, cluster_N, points_ND)
        mean_KD = sum_KD / size_K.clamp(min=1)[:, None]
        if moves_empty and (empty_K := (size_K == 0).nonzero()[:, 0]).numel():
            distance_N = (points_ND - centre_KD[cluster_N]).square().sum(1)
            farthest_N = distance_N.argsort(descending=True, stable=True)
            mean_KD[empty_K] = points_ND[farthest_N[: len(empty_K)]]
            centre_KD = mean_KD
        else:
            centre_KD = torch.where((size_K > 0)[:, None], mean_KD, centre_KD)
    return centre_KD, nearest(points_ND, centre_KD)


def nearest(points_ND: torch.Tensor, centre_KD: torch.Tensor) -> torch.Tensor:
    """The number of the centre with the least Euclidean distance from each point: int64[N]."""
    return (points_ND @ centre_KD.T - centre_KD.square().sum(1) / 2).argmax(1)
