"""A head that denoises: from a state and noise to the vector of the next item, and rankings by what is near that.

Items have tokens, which are given vectors. A noisy one is cos(a) * token + sin(a) * noise at an angle a from 0, the
token, to a right angle, noise alone. Suffixes: N states, V items, F width of tokens, D width of states, Q queries.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn

from cprec.systems.dot_product import DotProductModel, Rows, SequenceModel, Vectors

RIGHT_ANGLE = torch.pi / 2


def continuous_tokens(vectors_VF: np.ndarray, size: int) -> np.ndarray:
    """Vectors less their mean, in their `size` strongest directions, as far as there are so many, scaled so that the
    mean square of their numbers is 1: float32[V, size or fewer]. Vectors that are all equal stay zeros.

    >>> continuous_tokens(np.array([[1.0, 4], [3, 4], [5, 4]]), 1).round(3).astype(str).tolist()
    [['-1.225'], ['0.0'], ['1.225']]
    """
    centred_VF = vectors_VF.astype(np.float64) - vectors_VF.mean(0)
    _, _, axes_FF = np.linalg.svd(centred_VF, full_matrices=False)
    # A direction has either sign: its greatest number is positive.
    signs_F1 = np.sign(axes_FF[np.arange(len(axes_FF)), np.abs(axes_FF).argmax(1)])[:, None]
    token_VF = centred_VF @ (signs_F1 * axes_FF)[:size].T
    scale = np.sqrt(np.square(token_VF).mean())
    found: np.ndarray = (token_VF / (scale if scale > 0 else 1)).astype(np.float32)
    return found


class DiffusionHead(nn.Module):
    """A small network that tells the token of the next item from a noisy one, a state and the angle; a term of states.

    As a term it is the squared error at an angle and a noise that are drawn for each target, in the mean over a token's
    numbers. `denoised` begins at one fixed noise and takes steps of equal angles without further noise (Song et al.
    2021, DDIM), so that a state always has the same answer.
    """

    def __init__(self, token_VF: np.ndarray, size: int, *, num_steps: int, seed: int) -> None:
        """`size` is the width of states; `seed` decides the noise that `denoised` begins at."""
        super().__init__()
        width = token_VF.shape[1]
        self.register_buffer("token_VF", torch.from_numpy(token_VF), persistent=False)
        noise_F = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("noise_F", noise_F, persistent=False)
        self.network = nn.Sequential(
            nn.Linear(width + size + 2, 2 * size),
            nn.GELU(),
            nn.Linear(2 * size, 2 * size),
            nn.GELU(),
            nn.Linear(2 * size, width),
        )
        self._num_steps = num_steps

    def clean(self, noisy_NF: torch.Tensor, hidden_ND: torch.Tensor, angle_N1: torch.Tensor) -> torch.Tensor:
        """The token that is told from each noisy one: NF."""
        told: torch.Tensor = self.network(torch.cat([noisy_NF, hidden_ND, angle_N1.cos(), angle_N1.sin()], dim=1))
        return told

    def forward(self, hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        token_NF = self.get_buffer("token_VF")[target_N]
        angle_N1 = RIGHT_ANGLE * torch.rand(len(target_N), 1, device=token_NF.device)
        noisy_NF = angle_N1.cos() * token_NF + angle_N1.sin() * torch.randn_like(token_NF)
        return (self.clean(noisy_NF, hidden_ND, angle_N1) - token_NF).square().mean(1).sum()

    def denoised(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The token that each state leads to: NF."""
        noisy_NF = self.get_buffer("noise_F").expand(len(hidden_ND), -1)
        angles = torch.linspace(RIGHT_ANGLE, 0, self._num_steps + 1, device=hidden_ND.device)
        for angle, following in pairwise(angles):
            clean_NF = self.clean(noisy_NF, hidden_ND, angle.expand(len(hidden_ND), 1))
            noise_NF = (noisy_NF - angle.cos() * clean_NF) / angle.sin()
            noisy_NF = following.cos() * clean_NF + following.sin() * noise_NF
        return noisy_NF


class Denoised(DotProductModel):
    """A trained sequence model and its head, for rankings. With z the token that a state leads to, the score of an item
    is (1 - share) times the sequence model's, minus share times half the squared distance of z from the item's token.

    That is a product but for the square of z, which all items of a query have in common.
    """

    def __init__(self, network: SequenceModel, head: DiffusionHead, share: float) -> None:
        super().__init__()
        self.network, self.head, self._share = network, head, share

    def vectors(self) -> Vectors:
        """See `DotProductModel.vectors`."""
        vectors, token_VF = self.network.vectors(), self.head.get_buffer("token_VF")
        half_V1 = token_VF.square().sum(1, keepdim=True) / 2
        return vectors._replace(items_VD=torch.cat([vectors.items_VD, token_VF, half_V1], dim=1))

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Never called: the sequence model learns, and the head is a term of its states."""
        raise AssertionError("what is ranked by both parts is trained part by part")

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        hidden_QD = self.network.encode(vectors, rows)
        token_QF = self.head.denoised(hidden_QD)
        parts = [
            (1 - self._share) * hidden_QD,
            self._share * token_QF,
            token_QF.new_full((len(token_QF), 1), -self._share),
        ]
        return torch.cat(parts, dim=1)
