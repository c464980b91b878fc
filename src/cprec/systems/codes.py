"""Items as short sequences of codes, as tokens of a small vocabulary.

Suffixes: N items, M known items, L levels, K codes of a level, D width of vectors, E events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.special import logsumexp
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import Unsuitable
from cprec.systems.autoencoder import Autoencoder
from cprec.systems.quantise import Product, Quantiser, Residual, Scalar

Kind = Literal["residual k-means", "autoencoder", "product", "scalar"]
"""How vectors become codes."""

Collisions = Literal["count", "reassign", "sinkhorn", "share"]
"""What is done where items share all their codes."""

PADDING, END, BEGIN, FIRST_CODE = range(4)
"""Tokens: what fills rows up, what closes each item, what begins each history, and the first code of the first
level."""
_FIRST_CHARACTER = 0x10000
SCALINGS, SMOOTHING = 50, 0.1
"""How often shares of codes are scaled, and by how much of the mean distance distances are divided: with more, shares
are more alike."""


def fitted(kind: Kind, vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> Quantiser:
    """A quantiser of vectors, of `num_codes` codes a level at most: of fewer vectors than that each may be a centre.

    Raises ConfigError for vectors that have fewer numbers than there are slices to cut them into.
    """
    kinds: dict[Kind, type[Residual | Product]] = {
        **{"residual k-means": Residual, "autoencoder": Autoencoder},
        **{"product": Product, "scalar": Scalar},
    }
    return kinds[kind].fit(vectors_ND.astype(np.float64), num_levels, num_codes, seed)


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


def drawn_order(num_items: int) -> np.ndarray:
    """An order of items that says nothing of them: int64[N], always the same.

    The order of a catalogue may: ids of public files are often handed out along whole histories, held-out events among
    them (see `given_numbers`), so that numbers in that order would let a model know the next item by counting on.
    """
    return np.random.default_rng(0).permutation(num_items)


def told_apart(code_NL: np.ndarray, distance_NK: np.ndarray, known_ML: np.ndarray | None = None) -> np.ndarray:
    """Codes of which the last ones are exchanged where items share all of theirs: int64[N, L].

    The nearest item of a centre keeps its code. Each other item, the nearest to its centre first (of equals one that is
    drawn), takes the nearest of those last codes that fewest items have after the same codes before. So no two items
    share all codes unless more of them share all but the last than there are last codes; then each of these stands for
    about as many. Codes of `known_ML` stay as they are. `distance_NK` are distances from the centres of the last level.

    >>> told_apart(np.array([[0, 1], [0, 1], [2, 1]]), np.array([[9, 2, 7], [8, 1, 9], [0, 1, 5]])).tolist()
    [[0, 2], [0, 1], [2, 1]]
    """
    found_NL = code_NL.copy()
    for items, taken_K in _crowded(code_NL, distance_NK, known_ML):
        moved = []
        for item in items:
            if taken_K[code_NL[item, -1]]:
                moved.append(item)
            else:
                taken_K[code_NL[item, -1]] = 1
        for item in moved:
            found_NL[item, -1] = np.where(taken_K == taken_K.min(), distance_NK[item], np.inf).argmin()
            taken_K[found_NL[item, -1]] += 1
    return found_NL


def spread_out(code_NL: np.ndarray, distance_NK: np.ndarray, known_ML: np.ndarray | None = None) -> np.ndarray:
    """Codes of which the last ones are spread over items that share the others, if some share all: int64[N, L].

    Each item has shares of all last codes, in proportion to exp(-distance) at first, and these are scaled in turn until
    an item's are one in all and no code has more than its part of the items (Sinkhorn 1967; Zheng et al. 2024, where
    codes collide, and every code has the same). Then the items that are surest take, one after the other, the code of
    their largest share of those that fewest items have. No item keeps its code by right, so that less is lost in sum
    than by `told_apart`. The rest is as there.

    >>> distance_NK = np.array([[0.1], [0.9], [1.0]]) - np.array([0.0, 1.0, 2.0])
    >>> own_NL, distance_NK = np.array([[0], [1], [1]]), distance_NK**2
    >>> told_apart(own_NL, distance_NK).ravel().tolist(), spread_out(own_NL, distance_NK).ravel().tolist()
    ([0, 2, 1], [0, 1, 2])
    """
    found_NL = code_NL.copy()
    for items, taken_K in _crowded(code_NL, distance_NK, known_ML):
        distance_IK = distance_NK[items]
        log_IK = -distance_IK / max(SMOOTHING * distance_IK.mean(), np.finfo(float).tiny)
        part_K = np.maximum(-(-(len(items) + taken_K.sum()) // len(taken_K)) - taken_K, np.finfo(float).tiny)
        for _ in range(SCALINGS):
            log_IK = log_IK - logsumexp(log_IK, axis=1, keepdims=True)
            log_IK = log_IK - np.maximum(logsumexp(log_IK, axis=0) - np.log(part_K), 0)
        for place in np.argsort(-log_IK.max(1), kind="stable"):
            found_NL[items[place], -1] = np.where(taken_K == taken_K.min(), log_IK[place], -np.inf).argmax()
            taken_K[found_NL[items[place], -1]] += 1
    return found_NL


def _crowded(
    code_NL: np.ndarray, distance_NK: np.ndarray, known_ML: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The items that share all codes but the last one, where some share that, too: the nearest to their centres first,
    of equals one that is drawn; and how many known items have each last code there, int64[K]."""
    known_ML = code_NL[:0] if known_ML is None else known_ML
    every = np.concatenate([known_ML, code_NL])
    _, group, sizes = np.unique(every, axis=0, return_inverse=True, return_counts=True)
    prefix = Ragged(every[:, :-1].ravel(), np.arange(len(every) + 1) * (every.shape[1] - 1)).numbers()
    prefix_M, prefix_N = np.split(prefix, [len(known_ML)])
    own_N = distance_NK[np.arange(len(code_NL)), code_NL[:, -1]]
    order = np.lexsort((drawn_order(len(own_N)), own_N, prefix_N))
    for number in np.unique(prefix_N[sizes[group[len(known_ML) :]] > 1]):
        items = order[slice(*np.searchsorted(prefix_N[order], [number, number + 1]))]
        yield items, np.bincount(known_ML[prefix_M == number, -1], minlength=distance_NK.shape[1])


MOVES = {"reassign": told_apart, "sinkhorn": spread_out}
"""What exchanges last codes, by the rule."""


@dataclass(frozen=True)
class ItemCodes:
    """The token sequences of items, each closed by END: no two alike, except where `collisions` is `share` or new items
    came."""

    sequences: Ragged
    vocabulary_size: int
    num_collisions: int
    """Items that share all their codes with another. Each of these gets one more code, which makes it unique, or they
    share the probability of their sequence."""
    num_moved: int = 0
    """Items with another last code than their own, because it was taken."""
    collisions: Collisions = "count"
    code_NL: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    """The codes that the sequences are made of, below `num_codes`: int64[N, L]."""
    num_codes: int = 0
    num_further: int = 0
    """Tokens, after those of codes, that tell items of the same codes apart."""
    quantiser: Quantiser | None = None
    """What codes further vectors."""
    new_vectors: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None
    """The vectors of further items, by their ids and titles."""
    version: str = ""
    """A hash of the sequences of the items that a model learns, which say what tokens mean: nobody gives it, and items
    that come later do not change it."""

    def __post_init__(self) -> None:
        if not self.version:
            content = self.sequences.values.astype("<i8").tobytes() + self.sequences.offsets.astype("<i8").tobytes()
            object.__setattr__(self, "version", hashlib.sha256(content).hexdigest()[:16])

    @classmethod
    def of(cls, code_NL: np.ndarray, num_codes: int, collisions: Collisions = "count") -> ItemCodes:
        """From codes below `num_codes`; each level has tokens of its own. A draw decides which of the items of equal
        codes gets which further code.

        >>> codes = ItemCodes.of(np.array([[0, 1], [1, 0], [0, 1]]), num_codes=2)
        >>> [codes.sequences[item].tolist() for item in range(3)], codes.num_collisions, codes.vocabulary_size
        ([[3, 6, 8, 1], [4, 5, 1], [3, 6, 7, 1]], 2, 9)
        """
        num_items, num_levels = code_NL.shape
        _, group_N, sizes = np.unique(code_NL, axis=0, return_inverse=True, return_counts=True)
        # Items of one group stand side by side in `order`; their place in the group tells them apart.
        order = np.lexsort((drawn_order(num_items), group_N))
        place_N = np.empty(num_items, dtype=np.int64)
        place_N[order] = np.arange(num_items) - np.repeat(offsets_of(sizes)[:-1], sizes)
        shared_N = sizes[group_N] > 1
        told_N = shared_N & (collisions != "share")
        tokens = np.column_stack([code_NL, place_N, np.zeros(num_items, dtype=np.int64)])
        tokens += FIRST_CODE + np.arange(num_levels + 2) * num_codes
        tokens[:, -1] = END
        kept = np.ones(tokens.shape, dtype=bool)
        kept[:, -2] = told_N
        num_further = int(sizes.max()) if told_N.any() else 0
        return cls(
            sequences=Ragged(tokens[kept], offsets_of(kept.sum(1))),
            vocabulary_size=FIRST_CODE + num_levels * num_codes + num_further,
            num_collisions=int(shared_N.sum()),
            collisions=collisions,
            code_NL=code_NL,
            num_codes=num_codes,
            num_further=num_further,
        )

    @classmethod
    def coded(cls, quantiser: Quantiser, vectors_ND: np.ndarray, num_codes: int, collisions: Collisions) -> ItemCodes:
        """From vectors. With `reassign` and `sinkhorn`, last codes are exchanged first (`told_apart`, `spread_out`);
        where that does not suffice, items get one more code, as by `count`. Raises Unsuitable where all vectors have
        the same codes."""
        own_NL = code_NL = quantiser.encode(vectors_ND)
        if len(own_NL) > 1 and (own_NL == own_NL[0]).all():
            raise Unsuitable(
                f"all {len(own_NL):,} items have the same codes, which therefore say nothing: give vectors that tell "
                "items apart (vectors=FILE), or leave out systems of codes"
            )
        if collisions in MOVES:
            code_NL = MOVES[collisions](own_NL, quantiser.last_distances(vectors_ND, own_NL))
        made, num_moved = cls.of(code_NL, num_codes, collisions), int((code_NL != own_NL).any(1).sum())
        return replace(made, num_moved=num_moved, quantiser=quantiser)

    def with_items(self, vectors_ND: np.ndarray) -> ItemCodes:
        """With further items, after those that are here and keep their sequences.

        With `reassign` and `sinkhorn` a new item takes a near last code that is free. One whose codes are taken takes
        the first further code that is free; where a model knows none that is, it shares a sequence that the model has
        learnt.
        """
        assert self.quantiser is not None, "these codes were not made of vectors"
        own_NL = code_NL = self.quantiser.encode(vectors_ND)
        if self.collisions in MOVES:
            code_NL = MOVES[self.collisions](own_NL, self.quantiser.last_distances(vectors_ND, own_NL), self.code_NL)
        first = FIRST_CODE + self.num_levels * self.num_codes
        endings = [[END], *([token, END] for token in range(first, first + self.num_further))]
        values, offsets = self.sequences.values.tolist(), self.sequences.offsets.tolist()
        used = {tuple(values[start:stop]) for start, stop in pairwise(offsets)}
        taken, rows = set(map(tuple, self.code_NL.tolist())), []
        tokens_NL = code_NL + FIRST_CODE + np.arange(self.num_levels) * self.num_codes
        for codes, tokens in zip(map(tuple, code_NL.tolist()), tokens_NL.tolist(), strict=True):
            # After codes that several items share a model knows no END without a further code before it.
            free = [each for each in endings[codes in taken :] if (*tokens, *each) not in used]
            learnt = [each for each in endings if (*tokens, *each) in used]
            rows.append([*tokens, *(free or learnt)[0]])
            used.add(tuple(rows[-1]))
            taken.add(codes)
        every_NL = np.concatenate([self.code_NL, code_NL])
        _, group_N, sizes = np.unique(every_NL, axis=0, return_inverse=True, return_counts=True)
        return replace(
            self,
            sequences=Ragged.concatenate([self.sequences, Ragged.of(rows)]),
            code_NL=every_NL,
            num_collisions=int((sizes[group_N] > 1).sum()),
            num_moved=self.num_moved + int((code_NL != own_NL).any(1).sum()),
        )

    def take(self, items: np.ndarray) -> ItemCodes:
        """The same items in another order."""
        return replace(self, sequences=self.sequences.take(items), code_NL=self.code_NL[items])

    @property
    def num_levels(self) -> int:
        """Codes that every item has; tokens that close items or tell equal ones apart are none of them."""
        return self.code_NL.shape[1]

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
