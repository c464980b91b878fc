"""A language model as a recommender: prompts in, the catalogue's items out, behind the protocol that all share."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cprec import distributed
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError, DataError, ModelError
from cprec.models import load_model
from cprec.rank.config import Mode, RankConfig, Score
from cprec.rank.generation import match, write
from cprec.recommender import Certificate, Ranking, RankingQuery
from cprec.schema import SPECIFIC, Item, id_text
from cprec.search.cache import PrefixCache
from cprec.search.decoding import Found, search
from cprec.search.reading import ModelReader, Reader, Tree
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie
from cprec.text.config import Template
from cprec.text.encoding import PromptEncoder
from cprec.text.tokenizer import load_tokenizer

FIRST_BEAM = 8
"""Prefixes of each depth that the exact search begins with, and reads at a time, or K if that is more."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item, for people."""

    item_id: str
    title: str
    score: float
    """Log-probability of the item after the history, unless the recommender was given another `score`; higher is
    better, comparable within one list."""


class LLMRecommender:
    """Ranks a catalogue by a language model's probability of each item after the history's prompt.

    The model writes titles, so what it learns is the probability of a title (as far as it is read, `max_title_tokens`):
    that of all items together that have it. Each of these items has an equal share, P(item) = P(title) / n, where n
    counts the items of the domain in stock. A withdrawn item that is given as a candidate counts itself.

    Made by `from_pretrained` from a folder that `cprec pretrain` or `cprec finetune` wrote. Candidate lists are ranked
    by exact log-likelihood; the full catalogue over a trie of the domain's titles by `mode`:

    - `exact`: search until no better item can be left, with a certificate;
    - `auto`: the same, but a query that has read `max_nodes` prefixes gets the best found, and its certificate the gap;
    - `beam`: the `beam_width` best prefixes of each depth; the certificate has the gap;
    - `generate` (candidates only, named in the call of `rank`): the model writes freely, and what it writes is looked
      for among the candidates; a ranking holds one item or none.

    `score` is log P(item), the `sum` over the title's tokens less log n; its `mean`, the same divided by the number of
    tokens; or the sum less what it is under an empty history (`corrected` for popularity), in which the share cancels,
    and which is exact for candidates. Over the full catalogue a corrected score may rise along a title, so no prefix
    bounds it: `exact` refuses it, and the others put the titles that a beam found by sum into corrected order, with no
    certificate.

    `cache_bytes` of memory keep what was read of prompts, for users who come back.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        catalogue: Catalogue,
        *,
        name: str = "llm",
        domain: str | None = None,
        template: Template | None = None,
        begin: Sequence[int] = (),
        max_title_tokens: int = 32,
        history: str = SPECIFIC,
        max_history: int = 10,
        mode: Mode = "auto",
        beam_width: int = 20,
        max_nodes: int = 2000,
        seconds: float | None = None,
        score: Score = "sum",
        batch_size: int = 64,
        cache_bytes: int = 0,
        bf16: bool = False,
    ) -> None:
        """`model` is a causal language model of transformers, or a `Reader`, which has its own cache and precision.
        `begin` are the tokens that prompts begin with, as what the model was trained on (`cprec.json` has them).
        `seconds` limits how long a batch of `batch_size` queries searches for more than a beam has found."""
        self.ranking = RankConfig(mode=mode, beam_width=beam_width, max_nodes=max_nodes, score=score)
        self.name = name
        self.source = name
        """Where the model is from, for messages: its folder, if it is from one."""
        self.domain = domain
        self.catalogue = catalogue
        self.history_kind = history
        self.max_history = max_history
        self.seconds = seconds
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.reader: Reader = (
            model if hasattr(model, "read") else ModelReader(model, bf16=bf16, pad_id=pad_id, cache_bytes=cache_bytes)
        )
        self._encoder = PromptEncoder(
            tokenizer, catalogue, max_title_tokens=max_title_tokens, template=template, begin=begin
        )
        frame = int(self._encoder.frame_tokens(history, np.arange(len(catalogue.domains))).max())
        if frame + self._encoder.max_item_tokens + 1 > self.reader.context:
            raise ConfigError(
                f"the model's context of {self.reader.context:,} tokens has no room for a prompt without a history "
                f"({frame} tokens) and a title of max_title_tokens={max_title_tokens} with its end: prepare the data "
                "with a smaller max_title_tokens, or take a model with a longer context"
            )
        self._tries: dict[str, Trie] = {}
        self.withdrawn: Mapping[str, frozenset[str]] = {}
        """Item ids by domain that histories may name and full rankings never return; see `with_items`."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        engine: Literal["transformers", "vllm"] = "transformers",
        engine_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LLMRecommender:
        """The recommender of a model folder, read by `engine`; `options` are those of the constructor (`beam_width=50`,
        say), `engine_options` those of `vllm.LLM`.

        Raises ConfigError if the folder holds no finished model of CPRec, or the engine is not there.
        """
        folder = Path(folder)
        if not (folder / "cprec.json").is_file():
            unfinished = any(folder.glob("checkpoint-*"))
            why = (
                "its training was interrupted: start the same command again to finish it"
                if unfinished
                else ("give the output_dir of `cprec pretrain` or `cprec finetune`")
            )
            what = "holds no finished model of CPRec (no cprec.json)" if folder.exists() else "does not exist"
            raise ConfigError(f"{folder} {what}: {why}")
        about = json.loads((folder / "cprec.json").read_text())
        device = distributed.pick_device()
        settings: dict[str, Any] = {
            "domain": about.get("domain"),
            "template": Template(**about["template"]),
            "begin": about.get("begin", ()),
            "max_title_tokens": about["max_title_tokens"],
            "history": about["history"],
            "max_history": about["max_history"],
            "bf16": distributed.use_bf16("auto", device) if device.type == "cuda" else False,
            "name": folder.name,
        }
        model: Any
        if engine == "vllm":
            from cprec.rank.vllm import VLLMReader

            dtype = "bfloat16" if (settings | options)["bf16"] else "float32"
            model = VLLMReader.open(folder, **{"dtype": dtype, **(engine_options or {})})
        else:
            model = load_model(folder, device=device)
        made = cls(model, load_tokenizer(str(folder)), Catalogue.read(folder), **settings | options)
        made.source = str(folder)
        return made

    def rank(
        self,
        queries: Sequence[RankingQuery],
        k: int,
        mode: Mode | Literal["generate"] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Ranking]:
        """See `Recommender.rank`. Prompts of similar length share a batch. `mode` takes the place of the recommender's.

        Once `stop()` is true, no more is searched for than a beam has found, and lists that are not proven have their
        gap. Reading prompts, the beam and scoring candidates take the time that they take.

        Raises UnknownItemError for items that the catalogue does not have, ConfigError for queries without candidates
        in mode `generate`, ModelError where the model's scores are not finite.
        """
        try:
            return self._rank(queries, k, mode or self.ranking.mode, stop)
        except ModelError as error:
            raise ModelError(f"{self.source}: {error}") from None

    def _rank(
        self, queries: Sequence[RankingQuery], k: int, mode: str, stop: Callable[[], bool] | None
    ) -> list[Ranking]:
        if mode == "generate" and any(query.candidates is None for query in queries):
            raise ConfigError("mode='generate' ranks candidates: give each query some")
        prompts = self._prompts(queries)
        order = np.argsort(prompts.lengths, kind="stable")
        out: list[Ranking | None] = [None] * len(queries)
        groups: dict[tuple[str, bool], list[int]] = {}
        for number in order:
            query = queries[number]
            groups.setdefault((query.domain, query.candidates is not None), []).append(int(number))
        with torch.inference_mode():
            for (domain, given), members in groups.items():
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    tree = self.reader.read([prompts[n] for n in batch])
                    asked = [queries[n] for n in batch]
                    if mode == "generate":
                        rankings = self._generate(tree, domain, asked)
                    elif given:
                        rankings = self._rank_candidates(tree, domain, asked)
                    else:
                        rankings = self._rank_catalogue(tree, domain, asked, k, mode, stop)
                        for query, ranking in zip(asked, rankings, strict=True):
                            self._require_items(query, ranking)
                    for number, ranking in zip(batch, rankings, strict=True):
                        out[number] = ranking
        return [ranking for ranking in out if ranking is not None]

    def recommend(
        self, history: Sequence[str | int | Item], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> list[Recommendation]:
        """The `k` best next items for a history of item ids or titles, oldest first.

        Texts are ids or titles, as `Catalogue.look_up` knows them, of the target domain or else of another; a whole
        number is an id that is written so. `domain` is the domain to recommend from; by default the one the model was
        fine-tuned for. `exclude_seen` leaves out the items of the history, and those of the same text (title, and other
        fields where the model has them). Of a history longer than the model was trained on, or than its context, the
        latest events are read, with a warning.

        Raises UnknownItemError for texts that are neither id nor title or may mean several titles, ValueError if `k`
        exceeds the items there are.
        """
        return self.recommend_many([history], k, domain=domain, exclude_seen=exclude_seen)[0]

    def recommend_many(
        self,
        histories: Sequence[Sequence[str | int | Item]],
        k: int = 10,
        *,
        domain: str | None = None,
        exclude_seen: bool = True,
    ) -> list[list[Recommendation]]:
        """As `recommend` for each history, in batches."""
        domain = domain or self.domain
        if domain is None or domain not in self.catalogue.domains:
            raise ConfigError(f"domain={domain!r}: name one of {', '.join(self.catalogue.domains)}")
        queries = [self._query(history, k, domain, exclude_seen) for history in histories]
        out = []
        for ranking in self.rank(queries, k):
            rows = self.catalogue.find(domain, list(ranking.item_ids[:k]))
            out.append(
                [
                    Recommendation(item_id=i, title=str(self.catalogue.title[row]), score=s)
                    for i, row, s in zip(ranking.item_ids, rows, ranking.scores, strict=False)
                ]
            )
        return out

    def _query(self, history: Sequence[str | int | Item], k: int, domain: str, exclude_seen: bool) -> RankingQuery:
        """The query of a history, with warnings of what is not read; raises as `recommend` does."""
        items = tuple(event if isinstance(event, Item) else self._find(event, domain) for event in history)
        seen = [item.item_id for item in items if item.domain == domain and exclude_seen]
        exclude = self.catalogue.of_equal_text(domain, seen, self.item_fields)
        gone = self.withdrawn.get(domain, frozenset())
        available = len(self.catalogue.rows_of(domain)) - len(exclude | gone)
        if not 1 <= k <= available:
            raise ValueError(
                f"k={k}: domain {domain!r} has {available} items outside this history; choose 1 to {available}"
            )
        query = RankingQuery(query_id="", domain=domain, history=items, exclude=exclude)
        read = len(self.shown(query))
        if items and not read:
            warnings.warn(f"no event of the history is of domain {domain!r}: the ranking ignores it", stacklevel=4)
        elif read < len(self._read_part(query)):
            warnings.warn(
                f"the history has {len(items)} events, and the model's context of {self.reader.context:,} tokens holds "
                f"the latest {read}",
                stacklevel=4,
            )
        return query

    def _find(self, event: str | int, domain: str) -> Item:
        """An item by id or title, of the target domain first."""
        text = id_text(event)
        if text is None:
            raise DataError(f"{event!r} in the history is neither an id nor a title: leave it out")
        item = self.catalogue.item_of(domain, text)
        if item is None:
            self.catalogue.find_titles(domain, [text])  # raises, naming the nearest titles
            raise AssertionError("a title that look_up does not find must be unknown")
        return item

    @property
    def item_fields(self) -> tuple[str, ...]:
        """What stands for an item in every text: its title, and perhaps other fields."""
        return self._encoder.template.item_fields

    def _prompts(self, queries: Sequence[RankingQuery]) -> Ragged:
        """Prompt tokens of each query."""
        domains = np.array([self.catalogue.domain_index(query.domain) for query in queries], dtype=np.int64)
        return self._encoder.prompts(self.history_kind, domains, self._histories(queries, domains))

    def _histories(self, queries: Sequence[RankingQuery], domains: np.ndarray) -> Ragged:
        """Catalogue rows of each query's latest events, as many as were trained on and fit the model's context."""
        histories = [self._read_part(query) for query in queries]
        names = [(item.domain, item.item_id) for events in histories for item in events]
        rows = np.empty(len(names), dtype=np.int64)
        for domain in {name for name, _ in names}:
            mine = [place for place, (name, _) in enumerate(names) if name == domain]
            rows[mine] = self.catalogue.find(domain, [names[place][1] for place in mine])
        history = Ragged(rows, offsets_of(np.array([len(events) for events in histories], dtype=np.int64)))
        room = self.reader.context - self._encoder.max_item_tokens - 1
        return self._encoder.fit(self.history_kind, domains, history, room)

    def _read_part(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query that a prompt can show: of its domain unless mixed, the latest `max_history`."""
        if self.history_kind == SPECIFIC:
            return tuple(item for item in query.history if item.domain == query.domain)[-self.max_history :]
        return query.history[-self.max_history :]

    def trie(self, domain: str) -> Trie:
        """The titles of a domain's items, in the order of the catalogue; built when first asked for.

        Raises DataError if items have titles that cannot be ranked.
        """
        if domain not in self._tries:
            rows = self.catalogue.rows_of(domain)

            def name(row: int) -> str:
                return f"item {self.catalogue.item_id[rows[row]]!r} of {domain!r}"

            trie = Trie.build(self._encoder.titles(rows, end=True), name)
            if self.withdrawn.get(domain):
                trie.withdraw(self._positions(domain, self.withdrawn[domain]))
            self._tries[domain] = trie
        return self._tries[domain]

    def with_items(self, catalogue: Catalogue, withdrawn: Mapping[str, frozenset[str]]) -> LLMRecommender:
        """The same model over another catalogue of the same domains, less the items `withdrawn` (ids by domain).

        What a withdrawn item adds to a history is still read; only full rankings leave it out. This recommender goes on
        as it was, so a ranking under way is not disturbed. The two share the model and what was read of prompts; titles
        that did not change are not tokenised again, and tries of domains that did not change are shared.

        Raises ConfigError for other domains, UnknownItemError for withdrawn items that the catalogue does not have,
        DataError for titles that cannot be ranked.
        """
        if catalogue.domains != self.catalogue.domains:
            raise ConfigError(
                f"the domains {', '.join(catalogue.domains)} are not those of this recommender, "
                f"{', '.join(self.catalogue.domains)}: items come and go, domains stay"
            )
        out = copy.copy(self)
        out.catalogue, out.withdrawn = catalogue, {domain: ids for domain, ids in withdrawn.items() if ids}
        out._encoder = self._encoder.with_catalogue(self._tokenizer, catalogue)
        out._tries = {}
        for domain, trie in self._tries.items():
            before, after = self.catalogue.rows_of(domain), catalogue.rows_of(domain)
            if not np.array_equal(self.catalogue.item_id[before], catalogue.item_id[after]):
                continue
            if not self._encoder.same_titles(before, out._encoder, after):
                continue
            gone, was_gone = (r.withdrawn.get(domain, frozenset()) for r in (out, self))
            out._tries[domain] = trie = copy.copy(trie)  # what changes in it is replaced, never written into
            trie.put_back(out._positions(domain, was_gone - gone))
            trie.withdraw(out._positions(domain, gone - was_gone))
        for domain in self._tries:
            out.trie(domain)
        return out

    def _positions(self, domain: str, items: frozenset[str]) -> np.ndarray:
        """Where items stand among those of their domain."""
        if not items:
            return np.empty(0, dtype=np.int64)
        positions: np.ndarray = self.catalogue.find(domain, sorted(items)) - int(self.catalogue.rows_of(domain)[0])
        return positions

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query's history that its prompt shows: the latest, as many as were trained on and fit."""
        read = self._read_part(query)
        fits = self._histories([query], np.array([self.catalogue.domain_index(query.domain)]))[0]
        return read[len(read) - len(fits) :]

    @property
    def cache(self) -> PrefixCache | None:
        """What is kept of prompts; None where nothing is."""
        return self.reader.cache

    def _rank_catalogue(
        self,
        tree: Tree,
        domain: str,
        queries: Sequence[RankingQuery],
        k: int,
        mode: str,
        stop: Callable[[], bool] | None,
    ) -> list[Ranking]:
        rows, trie = self.catalogue.rows_of(domain), self.trie(domain)
        corrected = self.ranking.score == "corrected"
        beam = mode == "beam" or corrected
        found = search(
            tree,
            trie,
            k=max(k, self.ranking.beam_width) if corrected else k,
            width=max(self.ranking.beam_width if beam else FIRST_BEAM, k),
            exact=not beam,
            excluded=[self._positions(domain, query.exclude | query.uncounted) for query in queries],
            allowed=[None if query.allow is None else self._positions(domain, query.allow) for query in queries],
            max_nodes=self.ranking.max_nodes if mode == "auto" and not beam else None,
            seconds=self.seconds,
            stop=stop,
            per_token=self.ranking.score == "mean",
        )
        if corrected:
            found = self._corrected(found, domain, k)
        gone = self.withdrawn.get(domain, frozenset())
        beside = [[item for item in sorted(query.uncounted - gone) if _may(query, item)] for query in queries]
        beside_scores = self._candidate_scores(tree, domain, beside) if any(beside) else [np.empty(0)] * len(queries)
        out = []
        for query, result, more, more_scores in zip(queries, found, beside, beside_scores, strict=True):
            # an item whose title was found has the score that was found, to the last bit: the two tie
            score_at = dict(zip(trie.leaf[result.items].tolist(), result.scores.tolist(), strict=True))
            leaves = trie.leaf[self.catalogue.find(domain, more) - rows[0]].tolist()
            more_scores = np.array([score_at.get(leaf, score) for leaf, score in zip(leaves, more_scores, strict=True)])
            reached = more_scores >= (result.scores[k - 1] if len(result.scores) >= k else -np.inf)
            ids = np.append(self.catalogue.item_id[rows[result.items]], np.array(more, dtype=object)[reached])
            scores = np.append(result.scores, more_scores[reached])
            order = np.argsort(-scores, kind="stable")
            certificate = None if corrected else Certificate(gap=result.gap, expanded=result.expanded)
            out.append(_ranking(query, ids[order], scores[order], certificate))
        return out

    def _corrected(self, found: Sequence[Found], domain: str, k: int) -> list[Found]:
        """What was found, by corrected score: the `k` best, and those tied with the last."""
        first = int(self.catalogue.rows_of(domain)[0])
        out = []
        for result in found:
            scores = result.scores - self._without_history(domain, first + result.items)
            order = np.lexsort((result.items, -scores))
            if len(order) > k:
                order = order[: np.searchsorted(-scores[order], -scores[order[k - 1]], side="right")]
            out.append(replace(result, items=result.items[order], scores=scores[order]))
        return out

    def _without_history(self, domain: str, rows: np.ndarray) -> np.ndarray:
        """Log-probabilities of items after the prompt of an empty history."""
        prompt = self._prompts([RankingQuery(query_id="", domain=domain, history=())])[0]
        (scores,) = score_candidates(self.reader.read([prompt]), [self._encoder.titles(rows, end=True)])
        return scores + self._log_share(domain, rows)

    def _log_share(self, domain: str, rows: np.ndarray) -> np.ndarray:
        """See `Trie.log_share`; `rows` are those of the catalogue."""
        return self.trie(domain).log_share(rows - self.catalogue.rows_of(domain)[0])

    def _rank_candidates(self, tree: Tree, domain: str, queries: Sequence[RankingQuery]) -> list[Ranking]:
        given = [[item for item in query.candidates or () if _may(query, item)] for query in queries]
        out = []
        for query, items, scores in zip(queries, given, self._candidate_scores(tree, domain, given), strict=True):
            ids = np.array(items, dtype=object)
            order = np.lexsort((ids.astype(str), -scores))
            out.append(_ranking(query, ids[order], scores[order]))
        return out

    def _candidate_scores(self, tree: Tree, domain: str, items: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The score of each item after its prompt: float64 for each prompt's items, in their order."""
        rows = [self.catalogue.find(domain, mine) for mine in items]
        titles = [self._encoder.titles(mine, end=True) for mine in rows]
        scores = [
            score + self._log_share(domain, mine)
            for score, mine in zip(score_candidates(tree, titles), rows, strict=True)
        ]
        if self.ranking.score == "mean":
            return [score / text.lengths for score, text in zip(scores, titles, strict=True)]
        if self.ranking.score == "corrected":
            return [score - self._without_history(domain, mine) for score, mine in zip(scores, rows, strict=True)]
        return scores

    def _require_items(self, query: RankingQuery, ranking: Ranking) -> None:
        """Raise ModelError where a full ranking has no item although it may have some, and no budget was spent."""
        if ranking.item_ids or (ranking.certificate is not None and not ranking.certificate.exact):
            return
        ids = self.catalogue.item_id[self.catalogue.rows_of(query.domain)]
        gone = self.withdrawn.get(query.domain, frozenset()) | query.uncounted
        in_reach = sum(_may(query, item) and item not in gone for item in ids)
        if in_reach:
            raise ModelError(
                f"none of the {in_reach:,} items of {query.domain!r} in reach was found: this is a mistake of CPRec, "
                "please report it"
            )

    def _generate(self, tree: Tree, domain: str, queries: Sequence[RankingQuery]) -> list[Ranking]:
        written = write(tree, self.trie(domain).end, self._encoder.max_item_tokens)
        out = []
        for query, tokens in zip(queries, written, strict=True):
            rows = self.catalogue.find(domain, list(query.candidates or ()))
            # a title is compared as the model knows it, cut to its length
            known = [self._tokenizer.decode(title) for title in _rows(self._encoder.titles(rows))]
            said = match(self._tokenizer.decode(tokens), known)
            item = None if said is None else (query.candidates or ())[said]
            chosen = (item,) if item is not None and _may(query, item) else ()
            out.append(Ranking(query.query_id, chosen, (1.0,) * len(chosen)))
        return out


def _may(query: RankingQuery, item: str) -> bool:
    return item not in query.exclude and (query.allow is None or item in query.allow)


def _ranking(
    query: RankingQuery, ids: np.ndarray, scores: np.ndarray, certificate: Certificate | None = None
) -> Ranking:
    return Ranking(query.query_id, tuple(map(str, ids)), tuple(map(float, scores)), certificate)


def _rows(titles: Ragged) -> list[np.ndarray]:
    return [titles[row] for row in range(len(titles))]
