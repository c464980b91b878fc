"""Training sequences without the events that do not fit among the others, after LLM4DSR (Wang et al. 2025).

How well an event e fits is its item's log-probability given the other events of its sequence, above what the item's
share of all events gives it anywhere:

    fit(e) = log P(item | the others) - log share(item)

Without the second term rare items would look like noise. Deviations from paper and code: there a language model is
fine-tuned to name an item that was exchanged at random, the probability that it names an item is the score, and what it
suggests instead takes the item's place, in histories at test time too. Here any model of the item in a place may score,
events are left out unless they are to be replaced, and only what is trained on changes. Suffixes: E events, K some of
them, V items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from scipy import sparse

from cprec.batch import IGNORE
from cprec.data.links import followers
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import Unsuitable
from cprec.systems.dot_product import SequenceModel
from cprec.systems.items import MASK
from cprec.systems.signals import TrainingSequences, padded

CLOZE_BATCH = 256
"""Rows in which an item is guessed at once."""
SCORES = 1 << 22
"""Scores of items in places that exist at once."""


class PlaceScorer(ABC):
    """Says how probable items are in the places of events of some sequences, given the other events there."""

    @abstractmethod
    def log_probabilities(self) -> np.ndarray:
        """Of each event's own item: float[E]."""

    @abstractmethod
    def likeliest(self, events_K: np.ndarray) -> np.ndarray:
        """The most probable other item in the places of some events, by number; the first one of equals: int64[K]."""


class GraphScorer(PlaceScorer):
    """By how often items follow each other in the sequences themselves.

        P(j) = sum over the events n within `window` of the place of P(j | n) / distance, over the sum of 1 / distance
        P(j | n) = (links(n, j) + prior * share(j)) / (links(n, all) + prior)

    links(n, j) adds 1 / distance for each time that j follows n within the window; for an event after the place, for
    each time that j precedes it. The one link that the event itself makes with n does not count: noise has no other.
    """

    def __init__(self, sequences: Ragged, num_items: int, *, window: int = 3, prior: float = 5.0) -> None:
        """`prior` is how many links the items' shares of all events count for."""
        self._sequences, self._window, self._prior = sequences, window, prior
        each = (followers(sequences.row_of, sequences.values, num_items, far) for far in range(1, window + 1))
        self._links = sparse.csr_array(sum(each, sparse.csr_array((num_items, num_items))))
        self._after_V, self._before_V = self._links.sum(1), self._links.sum(0)
        self._share_V = np.bincount(sequences.values, minlength=num_items) / max(1, len(sequences.values))

    def log_probabilities(self) -> np.ndarray:
        """See `PlaceScorer.log_probabilities`. An item that stands alone has its share."""
        row, items, share_V, prior = self._sequences.row_of, self._sequences.values, self._share_V, self._prior
        sum_E, weight_E = np.zeros(len(items)), np.zeros(len(items))
        for distance in range(1, self._window + 1):
            first = np.flatnonzero(row[:-distance] == row[distance:])
            second, weight = first + distance, 1 / distance
            others = np.maximum(self._links[items[first], items[second]] - weight, 0)
            for own, total_V, other in ((second, self._after_V, first), (first, self._before_V, second)):
                total = np.maximum(total_V[items[other]] - weight, 0)
                sum_E[own] += weight * (others + prior * share_V[items[own]]) / (total + prior)
                weight_E[own] += weight
        return np.log(np.where(weight_E > 0, sum_E / np.maximum(weight_E, 1e-12), share_V[items]))

    def likeliest(self, events_K: np.ndarray) -> np.ndarray:
        num_events = max(1, SCORES // len(self._share_V))
        parts = [self._likeliest(events_K[at : at + num_events]) for at in range(0, len(events_K), num_events)]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _likeliest(self, events_K: np.ndarray) -> np.ndarray:
        row, items, prior = self._sequences.row_of, self._sequences.values, self._prior
        size = (len(events_K), len(self._share_V))
        scores_KV, share_K = np.zeros(size), np.zeros(len(events_K))
        for links, total_V, side in ((self._links, self._after_V, -1), (self._links.T, self._before_V, 1)):
            start_KV = sparse.csr_array(size)
            for distance in range(1, self._window + 1):
                place_K = events_K + side * distance
                near = np.flatnonzero((place_K >= 0) & (place_K < len(items)))
                near = near[row[place_K[near]] == row[events_K[near]]]
                other = items[place_K[near]]
                weight = 1 / distance / (total_V[other] + prior)
                start_KV = start_KV + sparse.csr_array((weight, (near, other)), size)
                share_K[near] += weight * prior
            scores_KV += (start_KV @ links).toarray()
        scores_KV += share_K[:, None] * self._share_V
        scores_KV[np.arange(len(events_K)), items[events_K]] = -np.inf
        return scores_KV.argmax(1)


class ClozeScorer(PlaceScorer):
    """By a model that fills in masked items, such as that of `BERT4Rec`: each event is masked in turn."""

    def __init__(self, model: SequenceModel, sequences: Ragged, max_length: int) -> None:
        """Longer sequences are cut into pieces of at most `max_length` events, which are read alone."""
        self._model, self._items = model.eval(), sequences.values
        after_E = np.repeat(sequences.offsets[1:], sequences.lengths) - 1 - np.arange(len(sequences.values))
        piece_E = after_E // max_length  # of its sequence, from the last one
        begins = (sequences.place_of == 0) | (np.diff(piece_E, prepend=-1) != 0)
        self._pieces = Ragged(sequences.values, np.append(np.flatnonzero(begins), len(sequences.values)))

    def log_probabilities(self) -> np.ndarray:
        found_E = np.empty(len(self._items))
        for events_K, log_KV in self._guesses(np.arange(len(self._items))):
            own_K1 = torch.from_numpy(self._items[events_K]).to(log_KV.device)[:, None]
            found_E[events_K] = log_KV.gather(1, own_K1)[:, 0].cpu().numpy()
        return found_E

    def likeliest(self, events_K: np.ndarray) -> np.ndarray:
        found = [np.empty(0, dtype=np.int64)]
        for events, log_KV in self._guesses(events_K):
            log_KV[torch.arange(len(events)), torch.from_numpy(self._items[events])] = -torch.inf
            found.append(log_KV.argmax(1).cpu().numpy())
        return np.concatenate(found)

    @torch.no_grad()
    def _guesses(self, events_K: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Some of the events, and the log-probability of every item in their places: KV."""
        vectors, (row_E, place_E) = self._model.vectors(), (self._pieces.row_of, self._pieces.place_of)
        num_items, device = len(vectors.items_VD), vectors.items_VD.device
        size = max(1, min(CLOZE_BATCH, SCORES // num_items))
        for start in range(0, len(events_K), size):
            events = events_K[start : start + size]
            items, _ = padded(self._pieces.take(row_E[events]), num_items)
            at = np.arange(len(events)), place_E[events]
            targets = np.full(items.shape, IGNORE)
            targets[at], items[at] = items[at], num_items + MASK
            rows = {"items": torch.from_numpy(items).to(device), "targets": torch.from_numpy(targets).to(device)}
            states_KD, _ = self._model.states(vectors, rows)
            yield events, (states_KD @ vectors.items_VD.T).log_softmax(1)


def fit_of_events(sequences: Ragged, scorer: PlaceScorer) -> np.ndarray:
    """How well each event of the sequences that a scorer was made for fits among the others: float[E]. 0: as well as
    anywhere else."""
    counts_V = np.bincount(sequences.values)
    return scorer.log_probabilities() - np.log(counts_V[sequences.values] / len(sequences.values))


def denoised(
    data: TrainingSequences,
    scorer: PlaceScorer,
    threshold: float,
    *,
    most: float = 0.2,
    replaces: bool = False,
) -> TrainingSequences:
    """The sequences without the events that fit worse than the threshold, or with the most probable other item in their
    places.

    Of each sequence at most the share `most` of the events goes, rounded up, those that fit worst (2 of 11 in the code
    of LLM4DSR). A user of whom nothing is left is left out. Raises Unsuitable where nothing is left to train on.
    """
    sequences = data.sequences
    fit_E, row_E = fit_of_events(sequences, scorer), sequences.row_of
    rank_E = np.empty(len(fit_E), dtype=np.int64)
    rank_E[np.lexsort((fit_E, row_E))] = sequences.place_of  # 0: the one that fits worst
    num_R = np.ceil(np.round(most * sequences.lengths, 9))
    is_noise_E = (fit_E < threshold) & (rank_E < num_R[row_E])
    if replaces:
        items = sequences.values.copy()
        items[is_noise_E] = scorer.likeliest(np.flatnonzero(is_noise_E))
        return replace(data, sequences=Ragged(items, sequences.offsets))
    kept = sequences.kept(~is_noise_E)
    if kept.lengths.max(initial=0) < 2:
        raise Unsuitable(
            f"threshold={threshold} and most={most} leave no user of domain {data.domain!r} two training events: lower "
            "one of them"
        )
    has_events = np.flatnonzero(kept.lengths)
    return replace(
        data,
        sequences=Ragged(kept.values, offsets_of(kept.lengths[has_events])),
        users=tuple(data.users[row] for row in has_events),
        times=None if data.times is None else data.times[~is_noise_E],
    )
