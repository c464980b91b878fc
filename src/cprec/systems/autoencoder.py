"""Codes of vectors by a small network that is trained for them.

Suffixes: N vectors, D width, H hidden width, C latent width, K codes of a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cprec.systems.clusters import nearest
from cprec.systems.quantise import Residual, clusters_of

HIDDEN, LATENT = 128, 32
"""Widths; the network of TIGER has hidden layers of 512, 256 and 128, and as wide a latent vector."""
STEPS, BATCH, RATE = 600, 1024, 2e-3
"""Steps, vectors of a step at most, and the learning rate of Adam."""
COMMITMENT = 0.25
"""Weight of the distance of latent vectors from their centres, as theirs."""
DECAY = 0.95
"""Of the moving averages that centres are."""
DEAD = 0.03
"""A centre with less than this share of the mean number of vectors begins anew."""


@dataclass(frozen=True)
class Autoencoder(Residual):
    """Residual codes of the latent vectors of a small network, which learns to restore vectors from their centres
    (RQ-VAE: Lee et al. 2022 and Zeghidour et al. 2021; of items, Rajput et al. 2023, section 3.1).

    Per vector x with latent vector z, centres e of each level and what these leave of z, r:

        |x - decoder(sum of e)|^2  +  COMMITMENT * sum over levels: |r - sg(e)|^2

    where the decoder's gradient goes straight to z. Centres begin at k-means of the first batch, as theirs do, and are
    moving averages of what they code (theirs are trained); one that codes next to nothing begins anew at what a vector
    of the batch leaves, as Zeghidour et al. have it. One hidden layer (theirs: three), vectors scaled to variance one.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    """Weights and biases of the encoder: float64[out, in] and [out]."""

    def latent(self, vectors_ND: np.ndarray) -> np.ndarray:
        (weight_HD, bias_H), (weight_CH, bias_C) = self.layers
        hidden_NH = np.maximum(vectors_ND @ weight_HD.T + bias_H, 0)
        latent_NC: np.ndarray = hidden_NH @ weight_CH.T + bias_C
        return latent_NC

    @classmethod
    def fit(cls, vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> Autoencoder:
        """By `STEPS` steps of Adam on the CPU; torch's own seed is left as it is."""
        generator, size = np.random.default_rng(seed), min(BATCH, len(vectors_ND))
        mean_D, scale = vectors_ND.mean(0), vectors_ND.std() or 1.0
        scaled_ND = torch.from_numpy((vectors_ND - mean_D) / scale).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = vectors_ND.shape[1]
            encoder = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENT))
            decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE)
        averages: list[_Averages] = []
        for _ in range(STEPS):
            batch_ND = scaled_ND[generator.choice(len(scaled_ND), size, replace=False)]
            latent_NC = encoder(batch_ND)
            left_NC, loss = latent_NC, torch.zeros(())
            for level in range(num_levels):
                points_NC = left_NC.detach()
                if level == len(averages):
                    averages.append(_Averages(*clusters_of(points_NC, num_codes, generator)))
                chosen_NC = averages[level].chosen(points_NC, generator)
                loss = loss + COMMITMENT * (left_NC - chosen_NC).square().sum(1).mean()
                left_NC = left_NC - chosen_NC
            # The value is the sum of centres, the gradient goes to the latent vector.
            restored_ND = decoder(latent_NC - left_NC.detach())
            loss = loss + (batch_ND - restored_ND).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weight_HD, bias_H, *last = (each.detach().double().numpy() for each in encoder.parameters())
        first = weight_HD / scale, bias_H - weight_HD @ mean_D / scale
        return cls(tuple(each.centre_KC.double().numpy() for each in averages), (first, (last[0], last[1])))


class _Averages:
    """Centres of a level as moving averages of what they code."""

    def __init__(self, centre_KC: torch.Tensor, code_N: torch.Tensor) -> None:
        self.count_K = torch.bincount(code_N, minlength=len(centre_KC)).float()
        self.sum_KC = centre_KC * self.count_K[:, None]
        self.centre_KC = centre_KC

    def chosen(self, points_NC: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """The centres nearest to points, which then move towards these: [N, C]."""
        code_N = nearest(points_NC, self.centre_KC)
        chosen_NC = self.centre_KC[code_N]
        counts_K = torch.bincount(code_N, minlength=len(self.count_K)).float()
        self.count_K = DECAY * self.count_K + (1 - DECAY) * counts_K
        self.sum_KC = DECAY * self.sum_KC + (1 - DECAY) * torch.zeros_like(self.sum_KC).index_add_(0, code_N, points_NC)
        mean = len(points_NC) / len(self.count_K)
        dead = (self.count_K < DEAD * mean).nonzero()[:, 0]
        anew = points_NC[generator.integers(0, len(points_NC), len(dead))]
        self.count_K[dead], self.sum_KC[dead] = mean, anew * mean
        self.centre_KC = self.sum_KC / self.count_K[:, None]
        return chosen_NC
