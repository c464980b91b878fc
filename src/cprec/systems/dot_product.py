"""Models that score by products of vectors, of histories and of items, and the recommender that ranks by them.

Suffixes: R rows, T positions, D width, N targets, V items, S special rows, U users, Q queries, C queries of a chunk,
B items of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.recommender import RankingQuery
from cprec.scoring import ScoringRecommender, check_domain
from cprec.systems.encoders import Encoder, LatentSteps
from cprec.systems.graph import Prompts, Step, UserItemGraph
from cprec.systems.intents import IntentSteps
from cprec.systems.items import ItemTable
from cprec.systems.signals import TrainingSequences, padded, recent

ENCODE_BATCH = 512
"""Histories encoded at once."""
ALIKE = 64
"""Histories of like length that are encoded at once where the scores of a batch are kept: there is less padding."""
SCORES = 1 << 20
"""Scores counted at once: as many as stay in the cache."""
STATES_OF = 64
"""Histories whose states' item distributions exist at once."""
ITEM_BLOCK = 1024
"""Items of a product on a CPU: with all of a large catalogue it takes twice as long."""

Rows = Mapping[str, torch.Tensor]
"""Arrays of a batch by name. `items`: int64[R, T], padded on the right with V. `targets`: int64[R, T], the item to
predict at each position or IGNORE, or int64[R], one for the whole row. `users`: int64[R], rows of the training users;
-1 for others. `gaps`: float32[R, T], for models that read them; see `signals.Gaps` and `signals.Baskets`."""


class Vectors(NamedTuple):
    """All that a model computes from its weights alone: once for a training step, once for all rankings."""

    items_VD: torch.Tensor
    """Output vectors: a score is the product of a history with one of them."""
    inputs: torch.Tensor
    """Input vectors, one row for each item; a sequence model has special rows after them."""
    users_UD: torch.Tensor | None = None
    """Of the users in training, for a model that knows them."""


class DotProductModel(nn.Module, ABC):
    """Represents histories and items by vectors, whose products are scores."""

    @abstractmethod
    def vectors(self) -> Vectors:
        """Everything that depends on the weights alone."""

    @abstractmethod
    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Representations of training rows and the items that are to score high with them: [N, ..., D], N."""

    @abstractmethod
    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        """Representations of whole histories, `items` and `users`: RD."""

    def products(self, hidden_QD: torch.Tensor, items_VD: torch.Tensor, out_QV: torch.Tensor) -> torch.Tensor:
        """Products of representations, as `encode` gives them, with the vectors of all items, in `out_QV`."""
        block = ITEM_BLOCK if out_QV.device.type == "cpu" else max(1, len(items_VD))
        for start in range(0, len(items_VD), block):
            items_BD = items_VD[start : start + block]
            torch.mm(hidden_QD, items_BD.T, out=out_QV[:, start : start + block])
        return out_QV

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        """What products mean as scores, one by one; the order of products is that of scores."""
        return products


class SequenceModel(DotProductModel):
    """Reads histories with an encoder. The same vectors stand for an item at both ends unless `output` has others."""

    def __init__(
        self,
        items: ItemTable,
        encoder: Encoder | LatentSteps | IntentSteps,
        pool: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda hidden, items_VD: hidden,
        prompts: Prompts | None = None,
        output: ItemTable | None = None,
    ) -> None:
        """`pool` makes one state of those that an encoder with latent steps gives, with the items' vectors: RD of RWD
        and VD. `prompts` stand before whole histories. `output`, without special rows, holds the vectors that states
        are multiplied with; without it they are those of `items`."""
        super().__init__()
        self.items, self.encoder, self._pool, self.prompts, self.output = items, encoder, pool, prompts, output

    def vectors(self, items_K: torch.Tensor | None = None) -> Vectors:
        """See `DotProductModel.vectors`. With the numbers of some items, those of them alone: in the rows that go with
        these vectors an item is its place among them, and special rows are numbered after the last."""
        if items_K is None:
            inputs, num_items = self.items.vectors(), self.items.num_items
        else:
            special_S = torch.arange(self.items.num_special, device=items_K.device) + self.items.num_items
            inputs, num_items = self.items.vectors(torch.cat([items_K, special_S])), len(items_K)
        return Vectors(inputs[:num_items] if self.output is None else self.output.vectors(items_K), inputs)

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DotProductModel.states`: at each position with a target, or at the ends of rows with one target each.

        Rows may hold several histories for one target, [R, W, T]; their states are [R, W, D].
        """
        items, targets = rows["items"], rows["targets"]
        if targets.ndim == 1:
            return self._last(vectors, rows).unflatten(0, items.shape[:-1]), targets
        assert isinstance(self.encoder, Encoder), "latent steps follow a whole history, not each of its positions"
        found, at = [], []
        for part_P, width in parts_of_like_length((rows["items"] != len(vectors.items_VD)).sum(1)):
            part = {name: rows[name][part_P, :width] for name in ("items", "gaps") if name in rows}
            hidden_PTD = self.encoder(*_inputs(vectors, part))
            row_N, place_N = (targets[part_P, :width] != IGNORE).nonzero(as_tuple=True)
            found.append(hidden_PTD[row_N, place_N])
            at.append(part_P[row_N] * targets.shape[1] + place_N)
        at_N = torch.cat(at)
        order_N = at_N.argsort()  # back to the order of rows
        return torch.cat(found)[order_N], targets.flatten()[at_N[order_N]]

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        return self._pool(self._last(vectors, rows), vectors.items_VD)

    def _last(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        if self.prompts is not None:
            return self.encoder.last(*self.prompts(rows["items"].flatten(0, -2), vectors.inputs))
        return self.encoder.last(*_inputs(vectors, rows))


def parts_of_like_length(lengths_R: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Rows that are read together, and how many of their positions: all of them, unless more than half of the positions
    would be padding on a CPU, where padding takes time. Then a row has more than half the length of the longest one of
    its part.

    >>> parts_of_like_length(torch.tensor([2, 9, 4, 1, 3]))
    [(tensor([1]), 9), (tensor([2, 4]), 4), (tensor([0]), 2), (tensor([3]), 1)]
    """
    longest, num_rows = max(1, int(lengths_R.max())), len(lengths_R)
    if lengths_R.device.type != "cpu" or 2 * int(lengths_R.sum()) >= longest * num_rows:
        return [(torch.arange(num_rows, device=lengths_R.device), longest)]
    halvings_R = (longest / lengths_R.clamp(min=1)).log2().floor()
    parts = [(halvings_R == halvings).nonzero().squeeze(1) for halvings in halvings_R.unique()]
    return [(part_P, max(1, int(lengths_R[part_P].max()))) for part_P in parts]


def states_of(model: DotProductModel, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """What a trained model makes of training rows, without dropout and gradients: states as `DotProductModel.states`
    has them, and the vectors of all items."""
    model.eval()
    with torch.no_grad():
        vectors = model.vectors()
        return model.states(vectors, rows)[0], vectors.items_VD


def _inputs(vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """What an encoder reads: the vectors of all rows' items, with their gaps as a last column where there are any, and
    how many positions are filled: RTD, R. The first special row, after the items, is padding."""
    items_RT = rows["items"].flatten(0, -2)
    inputs_RTD = F.embedding(items_RT, vectors.inputs)
    if "gaps" in rows:
        inputs_RTD = torch.cat([inputs_RTD, rows["gaps"][:, :, None]], dim=2)
    return inputs_RTD, (items_RT != len(vectors.items_VD)).sum(1)


def settled(hidden_RWD: torch.Tensor, items_VD: torch.Tensor, *, stop_below: float, temperature: float) -> torch.Tensor:
    """The first state whose item distribution diverges from the one before by less than `stop_below`; the last where
    there is none: RD."""
    if not stop_below or hidden_RWD.shape[1] == 1:
        return hidden_RWD[:, -1]
    chosen = []
    for part_CWD in hidden_RWD.split(STATES_OF):
        log_CWV = (part_CWD @ items_VD.T / temperature).log_softmax(-1)
        moved_CW = (log_CWV[:, :-1].exp() * (log_CWV[:, :-1] - log_CWV[:, 1:])).sum(-1)
        is_settled_CW = moved_CW < stop_below
        is_settled_CW[:, -1] = True
        chosen.append(part_CWD[torch.arange(len(part_CWD)), 1 + is_settled_CW.byte().argmax(1)])
    return torch.cat(chosen)


class MeanOfNetworks(DotProductModel):
    """The mean of the scores of several networks over the same items: their vectors stand side by side, so that one
    product adds up theirs."""

    def __init__(self, networks: Sequence[SequenceModel]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    @property
    def items(self) -> ItemTable:
        """That of one of them, for what they share."""
        return self._all[0].items

    def vectors(self) -> Vectors:
        items, inputs, _ = zip(*(network.vectors() for network in self._all), strict=True)
        return Vectors(torch.cat(items, dim=1), torch.cat(inputs, dim=1))

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Never called: each network learns by itself, and together they would learn as one."""
        raise AssertionError("networks that are averaged are trained one by one")

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        encoded = [network.encode(own, rows) for network, own in self._each(vectors)]
        return torch.cat(encoded, dim=1) / len(self.networks)

    @property
    def _all(self) -> list[SequenceModel]:
        return cast("list[SequenceModel]", list(self.networks))

    def _each(self, vectors: Vectors) -> Iterator[tuple[SequenceModel, Vectors]]:
        """Each network with the vectors that are its own."""
        parts = (one.chunk(len(self.networks), dim=1) for one in (vectors.items_VD, vectors.inputs))
        for network, items_VD, inputs in zip(self._all, *parts, strict=True):
            yield network, Vectors(items_VD, inputs)


def mean_of(networks: Sequence[SequenceModel]) -> SequenceModel | MeanOfNetworks:
    """A model whose scores are the mean of theirs."""
    return networks[0] if len(networks) == 1 else MeanOfNetworks(networks)


class GraphModel(DotProductModel):
    """Users and items by the mean of their vectors before, between and after the steps of smoothing on the graph of
    training events; with `side_by_side` by all of these vectors, whose products add up.

    A user who is not in training starts from `new_user` (zeros without it), with the items of their history as
    neighbours. With `cosine` all vectors are scaled to length one at the end.
    """

    def __init__(
        self,
        users: ItemTable,
        items: ItemTable,
        graph: UserItemGraph,
        steps: Sequence[Step],
        *,
        side_by_side: bool = False,
        cosine: bool = False,
        new_user: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.users, self.items, self.graph, self.steps = users, items, graph, nn.ModuleList(steps)
        self._side_by_side, self._cosine, self._new_user = side_by_side, cosine, new_user

    def vectors(self) -> Vectors:
        """See `DotProductModel.vectors`; histories are read by the items' vectors before each step, side by side."""
        users, items = zip(*self.graph.layers(self.users.vectors(), self.items.vectors(), self.steps), strict=True)
        return Vectors(self._whole(items), torch.cat(items[:-1], dim=1), self._whole(users))

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DotProductModel.states`: the training users in `users`."""
        assert vectors.users_UD is not None
        return vectors.users_UD[rows["users"]], rows["targets"]

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        assert vectors.users_UD is not None
        users_R = rows["users"]
        out_RD = vectors.users_UD[users_R.clamp(min=0)]
        unknown_R = users_R < 0
        if unknown_R.any():
            items_RT = rows["items"][unknown_R]
            lengths_R = (items_RT < self.items.num_items).sum(1)
            parts = vectors.inputs.chunk(len(self.steps), dim=1)
            start_RD = parts[0].new_zeros(len(items_RT), parts[0].shape[1])
            layers = [start_RD if self._new_user is None else self._new_user(items_RT)]
            for step, items_VD in zip(self.steps, parts, strict=True):
                layers.append(step(layers[-1], self.graph.new_user_sums(items_VD, items_RT, lengths_R)))
            out_RD[unknown_R] = self._whole(layers)
        return out_RD

    def _whole(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """One vector of those of all layers."""
        whole = torch.cat(tuple(layers), dim=-1) if self._side_by_side else _mean(layers)
        return F.normalize(whole, dim=-1) if self._cosine else whole


def _mean(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean, added up layer by layer: stacking first takes several times as long, forwards and backwards."""
    return sum(layers[1:], layers[0]) / len(layers)


class DotProductRecommender(ScoringRecommender):
    """Ranks by the products of a history's representation with the items' vectors. A history without events in the
    domain is represented by padding alone."""

    scale = "logit"
    seconds = 0.0

    def __init__(
        self,
        name: str,
        data: TrainingSequences,
        model: DotProductModel,
        max_length: int,
        history: Callable[[Ragged], np.ndarray] | None = None,
        gaps: Callable[[Ragged, Sequence[str]], Ragged] | None = None,
    ) -> None:
        """The latest `max_length` events are read. `history` makes the model's rows of item numbers of them, int64[R,
        T]; without it they are those events, padded. `gaps` says how long after the event before each was, of histories
        and their users, for a model that reads it."""
        self.name, self.catalogue, self.domain = name, data.catalogue, data.domain
        self._users = {user: row for row, user in enumerate(data.users)}
        self.model, self._history, self.max_length = model.eval(), history or self._read, max_length
        self._gaps = gaps
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        with torch.inference_mode():
            vectors = model.vectors()
            self._vectors = vectors._replace(items_VD=vectors.items_VD.contiguous())

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`. Raises ConfigError for another domain than the one trained on."""
        check_domain(self.name, (self.domain,), domain)
        users = [query.user or "" for query in queries]
        return self.score_histories(self.histories(domain, queries), users).cpu().numpy()

    @torch.inference_mode()
    def user_vectors(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """Representations of the histories of queries, whose products with items' vectors are scores: float32[Q, D]. A
        model with several heads has dimensions for them before the last one. Raises ConfigError for another domain than
        the one trained on."""
        check_domain(self.name, (self.domain,), domain)
        users = [query.user or "" for query in queries]
        return self.encode(self.histories(domain, queries), users).cpu().numpy()

    @torch.inference_mode()
    def score_histories(self, histories: Ragged, users: Sequence[str]) -> torch.Tensor:
        """Scores of all items after histories of item numbers, of users by name: float32[Q, V]."""
        return self.model.scores(self._products(self.encode(histories, users)))

    @torch.inference_mode()
    def encode(self, histories: Ragged, users: Sequence[str]) -> torch.Tensor:
        """The vectors of users by name, with histories of item numbers, as `DotProductModel.encode` gives them: QD."""
        order = np.argsort(np.minimum(histories.lengths, self.max_length), kind="stable")
        size = ALIKE if self._vectors.items_VD.device.type == "cpu" else len(order)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        hidden_QD = torch.cat([self._encoded(histories.take(part), [users[row] for row in part]) for part in parts])
        return hidden_QD[torch.from_numpy(np.argsort(order)).to(hidden_QD.device)]

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many items score above each target, and how many as high, itself included: int64[Q] each.

        Counted in the scores of the full catalogue, without sorting them. A target that is left out, because the
        history has it, is tied with nothing (0): a miss.
        """
        better, tied = (np.empty(len(targets), dtype=np.int64) for _ in range(2))
        # Histories of like length are encoded together, so that there is little padding.
        order = np.argsort(np.minimum(histories.lengths, self.max_length), kind="stable")
        num_items, device = len(self._vectors.items_VD), self._vectors.items_VD.device
        num_rows = max(1, SCORES // num_items)
        with torch.inference_mode():
            room = torch.empty(2, min(num_rows, len(order)), num_items, device=device)  # used again and again
            for start in range(0, len(order), ENCODE_BATCH):
                batch = order[start : start + ENCODE_BATCH]
                hidden_QD = self._encoded(histories.take(batch), [users[row] for row in batch])
                for hidden_CD, first in zip(hidden_QD.split(num_rows), range(0, len(batch), num_rows), strict=True):
                    chosen = batch[first : first + num_rows]
                    scores_CV, marks_CV = room[:, : len(chosen)]
                    self._products(hidden_CD, scores_CV)
                    target_C1 = torch.from_numpy(targets[chosen]).to(device)[:, None]
                    score_C1 = scores_CV.gather(1, target_C1)
                    if exclude_seen:
                        seen = histories.take(chosen)
                        scores_CV[torch.from_numpy(seen.row_of), torch.from_numpy(seen.values)] = -torch.inf
                        scores_CV.scatter_(1, target_C1, score_C1)
                    # Ones and zeros as floats are added up many times as fast as truth values.
                    better[chosen] = torch.gt(scores_CV, score_C1, out=marks_CV).sum(1).cpu().numpy()
                    tied[chosen] = torch.eq(scores_CV, score_C1, out=marks_CV).sum(1).cpu().numpy()
        if exclude_seen:
            tied[histories.row_of[histories.values == targets[histories.row_of]]] = 0
        return better, tied

    def _read(self, histories: Ragged) -> np.ndarray:
        return padded(recent(histories, self.max_length), len(self._vectors.items_VD))[0]

    def _encoded(self, histories: Ragged, users: Sequence[str]) -> torch.Tensor:
        """Representations of histories: QD."""
        device = self._vectors.items_VD.device
        rows = {
            "items": self._history(histories),
            "users": np.array([self._users.get(user, -1) for user in users], dtype=np.int64),
        }
        if self._gaps is not None:
            rows["gaps"] = padded(recent(self._gaps(histories, users), self.max_length), 0)[0]
        on_device = {name: torch.from_numpy(array).to(device) for name, array in rows.items()}
        return self.model.encode(self._vectors, on_device)

    def _products(self, hidden_QD: torch.Tensor, out_QV: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of all items: QV."""
        items_VD = self._vectors.items_VD
        if out_QV is None:
            out_QV = hidden_QD.new_empty(len(hidden_QD), len(items_VD))
        return self.model.products(hidden_QD, items_VD, out_QV)
