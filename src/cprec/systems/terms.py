"""Loss terms: a softmax over a support (all items, sampled ones, pairs), contrasts between states, spread of states.

A term is called with states, the items that are to score high, and all items' vectors; it gives a loss summed over the
targets, float32, without dimensions. Suffixes: N targets, U different items among them, W states of a target, D width,
V items, M shared negatives, C clusters, H negatives of a target's own, K all of a target's. `hidden_ND @ weight_VD.T`
are the scores of all items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from cprec import distributed
from cprec.batch import IGNORE
from cprec.errors import ConfigError
from cprec.systems.clusters import k_means, nearest
from cprec.systems.dropout import dropout
from cprec.systems.graph import SLOPE, ItemGraph, soft_rows
from cprec.train.loss import linear_cross_entropy, linear_divergence

CHUNK = 256
"""Targets whose scores of negatives exist at once."""

SPREAD = 1024
"""States that `dispersive` compares at most."""

Term = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(states [N, ..., D], targets [N], vectors of all items [V, D]) -> summed loss."""

Teacher = Callable[[torch.Tensor, Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""(states [N, ..., D], arrays of the batch by name, vectors of all items [V, D]) -> summed loss: a term that reads more
of a row than its target."""

Trained = Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""Arrays of the batch by name -> (states [N, ..., D], vectors of all items [V, D]) of a model that is not trained any
more, without gradients."""

Objective = Literal["softmax", "sampled_softmax", "bce", "bpr", "bpr_max"]


class _SampledSoftmax(torch.autograd.Function):
    """Loss and gradients of a few targets at a time, which stay in the cache; the gradients already in the forward
    pass, where the scores are at hand. Suffix C: targets of a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        positive_ND: torch.Tensor,
        negative_MD: torch.Tensor,
        target_N: torch.Tensor,
        drawn_M: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        low_MD = negative_MD.to(dtype)
        grads = [torch.empty_like(hidden_ND), torch.empty_like(positive_ND), torch.zeros_like(negative_MD)]
        loss = hidden_ND.new_zeros(())
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden_CD, positive_CD = hidden_ND[rows], positive_ND[rows]
            scores_CM = (hidden_CD.to(dtype) @ low_MD.T).to(hidden_ND.dtype)
            scores_CM.masked_fill_(drawn_M == target_N[rows, None], -torch.inf)
            positive_C1 = (hidden_CD * positive_CD).sum(1, keepdim=True)
            total_C1 = torch.logaddexp(positive_C1, scores_CM.logsumexp(1, keepdim=True))
            loss += (total_C1 - positive_C1).sum()
            share_CM = scores_CM.sub_(total_C1).exp_().to(dtype)
            rest_C1 = (positive_C1 - total_C1).expm1()  # minus the share that the target lacks
            grads[0][rows] = rest_C1 * positive_CD + share_CM @ low_MD
            grads[1][rows] = rest_C1 * hidden_CD
            grads[2] += share_CM.T @ hidden_CD.to(dtype)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(each * grads[0] for each in ctx.saved_tensors), None, None, None


def check_objective(objective: str, num_negatives: int) -> None:
    """Raises ConfigError for an unknown objective, and for negatives where it uses none or needs some."""
    if objective not in get_args(Objective):
        raise ConfigError(f"objective={objective!r}: expected {', '.join(get_args(Objective))}")
    if (objective == "softmax") != (num_negatives == 0):
        hint = "softmax ranks all items and draws none" if objective == "softmax" else "give 1 or more"
        raise ConfigError(f"num_negatives={num_negatives} with objective={objective}: {hint}")


def objective_loss(
    objective: Objective,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    *,
    num_negatives: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The summed loss of targets under an objective; negatives are uniform over the items, drawn with torch's seed.

    - `softmax`: cross-entropy over all items, never held for all targets at once; products in `dtype`.
    - `sampled_softmax`: cross-entropy over the target and M negatives that all targets of the step share; a negative
      that is the target does not count (Jean et al. 2015, with a uniform proposal, whose correction cancels); products
      with negatives in `dtype`.
    - `bce`: log-sigmoid of the target against M negatives of each target's own (Kang and McAuley 2018 have M = 1).
    - `bpr`: log-sigmoid of the difference to each of M own negatives, their mean (Rendle et al. 2009).
    - `bpr_max`: minus the log of the differences' sigmoids, weighted by a softmax over M shared negatives, plus 0.5
      times their weighted squares (Hidasi and Karatzoglou 2018, equation 10).
    """
    if objective == "softmax":
        return linear_cross_entropy(hidden_ND, weight_VD, target_N, dtype)
    num_items = len(weight_VD)
    if objective == "sampled_softmax":
        drawn_M = torch.randint(num_items, (num_negatives,), device=hidden_ND.device)
        return _SampledSoftmax.apply(hidden_ND, weight_VD[target_N], weight_VD[drawn_M], target_N, drawn_M, dtype)
    positive_N = (hidden_ND * weight_VD[target_N]).sum(1)
    if objective in ("bce", "bpr"):
        drawn_NM = torch.randint(num_items, (len(target_N), num_negatives), device=hidden_ND.device)
        negative_NM = torch.einsum("nd,nmd->nm", hidden_ND, weight_VD[drawn_NM])
        if objective == "bce":
            return -(F.logsigmoid(positive_N).sum() + F.logsigmoid(-negative_NM).sum())
        return -F.logsigmoid(positive_N[:, None] - negative_NM).mean(1).sum()
    drawn_M = torch.randint(num_items, (num_negatives,), device=hidden_ND.device)
    negative_NM = hidden_ND @ weight_VD[drawn_M].T
    negative_NM = negative_NM.masked_fill(drawn_M == target_N[:, None], -1e9)
    share_NM = negative_NM.softmax(1)
    apart_N = (share_NM * torch.sigmoid(positive_N[:, None] - negative_NM)).sum(1)
    size_N = (share_NM * negative_NM.clamp(min=-1e4).square()).sum(1)
    return (0.5 * size_N - torch.log(apart_N + 1e-24)).sum()


def product_dtype() -> torch.dtype:
    """The numbers that products with all items' vectors are made in: bf16 where the machine is good at it."""
    return torch.bfloat16 if distributed.use_bf16("auto", distributed.pick_device()) else torch.float32


def next_item(objective: Objective, num_negatives: int = 0, temperature: float = 1.0) -> Term:
    """`objective_loss` as a term, of scores divided by a temperature; `product_dtype` says in which numbers."""
    dtype = product_dtype()

    def term(hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        scaled_ND = hidden_ND if temperature == 1 else hidden_ND / temperature
        return objective_loss(objective, scaled_ND, weight_VD, target_N, num_negatives=num_negatives, dtype=dtype)

    return term


def divergence(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, items_NK: torch.Tensor, chance_NK: torch.Tensor
) -> torch.Tensor:
    """The summed Kullback-Leibler divergence of the item distributions of states from given ones, over K items each."""
    cross_entropy = linear_cross_entropy(hidden_ND, weight_VD, items_NK, product_dtype(), chance_NK=chance_NK)
    return cross_entropy + torch.special.xlogy(chance_NK, chance_NK).sum()


class Distillation:
    """A teacher: draws a model's states, [N, D] or [N, W, D], to those of a trained model at the same targets, and its
    scores of all items to that model's (Xu et al. 2025).

    A state h whose counterpart is t costs direction * (1 - cos(h, t)) + distance * |h - t|; all W are added up. The
    last state costs scores * KL(p, q) besides, where p and q are the softmaxes of the trained model's scores and of its
    own. Vectors of items need not be shared, widths of states must be.
    """

    def __init__(self, trained: Trained, *, direction: float, distance: float, scores: float) -> None:
        self._trained, self._direction, self._distance, self._scores = trained, direction, distance, scores
        self._dtype = product_dtype()

    def __call__(self, hidden: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor) -> torch.Tensor:
        given, given_VD = self._trained(rows)
        turned, distance = 1 - F.cosine_similarity(hidden, given, dim=-1), (hidden - given).norm(dim=-1)
        loss = self._direction * turned.sum() + self._distance * distance.sum()
        if self._scores:
            last_ND, given_ND = (each if each.ndim == 2 else each[:, -1] for each in (hidden, given))
            loss = loss + self._scores * linear_divergence(last_ND, weight_VD, given_ND, given_VD, self._dtype)
        return loss


class LateAlignment(nn.Module):
    """A teacher: draws what a model makes of each window of a step, its state at the last target, [N, D], through a
    matrix to the state that a trained model has there, and away from those that it has of the other windows.

    The cross-entropy of `in_batch`, averaged over the windows and counted once for each target of the step.
    """

    def __init__(self, trained: Trained, size: int, given_size: int, temperature: float) -> None:
        super().__init__()
        self._trained, self._temperature = trained, temperature
        self.matrix = nn.Linear(size, given_size, bias=False)

    def forward(
        self, hidden_ND: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        given_NG, _ = self._trained(rows)
        last_R = (rows["targets"] != IGNORE).sum(1).cumsum(0) - 1  # targets stand row after row
        row_R = torch.arange(len(last_R), device=last_R.device)
        loss = in_batch(self.matrix(hidden_ND[last_R]), given_NG[last_R], row_R, self._temperature)
        return loss * len(hidden_ND) / len(last_R)


class MiddleHeads(nn.Module):
    """A term of a target's states before the last one, [N, W, D], each through a matrix of its own; their sum."""

    def __init__(self, term: Term, num_heads: int, size: int) -> None:
        super().__init__()
        self._term = term
        self.heads = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(num_heads))

    def forward(self, hidden_NWD: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        states = zip(self.heads, hidden_NWD[:, :-1].unbind(1), strict=True)
        return torch.stack([self._term(head(state_ND), target_N, weight_VD) for head, state_ND in states]).sum()


def info_nce(
    first_ND: torch.Tensor, second_ND: torch.Tensor, label_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy of each vector's partner against all vectors of both sides that have another label.

    Summed over both directions and halved (van den Oord et al. 2018; the mask of labels is that of Qin et al. 2024).
    """
    both = torch.cat([first_ND, second_ND])
    partner = (first_ND * second_ND).sum(1).repeat(2) / temperature
    label = label_N.repeat(2)
    others = (both @ both.T / temperature).masked_fill(label[:, None] == label, -1e9)
    return (torch.logaddexp(partner, others.logsumexp(1)) - partner).sum() / 2


def in_batch(
    first_ND: torch.Tensor, second_ND: torch.Tensor, label_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy of each first vector's partner, by cosines over a temperature, against all second vectors that have
    another label (Gao et al. 2021, equation 1): summed, in this one direction."""
    score_NN = F.normalize(first_ND, dim=1) @ F.normalize(second_ND, dim=1).T / temperature
    is_same_NN = (label_N[:, None] == label_N).fill_diagonal_(False)
    partner_N = torch.arange(len(label_N), device=label_N.device)
    return F.cross_entropy(score_NN.masked_fill(is_same_NN, -torch.inf), partner_N, reduction="sum")


def same_history(num_pairs: int, temperature: float, *, cosine: bool = False) -> Term:
    """Contrast of a history's last `num_pairs` states, [N, W, D], with as many before them: each is to be near its
    partner and far from both states of that pair in all other rows. The mean over the pairs."""

    def term(hidden_NWD: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        states_NWD = F.normalize(hidden_NWD, dim=-1) if cosine else hidden_NWD
        first, second = (part.unbind(1) for part in states_NWD[:, -2 * num_pairs :].chunk(2, dim=1))
        row_N = torch.arange(len(hidden_NWD), device=hidden_NWD.device)
        pairs = zip(first, second, strict=True)
        return torch.stack([info_nce(one_ND, other_ND, row_N, temperature) for one_ND, other_ND in pairs]).mean()

    return term


def same_target(temperature: float) -> Term:
    """Contrast of two histories with one target, [N, 2, D], against those with other targets: coarse intentions (Qin et
    al. 2024, equation 8)."""

    def term(hidden_N2D: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return info_nce(hidden_N2D[:, 0], hidden_N2D[:, 1], target_N, temperature)

    return term


class MixOfNeighbours(nn.Module):
    """Contrast of each history's state, the first of [N, 1 + K or more, D], with a mix of those of its K neighbours,
    which come next, against the states and mixes of all other histories (Cui et al. 2025).

    The mix is weighted by attention over frozen vectors of the items, with some weights dropped out.
    """

    def __init__(
        self, frozen_VF: np.ndarray, size: int, num_neighbours: int, temperature: float, dropout: float
    ) -> None:
        super().__init__()
        padded = np.concatenate([frozen_VF, np.zeros((1, frozen_VF.shape[1]))]).astype(np.float32)
        self.register_buffer("frozen", torch.from_numpy(padded), persistent=False)
        self.matrix = nn.Linear(frozen_VF.shape[1], size, bias=False)
        self.vector = nn.Linear(2 * size, 1, bias=False)
        for linear in (self.matrix, self.vector):
            nn.init.xavier_uniform_(linear.weight, gain=nn.init.calculate_gain("relu"))
        self._num, self._temperature, self._dropout = num_neighbours, temperature, dropout

    def weights(self, items_NWT: torch.Tensor) -> torch.Tensor:
        """Of each neighbour in the mix, softmax over K of LeakyReLU(a . [M s, M s_k]): NK. A history's s is the mean of
        its items' frozen vectors; M and a are trained."""
        frozen = self.get_buffer("frozen")
        histories = items_NWT.flatten(0, 1)
        mean = F.embedding_bag(histories, frozen, mode="mean", padding_idx=len(frozen) - 1)
        mapped_NWD = self.matrix(mean).unflatten(0, items_NWT.shape[:2])
        theirs_NKD = mapped_NWD[:, 1:]
        both = torch.cat([mapped_NWD[:, :1].expand_as(theirs_NKD), theirs_NKD], dim=2)
        return F.leaky_relu(self.vector(both).squeeze(2), SLOPE).softmax(1)

    def forward(
        self, hidden_NWD: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        end = 1 + self._num
        weight_NK = dropout(self.weights(rows["items"][:, :end]), self._dropout, training=self.training)
        mix_ND = torch.einsum("nk,nkd->nd", weight_NK, hidden_NWD[:, 1:end])
        label_N = torch.arange(len(mix_ND), device=mix_ND.device)
        return info_nce(hidden_NWD[:, 0], mix_ND, label_N, self._temperature)


class MaxMargin(nn.Module):
    """How far negatives come nearer to a history than the target less a margin, max(0, negative - target + margin), in
    the mean over a target's negatives (Ying et al. 2018, equation 1).

    Negatives are M items that all targets of the step share, drawn uniformly from some, and each row's own in `hard`.
    The item of the history and the target do not count.
    """

    def __init__(self, margin: float, num_negatives: int, drawn_from: np.ndarray) -> None:
        super().__init__()
        self._margin, self._num_negatives = margin, num_negatives
        self.register_buffer("drawn_from", torch.from_numpy(drawn_from.astype(np.int64)), persistent=False)

    def forward(
        self, hidden_ND: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        drawn_from, target_N1, hard_NH = self.get_buffer("drawn_from"), rows["targets"][:, None], rows["hard"]
        drawn_M = drawn_from[torch.randint(len(drawn_from), (self._num_negatives,), device=hidden_ND.device)]
        target_score_N1 = torch.einsum("nd,nkd->nk", hidden_ND, weight_VD[target_N1])
        hard_score_NH = torch.einsum("nd,nhd->nh", hidden_ND, weight_VD[hard_NH.clamp(max=len(weight_VD) - 1)])
        score_NK = torch.cat([hidden_ND @ weight_VD[drawn_M].T, hard_score_NH], dim=1)
        item_NK = torch.cat([drawn_M.expand(len(hidden_ND), -1), hard_NH], dim=1)
        counts_NK = (item_NK != target_N1) & (item_NK != rows["items"]) & (item_NK != len(weight_VD))
        nearer_NK = (score_NK - target_score_N1 + self._margin).clamp(min=0) * counts_NK
        return (nearer_NK.sum(1) / counts_NK.sum(1).clamp(min=1)).sum()


class SkipGram(nn.Module):
    """Minus the log-sigmoid of the target's score, and of minus the scores of M negatives of each target's own, drawn
    with chances count ** power, where what was never counted counts as one (Mikolov et al. 2013, equation 4). A
    negative that is the target does not count."""

    def __init__(self, counts_V: np.ndarray, num_negatives: int, power: float) -> None:
        super().__init__()
        chance_V = np.maximum(counts_V, 1.0) ** power
        self.register_buffer("chance_V", torch.from_numpy(chance_V), persistent=False)
        self._num_negatives = num_negatives

    def forward(self, hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        num_drawn = len(target_N) * self._num_negatives
        drawn_NM = torch.multinomial(self.get_buffer("chance_V"), num_drawn, replacement=True).view(len(target_N), -1)
        target_score_N = (hidden_ND * weight_VD[target_N]).sum(1)
        score_NM = torch.einsum("nd,nmd->nm", hidden_ND, weight_VD[drawn_NM])
        counts_NM = drawn_NM != target_N[:, None]
        return -(F.logsigmoid(target_score_N).sum() + (F.logsigmoid(-score_NM) * counts_NM).sum())


class SameCluster(nn.Module):
    """Contrast of each state, [N, 2, D], with the nearest of C centres, against states and centres of other clusters:
    fine intentions (Qin et al. 2024, equation 11). The centres do not learn; `fit` finds them anew.

    They are a parameter without a gradient, so that checkpoints hold them.
    """

    def __init__(self, num_clusters: int, size: int, temperature: float) -> None:
        super().__init__()
        self.centre_CD = nn.Parameter(torch.zeros(num_clusters, size), requires_grad=False)
        self._temperature = temperature

    def forward(self, hidden_N2D: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        losses = []
        for hidden_ND in hidden_N2D.unbind(1):
            nearest_N = nearest(hidden_ND.detach(), self.centre_CD)
            losses.append(info_nce(hidden_ND, self.centre_CD[nearest_N], nearest_N, self._temperature))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def fit(self, states_ND: torch.Tensor, seed: int) -> None:
        """Find the centres of states by k-means, begun at states drawn without replacement."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(states_ND), generator=generator)[: len(self.centre_CD)]
        self.centre_CD[: len(drawn)] = states_ND[drawn.to(states_ND.device)]
        self.centre_CD.copy_(k_means(states_ND, self.centre_CD, num_rounds=10)[0])


def of_mean(term: Term) -> Term:
    """A term of the mean over a target's states, [N, W, D]."""
    return lambda hidden_NWD, target_N, weight_VD: term(hidden_NWD.mean(1), target_N, weight_VD)


def of_state(term: Term, place: int) -> Term:
    """A term of one of a target's states, [N, W, D]."""
    return lambda hidden_NWD, target_N, weight_VD: term(hidden_NWD[:, place], target_N, weight_VD)


def by_step(terms: Sequence[Term]) -> Term:
    """The mean of terms of a target's states, [N, W, D]: the first term is of the first state, and so on."""

    def term(hidden_NWD: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return torch.stack([each(hidden_NWD[:, k], target_N, weight_VD) for k, each in enumerate(terms)]).mean()

    return term


def likeness(temperature: float = 1.0) -> Term:
    """Minus the mean Kullback-Leibler divergence between the item distributions of a target's states, [N, W, D].

    The mean is over all ordered pairs; minimising the term spreads the states (Tang et al. 2025, equation 9). The
    second of a pair has no gradient, as in their code.
    """

    def term(hidden_NWD: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        log_NWV = (hidden_NWD @ weight_VD.T / temperature).log_softmax(-1)
        share_NWV = log_NWV.exp()
        # KL(p, q) = sum of p log p - sum of p log q, for each ordered pair; 0 on the diagonal.
        negative_entropy_NW = (share_NWV * log_NWV).sum(-1)
        cross_NWW = share_NWV @ log_NWV.detach().mT
        divergence_NWW = negative_entropy_NW[:, :, None] - cross_NWW
        num_states = hidden_NWD.shape[1]
        return -divergence_NWW.sum() / (num_states * (num_states - 1))

    return term


def dispersive(temperature: float) -> Term:
    """Keeps states, [N, D], apart from each other, whatever their targets (Wang and He 2025):

        log of the mean over all pairs, those of a state with itself among them, of exp(-d / temperature)

    where d is the mean square of the difference of two states; times the number of targets. Of many states `SPREAD` at
    most are compared, which stand at equal distances in the step.
    """

    def term(hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        some_ND = hidden_ND[:: max(1, -(-len(hidden_ND) // SPREAD))]
        square_N = some_ND.square().sum(1)
        apart_NN = (square_N[:, None] + square_N - 2 * some_ND @ some_ND.T).clamp(min=0) / hidden_ND.shape[1]
        spread = torch.logsumexp(-apart_NN.flatten() / temperature, 0) - 2 * np.log(max(1, len(some_ND)))
        return len(hidden_ND) * spread

    return term


class Successors(nn.Module):
    """Draws each item's vector to those of the items that came after it in training (Zhu et al. 2024).

    At each position with a target, the cross-entropy between two softmaxes over all items, both over a temperature: of
    the item's row of counts (`data.links.followers`), divided by its greatest, and of the products of the item's input,
    its vector times the root of D with some entries dropped out, with all items' vectors.
    """

    def __init__(self, counts: sparse.csr_array, temperature: float, dropout: float) -> None:
        super().__init__()
        more, least = soft_rows(counts, temperature)
        for name, array, kind in (
            ("start_V", more.indptr, np.int64),
            ("column_E", more.indices, np.int64),
            ("more_E", more.data, np.float32),
            ("least_V", least, np.float32),
        ):
            self.register_buffer(name, torch.from_numpy(array.astype(kind)), persistent=False)
        self._temperature, self._dropout, self._dtype = temperature, dropout, product_dtype()

    def forward(
        self, hidden_ND: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        item_N = rows["items"][rows["targets"] != IGNORE]
        column_NK, more_NK = self._of(item_N)
        scaled_ND = weight_VD[item_N] * weight_VD.shape[1] ** 0.5
        input_ND = dropout(scaled_ND, self._dropout, training=self.training) / self._temperature
        # Chances are those above the least, which all items have: of these the sum of all products is taken.
        loss = linear_cross_entropy(input_ND, weight_VD, column_NK, self._dtype, chance_NK=more_NK)
        least_N = self.get_buffer("least_V")[item_N]
        return loss - least_N @ (input_ND @ weight_VD.sum(0))

    def _of(self, item_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that came after each item, and their chances above the least, filled up with chances of 0: NK each."""
        start_V, column_E, more_E = (self.get_buffer(name) for name in ("start_V", "column_E", "more_E"))
        num_N = start_V[item_N + 1] - start_V[item_N]
        place_K = torch.arange(max(1, int(num_N.max())), device=item_N.device)
        is_there_NK = place_K < num_N[:, None]
        edge_NK = torch.where(is_there_NK, start_V[item_N][:, None] + place_K, 0)
        return column_E[edge_NK], more_E[edge_NK] * is_there_NK


class Alignment(nn.Module):
    """Contrast of two vectors of the targets: an item's first vector is to be near its own second one and those of its
    neighbours in a graph, and far from those of the other targets of a step; so are second and first (Liu et al. 2025).

    With s_ij the cosine of i's first and j's second vector over a temperature, and P(i) the item i with its neighbours,

        loss(i) = log sum_j exp(s_ij) - log sum_{j in P(i)} exp(s_ij)

    where j runs over the different items among the targets; its mean over both directions, summed over the targets.
    """

    def __init__(
        self,
        parts: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        graph: ItemGraph,
        temperature: float,
    ) -> None:
        """`parts` gives the two vectors of items by number: UD each."""
        super().__init__()
        self.graph, self._parts, self._temperature = graph, parts, temperature

    def forward(self, hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        item_U, count_U = target_N.unique(return_counts=True)
        first_UD, second_UD = (F.normalize(part_UD, dim=1) for part_UD in self._parts(item_U))
        score_UU = first_UD @ second_UD.T / self._temperature
        is_far_UU = ~self._near(item_U)
        losses = [
            each_UU.logsumexp(1) - each_UU.masked_fill(is_far_UU, -torch.inf).logsumexp(1)
            for each_UU in (score_UU, score_UU.T)
        ]
        return torch.stack(losses).mean(0) @ count_U.to(score_UU.dtype)

    def _near(self, item_U: torch.Tensor) -> torch.Tensor:
        """Which of some items, sorted by number, each is to be near, itself among them: bool[U, U]."""
        neighbour_UK = self.graph.neighbours(item_U)
        place_UK = torch.searchsorted(item_U, neighbour_UK).clamp(max=len(item_U) - 1)
        row, column = (item_U[place_UK] == neighbour_UK).nonzero(as_tuple=True)
        near_UU = torch.eye(len(item_U), dtype=torch.bool, device=item_U.device)
        near_UU[row, place_UK[row, column]] = True
        return near_UU
