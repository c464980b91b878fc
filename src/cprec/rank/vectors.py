"""What an item head says of a domain's items: the state at a prompt's end against a vector for each.

Suffixes: Q queries, N items of the domain in catalogue order, D width.
"""

from __future__ import annotations

import numpy as np
import torch

from cprec.errors import ModelError
from cprec.item_head import ItemHead


class ItemVectors:
    """The vectors of a domain's items by an item head, all made once."""

    @torch.inference_mode()
    def __init__(self, head: ItemHead, embedding: torch.Tensor, in_stock: np.ndarray) -> None:
        """`embedding` holds the token embeddings of the model; `in_stock` is bool[N]."""
        self._head = head
        self._vectors_ND = head.vectors(embedding.float())
        self._in_stock_N = torch.from_numpy(in_stock).to(embedding.device)

    @torch.inference_mode()
    def log_probs(self, hidden_QD: torch.Tensor) -> np.ndarray:
        """The logarithm of the share that each item has after a state: float64[Q, N].

        The shares of the items in stock sum to one; that of a withdrawn item is measured by theirs. Raises ModelError
        where a score is not finite.
        """
        logits_QN = (self._head.states(hidden_QD.float()) @ self._vectors_ND.T).double()
        scores_QN = logits_QN - logits_QN[:, self._in_stock_N].logsumexp(1, keepdim=True)
        if not torch.isfinite(scores_QN).all():
            raise ModelError("the scores of the item head are not finite (NaN or infinity): take an earlier checkpoint")
        return scores_QN.cpu().numpy()
