"""Rankings by an item head: the state at a prompt's end against a vector for each item, in one pass.

Suffixes: Q queries, N items of the domain in catalogue order, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from cprec.data.catalogue import Catalogue
from cprec.errors import ModelError
from cprec.item_head import ItemHead
from cprec.recommender import Ranking, RankingQuery
from cprec.scoring import ScoringRecommender


class VectorRanker(ScoringRecommender):
    """Ranks a domain's items by the logarithm of the share that an item head gives each of those in stock."""

    def __init__(
        self,
        catalogue: Catalogue,
        head: ItemHead,
        embedding: torch.Tensor,
        in_stock: np.ndarray,
        withdrawn: frozenset[str],
        read: Callable[[Sequence[RankingQuery]], torch.Tensor],
    ) -> None:
        """`in_stock` is bool[N], with `withdrawn` the ids of the others; `read` gives the states of queries: QD."""
        self.name, self.catalogue = "item head", catalogue
        self._head, self._read, self._withdrawn = head, read, withdrawn
        with torch.inference_mode():
            self._vectors_ND = head.vectors(embedding.float())
        self._in_stock_N = torch.from_numpy(in_stock).to(embedding.device)

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`; withdrawn items are returned as candidates only."""
        gone = self._withdrawn
        asked = [q if q.candidates is not None or not gone else replace(q, exclude=q.exclude | gone) for q in queries]
        return super().rank(asked, k)

    @torch.inference_mode()
    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`: float64. The shares of the items in stock sum to one; that of a withdrawn
        item is measured by theirs. Raises ModelError where a score is not finite."""
        logits_QN = (self._head.states(self._read(queries).float()) @ self._vectors_ND.T).double()
        scores_QN = logits_QN - logits_QN[:, self._in_stock_N].logsumexp(1, keepdim=True)
        if not torch.isfinite(scores_QN).all():
            raise ModelError("the scores of the item head are not finite (NaN or infinity): take an earlier checkpoint")
        return scores_QN.cpu().numpy()
