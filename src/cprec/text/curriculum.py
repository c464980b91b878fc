"""Documents that no user wrote: walks on the graph of training events, rules on pairs of items, and item texts.

Layers of such documents in place of logs are from arXiv 2602.07298 (2026). Here they are kinds of documents beside
behaviour sequences, made of nothing but the training events of a split and the fields of items that have such events.

Suffixes: U users, V items of the domain, P pairs of items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from cprec.data.cleaning import clean_title
from cprec.data.links import links
from cprec.data.ragged import Ragged
from cprec.data.random_walks import SecondOrderWalks
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.schema import SPECIFIC
from cprec.text import prompts
from cprec.text.config import Curriculum, Mixture
from cprec.text.corpus import ITEM_TEXTS, RULES, WALKS, Group
from cprec.text.documents import histories
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import Shards
from cprec.text.tokenizer import encode_pieces

WINDOW, BACKWARD = 5, 0.5
"""Of the graph to walk on: links within so many events, and how strong those to earlier events are (`links`)."""


@dataclass(frozen=True)
class Rules:
    """Pairs of items that users had both of; arrays of length P, sorted by the first item, then by the second."""

    first: np.ndarray
    second: np.ndarray
    """Items by number: int64."""
    support: np.ndarray
    """Users who had both: int64."""
    confidence: np.ndarray
    """The share of those with the first who had the second."""
    lift: np.ndarray
    """Over the share of all users who had the second."""


def pair_rules(histories: Ragged, num_items: int) -> Rules:
    """The rules of users' events, both directions of each pair.

    >>> found = pair_rules(Ragged.of([[0, 1, 0], [0, 1], [0], [2]]), 3)
    >>> found.first.tolist(), found.second.tolist(), found.support.tolist()
    ([0, 1], [1, 0], [2, 2])
    >>> found.confidence.round(3).tolist(), found.lift.round(3).tolist()
    ([0.667, 1.0], [1.333, 1.333])
    """
    ones = np.ones(len(histories.values), dtype=np.int64)
    had_UV = sparse.csr_array((ones, (histories.row_of, histories.values)), (len(histories), num_items))
    had_UV.data[:] = 1  # each item once, however often the user had it
    both_VV = sparse.csr_array(had_UV.T @ had_UV)
    both_VV.sort_indices()
    users_V, pairs = both_VV.diagonal(), both_VV.tocoo()
    kept = pairs.row != pairs.col
    first, second, support = pairs.row[kept], pairs.col[kept], pairs.data[kept]
    confidence = support / users_V[first]
    return Rules(first, second, support, confidence, confidence * len(histories) / users_V[second])


class CurriculumWriter:
    """Writes the documents of a split's training events, the same for the same split, settings and seed."""

    def __init__(
        self,
        split: Split,
        encoder: PromptEncoder,
        tokenizer: Any,
        settings: Curriculum,
        *,
        max_length: int,
        seed: int,
        begin: Sequence[int] = (),
    ) -> None:
        """`encoder` writes the data's documents, which begin with the tokens `begin`; walks have at most `max_length`
        tokens."""
        self._split, self._encoder, self._tokenizer, self._begin = split, encoder, tokenizer, begin
        self._settings, self._max_length, self._seed = settings, max_length, seed

    def groups(self, domains: Sequence[str], mixtures: Sequence[Mixture]) -> list[Group]:
        """The documents of each kind that any mixture asks for: a group for each kind and domain.

        A domain whose items have neither brand nor categories has no item texts. Raises ConfigError for a domain
        without transitions or without rules where these are asked for, and where an item does not fit a row.
        """
        made = []
        for kind, write, share in (
            (WALKS, self._walks, "walks_share"),
            (RULES, self._rules, "rules_share"),
            (ITEM_TEXTS, self._item_texts, "item_text_share"),
        ):
            if any(getattr(mixture, share) for mixture in mixtures):
                shards_of = {domain: write(domain) for domain in domains}
                made += [
                    Group(f"{kind} of {domain}", kind, shards, np.arange(len(shards)), domain)
                    for domain, shards in shards_of.items()
                    if len(shards)
                ]
        return made

    def walks_of(self, domain: str) -> SecondOrderWalks:
        """The walks of a domain, on the links of its training events. Items have their numbers in the domain."""
        history, num_items = self._events(domain)
        linked = links(history.row_of, history.values, num_items, window=WINDOW, backward=BACKWARD)
        try:
            return SecondOrderWalks(linked, p=self._settings.walk_p, q=self._settings.walk_q)
        except ConfigError as error:
            raise ConfigError(f"no walks of domain {domain!r}: {error}. Leave out walks_share or the domain") from None

    def _walks(self, domain: str) -> Shards:
        catalogue, settings = self._split.catalogue, self._settings
        number, first = catalogue.domain_index(domain), int(catalogue.rows_of(domain)[0])
        history, _ = self._events(domain)
        num_walks = settings.walks_per_item * len(np.unique(history.values))
        generator = np.random.default_rng((self._seed, number))
        items = self.walks_of(domain).sample(num_walks, settings.walk_length, generator)
        events = Ragged(first + items.ravel(), settings.walk_length * np.arange(num_walks + 1))
        domains = np.full(num_walks, number)
        kept = self._encoder.fit(SPECIFIC, domains, events, self._max_length - 1)
        if not kept.lengths.all():
            raise ConfigError(f"max_length={self._max_length} has no room for an item of domain {domain!r}: raise it")
        tokens, target_start = self._encoder.documents(SPECIFIC, domains, kept)
        return _in_memory(tokens, kept.lengths, target_start)

    def _rules(self, domain: str) -> Shards:
        history, num_items = self._events(domain)
        first = int(self._split.catalogue.rows_of(domain)[0])
        found, least = pair_rules(history, num_items), self._settings.min_support
        kept = np.flatnonzero(found.support >= least)
        if not len(kept):
            raise ConfigError(
                f"min_support={least} leaves no rule in domain {domain!r}, where no two items have more than "
                f"{found.support.max(initial=0)} users in common: lower it, or leave out rules_share or the domain"
            )
        numbers = [found.support[kept].tolist(), found.confidence[kept].tolist(), found.lift[kept].tolist()]
        return self._sentences(
            domain,
            self._words(self._encoder.template.sentence(domain, prompts.CHOSE), len(kept)),
            self._encoder.titles(first + found.first[kept]),
            self._words(prompts.ALSO_CHOSE, len(kept)),
            self._encoder.titles(first + found.second[kept]),
            self._pieces([prompts.rule_numbers(*each) for each in zip(*numbers, strict=True)]),
        )

    def _item_texts(self, domain: str) -> Shards:
        catalogue = self._split.catalogue
        history, _ = self._events(domain)
        rows = catalogue.rows_of(domain)[np.unique(history.values)]
        brand, categories = (
            np.array([clean_title(text) for text in column[rows]], dtype=object)
            for column in (catalogue.brand, catalogue.categories)
        )
        kept = (brand != "") | (categories != "")
        rows, brand, categories = rows[kept], brand[kept], categories[kept]
        has_brand, has_categories = brand != "", categories != ""
        return self._sentences(
            domain,
            self._words(self._encoder.template.sentence(domain, prompts.THE_ITEM), len(rows)),
            self._encoder.titles(rows),
            self._pieces(np.where(has_brand, prompts.BY, "")),
            self._fields(brand),
            self._pieces(np.where(has_brand & has_categories, prompts.AND, "")),
            self._pieces(np.where(has_categories, prompts.BELONGS, "")),
            self._fields(categories),
            self._words(prompts.STOP, len(rows)),
        )

    def _events(self, domain: str) -> tuple[Ragged, int]:
        """Each user's training events in a domain, by the items' numbers in it; and the number of its items."""
        rows = self._split.catalogue.rows_of(domain)
        history, _ = histories(self._split, self._split.catalogue.domain_index(domain), SPECIFIC)
        return Ragged(history.values - rows[0], history.offsets), len(rows)

    def _words(self, text: str, times: int) -> Ragged:
        """A text as tokens, once for each document."""
        return self._pieces([text]).take(np.zeros(times, dtype=np.int64))

    def _pieces(self, texts: Sequence[str] | np.ndarray, most: int | None = None) -> Ragged:
        """Texts as tokens, each cut to `most`."""
        each, place = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
        return Ragged.of([ids[:most] for ids in encode_pieces(self._tokenizer, each.tolist())]).take(place)

    def _fields(self, texts: np.ndarray) -> Ragged:
        """Fields of items as tokens, each cut as titles are."""
        title = self._encoder.template.title
        return self._pieces([title(text) if text else "" for text in texts], self._encoder.max_title_tokens)

    def _sentences(self, domain: str, *parts: Ragged) -> Shards:
        """Documents of several parts each, closed by end-of-sequence."""
        number = len(parts[0])
        whole = [Ragged.of([self._begin] * number), *parts, Ragged.of([[self._encoder.eos_id]] * number)]
        order = np.arange(len(whole) * number).reshape(len(whole), number).T.ravel()
        joined = Ragged.concatenate(whole).take(order)
        documents = Ragged(joined.values, joined.offsets[:: len(whole)])
        return _in_memory(documents, np.zeros(number, dtype=np.int64), np.ones(number, dtype=np.int64))


def _in_memory(documents: Ragged, num_events: np.ndarray, target_start: np.ndarray) -> Shards:
    """Documents as shards without a folder; the manifest has the hashes of tokens and lengths."""
    index = {
        "offset": documents.offsets[:-1],
        "length": documents.lengths,
        "num_events": num_events,
        "target_start": target_start,
    }
    tokens = documents.values.astype(np.int64)
    hashed = [hashlib.sha256(array.tobytes()).hexdigest() for array in (tokens, documents.lengths)]
    return Shards(documents.values, pa.table(index), {"sha256": hashed})
