"""Documents that no user wrote: walks on the graph of training events, rules on pairs of items, and item texts.

Layers of such documents in place of logs are from arXiv 2602.07298 (2026). Here they are kinds of documents beside
behaviour sequences, made of nothing but the training events of a split and the fields of items that have such events.

Suffixes: U users, V items of the domain, P pairs of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Rules(NamedTuple):
    """Pairs of items that users had both of, sorted by the first item, then by the second."""

    first_P: np.ndarray
    second_P: np.ndarray
    support_P: np.ndarray
    """Users who had both."""
    confidence_P: np.ndarray
    """The share of those with the first who had the second."""
    lift_P: np.ndarray
    """Over the share of all users who had the second."""


def pair_rules(histories: Ragged, num_items: int, min_support: int = 1) -> Rules:
    """The rules of users' events, both directions of each pair.

    >>> found = pair_rules(Ragged.of([[0, 1, 0], [0, 1], [0], [2]]), 3)
    >>> found.first_P.tolist(), found.second_P.tolist(), found.support_P.tolist()
    ([0, 1], [1, 0], [2, 2])
    >>> found.confidence_P.round(3).tolist(), found.lift_P.round(3).tolist()
    ([0.667, 1.0], [1.333, 1.333])
    """
    ones = np.ones(len(histories.values), dtype=np.int64)
    had_UV = sparse.csr_array((ones, (histories.row_of, histories.values)), (len(histories), num_items))
    had_UV.data[:] = 1  # each item once, however often the user had it
    both_VV = sparse.csr_array(had_UV.T @ had_UV)
    both_VV.sort_indices()
    users_V, pairs = both_VV.diagonal(), both_VV.tocoo()
    kept = (pairs.row != pairs.col) & (pairs.data >= min_support)
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
        rules = pair_rules(history, num_items, self._settings.min_support)
        if not len(rules.first_P):
            most = pair_rules(history, num_items).support_P.max(initial=0)
            raise ConfigError(
                f"min_support={self._settings.min_support} leaves no rule in domain {domain!r}, where no two items "
                f"have more than {most} users in common: lower it, or leave out rules_share or the domain"
            )
        numbers = zip(rules.support_P.tolist(), rules.confidence_P.tolist(), rules.lift_P.tolist(), strict=True)
        return self._sentences(
            self._tokens([self._encoder.template.sentence(domain, prompts.CHOSE)] * len(rules.first_P)),
            self._encoder.titles(first + rules.first_P),
            self._tokens([prompts.ALSO_CHOSE] * len(rules.first_P)),
            self._encoder.titles(first + rules.second_P),
            self._tokens([prompts.rule_numbers(*each) for each in numbers]),
        )

    def _item_texts(self, domain: str) -> Shards:
        catalogue, (history, _) = self._split.catalogue, self._events(domain)
        rows = catalogue.rows_of(domain)[np.unique(history.values)]
        fields = [[clean_title(text) for text in column[rows]] for column in (catalogue.brand, catalogue.categories)]
        told = np.array([prompts.item_fields(*each) for each in zip(*fields, strict=True)], dtype=object)
        rows, told = rows[told != ""], told[told != ""]
        return self._sentences(
            self._tokens([self._encoder.template.sentence(domain, prompts.THE_ITEM)] * len(rows)),
            self._encoder.titles(rows),
            self._tokens(told, most=len(fields) * self._encoder.max_title_tokens),
        )

    def _events(self, domain: str) -> tuple[Ragged, int]:
        """Each user's training events in a domain, by the items' numbers in it; and the number of its items."""
        rows = self._split.catalogue.rows_of(domain)
        history, _ = histories(self._split, self._split.catalogue.domain_index(domain), SPECIFIC)
        return Ragged(history.values - rows[0], history.offsets), len(rows)

    def _tokens(self, texts: Sequence[str] | np.ndarray, most: int | None = None) -> Ragged:
        """The tokens of texts, each cut to `most`; equal ones are tokenised once."""
        each, place = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
        return Ragged.of([ids[:most] for ids in encode_pieces(self._tokenizer, each.tolist())]).take(place)

    def _sentences(self, *parts: Ragged) -> Shards:
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
