"""The loss of titles over the catalogue: each step's softmax runs over the tokens with which titles go on there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.errors import DataError
from cprec.models import trunk_and_head
from cprec.search.trie import Trie
from cprec.text.stream import NEXT_CHILD, NEXT_TOKEN
from cprec.train.loss import CHUNK, PackedLoss


class TitleNodes:
    """Finds the targets of examples in the trie of the domain's titles."""

    def __init__(self, trie: Trie) -> None:
        self._trie = trie
        self._width = int(trie.token.max()) + 1
        parent = trie.parent(np.arange(1, trie.num_nodes))
        # Nodes stand by parent and then by token, so these keys ascend.
        self._keys = parent.astype(np.int64) * self._width + trie.token[1:]
        self._only = np.diff(trie.first_child)[parent] == 1

    def __call__(self, tokens: Ragged, first_target: np.ndarray) -> np.ndarray:
        """For each token of some documents, the node that it leads to, or IGNORE: before the target's first token, and
        where titles go on in one way only: int64.

        Raises DataError for targets that are no titles of the trie.
        """
        out = np.full(len(tokens.values), IGNORE, dtype=np.int64)
        at, node = tokens.offsets[:-1] + first_target, np.zeros(len(tokens), dtype=np.int64)
        stop = tokens.offsets[1:]
        # All targets go down the trie together, a token at a time.
        while len(at):
            key = node * self._width + tokens.values[at]
            found = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
            if (self._keys[found] != key).any():
                raise DataError("examples have targets that are no titles of the catalogue: prepare the data anew")
            node = found + 1
            out[at] = np.where(self._only[found], IGNORE, node)
            more = at + 1 < stop
            at, node, stop = at[more] + 1, node[more], stop[more]
        return out


class CatalogueLoss(PackedLoss):
    """Next tokens over the vocabulary times 1 - `weight`, and with `nodes` in the rows (see `TokenStream`) the targets'
    steps over the children of the trie's nodes, times `weight`; rows without have the first term alone, whole."""

    def __init__(self, model: Any, trie: Trie, weight: float, *, bf16: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        self._trie, self._weight = trie, weight

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        if "nodes" not in rows:
            return super().losses(rows)
        hidden_RTD = self._hidden(rows["input_ids"], rows["position_ids"])
        out = {NEXT_CHILD: self._weight * self._of_children(hidden_RTD, rows["nodes"])}
        if self._weight < 1:
            out[NEXT_TOKEN] = (1 - self._weight) * self._of_tokens(hidden_RTD, rows["targets"])
        return out

    def _of_children(self, hidden_RTD: torch.Tensor, nodes_RT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each node among its siblings, summed. N nodes, S siblings of all of them."""
        nodes, first_child = nodes_RT.flatten(), self._trie.on(nodes_RT.device, "first_child")
        at_N = (nodes != IGNORE).nonzero()[:, 0]
        # By node, so that those of one parent, which ask for the same tokens, stand together.
        at_N = at_N[nodes[at_N].argsort()]
        hidden, node_N = hidden_RTD.flatten(0, 1), nodes[at_N]
        parent_N = torch.searchsorted(first_child, node_N.int(), right=True) - 1
        loss = hidden.sum() * 0.0
        for start in range(0, len(at_N), CHUNK):
            rows = slice(start, start + CHUNK)
            loss = loss + self._of_chunk(hidden[at_N[rows]], parent_N[rows], node_N[rows], first_child)
        return loss.float()

    def _of_chunk(
        self, hidden_ND: torch.Tensor, parent_N: torch.Tensor, node_N: torch.Tensor, first_child: torch.Tensor
    ) -> torch.Tensor:
        begin_N = first_child[parent_N].long()
        counts_N = first_child[parent_N + 1] - begin_N
        before_N = counts_N.cumsum(0) - counts_N
        row_S = torch.repeat_interleave(counts_N)
        child_S = (begin_N - before_N)[row_S] + torch.arange(len(row_S), device=row_S.device)
        tokens, column_S = self._trie.on(row_S.device, "token")[child_S].long().unique(return_inverse=True)
        _, head = trunk_and_head(self.module)
        logits = linear(hidden_ND.to(self._dtype), head.weight[tokens].to(self._dtype)).float() * self.scale
        # Tokens that lead nowhere from a row's parent are none of its choices.
        is_child = torch.zeros_like(logits, dtype=torch.bool)
        is_child[row_S, column_S] = True
        target_N = column_S[before_N + node_N - begin_N]
        return cross_entropy(logits.masked_fill(~is_child, -torch.inf), target_N, reduction="sum")
