"""Lists of another recommender in a new order: a language model reads the titles, each with a letter, and answers with
one.

Suffixes: Q queries, R rows, N items of the domain, K letters, L codes of a user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.models import context_of, inner_model
from cprec.progress import say
from cprec.ranks import count_rankings
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import Item
from cprec.scoring import ScoringRecommender, check_domain
from cprec.search.reading import ModelReader
from cprec.systems.batches import Passes, Prefixes, RowStream
from cprec.systems.fit import Validation
from cprec.systems.generator import QUERY_BATCH
from cprec.systems.hybrid import Slots
from cprec.systems.items import IdTable
from cprec.systems.language import Language
from cprec.systems.quantise import Residual
from cprec.systems.signals import TrainingSequences, padded, recent
from cprec.text.prompts import OFFERED, Template
from cprec.text.stream import NEXT_TOKEN
from cprec.text.tokenizer import encode_pieces

INITIAL = 0.02
"""Standard deviation of vectors of codes before training, about that of tokens."""
FLOOR = -1e9
"""The score of what the retriever has nothing to say for."""
LEAST_SHARE = 1e-9
"""The least score of an item beside the best, where the retriever's are shares: their logarithms are finite."""
ALL = 1 << 30
"""Events of a history that a retriever reads which does not say how many."""
CEILING_QUERIES = 4000
"""Validation queries, a seeded sample at most, by which it is told what a retriever finds."""
_USER, _BREAK, _HEAD, _LINE, _OFFERED, _OPEN, _CLOSE, _NEXT, _FIRST_LETTER = range(9)


class LetterPrompts:
    """Prompts that list candidates by letters, as tokens, and end where a letter is to stand."""

    def __init__(self, language: Language, domain: str, num_letters: int, num_codes: int = 0) -> None:
        """There are `num_codes` codes of users, which have numbers behind those of the language model's tokens. Raises
        ConfigError where a letter is not one token."""
        template, letters = Template(), list(ascii_uppercase[:num_letters])
        parts = ["User:", "\n", template.head(domain), template.line, OFFERED, "\n(", ")", f"{template.next} ("]
        tokens = encode_pieces(language.tokenizer, [*parts, *letters])
        if wrong := [letter for letter, own in zip(letters, tokens[len(parts) :], strict=True) if len(own) != 1]:
            raise ConfigError(f"the tokenizer of the base writes {wrong[0]!r} as several tokens: take another base")
        self.letters = np.array([own[0] for own in tokens[len(parts) :]], dtype=np.int64)
        codes = language.model.get_input_embeddings().num_embeddings + np.arange(num_codes)
        self._begin, self._first_code = language.begin, _FIRST_LETTER + len(letters)
        self._first_title = self._first_code + num_codes
        self._pieces = Ragged.concatenate([Ragged.of([*tokens, *codes[:, None].tolist()]), language.titles])
        self._titles, self._context = language.titles, int(context_of(language.model) or 1 << 30)

    def require_room_for(self, max_length: int, num_levels: int) -> None:
        """Raise ConfigError where there is no room for the longest titles in all places of a prompt, of a user with so
        many codes."""
        longest = np.argsort(-self._titles.lengths, kind="stable")
        history, offered = (Ragged.of([np.resize(longest, size)]) for size in (max_length, len(self.letters)))
        self.of(history, offered, np.zeros((1, num_levels), dtype=np.int64) if num_levels else None)

    def of(self, histories: Ragged, offered: Ragged, codes_RL: np.ndarray | None = None) -> Ragged:
        """The tokens of prompts with these histories and candidates, by number, and the codes of their users, if any.

        Raises ConfigError where the language model cannot read one.
        """
        rows = []
        for row in range(len(histories)):
            numbers = [] if codes_RL is None else [_USER, *(self._first_code + codes_RL[row]).tolist(), _BREAK]
            numbers.append(_HEAD)
            for item in histories[row].tolist():
                numbers += [_LINE, self._first_title + item]
            numbers.append(_OFFERED)
            for place, item in enumerate(offered[row].tolist()):
                numbers += [_OPEN, _FIRST_LETTER + place, _CLOSE, self._first_title + item]
            pieces = self._pieces.take(np.array([*numbers, _NEXT]))
            rows.append(np.array([*self._begin, *pieces.values]))
        longest = max(map(len, rows), default=0)
        if longest >= self._context:
            raise ConfigError(
                f"a prompt has {longest:,} tokens, and the language model reads {self._context:,} with the answer: "
                "lower max_length, num_candidates or title_tokens"
            )
        return Ragged.of(rows)


class Finder(Protocol):
    """Settings of a recommender: a frozen dataclass."""

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> Recommender: ...


class Retriever:
    """The first items of a recommender's lists, and codes of its users."""

    def __init__(
        self,
        recommender: Any,
        data: TrainingSequences,
        num_items: int,
        *,
        num_levels: int = 0,
        num_codes: int = 0,
        seed: int = 0,
    ) -> None:
        """`num_items` of each list. With levels, vectors of users have codes from coarse to fine, fitted to those of
        the training users. Raises ConfigError for a recommender without scores, or without vectors where users are to
        have codes."""
        if not isinstance(recommender, ScoringRecommender):
            raise ConfigError(f"{recommender.name} gives no scores of all items, so its lists cannot be re-ranked")
        if num_levels and not hasattr(recommender, "user_vectors"):
            raise ConfigError(f"{recommender.name} has no vectors of users to make codes of: set user_codes=0")
        self.recommender, self.domain, self.num_items, self._num_codes = recommender, data.domain, num_items, num_codes
        self.ids, self.num_tokens = np.array(data.item_ids, dtype=object), num_levels * num_codes
        self._quantiser: Residual | None = None
        if num_levels:
            vectors = self._vectors(self.queries(data.sequences, data.users))
            self._quantiser = Residual.fit(vectors, num_levels, num_codes, seed)

    def queries(self, histories: Ragged, users: Sequence[str]) -> list[RankingQuery]:
        """Queries with these histories of item numbers."""
        pairs = zip(map(histories.__getitem__, range(len(histories))), users, strict=True)
        return [
            RankingQuery(str(row), self.domain, tuple(Item(self.domain, item) for item in self.ids[history]), user=user)
            for row, (history, user) in enumerate(pairs)
        ]

    def lists(self, queries: Sequence[RankingQuery], histories: Ragged) -> tuple[np.ndarray, Ragged]:
        """Scores of all items, float64[Q, N], `FLOOR` where nothing speaks for one, and the best `num_items` that are
        not in the history, best first, of equals the first in the catalogue."""
        scores_QN = np.asarray(self.recommender.scores(self.domain, queries), dtype=np.float64)
        scores_QN = np.where(scores_QN > self.recommender.floor, scores_QN, FLOOR)
        np.maximum(scores_QN, FLOOR, out=scores_QN)
        found_QN = scores_QN.copy()
        found_QN[histories.row_of, histories.values] = FLOOR
        return scores_QN, Ragged.of([_first(found_N, self.num_items) for found_N in found_QN])

    def log_probs(self, scores_K: np.ndarray) -> np.ndarray:
        """The retriever's log-probabilities of some items of a query, among these, by their scores: float64[K]."""
        best = scores_K.max()
        if self.recommender.scale == "logit":
            logits_K = scores_K - best
        else:
            logits_K = np.log(np.maximum(scores_K / best, LEAST_SHARE)) if best > 0 else np.zeros(len(scores_K))
        found: np.ndarray = logits_K - np.log(np.exp(logits_K).sum())
        return found

    def codes(self, queries: Sequence[RankingQuery]) -> np.ndarray | None:
        """The codes of users after their histories, each level numbered behind the one before: int64[Q, L]; None where
        users have none."""
        if self._quantiser is None:
            return None
        code_QL = self._quantiser.encode(self._vectors(queries))
        return code_QL + self._num_codes * np.arange(code_QL.shape[1])

    def _vectors(self, queries: Sequence[RankingQuery]) -> np.ndarray:
        found = np.asarray(self.recommender.user_vectors(self.domain, queries), dtype=np.float64)  # type: ignore[attr-defined]
        return found.reshape(len(found), -1)


def _first(score_N: np.ndarray, most: int) -> np.ndarray:
    """The items that score best, above `FLOOR`, the best first, of equals the first: at most so many."""
    least = np.partition(score_N, -most)[-most] if most < len(score_N) else FLOOR
    items = np.flatnonzero((score_N >= least) & (score_N > FLOOR))  # a sort of all items would take many times as long
    return items[np.argsort(-score_N[items], kind="stable")[:most]]


class LetterStream(RowStream):
    """Prompts of prefixes of training sequences; the letter of the next item is learnt.

    Candidates are what the retriever finds, with the next item in place of the last where it is not among them; their
    order is drawn by the seed and the step, or, `by_rank`, the retriever's.
    """

    def __init__(
        self,
        data: TrainingSequences,
        prompts: LetterPrompts,
        retriever: Retriever,
        max_length: int,
        passes: Passes,
        *,
        by_rank: bool,
    ) -> None:
        whole = int(data.sequences.lengths.max())
        self.prefixes, self._all, self._users = Prefixes(data, max_length), Prefixes(data, whole), data.users
        self._prompts, self._retriever, self._by_rank = prompts, retriever, by_rank
        super().__init__(self.prefixes.lengths, [NEXT_TOKEN], passes)

    def candidates(self, step: int) -> Ragged:
        """The candidates of a step's rows, in the order of their letters."""
        return self._offered(step, self._queries(step))

    def batch(self, step: int) -> Batch:
        members, queries = self.members(step), self._queries(step)
        offered = self._offered(step, queries)
        place = [int(np.flatnonzero(offered[row] == target)[0]) for row, target in enumerate(self._targets(step))]
        prompts = self._prompts.of(self.prefixes.take(members), offered, self._retriever.codes(queries))
        tokens, lengths = padded(prompts, 0)
        targets = np.full(tokens.shape, IGNORE)
        targets[np.arange(len(members)), lengths - 1] = self._prompts.letters[place]
        position = np.tile(np.arange(tokens.shape[1]), (len(members), 1))
        num_events = int(self._lengths[members].sum())
        return self._batch(members, len(members), num_events, input_ids=tokens, position_ids=position, targets=targets)

    def _queries(self, step: int) -> list[RankingQuery]:
        members = self.members(step)
        return self._retriever.queries(self._all.take(members), [self._users[row] for row in self._all.users[members]])

    def _targets(self, step: int) -> np.ndarray:
        return self.prefixes.targets[self.members(step)]

    def _offered(self, step: int, queries: Sequence[RankingQuery]) -> Ragged:
        histories, generator = self._all.take(self.members(step)), np.random.default_rng([self._seed, step, 7])
        _, found = self._retriever.lists(queries, histories)
        rows = []
        for row, target in enumerate(self._targets(step)):
            mine = found[row]
            if target not in mine:
                mine = np.append(mine[: self._retriever.num_items - 1], target)
            rows.append(mine if self._by_rank else generator.permutation(mine))
        return Ragged.of(rows)


@dataclass(frozen=True, kw_only=True)
class LetterForm:
    """How a list is put in order."""

    max_length: int
    by_rank: bool
    weight: float
    """Of the language model beside the retriever."""


class LetterRecommender(ScoringRecommender):
    """Ranks the items that a retriever finds first by

        weight * log P(letter) + (1 - weight) * log P(item by the retriever)

    both among these items, and all others behind them in the retriever's order. What is found are items that are not in
    the history; an item that was not found is therefore a miss at any cut up to their number.
    """

    floor = FLOOR
    scale = "logit"
    seconds = 0.0

    def __init__(
        self,
        name: str,
        data: TrainingSequences,
        language: Language,
        prompts: LetterPrompts,
        retriever: Retriever,
        form: LetterForm,
    ) -> None:
        self.name, self.catalogue, self.domain = name, data.catalogue, data.domain
        self.max_length = max(form.max_length, getattr(retriever.recommender, "max_length", ALL))
        self.num_parameters = sum(parameter.numel() for parameter in language.model.parameters())
        self._reader, self._prompts, self.retriever, self._form = (
            ModelReader(language.model, bf16=None),
            prompts,
            retriever,
            form,
        )

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`. Raises ConfigError for another domain than the one trained on."""
        check_domain(self.name, (self.domain,), domain)
        histories = self.histories(domain, queries)
        scores_QN, found = self.retriever.lists(queries, histories)
        of_letters = self.letter_scores(queries, histories, found)
        for row, own_N in enumerate(scores_QN):
            mine = found[row]
            if not len(mine):
                continue
            own_K = self.retriever.log_probs(own_N[mine])
            best = self._form.weight * of_letters[row] + (1 - self._form.weight) * own_K
            others = np.setdiff1d(np.flatnonzero(own_N > FLOOR), mine)
            own_N[others] += best.min() - 1 - own_N[others].max(initial=FLOOR)
            own_N[mine] = best
        return scores_QN

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many items score above each target, and how many as high, itself included: int64[Q] each. A target that
        is not among the first that the retriever finds is tied with nothing (0): a miss."""
        queries = self.retriever.queries(histories, users)
        ids = [frozenset(item.item_id for item in query.history) if exclude_seen else frozenset() for query in queries]
        asked = [
            RankingQuery(query.query_id, query.domain, query.history, exclude=seen, user=query.user)
            for query, seen in zip(queries, ids, strict=True)
        ]
        return count_rankings(self.rank(asked, self.retriever.num_items), self.retriever.ids[targets].tolist())

    @torch.inference_mode()
    def letter_scores(self, queries: Sequence[RankingQuery], histories: Ragged, found: Ragged) -> list[np.ndarray]:
        """The log-probability of the letter of each item that was found, among those of its list: float64."""
        orders = [self._order(histories[row], len(found[row])) for row in range(len(queries))]
        offered = Ragged.of([found[row][order] for row, order in enumerate(orders)])
        prompts = self._prompts.of(recent(histories, self._form.max_length), offered, self.retriever.codes(queries))
        out = [np.empty(0)] * len(queries)
        by_length = np.argsort(prompts.lengths, kind="stable")
        for start in range(0, len(by_length), QUERY_BATCH):
            batch = by_length[start : start + QUERY_BATCH]
            tree = self._reader.read([prompts[row] for row in batch])
            sizes = offered.lengths[batch]
            row_N = torch.from_numpy(np.repeat(np.arange(len(batch)), sizes)).to(tree.prompt_hidden_UD.device)
            letter = np.concatenate([self._prompts.letters[:size] for size in sizes])
            logits = tree.token_logits(tree.prompt_hidden_UD, row_N, torch.from_numpy(letter).to(row_N.device))
            for row, mine in zip(batch, logits.split(sizes.tolist()), strict=True):
                log_probs = mine.log_softmax(0).cpu().numpy()
                out[row] = np.empty(len(log_probs))
                out[row][orders[row]] = log_probs
        return out

    def _order(self, history: np.ndarray, size: int) -> np.ndarray:
        """The places of a list in the order of letters: the retriever's, or one that is drawn by the history."""
        if self._form.by_rank:
            return np.arange(size)
        digest = hashlib.sha256(history.astype(np.int64).tobytes()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32)).permutation(size)


def re_ranking(
    name: str,
    data: TrainingSequences,
    language: Language,
    retriever: Retriever,
    form: LetterForm,
    passes: Passes,
) -> tuple[LetterStream, Callable[[], LetterRecommender]]:
    """The rows that a language model learns from to re-rank a retriever's lists, and a recommender of its current
    weights. Where users have codes, it gets vectors of them."""
    prompts = LetterPrompts(language, data.domain, retriever.num_items, retriever.num_tokens)
    if retriever.num_tokens:
        inner = inner_model(language.model)
        codes = IdTable(retriever.num_tokens, language.width, 0)
        nn.init.normal_(codes.table.weight, std=INITIAL)
        inner.set_input_embeddings(Slots(inner.get_input_embeddings(), codes))
    stream = LetterStream(data, prompts, retriever, form.max_length, passes, by_rank=form.by_rank)
    return stream, lambda: LetterRecommender(name, data, language, prompts, retriever, form)


def ceiling(retriever: Retriever, histories: Ragged, targets: np.ndarray, users: Sequence[str]) -> float:
    """The share of targets among the items that a retriever finds first: no new order of its lists finds more."""
    num_found = 0
    for start in range(0, len(targets), QUERY_BATCH * 4):
        rows = np.arange(start, min(start + QUERY_BATCH * 4, len(targets)))
        mine = histories.take(rows)
        _, found = retriever.lists(retriever.queries(mine, [users[row] for row in rows.tolist()]), mine)
        num_found += int((found.values == targets[rows][found.row_of]).sum())
    return num_found / max(1, len(targets))


def tell_ceiling(retriever: Retriever, asked: Validation) -> None:
    """Say how many targets of validation queries are found at all. Raises Unsuitable where none is."""
    share = ceiling(retriever, asked.histories, asked.targets, asked.users)
    told = (
        f"{retriever.domain}: {retriever.recommender.name} finds {share:.4f} of {len(asked.targets):,} targets of "
        f"validation queries among {retriever.num_items} items"
    )
    if not share:
        raise Unsuitable(f"{told}: there is nothing to re-rank")
    say(f"{told}, and no new order of its lists finds more")
