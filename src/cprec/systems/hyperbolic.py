"""Histories and items as points of a hyperboloid, scored by their distance.

A point is (x0, x) with x0^2 = 1 + |x|^2. The Lorentz product of two points, -x0 y0 + x . y, is minus the cosh of their
distance, so items are ordered by products as they are by distances. Suffixes: N targets, V items, C targets of a chunk,
R rows, T positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import Encoder
from cprec.systems.items import IdTable, ItemTable
from cprec.systems.terms import CHUNK


class DistanceModel(SequenceModel):
    """A sequence model on a hyperboloid, whose products are minus the cosh of distances."""

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        return distance_scores(products)


class OnHyperboloid(ItemTable):
    """Trained vectors mapped onto the hyperboloid: v becomes (cosh |v|, sinh |v| v / |v|)."""

    def __init__(self, tangents: IdTable) -> None:
        super().__init__()
        self.tangents, self.num_items, self.num_special = tangents, tangents.num_items, tangents.num_special

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        tangents = self.tangents.vectors(items)
        length = tangents.norm(dim=-1, keepdim=True)
        return torch.cat([length.cosh(), length.sinh() * F.normalize(tangents, dim=-1)], dim=-1)


class ToHyperboloid(Encoder):
    """An encoder between points of the hyperboloid. A state s becomes (-(1 + |s|^2)^(1/2), s): with the sign of the
    first coordinate turned, its product with an item's point is the Lorentz product."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(inputs_RTD[:, :, 1:], lengths_R)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return _point(self.encoder.read(embedded_RTD, lengths_R))

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return _point(self.encoder.read_last(embedded_RTD, lengths_R))


def _point(state: torch.Tensor) -> torch.Tensor:
    return torch.cat([-(1 + state.square().sum(-1, keepdim=True)).sqrt(), state], dim=-1)


def distance_scores(product: torch.Tensor) -> torch.Tensor:
    """Scores of points by their Lorentz products: -2 - 2 distance^2, of the same shape. Products above -1, which
    rounding makes, count as -1.

    >>> distance_scores(-torch.tensor([0.0, 1.0, 2.0]).cosh()).tolist()  # of distances 0, 1 and 2
    [-2.0, -4.0, -10.0]
    """
    return -2 - 2 * torch.acosh(-product.clamp(max=-1)).square()


def nearest_item(hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all items, scored by `distance_scores`, as a loss term."""
    loss: torch.Tensor = _DistanceSoftmax.apply(hidden_ND, weight_VD, target_N)
    return loss


class _DistanceSoftmax(torch.autograd.Function):
    """Loss and gradients of a few targets at a time, in the forward pass, where the scores are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        grads = [torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)]
        loss = hidden_ND.new_zeros(())
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            cosh_CV = (hidden_ND[rows] @ weight_VD.T).neg_().clamp_(min=1)
            distance_CV, sinh_CV = cosh_CV.acosh(), cosh_CV.square().sub_(1).sqrt_()
            log_CV = (-2 * distance_CV.square()).log_softmax(1)
            at_C1 = target_N[rows, None]
            loss -= log_CV.gather(1, at_C1).sum()
            # d score / d product = 4 distance / sinh(distance), which is 4 where the distance is 0.
            slope_CV = torch.where(sinh_CV > 1e-3, 4 * distance_CV / sinh_CV, 4.0)
            share_CV = log_CV.exp_()
            share_CV.scatter_add_(1, at_C1, share_CV.new_full(at_C1.shape, -1))
            share_CV *= slope_CV
            grads[0][rows] = share_CV @ weight_VD
            grads[1] += share_CV.T @ hidden_ND[rows]
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(each * grads[0] for each in ctx.saved_tensors), None
