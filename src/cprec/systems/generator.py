"""A language model that writes items: recommenders by its probabilities, and the rows that one of codes learns from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cprec.batch import IGNORE, Batch
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, InputChanged
from cprec.progress import hide_progress_bars
from cprec.ranks import count_rankings
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.scoring import check_domain, histories_of
from cprec.search.normaliser import Over
from cprec.search.ranking import SequenceRanker, batches
from cprec.search.reading import ModelReader, Tree
from cprec.search.trie import Trie
from cprec.systems.batches import Passes, RowStream
from cprec.systems.codes import END, PADDING, ItemCodes
from cprec.systems.signals import TrainingSequences, padded, recent, windows
from cprec.text.stream import NEXT_TOKEN

QUERY_BATCH = 64
"""Histories that are read and searched together."""
TOP = 10
"""The length of lists by which weights are chosen."""


def decoder(
    codes: ItemCodes, *, max_length: int, dropout: float, hidden_size: int, num_layers: int, num_heads: int
) -> GPT2LMHeadModel:
    """A causal transformer before training, with room for `max_length` items and one more; the tokens have the same
    vectors at its input and output."""
    hide_progress_bars()
    config = GPT2Config(
        vocab_size=codes.vocabulary_size,
        n_positions=1 + (max_length + 1) * codes.longest,
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = GPT2LMHeadModel(config)
    # Stored with the weights, so that these are never read by other codes.
    model.register_buffer("code_version", torch.tensor([*bytes.fromhex(codes.version)], dtype=torch.uint8))
    return model


class CodeStream(RowStream):
    """Windows of training sequences as tokens of codes, for `cprec.train.loss.PackedLoss`: one window a row, each token
    of which predicts the next one."""

    def __init__(self, data: TrainingSequences, codes: ItemCodes, max_length: int, passes: Passes) -> None:
        self.windows = windows(data.sequences, max_length)
        """The item numbers of each row."""
        self._rows = codes.prompts(self.windows)
        super().__init__(self._rows.lengths - 1, [NEXT_TOKEN], passes)

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        tokens, lengths = padded(self.rows(members, step), PADDING)
        place = np.tile(np.arange(tokens.shape[1] - 1), (len(members), 1))
        targets = np.where(place + 1 < lengths[:, None], tokens[:, 1:], IGNORE)
        num_targets = int((lengths - 1).sum())
        return self._batch(
            members, num_targets, num_targets, input_ids=tokens[:, :-1], position_ids=place, targets=targets
        )

    def rows(self, members: np.ndarray, step: int) -> Ragged:
        """The tokens of a step's rows."""
        return self._rows.take(members)


class SequenceRecommender(ABC):
    """Ranks a domain's items by a language model's probability of each item's tokens after a prompt. Full lists come
    with a proof, as those of titles do. A subclass says what stands in a prompt."""

    seconds = 0.0

    def __init__(
        self,
        name: str,
        data: TrainingSequences,
        model: Any,
        *,
        max_length: int,
        beam_width: int,
        max_nodes: int,
        over: Over = "vocabulary",
        temperatures: Callable[[Trie], np.ndarray] | None = None,
        bf16: bool | None = False,
    ) -> None:
        """`over` and `temperatures`, which are made of the trie of the sequences: see `SequenceRanker`; `bf16`: see
        `ModelReader`."""
        self.name, self.domain = name, data.domain
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.max_length, self._beam_width, self._max_nodes = max_length, beam_width, max_nodes
        self._reader = ModelReader(model, bf16=bf16, pad_id=PADDING)
        self._over, self._temperatures = over, temperatures

    def _rank_by(self, catalogue: Catalogue, sequences: Ragged) -> None:
        """Rank the domain's items of a catalogue by these tokens, each closed by the token that ends it."""
        self.catalogue = catalogue
        first = int(catalogue.rows_of(self.domain)[0])
        self._trie = Trie.build(sequences)
        of_nodes = self._temperatures(self._trie) if self._temperatures else None
        self._ranker = SequenceRanker(
            catalogue,
            self.domain,
            lambda rows: sequences.take(rows - first),
            self._trie,
            over=self._over,
            temperatures=of_nodes,
        )

    def with_beams(self, beam_width: int) -> Self:
        """The same recommender, whose beams keep so many prefixes at each depth."""
        out = copy.copy(self)
        out._beam_width = beam_width
        return out

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: str = "auto") -> list[Ranking]:
        """See `Recommender.rank`. `mode` is `exact`, `auto` (exact within `max_nodes` prefixes) or `beam`, of
        `beam_width` prefixes at each depth. Raises ConfigError for another domain than the one trained on."""
        return self._after_prompts(queries, lambda tree, asked: self._ranked(tree, asked, k, mode))

    def _after_prompts(
        self, queries: Sequence[RankingQuery], answer: Callable[[Tree, Sequence[RankingQuery]], Sequence[Ranking]]
    ) -> list[Ranking]:
        """What `answer` makes of queries whose prompts were read, all with candidates or all without; in their
        order."""
        for query in queries:
            check_domain(self.name, (self.domain,), query.domain)
        prompts = self._prompts(queries)
        out: dict[int, Ranking] = {}
        with torch.inference_mode():
            for batch in batches(prompts, queries, QUERY_BATCH):
                tree = self._reader.read([prompts[number] for number in batch])
                out |= dict(zip(batch, answer(tree, [queries[number] for number in batch]), strict=True))
        return [out[number] for number in range(len(queries))]

    def _ranked(self, tree: Tree, queries: Sequence[RankingQuery], k: int, mode: str) -> list[Ranking]:
        """The rankings of queries whose prompts were read."""
        if queries[0].candidates is not None:
            return self._ranker.rank_candidates(tree, queries)
        limits: dict[str, Any] = {"mode": mode, "beam_width": self._beam_width, "max_nodes": self._max_nodes}
        return self._ranker.rank_catalogue(tree, queries, k, **limits)

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many items score above each target, and how many as high, itself included: int64[Q] each.

        Counted in the ten best that a beam finds. A target that is not among them is a miss: ten are better, and it is
        tied with nothing (0).
        """
        ids = self.catalogue.item_id[self.catalogue.rows_of(self.domain)]
        queries = [self._query(ids[histories[number]], user, exclude_seen) for number, user in enumerate(users)]
        return count_rankings(self.rank(queries, TOP, "beam"), ids[targets].tolist())

    @abstractmethod
    def _prompts(self, queries: Sequence[RankingQuery]) -> Ragged:
        """What the model reads before the tokens of the next item."""

    def _histories(self, queries: Sequence[RankingQuery]) -> Ragged:
        """The latest `max_length` events of each query in the domain."""
        return recent(histories_of(self.catalogue, self.domain, queries), self.max_length)

    def _query(self, item_ids: np.ndarray, user: str, exclude_seen: bool) -> RankingQuery:
        history = tuple(Item(self.domain, item) for item in item_ids)
        exclude = frozenset(item_ids if exclude_seen else ())
        return RankingQuery("", self.domain, history, exclude=exclude, user=user)


class CodeRecommender(SequenceRecommender):
    """Ranks a domain's items by a model's probability of each item's codes after those of the history."""

    def __init__(self, name: str, data: TrainingSequences, codes: ItemCodes, model: Any, **ranking: Any) -> None:
        """`ranking`: see `SequenceRecommender`."""
        stored = getattr(model, "code_version", None)
        if stored is not None and (learnt := bytes(stored.tolist()).hex()) != codes.version:
            raise InputChanged(
                f"{name}: the model has learnt codes of version {learnt}, and these are of version {codes.version}, in "
                "which tokens mean other items: take the codes that it has learnt (with_items adds items to them), or "
                "train it again"
            )
        super().__init__(name, data, model, **ranking)
        self._take_items(data.catalogue, codes)

    def _take_items(self, catalogue: Catalogue, codes: ItemCodes) -> None:
        """Rank the domain's items of a catalogue, which have these codes."""
        self._codes = codes
        self._rank_by(catalogue, codes.sequences)

    def with_items(self, catalogue: Catalogue) -> CodeRecommender:
        """The same model over a catalogue that has further items in the domain: these get codes and can be ranked at
        once, and the items that were there keep theirs; see `ItemCodes.with_items`. This recommender stays as it is.

        Raises UnknownItemError where an item that the model has learnt is not there: leave it out by queries instead.
        Raises ConfigError where the codes are of vectors that new items cannot have.
        """
        learnt = catalogue.find(self.domain, self.catalogue.item_id[self.catalogue.rows_of(self.domain)].tolist())
        rows = catalogue.rows_of(self.domain)
        new = np.setdiff1d(rows, learnt)
        codes = self._codes
        if len(new):
            if codes.new_vectors is None:
                raise ConfigError(
                    f"{self.name}: these codes are not made of vectors alone, so new items cannot get any"
                )
            codes = codes.with_items(codes.new_vectors(catalogue.item_id[new].tolist(), catalogue.title[new].tolist()))
        out = copy.copy(self)
        out._take_items(catalogue, codes.take(np.argsort(np.concatenate([learnt, new]))))
        return out

    def _prompts(self, queries: Sequence[RankingQuery]) -> Ragged:
        return self._codes.prompts(self._histories(queries))
