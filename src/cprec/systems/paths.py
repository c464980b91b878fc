"""Lists of items by the probability of their codes, which are filled in a few at a time, in an order that the model
chooses.

A step fills in the masked codes that the model is surest of: one in each of the first `warm_up` steps, then `at_once`.
Which ones these are depends on the history and the codes that stand there already, and on nothing else. So each item
has one path, along which its score is added up,

    log P(item | history) = sum over steps, and the codes c that each fills in, of
                            log p(c | history, codes of the steps before) - log(items with the same codes)

and the probabilities of all combinations of codes sum to one. The score falls along a path, which makes that of a
beginning a bound for all items behind it: the best items can be proven. A model that fills in codes in any order has
other probabilities along other paths; these are the ones that are ranked by.

Suffixes: U users, V items, M beginnings (items of which some codes are known), C those that follow from them, E items
of beginnings, L codes of an item, K codes of a level, N rows that are read, D width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from cprec.data.ragged import Ragged
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.scoring import check_domain, histories_of, positions_of, rankings_of
from cprec.systems.cloze import CodeCloze, sureness
from cprec.systems.signals import TrainingSequences, padded, recent

QUERY_BATCH = 64
"""Histories that are read and searched together."""
READ = 4096
"""Beginnings that the decoder reads at once."""
TOP = 10
"""The length of lists by which weights are chosen."""
PRUNED = -1e9
"""The score of items whose codes disagree: below all others."""

Mode = Literal["exact", "auto", "beam"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """How codes are filled in, and which items are pruned."""

    warm_up: int
    """Steps that fill in one code, before the others."""
    at_once: int
    """Codes that each of the other steps fills in."""
    least_agreement: float = 0.0
    """An item is pruned if one of its codes, given the history and all its other codes, is less than this many times as
    probable as if all codes of its level were equally so."""


@dataclass(frozen=True)
class Beginnings:
    """Items of which some codes are known, the same ones for all items of a row."""

    user: torch.Tensor
    start: torch.Tensor
    """Where the items begin in the search's list of items."""
    stop: torch.Tensor
    masked: torch.Tensor
    """bool[M, L]: codes that are not known yet."""
    score: torch.Tensor
    """float64."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: torch.Tensor) -> Beginnings:
        return Beginnings(*(column[chosen] for column in vars(self).values()))

    @classmethod
    def joined(cls, pieces: Sequence[Beginnings]) -> Beginnings:
        return cls(*(torch.cat(columns) for columns in zip(*(vars(piece).values() for piece in pieces), strict=True)))


@dataclass(frozen=True)
class Found:
    """What a search found."""

    scores_UV: torch.Tensor
    """float64; -inf for items that were not found, `PRUNED` for those whose codes disagree."""
    gap_U: torch.Tensor
    """The most by which a missed item can score above the K-th that was found: 0 where it is proven that there is none,
    inf where there are fewer than K and something was left out."""
    expanded_U: torch.Tensor
    """Beginnings that the decoder read, those without a code not counted."""


class Search:
    """One search for some users. Their items are kept in one list, user by user. Those of a beginning stand side by
    side, and filling in a code sorts them by it."""

    def __init__(self, model: CodeCloze, order: Order, states_UD: torch.Tensor, permitted_UV: torch.Tensor) -> None:
        self.model, self.order, self.states_UD = model, order, states_UD
        self.code_VL, self.num_codes = model.items.code_VL, model.items.num_codes
        user_E, self.items = permitted_UV.nonzero(as_tuple=True)
        self.counts_U = torch.bincount(user_E, minlength=len(states_UD))
        self.scores_UV = torch.full(permitted_UV.shape, -torch.inf, dtype=torch.float64, device=states_UD.device)
        self.kth_U = self.scores_UV.new_full((len(states_UD),), -torch.inf)
        self.dropped_U = self.kth_U.clone()  # the best score of beginnings that were given up
        self.expanded_U = torch.zeros_like(self.kth_U, dtype=torch.int64)
        self.log_alike_V = model.items.alike_V.double().log()

    def run(self, k: int, width: int, *, exact: bool, max_nodes: int | None = None) -> Found:
        """The `k` best items of each user, and others.

        A beam comes first: after each step the `width` best beginnings go on. With `exact` those that it left behind
        follow, the best first, `width` at a time, until none is as good as the K-th item, or the user has read
        `max_nodes`. The beam is not cut short, so lists are always full.
        """
        self.k = k
        fresh = self._filled(self._nothing())
        left = [fresh.take(fresh.user < 0)]
        while len(fresh):
            chosen, rest = self._best(fresh, width)
            left.append(rest)
            fresh = self._read(chosen)
        frontier = Beginnings.joined(left)
        while len(frontier := self._hopeful(frontier)):
            chosen, rest = self._best(frontier, width, max_nodes if exact else 0)  # 0: nothing more is read
            if not len(chosen):
                self._drop(rest)
                break
            frontier = Beginnings.joined([rest, self._read(chosen)])
        is_proven_U = (self.dropped_U < self.kth_U) | (self.dropped_U == -torch.inf)
        gap_U = torch.where(is_proven_U, 0.0, self.dropped_U - self.kth_U)
        return Found(self.scores_UV, gap_U, self.expanded_U)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _nothing(self) -> Beginnings:
        """No code is known yet, of any item that a user may be given."""
        stop_U, zero_U = self.counts_U.cumsum(0), torch.zeros_like(self.kth_U)
        masked_UL = torch.ones(len(stop_U), self.code_VL.shape[1], dtype=torch.bool, device=stop_U.device)
        users = torch.arange(len(stop_U), device=stop_U.device)
        every = Beginnings(users, stop_U - self.counts_U, stop_U, masked_UL, zero_U)
        return every.take(self.counts_U > 0)

    def _read(self, chosen: Beginnings) -> Beginnings:
        self.expanded_U += torch.bincount(chosen.user, minlength=len(self.expanded_U))
        return self._hopeful(self._filled(chosen))

    def _filled(self, above: Beginnings) -> Beginnings:
        """Fill in the next codes of beginnings. Items of which all are known are kept, and the others returned."""
        parts = [self._stepped(above.take(rows)) for rows in torch.arange(len(above)).split(READ) if len(rows)]
        below = Beginnings.joined(parts) if parts else above
        is_whole = ~below.masked.any(1)
        self._keep(below.take(is_whole))
        return below.take(~is_whole)

    def _stepped(self, above: Beginnings) -> Beginnings:
        log_MLK = self.model.log_probs(self.states_UD[above.user], self.code_VL[self.items[above.start]], above.masked)
        # The places to fill in, the surest first, of equals the first.
        num_left_M = above.masked.sum(1)
        warms_up_M = above.masked.shape[1] - num_left_M < self.order.warm_up
        num_M = torch.where(warms_up_M, 1, num_left_M.clamp(max=self.order.at_once))
        place_ML = sureness(log_MLK, above.masked).argsort(dim=1, descending=True, stable=True)
        is_filled_ML = place_ML.argsort(1) < num_M[:, None]
        # The items of each beginning, sorted by the codes in these places.
        row_E, at_E = spans(above.start, above.stop)
        item_E, key_E = self.items[at_E], row_E
        for number in range(int(num_M.max())):
            code_E = torch.where(number < num_M[row_E], self.code_VL[item_E, place_ML[row_E, number]], 0)
            key_E = torch.unique(key_E * self.num_codes + code_E, return_inverse=True)[1]
        self.items[at_E] = item_E[key_E.argsort(stable=True)]
        # Those with the same codes in them make one beginning.
        size_C = torch.bincount(key_E)
        first_C = size_C.cumsum(0) - size_C
        start_C, row_C = at_E[first_C], row_E[first_C]
        is_filled_CL, score_CL = is_filled_ML[row_C], self._own(log_MLK, row_C, self.code_VL[self.items[start_C]])
        score_C = above.score[row_C] + score_CL.where(is_filled_CL, 0.0).sum(1)
        return Beginnings(above.user[row_C], start_C, start_C + size_C, above.masked[row_C] & ~is_filled_CL, score_C)

    @staticmethod
    def _own(log_MLK: torch.Tensor, row_C: torch.Tensor, code_CL: torch.Tensor) -> torch.Tensor:
        """The log-probability of each of some codes, in rows of all: float64[C, L]."""
        level_L = torch.arange(code_CL.shape[1], device=code_CL.device)
        return log_MLK[row_C[:, None], level_L, code_CL].double()

    def _keep(self, whole: Beginnings) -> None:
        """Note the scores of items of which all codes are known, where they matter."""
        whole = self._hopeful(whole)
        if not len(whole):
            return
        row_E, at_E = spans(whole.start, whole.stop)
        item_E = self.items[at_E]
        score_E = whole.score[row_E] - self.log_alike_V[item_E]
        if self.order.least_agreement:
            score_E = score_E.where(self._agree(whole)[row_E], PRUNED)
        self.scores_UV[whole.user[row_E], item_E] = score_E
        if self.k <= self.scores_UV.shape[1]:
            best_U = self.scores_UV.topk(self.k).values[:, -1]
            self.kth_U = best_U.where(best_U > PRUNED, -torch.inf)

    def _agree(self, whole: Beginnings) -> torch.Tensor:
        """Whether the codes of items agree: each is masked in turn, and asked for by the others: bool[M]."""
        num_levels = self.code_VL.shape[1]
        least = math.log(self.order.least_agreement / self.num_codes)
        one_LL = torch.eye(num_levels, dtype=torch.bool, device=self.code_VL.device)
        found = []
        for part in torch.arange(len(whole)).split(max(1, READ // num_levels)):
            code_ML = self.code_VL[self.items[whole.start[part]]]
            states_ND = self.states_UD[whole.user[part]].repeat_interleave(num_levels, 0)
            code_NL = code_ML.repeat_interleave(num_levels, 0)
            log_NLK = self.model.log_probs(states_ND, code_NL, one_LL.repeat(len(part), 1))
            every_N = torch.arange(len(code_NL), device=code_NL.device)
            own_ML = self._own(log_NLK, every_N, code_NL).unflatten(0, (-1, num_levels)).diagonal(dim1=1, dim2=2)
            found.append((own_ML >= least).all(1))
        return torch.cat(found)

    # ---- where to go on ----------------------------------------------------------------------------------------------

    def _best(self, some: Beginnings, width: int, max_nodes: int | None = None) -> tuple[Beginnings, Beginnings]:
        """Each user's best `width` beginnings, as far as the user's nodes go, and the others."""
        order = some.score.argsort(descending=True, stable=True)
        order = order[some.user[order].argsort(stable=True)]
        user = some.user[order]
        counts_U = torch.bincount(user, minlength=len(self.kth_U))
        number = torch.arange(len(user), device=user.device) - (counts_U.cumsum(0) - counts_U)[user]
        is_chosen = number < width
        if max_nodes is not None:
            is_chosen &= number < (max_nodes - self.expanded_U)[user]
        return some.take(order[is_chosen]), some.take(order[~is_chosen])

    def _hopeful(self, some: Beginnings) -> Beginnings:
        """Beginnings as good as the K-th item; the others are dropped."""
        is_hopeful = some.score >= self.kth_U[some.user]
        self._drop(some.take(~is_hopeful))
        return some.take(is_hopeful)

    def _drop(self, some: Beginnings) -> None:
        """Give beginnings up; the best score among them is remembered for the gap."""
        self.dropped_U.scatter_reduce_(0, some.user, some.score, "amax")


def spans(start_M: torch.Tensor, stop_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers from each start up to its stop, one row after the other, with the row of each: int64[E] each.

    >>> [each.tolist() for each in spans(torch.tensor([4, 0]), torch.tensor([6, 3]))]
    [[0, 0, 1, 1, 1], [4, 5, 0, 1, 2]]
    """
    sizes_M = stop_M - start_M
    row_E = torch.arange(len(start_M), device=start_M.device).repeat_interleave(sizes_M)
    shift_M = start_M - (sizes_M.cumsum(0) - sizes_M)
    return row_E, torch.arange(len(row_E), device=start_M.device) + shift_M[row_E]


class PathRecommender:
    """Ranks a domain's items by the probability of their codes along the paths of a model. Full lists come with a
    proof. A history without events in the domain is represented by padding alone."""

    seconds = 0.0

    def __init__(
        self,
        name: str,
        data: TrainingSequences,
        model: CodeCloze,
        order: Order,
        *,
        max_length: int,
        beam_width: int,
        max_nodes: int,
    ) -> None:
        self.name, self.catalogue, self.domain = name, data.catalogue, data.domain
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._model, self._order, self._num_items = model.eval(), order, data.num_items
        self.max_length, self._beam_width, self._max_nodes = max_length, beam_width, max_nodes
        with torch.inference_mode():
            self._vectors = model.history.vectors()

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: Mode = "auto") -> list[Ranking]:
        """See `Recommender.rank`. `mode` is `exact`, `auto` (exact within `max_nodes` beginnings) or `beam`, of
        `beam_width` beginnings after each step. Items whose codes disagree are not returned, and stand last among
        candidates. Raises ConfigError for another domain than the one trained on."""
        for query in queries:
            check_domain(self.name, (self.domain,), query.domain)
        histories, out = histories_of(self.catalogue, self.domain, queries), []
        for start in range(0, len(queries), QUERY_BATCH):
            asked = queries[start : start + QUERY_BATCH]
            states_QD = self._states(histories.take(np.arange(start, start + len(asked))))
            searched_QV, scored_QV = self._asked(asked)
            found = self._search(states_QD, searched_QV, k, mode)
            # Candidates and items that do not count are all scored, on whatever paths they have.
            others = self._search(states_QD, scored_QV, self._num_items + 1, "exact").scores_UV
            scores_QV = torch.maximum(found.scores_UV, others).cpu().numpy()
            rankings = rankings_of(self.catalogue, asked, scores_QV, k, PRUNED)
            proofs = zip(found.gap_U.tolist(), found.expanded_U.tolist(), strict=True)
            out += [
                ranking if query.candidates is not None else replace(ranking, proof=Proof(gap, expanded))
                for query, ranking, (gap, expanded) in zip(asked, rankings, proofs, strict=True)
            ]
        return out

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many items score above each target, and how many as high, itself included: int64[Q] each.

        Counted among what a beam for the ten best finds. A target that is not there is a miss: ten are better, and it
        is tied with nothing (0).
        """
        better, tied = (np.empty(len(targets), dtype=np.int64) for _ in range(2))
        for start in range(0, len(targets), QUERY_BATCH):
            rows = np.arange(start, min(start + QUERY_BATCH, len(targets)))
            asked = histories.take(rows)
            permitted_QV = np.ones((len(rows), self._num_items), dtype=bool)
            if exclude_seen:
                permitted_QV[asked.row_of, asked.values] = False
            scores_QV = self._search(self._states(asked), permitted_QV, TOP, "beam").scores_UV.cpu().numpy()
            score_Q1 = scores_QV[np.arange(len(rows)), targets[rows]][:, None]
            is_found_Q = score_Q1[:, 0] > PRUNED
            better[rows] = np.where(is_found_Q, (scores_QV > score_Q1).sum(1), TOP)
            tied[rows] = np.where(is_found_Q, (scores_QV == score_Q1).sum(1), 0)
        return better, tied

    @torch.inference_mode()
    def _states(self, histories: Ragged) -> torch.Tensor:
        """The last states of histories: QD."""
        items, _ = padded(recent(histories, self.max_length), self._num_items)
        rows = {"items": torch.from_numpy(items).to(self._vectors.inputs.device)}
        return self._model.history.encode(self._vectors, rows)

    @torch.inference_mode()
    def _search(self, states_QD: torch.Tensor, permitted_QV: np.ndarray, k: int, mode: Mode) -> Found:
        search = Search(self._model, self._order, states_QD, torch.from_numpy(permitted_QV).to(states_QD.device))
        max_nodes = self._max_nodes if mode == "auto" else None
        return search.run(k, max(self._beam_width, min(k, READ)), exact=mode != "beam", max_nodes=max_nodes)

    def _asked(self, queries: Sequence[RankingQuery]) -> tuple[np.ndarray, np.ndarray]:
        """Which items are searched for the best, and which are scored whatever their place: bool[Q, V] each."""
        searched_QV, scored_QV = (np.full((len(queries), self._num_items), full) for full in (True, False))

        def fill(marks_QV: np.ndarray, row: int, items: Collection[str], value: bool) -> None:
            marks_QV[row, positions_of(self.catalogue, self.domain, [items]).values] = value

        for row, query in enumerate(queries):
            if query.candidates is not None or query.allow is not None:
                searched_QV[row] = False
            if query.candidates is None and query.allow is not None:
                fill(searched_QV, row, query.allow, True)
            fill(searched_QV, row, query.exclude | query.uncounted, False)
            fill(scored_QV, row, query.uncounted if query.candidates is None else query.candidates, True)
        return searched_QV, scored_QV
