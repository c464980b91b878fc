"""What a step's probabilities add up to one over: the whole vocabulary, or what the catalogue has there.

N children asked for, each after one of M states; S children of all states' nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from cprec.search.finite import require_finite
from cprec.search.reading import Tree
from cprec.search.trie import Trie

Over = Literal["vocabulary", "catalogue"]


class Normaliser(Protocol):
    """Makes log-probabilities of the steps of a trie."""

    @property
    def only_way_is_certain(self) -> bool:
        """Whether the step to an only child has probability one."""
        ...

    def log_probs(
        self, tree: Tree, hidden_MD: torch.Tensor, node_M: torch.Tensor, row_N: torch.Tensor, child_N: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each child after its state, a row of `hidden_MD` (rows ascend), which has read the trie up
        to `node_M`: float64[N]. Raises ModelError where the model's scores are not finite."""
        ...


def normaliser_of(over: Over, trie: Trie, temperatures: np.ndarray | None = None) -> Normaliser:
    """The normaliser of a trie's steps, perhaps at a temperature of each node: float32[num_nodes]."""
    found: Normaliser = OverVocabulary(trie) if over == "vocabulary" else OverCatalogue(trie)
    return found if temperatures is None else Tempered(found, temperatures)


@dataclass(frozen=True)
class Tempered:
    """Another normaliser, with logits divided by the temperature of the node that they come after.

    States are divided in their place, which is the same where the output layer has no bias. So the tree must be of a
    model in this process.
    """

    normaliser: Normaliser
    temperatures: np.ndarray
    """float32[num_nodes]."""

    @property
    def only_way_is_certain(self) -> bool:
        """See `Normaliser.only_way_is_certain`."""
        return self.normaliser.only_way_is_certain

    def log_probs(
        self, tree: Tree, hidden_MD: torch.Tensor, node_M: torch.Tensor, row_N: torch.Tensor, child_N: torch.Tensor
    ) -> torch.Tensor:
        """See `Normaliser.log_probs`."""
        temperature_M = torch.from_numpy(self.temperatures).to(hidden_MD.device)[node_M]
        return self.normaliser.log_probs(tree, hidden_MD / temperature_M[:, None], node_M, row_N, child_N)


@dataclass(frozen=True)
class OverVocabulary:
    """The model's own probabilities. What the catalogue does not have keeps its part."""

    trie: Trie
    only_way_is_certain = False

    def log_probs(
        self, tree: Tree, hidden_MD: torch.Tensor, node_M: torch.Tensor, row_N: torch.Tensor, child_N: torch.Tensor
    ) -> torch.Tensor:
        """See `Normaliser.log_probs`."""
        return tree.log_probs(hidden_MD, row_N, self.trie.on(child_N.device, "token")[child_N].long())


@dataclass(frozen=True)
class OverCatalogue:
    """Each step's softmax runs over the children that lead to an item in stock, so that the probabilities of all items
    in stock sum to one.

    What a query leaves out stays in stock and counts. A child that leads to nothing in stock counts itself besides, as
    if it were back. Where there is one child, it is certain.
    """

    trie: Trie
    only_way_is_certain = True

    def log_probs(
        self, tree: Tree, hidden_MD: torch.Tensor, node_M: torch.Tensor, row_N: torch.Tensor, child_N: torch.Tensor
    ) -> torch.Tensor:
        """See `Normaliser.log_probs`."""
        device = child_N.device
        first_child, token, num_items = (self.trie.on(device, name) for name in ("first_child", "token", "num_items"))
        # All children of all states, in one flat run; those asked for are among them.
        begin_M = first_child[node_M].long()
        counts_M = first_child[node_M + 1] - begin_M
        before_M = counts_M.cumsum(0) - counts_M
        row_S = torch.repeat_interleave(torch.arange(len(node_M), device=device), counts_M)
        child_S = (begin_M - before_M)[row_S] + torch.arange(len(row_S), device=device)
        logits_S = tree.token_logits(hidden_MD, row_S, token[child_S].long())
        # The logarithm of the sum over the children in stock; -inf where none is.
        counted = num_items[child_S] > 0
        total_M = _log_sum_exp(logits_S[counted], row_S[counted], len(node_M))
        require_finite(total_M[row_S[counted]])
        own_N = logits_S[(before_M - begin_M)[row_N] + child_N]
        total_N = total_M[row_N]
        total_N = torch.where(num_items[child_N] > 0, total_N, torch.logaddexp(total_N, own_N))
        return own_N - total_N


def _log_sum_exp(values: torch.Tensor, row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """log(sum(exp(values))) of each row: float64[num_rows], -inf for rows without values."""
    largest = values.new_full((num_rows,), -torch.inf).scatter_reduce_(0, row, values, "amax")
    safe = torch.where(largest == -torch.inf, 0.0, largest)
    return safe + values.new_zeros(num_rows).index_add_(0, row, (values - safe[row]).exp()).log()
