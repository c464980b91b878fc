"""A language model as a recommender: it reads a history as a prompt and ranks the catalogue's items by their titles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.word_index import QUERY
from cprec.errors import ConfigError, ModelError
from cprec.item_head import TITLE_TOKENS, ItemHead, load_heads, title_states
from cprec.rank.blend_file import BLEND
from cprec.rank.config import Mode, Normaliser, RankConfig, Score
from cprec.rank.opening import Engine, open_blend, open_model, settings_of
from cprec.rank.prompts import Prompts
from cprec.rank.recommending import Recommending
from cprec.rank.why import THE_MODEL, effects_of
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.schema import SPECIFIC, Item
from cprec.scoring import rankings_of
from cprec.search.cache import PrefixCache
from cprec.search.normaliser import Over
from cprec.search.priors import Priors, PriorSource
from cprec.search.ranking import SequenceRanker, batches
from cprec.search.reading import ModelReader, Reader, Tree
from cprec.search.trie import Trie
from cprec.search.writing import generate
from cprec.text.config import PLAIN, TitleCut
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.tokenizer import load_tokenizer


class LLMRecommender(Recommending):
    """Ranks a catalogue by a language model's probability of each item after the history's prompt.

    The model learns the probability of a title (its first `max_title_tokens` tokens), which is that of all items with
    this title together. Each of them has an equal share: P(item) = P(title) / n, where n counts the items of the domain
    in stock. A withdrawn item that is given as a candidate counts itself.

    Made by `from_pretrained` from a folder that `cprec pretrain` or `cprec finetune` wrote. Candidate lists are ranked
    by exact log-likelihood; the full catalogue over a trie of the domain's titles by `mode`:

    - `exact`: search until no better item can be left, with a proof;
    - `auto`: the same, but a query that has read `max_nodes` prefixes gets the best found, and its proof has the gap;
    - `beam`: the `beam_width` best prefixes of each depth; the proof has the gap;
    - `vectors`: no titles are read; the model's item head scores all items in one pass, candidates too. A blend must
      then give log P the weight 0;
    - `generate` (candidates only, named in the call of `rank`): the model writes freely, and what it writes is looked
      for among the candidates; a ranking holds one item or none.

    `score` is log P(item), the `sum` over the title's tokens less log n; its `mean`, the same divided by the number of
    tokens; or the sum less what it is under an empty history (`corrected` for popularity), in which the share cancels,
    and which is exact for candidates. Over the full catalogue a corrected score may rise along a title, so no prefix
    bounds it: `exact` refuses it, and the others put the titles that a beam found by sum into corrected order, with no
    proof.

    `normaliser` says what the probabilities of each step sum to one over: the `vocabulary`, or the `catalogue`, the
    children of the trie's node that lead to items in stock; then the probabilities of all items in stock sum to one.

    With a `blend` the score is weighted, and each item's prior is added, of which the log-probability by the item head
    may be a part; exact lists are still proven. Where the score has the weight 0, no titles are read in any mode.

    The `text` of a query is another prior (`data.word_index.WordIndex`), of as much weight as all other parts together:
    these are then a log-probability, times that weight, to which Bayes' rule adds that of the words.

    `cache_bytes` of memory keep what was read of prompts, for users who come back.
    """

    source: str
    """Where the model is from, for messages: its folder, if it is from one."""
    withdrawn: Mapping[str, frozenset[str]]
    """Item ids by domain that histories may name and full rankings never return; see `with_items`."""
    blend: PriorSource | None
    """What is known of items beside the model: joins every score (`generate` has none). None leaves it to the model."""
    way = None

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
        title_cut: TitleCut = PLAIN,
        history: str = SPECIFIC,
        max_history: int = 10,
        mode: Mode = "auto",
        beam_width: int = 20,
        max_nodes: int = 2000,
        seconds: float | None = None,
        score: Score = "sum",
        normaliser: Normaliser = "auto",
        trained_over: Over = "vocabulary",
        batch_size: int = 64,
        cache_bytes: int = 0,
        bf16: bool | None = False,
        item_heads: Mapping[str, ItemHead] | None = None,
    ) -> None:
        """`model` is a causal language model of transformers, or a `Reader`, which has its own cache and precision.
        Prompts start with the tokens `begin`, as the model was trained (`cprec.json` has them). `normaliser` auto is
        `trained_over`. `seconds` limits how long a batch of `batch_size` queries searches for more than a beam has
        found. `bf16` None leaves it to the model's size and the machine (`ModelReader`). `item_heads` are by domain,
        over its items in the order of the catalogue."""
        self.ranking = RankConfig(
            mode=mode, beam_width=beam_width, max_nodes=max_nodes, score=score, normaliser=normaliser
        )
        self.over: Over = trained_over if normaliser == "auto" else normaliser
        self.name = self.source = name
        self.domain, self.catalogue = domain, catalogue
        self.max_history, self.seconds, self.batch_size = max_history, seconds, batch_size
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.reader: Reader = (
            model if hasattr(model, "read") else ModelReader(model, bf16=bf16, pad_id=pad_id, cache_bytes=cache_bytes)
        )
        self._tokenizer = tokenizer
        encoder = PromptEncoder(
            tokenizer,
            catalogue,
            max_title_tokens=max_title_tokens,
            title_cut=title_cut,
            template=template,
            begin=begin,
        )
        self.prompts = Prompts(encoder, history, max_history, self.reader.context)
        self._item_heads: Mapping[str, ItemHead] = item_heads or {}
        self._tries: dict[str, Trie] = {}
        self.withdrawn: Mapping[str, frozenset[str]] = {}
        self.blend = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        engine: Engine = "transformers",
        engine_options: Mapping[str, Any] | None = None,
        blend: bool = True,
        **options: Any,
    ) -> LLMRecommender:
        """The recommender of a model folder, read by `engine`; `options` are those of the constructor (`beam_width=50`,
        say), `engine_options` those of `vllm.LLM`. A blend that `cprec blend` wrote beside the model is used, unless
        `blend` is False; with mode `vectors` it is the one that was chosen without log P.

        Raises ConfigError if the folder holds no finished model of CPRec, or the engine is not there; DataError or
        ConfigError for a blend that is damaged, or is not of this model.
        """
        folder = Path(folder)
        settings = settings_of(folder) | options
        model = open_model(folder, engine, engine_options or {}, bf16=settings["bf16"])
        made = cls(model, load_tokenizer(str(folder)), Catalogue.read(folder), **settings)
        made.source = str(folder)
        if engine == "transformers":
            made._item_heads = load_heads(folder, made.catalogue)
        if made.ranking.mode == "vectors":
            made._require_head(made.domain or made.catalogue.domains[0], "mode=vectors")
        if blend and (folder / BLEND).exists():
            found = open_blend(folder, made.catalogue, made.ranking)
            if found.item_head:
                made._require_head(found.domain, str(folder / BLEND))
            made.blend = found
        return made

    def rank(
        self,
        queries: Sequence[RankingQuery],
        k: int,
        mode: Mode | Literal["generate"] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Ranking]:
        """See `Recommender.rank`. Prompts of similar length share a batch. `mode` replaces the recommender's own.

        Once `stop()` is true, the search ends with what a beam has found, and lists that are not proven state their
        gap. Nothing stops the reading of prompts, the beam, or the scoring of candidates.

        Raises UnknownItemError for items that the catalogue does not have, ConfigError for queries without candidates
        in mode `generate`, ModelError where the model's scores are not finite.
        """
        mode = mode or self.ranking.mode
        if mode == "generate" and any(query.candidates is None for query in queries):
            raise ConfigError("mode='generate' ranks candidates: give each query some")
        prompts = self.prompts.of(queries)
        out: dict[int, Ranking] = {}
        with torch.inference_mode(), self._naming_itself():
            for batch in batches(prompts, queries, self.batch_size):
                asked = [queries[number] for number in batch]
                read = partial(self.reader.read, [prompts[number] for number in batch])
                out |= dict(zip(batch, self._rank_batch(read, asked, k, mode, stop), strict=True))
        return [out[number] for number in range(len(queries))]

    @property
    def reads_titles(self) -> bool:
        """Whether scores have a part of log P; without it the item head and the other parts of a blend are all."""
        return self.ranking.mode != "vectors" if self.blend is None else self.blend.weight > 0

    def values(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """The scores of a domain's items where no titles are read: float64[Q, N], items in the order of the catalogue.

        What queries leave out, allow or offer is not looked at. Raises as `rank` does.
        """
        values_QN = np.empty((len(queries), len(self.catalogue.rows_of(domain))))
        with torch.inference_mode(), self._naming_itself():
            for batch in batches(self.prompts.of(queries), queries, self.batch_size):
                priors = self._priors(domain, [queries[number] for number in batch], self.ranking.mode)
                assert priors is not None and not priors.weight, "titles are read"
                values_QN[batch] = priors.values_UN
        return values_QN

    @contextmanager
    def _naming_itself(self) -> Iterator[None]:
        """Errors of the model say which one it is."""
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{self.source}: {error}") from None

    # ---- the item head -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def item_log_probs(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """The log-probability of each item of a domain after each query's history, by the item head: float64[Q, N],
        items in the order of the catalogue. What queries exclude, allow or offer is not looked at.

        Raises ConfigError where the model has no head for the domain.
        """
        self._require_head(domain, "the score")
        return self._item_heads[domain].log_probs(queries, self._in_stock(domain))

    def has_item_head(self, domain: str) -> bool:
        """Whether the model has an item head for the domain."""
        return domain in self._item_heads

    def _require_head(self, domain: str, what: str) -> None:
        """Raise ConfigError where the model has no head for the domain, which is needed for `what`."""
        if not self.has_item_head(domain):
            names = ", ".join(map(repr, self._item_heads))
            has = f"one for {names} only" if names else "none"
            raise ConfigError(
                f"{what} needs an item head for domain {domain!r}, and {self.source} has {has}: train it with "
                "item_head=true and take the engine transformers, or choose another mode"
            )

    def title_states(self, rows: np.ndarray, advance: Callable[[int], None] = lambda number: None) -> np.ndarray:
        """What the model makes of the titles of some catalogue rows, see `item_head.title_states`: float32[rows, F]."""
        assert isinstance(self.reader, ModelReader)
        titles = self.prompts.encoder.encode_items(self._tokenizer, rows, TITLE_TOKENS)
        return title_states(self.reader.model, titles, advance)

    # ---- a batch -----------------------------------------------------------------------------------------------------

    def _rank_batch(
        self,
        read: Callable[[], Tree],
        queries: Sequence[RankingQuery],
        k: int,
        mode: str,
        stop: Callable[[], bool] | None,
    ) -> list[Ranking]:
        """Rankings for queries of one domain, all with candidates or all without; `read` reads their prompts."""
        domain = queries[0].domain
        if mode == "generate":
            longest = self.prompts.encoder.max_item_tokens
            return generate(read(), self.trie(domain).end, queries, self._candidate_titles, longest, self._tokenizer)
        priors = self._priors(domain, queries, mode)
        if priors is not None and not priors.weight:
            return self._by_values(queries, priors, k)
        tree, ranker = read(), self._ranker(domain)
        if queries[0].candidates is not None:
            return ranker.rank_candidates(tree, queries, priors)
        return ranker.rank_catalogue(
            tree,
            queries,
            k,
            mode=mode,
            beam_width=self.ranking.beam_width,
            max_nodes=self.ranking.max_nodes,
            seconds=self.seconds,
            stop=stop,
            priors=priors,
        )

    def _candidate_titles(self, query: RankingQuery) -> Ragged:
        """The titles of a query's candidates as the model knows them, cut to `max_title_tokens`."""
        return self.prompts.encoder.titles(self.catalogue.find(query.domain, query.candidates or ()))

    def _priors(self, domain: str, queries: Sequence[RankingQuery], mode: str) -> Priors | None:
        """What joins or replaces the log-probabilities of titles; None where nothing does. Raises as `_of_histories`
        does."""
        found = self._of_histories(domain, queries, mode)
        if not any(query.text for query in queries):
            return found
        words_QN = self._of_text(domain, queries)
        return Priors(words_QN) if found is None else replace(found, values_UN=found.values_UN + words_QN)

    def _of_text(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """What the words of each query add to the score of each item: float64[Q, N]."""
        index, weight = self.catalogue.words_of(domain), sum(self.weights.values())
        return weight * np.stack([index.effects(query.text)[1].sum(axis=0) for query in queries])

    def _of_histories(self, domain: str, queries: Sequence[RankingQuery], mode: str) -> Priors | None:
        """What is known of the items by the histories, beside the log-probabilities of titles.

        Raises ConfigError where mode `vectors` would leave out what a blend gives a weight.
        """
        if self.blend is None:
            if mode != "vectors":
                return None
            nothing = np.zeros((len(queries), len(self.catalogue.rows_of(domain))))
            priors = Priors(nothing, weight=0.0, item_head=1.0)
        else:
            priors = self.blend.priors(domain, queries)
        if mode == "vectors" and priors.weight:
            raise ConfigError(
                f"mode='vectors' reads no titles, and the blend in use gives log P the weight {priors.weight:g}: open "
                "the model with mode='vectors', which takes the weights that were chosen for it, or with blend=False"
            )
        return priors.with_head(self.item_log_probs(domain, queries)) if priors.item_head else priors

    def _by_values(self, queries: Sequence[RankingQuery], priors: Priors, k: int) -> list[Ranking]:
        """Rankings by priors alone: every item is scored, so nothing is searched."""
        priors.check(len(queries), len(self.catalogue.rows_of(queries[0].domain)))
        gone = self.withdrawn.get(queries[0].domain, frozenset())
        asked = [replace(q, exclude=q.exclude | gone) if gone and q.candidates is None else q for q in queries]
        found, proof = rankings_of(self.catalogue, asked, priors.values_UN, k), Proof(0.0, expanded=0)
        return [r if q.candidates is not None else replace(r, proof=proof) for q, r in zip(queries, found, strict=True)]

    def trie(self, domain: str) -> Trie:
        """The titles of a domain's items, in the order of the catalogue; built when first asked for.

        Raises DataError if items have titles that cannot be ranked.
        """
        if domain not in self._tries:
            rows = self.catalogue.rows_of(domain)

            def name(row: int) -> str:
                return f"the title of item {self.catalogue.item_id[rows[row]]!r} of {domain!r}"

            trie = Trie.build(self.prompts.encoder.titles(rows, end=True), name)
            self._tries[domain] = trie.with_stock(self._in_stock(domain))
        return self._tries[domain]

    def with_items(self, catalogue: Catalogue, withdrawn: Mapping[str, frozenset[str]]) -> LLMRecommender:
        """The same model over another catalogue of the same domains, less the items `withdrawn` (ids by domain).

        Withdrawn items are still read in histories; only full rankings leave them out. This recommender stays as it is,
        so a ranking under way is not disturbed. The two share the model, its cache, the tokens of titles that did not
        change and the tries of domains that did not change.

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
        out.blend = None if self.blend is None else self.blend.with_catalogue(catalogue)
        was = self.prompts.encoder
        out.prompts = replace(self.prompts, encoder=was.with_catalogue(self._tokenizer, catalogue))
        heads = self._item_heads.items()
        out._item_heads = {domain: head.over(catalogue, out.title_states, self.item_fields) for domain, head in heads}
        out._tries = {}
        for domain, trie in self._tries.items():
            before, after = self.catalogue.rows_of(domain), catalogue.rows_of(domain)
            if not np.array_equal(self.catalogue.item_id[before], catalogue.item_id[after]):
                continue
            if not was.same_titles(before, out.prompts.encoder, after):
                continue
            in_stock = out._in_stock(domain)
            out._tries[domain] = trie if np.array_equal(trie.in_stock, in_stock) else trie.with_stock(in_stock)
        for domain in self._tries:
            out.trie(domain)
        return out

    def _in_stock(self, domain: str) -> np.ndarray:
        """Which items of a domain are not withdrawn: bool[number of items]."""
        withdrawn = self.catalogue.find(domain, self.withdrawn.get(domain, ()))
        return ~np.isin(self.catalogue.rows_of(domain), withdrawn)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it recommends from: all of the catalogue, or the one of a blend, or those that have an item
        head where it ranks by that."""
        if self.blend is not None:
            return (self.blend.domain,)
        if self.ranking.mode == "vectors" and self._item_heads:
            return tuple(self._item_heads)
        return self.catalogue.domains

    @property
    def weights(self) -> Mapping[str, float]:
        """The parts of a score and their weights: the model alone, or that of its blend and the blend's others."""
        return {THE_MODEL: 1.0} if self.blend is None else self.blend.weights

    def effects(self, queries: Sequence[RankingQuery], rankings: Sequence[Ranking]) -> list[dict[str, float]]:
        """What each part adds to the score of a query's one candidate, compared with an average item of the domain.

        The queries are of one domain, and `rankings` those that `rank` gave for them. The effects of a query sum up to
        how far the score lies above that of an average item.
        """
        domain = queries[0].domain
        rows = self.catalogue.rows_of(domain)
        places = self.catalogue.find(domain, [ranking.item_ids[0] for ranking in rankings]) - rows[0]
        priors = {} if self.blend is None else self.blend.priors_of_parts(domain, queries)
        weights = dict(self.weights)
        if any(query.text for query in queries):
            priors, weights[QUERY] = priors | {QUERY: self._of_text(domain, queries)}, sum(self.weights.values())
        return effects_of(weights, priors, places, [ranking.scores[0] for ranking in rankings], len(rows))

    @property
    def item_fields(self) -> tuple[str, ...]:
        """What stands for an item in every text: its title, and perhaps other fields."""
        return self.prompts.encoder.template.item_fields

    def reading(self, query: RankingQuery) -> tuple[int, str]:
        """See `Recommending.reading`: fewer than the model was trained on where its context holds no more."""
        read = len(self.prompts.shown(query))
        is_less = read < len(self.prompts.readable(query))
        warning = (
            f"the history has {len(query.history)} events, and the model's context of {self.prompts.context:,} tokens "
            f"holds the latest {read}"
        )
        return read, warning if is_less else ""

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query's history that count: those that the prompt shows and, with a blend, all of its domain,
        since the other parts read those."""
        prompt = self.prompts.shown(query)
        if self.blend is None:
            return prompt
        of_all_domains = 0 if self.prompts.history == SPECIFIC else len(prompt)
        first = len(query.history) - of_all_domains
        events = enumerate(query.history)
        return tuple(item for place, item in events if place >= first or item.domain == query.domain)

    @property
    def cache(self) -> PrefixCache | None:
        """Prompts kept in this process; None where none are."""
        return self.reader.cache

    def _ranker(self, domain: str) -> SequenceRanker:
        """The ranker of a domain's titles by this model's scores."""
        score = self.ranking.score

        def empty_prompt() -> Tree:
            return self.reader.read([self.prompts.empty(domain)])

        return SequenceRanker(
            self.catalogue,
            domain,
            partial(self.prompts.encoder.titles, end=True),
            self.trie(domain),
            per_token=score == "mean",
            over=self.over,
            empty_prompt=empty_prompt if score == "corrected" else None,
        )
