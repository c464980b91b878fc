"""Items as codes and then a vector: a decoder that reads and predicts both, and rankings by both.

Items that share all their codes are a cell. The token END, which closes an item's codes, also carries its vector: in
what a decoder reads, the number of tokens + i is END of item i. The state before it, which has read all codes, predicts
the vector. Suffixes: N items, L levels, C cells, M pairs of a query and a cell, E items of these pairs, Q queries, R
rows, T tokens, D width, U states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from cprec.batch import IGNORE, Batch
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.scoring import rankings_of
from cprec.search.decoding import search
from cprec.search.ranking import FIRST_BEAM
from cprec.search.reading import Tree
from cprec.search.trie import Trie
from cprec.systems.batches import Passes
from cprec.systems.codes import END, ItemCodes
from cprec.systems.generator import CodeRecommender, CodeStream
from cprec.systems.items import FrozenTable
from cprec.systems.signals import TrainingSequences
from cprec.text.stream import NEXT_TOKEN
from cprec.train.loss import PackedLoss, linear_cross_entropy

NEXT_VECTOR = "next_vector"
"""The name of the loss term of vectors."""
PAIRS = 4096
"""Pairs of a query and a cell that are read at once."""
GROWTH = 4
"""How many times as many cells are looked for when a list is not proven by those found."""


def with_vectors(codes: ItemCodes) -> ItemCodes:
    """The sequences that a decoder of codes and vectors reads: END is that of each item."""
    sequences, num_tokens = codes.sequences, codes.vocabulary_size
    values = np.where(sequences.values == END, num_tokens + sequences.row_of, sequences.values)
    return replace(codes, sequences=Ragged(values, sequences.offsets))


class CodesAndVectors(nn.Embedding):
    """What a decoder reads of tokens: their rows, and with those of END the vectors of items, through an adapter."""

    def __init__(self, rows: nn.Embedding, items: FrozenTable, *, reads_vectors: bool) -> None:
        """The rows stay those of the decoder, which may have them at its output as well."""
        super().__init__(rows.num_embeddings, rows.embedding_dim, _weight=rows.weight)
        self.weight, self.items, self._reads_vectors = rows.weight, items, reads_vectors

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """The vector of each token: [..., D]."""
        item = token - self.num_embeddings
        is_item = item >= 0
        rows = super().forward(torch.where(is_item, END, token))
        if not self._reads_vectors:
            return rows
        vectors = self.items.vectors(item[is_item]).to(rows.dtype)
        return rows.index_put(is_item.nonzero(as_tuple=True), vectors, accumulate=True)

    def directions(self) -> torch.Tensor:
        """The vectors of all items, of length one: ND."""
        return F.normalize(self.items.vectors(), dim=1)


class CascadeStream(CodeStream):
    """A `CodeStream` whose rows say the items of END: in `input_ids`, and as targets in `vectors`."""

    def __init__(self, data: TrainingSequences, codes: ItemCodes, max_length: int, passes: Passes) -> None:
        self._num_tokens = codes.vocabulary_size
        super().__init__(data, with_vectors(codes), max_length, passes)

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        targets = batch.rows["targets"]
        is_item = targets >= self._num_tokens
        of_rows = {
            "targets": np.where(is_item, END, targets),
            "vectors": np.where(is_item, targets - self._num_tokens, IGNORE),
        }
        counts = {**batch.counts, NEXT_VECTOR: int(is_item.sum())}
        return replace(batch, rows={**batch.rows, **of_rows}, counts=counts, blank=dict.fromkeys(of_rows, IGNORE))


class CascadeLoss(PackedLoss):
    """The softmax of each next token, and, times a weight, that of each next vector among those of all items: logits
    are cosines, with the state before END, times a scale."""

    def __init__(self, model: Any, weight: float, scale: float, *, bf16: bool = False) -> None:
        """The model reads `CodesAndVectors`."""
        super().__init__(model, bf16=bf16)
        self._weight, self._cosine_scale = weight, scale

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        hidden_RTD = self._hidden(rows["input_ids"], rows["position_ids"])
        found = {NEXT_TOKEN: self._of_tokens(hidden_RTD, rows["targets"])}
        if self._weight:
            at_RT = rows["vectors"] != IGNORE
            asking_ND = self._cosine_scale * F.normalize(hidden_RTD[at_RT].float(), dim=1)
            item_ND = self.module.get_input_embeddings().directions()
            loss = linear_cross_entropy(asking_ND, item_ND, rows["vectors"][at_RT], self._dtype)
            found[NEXT_VECTOR] = self._weight * loss
        return found

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")


@dataclass(frozen=True)
class Cells:
    """Items by their token sequences, all of one length."""

    token_CL: np.ndarray
    """The sequences, END included, in rising order."""
    cell_N: np.ndarray
    items: Ragged
    """Those of each cell."""

    @classmethod
    def of(cls, codes: ItemCodes) -> Cells:
        """
        >>> Cells.of(ItemCodes.of(np.array([[1], [0], [1]]), 2, "share")).items.values.tolist()
        [1, 0, 2]
        """
        token_NL = codes.sequences.values.reshape(len(codes.sequences), -1)
        token_CL, cell_N, sizes = np.unique(token_NL, axis=0, return_inverse=True, return_counts=True)
        return cls(token_CL, cell_N, Ragged(np.argsort(cell_N, kind="stable"), offsets_of(sizes)))

    def read(self, tree: Tree, query_M: np.ndarray, cell_M: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """The log-probability of each cell after its query's prompt, float64[M], and the state that has read its codes:
        MD. Queries rise, and the cells of each. Prefixes that cells share are read once; the tree's nodes are dropped.
        """
        device = tree.prompt_hidden_UD.device
        tree.forget()
        state_UD, row_M, parent_U = tree.prompt_hidden_UD, query_M, np.full(tree.num_users, -1)
        log_prob_M = np.zeros(len(cell_M))
        for level, token_M in enumerate(self.token_CL[cell_M].T):
            asked = (torch.from_numpy(each).to(device) for each in (row_M, token_M))
            log_prob_M += tree.log_probs(state_UD, *asked).cpu().numpy()
            if level + 1 == self.token_CL.shape[1]:
                break
            # A prefix begins at each pair whose prefix so far, or next token, differs from the pair before.
            begins_M = (np.diff(row_M, prepend=-1) != 0) | (np.diff(token_M, prepend=-1) != 0)
            first, before = np.flatnonzero(begins_M), tree.num_nodes
            new = (token_M[first], query_M[first], parent_U[row_M[first]])
            state_UD = tree.extend(*(torch.from_numpy(each).to(device) for each in new))
            row_M, parent_U = np.cumsum(begins_M) - 1, before + np.arange(len(first))
        tree.forget()
        return log_prob_M, state_UD[torch.from_numpy(row_M).to(device)]


class CascadeRecommender(CodeRecommender):
    """Ranks by what a model says of an item's codes, and of its vector once they are known:

        score(item) = code_scale * log P(codes) + log softmax(cosine_scale * cosine(state, vector))

    where the softmax runs over the items of the cell, and the state has read its codes. With `code_scale` 1 this is a
    probability of items; with `cosine_scale` 0 items share that of their cell evenly.

    No item scores above its cell. So a list is proven as soon as its K-th item scores above all cells that were not
    read; more and more of the best cells are searched until then, each time from the start, and a proof counts the
    prefixes of the last search. A beam reads as many cells as it is wide.
    """

    def __init__(
        self,
        name: str,
        data: TrainingSequences,
        codes: ItemCodes,
        model: Any,
        *,
        code_scale: float,
        cosine_scale: float,
        **reads: Any,
    ) -> None:
        """`reads` are `max_length`, `beam_width` and `max_nodes`, as for `CodeRecommender`."""
        super().__init__(name, data, codes, model, **reads)
        self._codes, self._cells = with_vectors(codes), Cells.of(codes)
        token_CL = self._cells.token_CL
        self._trie_of_cells = Trie.build(Ragged(token_CL.reshape(-1), np.arange(len(token_CL) + 1) * token_CL.shape[1]))
        self._code_scale, self._cosine_scale = code_scale, cosine_scale
        with torch.inference_mode():
            self._item_ND = model.get_input_embeddings().directions()

    def with_items(self, catalogue: Catalogue) -> CodeRecommender:
        """Raises ConfigError: new items have no vectors among those that the model reads."""
        raise ConfigError(f"{self.name} cannot rank items that came after training: train it again")

    def _ranked(self, tree: Tree, queries: Sequence[RankingQuery], k: int, mode: str) -> list[Ranking]:
        if queries[0].candidates is not None:
            scores_QN = self._of_items(tree, [query.candidates or () for query in queries])
            return rankings_of(self.catalogue, queries, scores_QN, k)
        scores_QN, gap_Q, expanded_Q = self._searched(tree, queries, k, mode)
        if any(query.uncounted for query in queries):
            beside_QN = self._of_items(tree, [query.uncounted for query in queries])
            scores_QN = np.where(scores_QN == -np.inf, beside_QN, scores_QN)
        rankings = rankings_of(self.catalogue, queries, scores_QN, k)
        proofs = [Proof(*each) for each in zip(gap_Q.tolist(), expanded_Q.tolist(), strict=True)]
        return [replace(ranking, proof=proof) for ranking, proof in zip(rankings, proofs, strict=True)]

    def _searched(
        self, tree: Tree, queries: Sequence[RankingQuery], k: int, mode: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The scores of the items of cells that were found, minus infinity for others, the most by which one of these
        can score above the K-th, and the prefixes read: QN, Q, Q."""
        counts_QN = np.stack([self._counts(query) for query in queries])
        allowed = [np.unique(self._cells.cell_N[counts_N]) for counts_N in counts_QN]
        scores_QN = np.full(counts_QN.shape, -np.inf)
        gap_Q, expanded_Q = np.zeros(len(queries)), np.zeros(len(queries), dtype=np.int64)
        beam = mode == "beam"
        num = max(self._beam_width, k) if beam else k
        open_Q = np.ones(len(queries), dtype=bool)
        while open_Q.any():
            found = search(
                tree,
                self._trie_of_cells,
                k=num,
                width=num if beam else max(FIRST_BEAM, num),
                exact=not beam,
                allowed=[cells if is_open else cells[:0] for cells, is_open in zip(allowed, open_Q, strict=True)],
                max_nodes=self._max_nodes if mode == "auto" else None,
            )
            read_QN = self._of_cells(tree, [np.sort(each.items) for each in found])
            for row in np.flatnonzero(open_Q):
                scores_QN[row], expanded_Q[row] = read_QN[row], found[row].expanded
                counted = np.sort(read_QN[row, counts_QN[row]])
                kth = counted[-k] if len(counted) >= k else -np.inf
                # A cell that is not among those found scores no more than their last one, or than the search's bound.
                is_left = len(found[row].items) < len(allowed[row])
                bound = self._code_scale * max(found[row].bound, found[row].kth)
                gap_Q[row] = max(0.0, bound - kth) if is_left else 0.0
                # Where the cells found are not the best ones, a beam or a budget has ended the search.
                open_Q[row] = gap_Q[row] > 0 and found[row].exact and not beam
            num *= GROWTH
        return scores_QN, gap_Q, expanded_Q

    def _counts(self, query: RankingQuery) -> np.ndarray:
        """Which items may be among a query's K best: bool[N]."""
        counts_N = np.full(len(self._cells.cell_N), query.allow is None)
        if query.allow is not None:
            counts_N[self._ranker.positions(query.allow)] = True
        counts_N[self._ranker.positions(query.exclude | query.uncounted)] = False
        return counts_N

    def _of_items(self, tree: Tree, ids: Sequence[Iterable[str]]) -> np.ndarray:
        """The scores of some items of each query, and minus infinity for others: float64[Q, N]."""
        items = [self._ranker.positions(each) for each in ids]
        read_QN = self._of_cells(tree, [np.unique(self._cells.cell_N[each]) for each in items])
        scores_QN = np.full(read_QN.shape, -np.inf)
        for row, each in enumerate(items):
            scores_QN[row, each] = read_QN[row, each]
        return scores_QN

    def _of_cells(self, tree: Tree, cells: Sequence[np.ndarray]) -> np.ndarray:
        """The scores of the items of some cells of each query, which rise, and minus infinity for others:
        float64[Q, N]."""
        scores_QN = np.full((len(cells), len(self._cells.cell_N)), -np.inf)
        pairs = Ragged.of(cells)
        for start in range(0, len(pairs.values), PAIRS):
            query_M, cell_M = (each[start : start + PAIRS] for each in (pairs.row_of, pairs.values))
            log_prob_M, state_MD = self._cells.read(tree, query_M, cell_M)
            items = self._cells.items.take(cell_M)
            pair_E, item_E = (torch.from_numpy(each).to(state_MD.device) for each in (items.row_of, items.values))
            cosine_E = (F.normalize(state_MD.float(), dim=1)[pair_E] * self._item_ND[item_E]).sum(1)
            logit_E = self._cosine_scale * cosine_E.double().cpu().numpy()
            log_share_E = logit_E - np.logaddexp.reduceat(logit_E, items.offsets[:-1])[items.row_of]
            scores_QN[query_M[items.row_of], items.values] = self._code_scale * log_prob_M[items.row_of] + log_share_E
        return scores_QN
