"""Items as short sequences of codes, as tokens of a small vocabulary.

Suffixes: N items, L levels, E events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from cprec.data.ragged import Ragged, offsets_of

PADDING, END, BEGIN, FIRST_CODE = range(4)
"""Tokens: what fills rows up, what closes each item, what begins each history, and the first code of the first
level."""
_FIRST_CHARACTER = 0x10000


def pieces_of(token_NL: np.ndarray, item_E: np.ndarray, num_pieces: int) -> np.ndarray:
    """Pieces of items' token sequences: int64[N, L], filled up with -1.

    The pieces are learnt by byte-pair encoding (Sennrich et al. 2016) on the sequences of the items of events, so that
    what stands in many events becomes one piece: each token is a piece, and each merge of two adds one while there are
    fewer than `num_pieces` and some two stand side by side in two events. A tie goes to the two with the lower numbers.

    >>> pieces_of(np.array([[0, 5, 8], [0, 5, 9], [1, 5, 8]]), np.array([0, 0, 0, 1, 2, 2]), num_pieces=7).tolist()
    [[6, -1, -1], [0, 2, 4], [1, 5, -1]]
    """
    words = ["".join(chr(_FIRST_CHARACTER + token) for token in row) for row in token_NL.tolist()]
    alphabet = sorted(set("".join(words)))  # those of items without events, too
    trainer = BpeTrainer(vocab_size=num_pieces, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer = Tokenizer(BPE())
    tokenizer.train_from_iterator((words[item] for item in item_E.tolist()), trainer)
    found_NL = np.full(token_NL.shape, -1, dtype=np.int64)
    for row, encoded in enumerate(tokenizer.encode_batch(words)):
        found_NL[row, : len(encoded.ids)] = encoded.ids
    return found_NL


@dataclass(frozen=True)
class ItemCodes:
    """The token sequences of items, no two alike, each closed by END."""

    sequences: Ragged
    vocabulary_size: int
    num_collisions: int
    """Items that share all their codes with another. Each of these gets one more code, which makes it unique."""

    @classmethod
    def of(cls, codes_NL: np.ndarray, num_codes: int) -> ItemCodes:
        """From codes below `num_codes`; each level has tokens of its own.

        >>> codes = ItemCodes.of(np.array([[0, 1], [1, 0], [0, 1]]), num_codes=2)
        >>> [codes.sequences[item].tolist() for item in range(3)], codes.num_collisions, codes.vocabulary_size
        ([[3, 6, 7, 1], [4, 5, 1], [3, 6, 8, 1]], 2, 9)
        """
        num_items, num_levels = codes_NL.shape
        _, group_N, sizes = np.unique(codes_NL, axis=0, return_inverse=True, return_counts=True)
        # Items of one group stand side by side in `order`; their place in the group tells them apart.
        order = np.argsort(group_N, kind="stable")
        place_N = np.empty(num_items, dtype=np.int64)
        place_N[order] = np.arange(num_items) - np.repeat(offsets_of(sizes)[:-1], sizes)
        shared_N = sizes[group_N] > 1
        tokens = np.column_stack([codes_NL, place_N, np.zeros(num_items, dtype=np.int64)])
        tokens += FIRST_CODE + np.arange(num_levels + 2) * num_codes
        tokens[:, -1] = END
        kept = np.ones(tokens.shape, dtype=bool)
        kept[:, -2] = shared_N
        vocabulary_size = FIRST_CODE + num_levels * num_codes + (int(sizes.max()) if shared_N.any() else 0)
        return cls(Ragged(tokens[kept], offsets_of(kept.sum(1))), vocabulary_size, int(shared_N.sum()))

    @property
    def longest(self) -> int:
        """The most tokens of an item."""
        return int(self.sequences.lengths.max())

    def prompts(self, histories: Ragged) -> Ragged:
        """Histories of item numbers as tokens: BEGIN, then each item's, so that the next item's tokens follow.

        >>> codes = ItemCodes.of(np.array([[0], [1]]), num_codes=2)
        >>> prompts = codes.prompts(Ragged.of([[1, 0], []]))
        >>> [prompts[row].tolist() for row in range(2)]
        [[2, 4, 1, 3, 1], [2]]
        """
        num_items = len(self.sequences)
        pieces = Ragged.concatenate([self.sequences, Ragged.of([[BEGIN]])])
        # BEGIN is one more piece, which stands before the items of each row.
        tokens = pieces.take(np.insert(histories.values, histories.offsets[:-1], num_items))
        return Ragged(tokens.values, tokens.offsets[histories.offsets + np.arange(len(histories) + 1)])
