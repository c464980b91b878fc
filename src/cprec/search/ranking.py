"""Rankings of a domain's items by their token sequences, as queries ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ModelError
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.search.decoding import Found, search
from cprec.search.normaliser import Normaliser, Over, normaliser_of
from cprec.search.priors import Priors
from cprec.search.reading import Tree
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie

FIRST_BEAM = 8
"""Prefixes of each depth that the exact search begins with, and reads at a time, or K if that is more."""


def batches(prompts: Ragged, queries: Sequence[RankingQuery], size: int) -> Iterator[list[int]]:
    """Queries to answer together, by number: of one domain, all with candidates or all without, and with prompts of
    similar length."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for number in np.argsort(prompts.lengths, kind="stable").tolist():
        query = queries[number]
        groups.setdefault((query.domain, query.candidates is not None), []).append(number)
    for members in groups.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]


@dataclass(frozen=True)
class SequenceRanker:
    """Ranks the items of a domain by the log-probability of each one's token sequence after a prompt.

    Items of one sequence have equal shares of its probability. The methods take the tree of the queries' prompts, and
    perhaps priors of the queries and the domain's items: these join every score, and the model's part is weighted.
    """

    catalogue: Catalogue
    domain: str
    sequences: Callable[[np.ndarray], Ragged]
    """Tokens of catalogue rows, each closed by the end token."""
    trie: Trie
    """Sequences of all the domain's items, in the order of the catalogue."""
    per_token: bool = False
    """Scores are divided by the number of tokens."""
    over: Over = "vocabulary"
    """What the probabilities of each step sum to one over."""
    temperatures: np.ndarray | None = None
    """Of the steps after each node of the trie, float32[num_nodes]; None: all are 1."""
    empty_prompt: Callable[[], Tree] | None = None
    """Reads the prompt without a history. If given, scores are those after a prompt less those after this one."""

    def rank_candidates(
        self, tree: Tree, queries: Sequence[RankingQuery], priors: Priors | None = None
    ) -> list[Ranking]:
        """All candidates of each query, best first; equal scores by item id."""
        given = [[item for item in query.candidates or () if may_return(query, item)] for query in queries]
        out = []
        for query, items, scores in zip(queries, given, self._scores(tree, given, priors), strict=True):
            ids = np.array(items, dtype=object)
            order = np.lexsort((ids.astype(str), -scores))
            out.append(_ranking(query, ids[order], scores[order]))
        return out

    def rank_catalogue(
        self,
        tree: Tree,
        queries: Sequence[RankingQuery],
        k: int,
        *,
        mode: str,
        beam_width: int,
        max_nodes: int,
        seconds: float | None = None,
        stop: Callable[[], bool] | None = None,
        priors: Priors | None = None,
    ) -> list[Ranking]:
        """The `k` best items in stock for each query, with a proof.

        `mode` is `exact`, `auto` (exact, but a query reads `max_nodes` prefixes at most) or `beam`. A score less that
        of the empty prompt may rise along a sequence, so nothing bounds it: what a beam finds by probability is put in
        that order, without a proof. Raises ModelError where items are in reach and none is found.
        """
        corrected = self.empty_prompt is not None
        beam = mode == "beam" or corrected
        found = search(
            tree,
            self.trie,
            k=max(k, beam_width) if corrected else k,
            width=max(beam_width if beam else FIRST_BEAM, k),
            exact=not beam,
            excluded=[self.positions(query.exclude | query.uncounted) for query in queries],
            allowed=[None if query.allow is None else self.positions(query.allow) for query in queries],
            max_nodes=max_nodes if mode == "auto" and not beam else None,
            seconds=seconds,
            stop=stop,
            per_token=self.per_token,
            normaliser=self._normaliser,
            priors=priors,
        )
        if corrected:
            found = self._corrected(found, k, 1.0 if priors is None else priors.weight)
        uncounted = self._uncounted(tree, queries, priors)
        rankings = []
        for number, (query, result, (items, scores)) in enumerate(zip(queries, found, uncounted, strict=True)):
            prior_N = np.zeros(len(self._rows)) if priors is None else priors.values_UN[number]
            rankings.append(self._ranking(query, result, items, scores, prior_N, k))
        for query, ranking in zip(queries, rankings, strict=True):
            self._require_items(query, ranking)
        return rankings

    def positions(self, items: Iterable[str]) -> np.ndarray:
        """Where items stand in the trie: int64. Raises UnknownItemError for items that the catalogue does not have."""
        found: np.ndarray = self.catalogue.find(self.domain, sorted(items)) - self._rows[0]
        return found

    @property
    def _normaliser(self) -> Normaliser:
        return normaliser_of(self.over, self.trie, self.temperatures)

    @property
    def _rows(self) -> np.ndarray:
        return self.catalogue.rows_of(self.domain)

    def _scores(self, tree: Tree, items: Sequence[Sequence[str]], priors: Priors | None) -> list[np.ndarray]:
        """The score of each item after its prompt: float64 for each prompt's items, in their order."""
        rows = [self.catalogue.find(self.domain, mine) for mine in items]
        scores = self._log_probs(tree, rows)
        if self.per_token:
            scores = [score / self.sequences(mine).lengths for score, mine in zip(scores, rows, strict=True)]
        if self.empty_prompt is not None:
            empty = self.empty_prompt()
            scores = [score - self._log_probs(empty, [mine])[0] for score, mine in zip(scores, rows, strict=True)]
        if priors is not None:
            priors.check(len(items), len(self._rows))
            scores = [
                priors.scores(query, mine - self._rows[0], score)
                for query, (mine, score) in enumerate(zip(rows, scores, strict=True))
            ]
        return scores

    def _log_probs(self, tree: Tree, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of the items of catalogue rows, given for each prompt: the sequence's, shared."""
        items = [mine - self._rows[0] for mine in rows]
        scores = score_candidates(tree, self.trie, items, self._normaliser)
        return [score + self.trie.log_share(mine) for score, mine in zip(scores, items, strict=True)]

    def _corrected(self, found: Sequence[Found], k: int, weight: float) -> list[Found]:
        """What was found, by score less the weighted one of the empty prompt: the `k` best, and those tied with the
        last."""
        assert self.empty_prompt is not None
        empty, out = self.empty_prompt(), []
        for result in found:
            scores = result.scores - weight * self._log_probs(empty, [self._rows[result.items]])[0]
            order = np.lexsort((result.items, -scores))
            if len(order) > k:
                order = order[: np.searchsorted(-scores[order], -scores[order[k - 1]], side="right")]
            out.append(replace(result, items=result.items[order], scores=scores[order]))
        return out

    def _uncounted(
        self, tree: Tree, queries: Sequence[RankingQuery], priors: Priors | None
    ) -> list[tuple[list[str], np.ndarray]]:
        """Each query's uncounted items that may be returned, and their scores."""
        in_stock = self.trie.in_stock
        items = [
            [
                item
                for item, stocked in zip(
                    sorted(query.uncounted), in_stock[self.positions(query.uncounted)], strict=True
                )
                if stocked and may_return(query, item)
            ]
            for query in queries
        ]
        scores = self._scores(tree, items, priors) if any(items) else [np.empty(0)] * len(queries)
        return list(zip(items, scores, strict=True))

    def _ranking(
        self,
        query: RankingQuery,
        found: Found,
        uncounted: Sequence[str],
        scores: np.ndarray,
        prior_N: np.ndarray,
        k: int,
    ) -> Ranking:
        """What was found, with those of the uncounted items that reach the score of the K-th."""

        # An item with the sequence and the prior of one found has its score, to the last bit: the two tie.
        def keys(items: np.ndarray) -> list[tuple[int, float]]:
            return list(zip(self.trie.leaf[items].tolist(), prior_N[items].tolist(), strict=True))

        score_at = dict(zip(keys(found.items), found.scores.tolist(), strict=True))
        of_uncounted = keys(self.positions(uncounted))
        scores = np.array([score_at.get(key, score) for key, score in zip(of_uncounted, scores, strict=True)])
        reached = scores >= (found.scores[k - 1] if len(found.scores) >= k else -np.inf)
        ids = np.append(self.catalogue.item_id[self._rows[found.items]], np.array(uncounted, dtype=object)[reached])
        scores = np.append(found.scores, scores[reached])
        order = np.argsort(-scores, kind="stable")
        proof = None if self.empty_prompt else Proof(gap=found.gap, expanded=found.expanded)
        return _ranking(query, ids[order], scores[order], proof)

    def _require_items(self, query: RankingQuery, ranking: Ranking) -> None:
        """Raise ModelError where a full ranking has no item although it may have some, and no budget was spent."""
        if ranking.item_ids or (ranking.proof is not None and not ranking.proof.exact):
            return
        stocked = self.catalogue.item_id[self._rows[self.trie.in_stock]]
        in_reach = sum(may_return(query, item) and item not in query.uncounted for item in stocked)
        if in_reach:
            raise ModelError(
                f"none of the {in_reach:,} items of {self.domain!r} in reach was found: this is a mistake of CPRec, "
                "please report it"
            )


def may_return(query: RankingQuery, item: str) -> bool:
    """Whether a query may be answered with an item."""
    return item not in query.exclude and (query.allow is None or item in query.allow)


def _ranking(query: RankingQuery, ids: np.ndarray, scores: np.ndarray, proof: Proof | None = None) -> Ranking:
    return Ranking(query.query_id, tuple(map(str, ids)), tuple(map(float, scores)), proof)
