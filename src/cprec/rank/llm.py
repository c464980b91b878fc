"""A language model as a recommender: prompts in, the catalogue's items out, behind the protocol that all share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cprec import distributed
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.models import load_model
from cprec.rank.attention import PromptTree
from cprec.rank.decoding import beam_search
from cprec.rank.scoring import score_candidates
from cprec.rank.trie import Trie
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import SPECIFIC, Item
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item, for people."""

    item_id: str
    title: str
    score: float
    """Log-probability of the title after the history; higher is better, comparable within one list."""


class LLMRecommender:
    """Ranks a catalogue by a language model's probability of each title after the history's prompt.

    The full catalogue is ranked by beam search of `beam_width` over a trie of the domain's titles; candidate lists by
    exact log-likelihood. Made by `from_pretrained` from a folder that `cprec pretrain` or `cprec finetune` wrote.
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
        max_title_tokens: int = 32,
        history: str = SPECIFIC,
        max_history: int = 10,
        beam_width: int = 20,
        batch_size: int = 32,
        bf16: bool = False,
    ) -> None:
        self.name = name
        self.domain = domain
        self.catalogue = catalogue
        self.history_kind = history
        self.max_history = max_history
        self.beam_width = beam_width
        self.batch_size = batch_size
        self._model = model.eval()
        self._bf16 = bf16
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._encoder = PromptEncoder(tokenizer, catalogue, max_title_tokens=max_title_tokens, template=template)
        self._tries: dict[str, Trie] = {}
        self._context = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> LLMRecommender:
        """The recommender of a model folder; `options` are those of the constructor (`beam_width=50`, say).

        Raises ConfigError if the folder holds no finished model of CPRec.
        """
        folder = Path(folder)
        if not (folder / "cprec.json").is_file():
            unfinished = any(folder.glob("checkpoint-*"))
            why = (
                "its training was interrupted: start the same command again to finish it"
                if unfinished
                else ("give the output_dir of `cprec pretrain` or `cprec finetune`")
            )
            raise ConfigError(f"{folder} holds no finished model of CPRec (no cprec.json): {why}")
        about = json.loads((folder / "cprec.json").read_text())
        device = distributed.pick_device()
        settings: dict[str, Any] = {
            "domain": about.get("domain"),
            "template": Template(**about["template"]),
            "max_title_tokens": about["max_title_tokens"],
            "history": about["history"],
            "max_history": about["max_history"],
            "bf16": distributed.use_bf16("auto", device) if device.type == "cuda" else False,
            "name": folder.name,
        }
        model = load_model(folder, device=device)
        return cls(model, load_tokenizer(str(folder)), Catalogue.read(folder), **settings | options)

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`. Prompts of similar length share a batch.

        Raises UnknownItemError for items that the catalogue does not have.
        """
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
                    tree = PromptTree(self._model, [prompts[n] for n in batch], bf16=self._bf16, pad_id=self._pad_id)
                    rank = self._rank_candidates if given else self._rank_catalogue
                    for number, ranking in zip(batch, rank(tree, domain, [queries[n] for n in batch], k), strict=True):
                        out[number] = ranking
        return [ranking for ranking in out if ranking is not None]

    def recommend(
        self, history: Sequence[str | Item], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> list[Recommendation]:
        """The `k` best next items for a history of item ids or titles, oldest first.

        Texts are looked up as ids, then as titles, in the target domain, then in every other one. `domain` is the
        domain to recommend from; by default the one the model was fine-tuned for. Of a history longer than the model
        was trained on, or than its context, the latest events are read, with a warning.

        Raises UnknownItemError for texts that are neither id nor title, ValueError if `k` exceeds the items there are.
        """
        domain = domain or self.domain
        if domain is None or domain not in self.catalogue.domains:
            raise ConfigError(f"domain={domain!r}: name one of {', '.join(self.catalogue.domains)}")
        items = tuple(event if isinstance(event, Item) else self._find(event, domain) for event in history)
        exclude = frozenset(item.item_id for item in items if item.domain == domain) if exclude_seen else frozenset()
        available = len(self.catalogue.rows_of(domain)) - len(exclude)
        if not 1 <= k <= available:
            raise ValueError(
                f"k={k}: domain {domain!r} has {available} items outside this history; choose 1 to {available}"
            )
        query = RankingQuery(query_id="", domain=domain, history=items, exclude=exclude)
        read = len(self._histories([query], np.array([self.catalogue.domain_index(domain)]))[0])
        if items and not read:
            warnings.warn(f"no event of the history is of domain {domain!r}: the ranking ignores it", stacklevel=2)
        elif read < len(self._read_part(query)):
            warnings.warn(
                f"the history has {len(items)} events, and the model's context of {self._context:,} tokens holds the "
                f"latest {read}",
                stacklevel=2,
            )
        ranking = self.rank([query], k)[0]
        rows = self.catalogue.find(domain, list(ranking.item_ids[:k]))
        return [
            Recommendation(item_id=i, title=str(self.catalogue.title[row]), score=s)
            for i, row, s in zip(ranking.item_ids, rows, ranking.scores, strict=False)
        ]

    def _find(self, text: str, domain: str) -> Item:
        """An item by id or title, of the target domain first."""
        for name in [domain, *(other for other in self.catalogue.domains if other != domain)]:
            row = self.catalogue.row_of(name, text)
            if row is not None:
                return Item(name, str(self.catalogue.item_id[row]))
        self.catalogue.find_titles(domain, [text])  # raises, naming the nearest titles
        raise AssertionError("a title that row_of does not find must be unknown")

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
        room = self._context - self._encoder.max_item_tokens - 1
        return self._encoder.fit(self.history_kind, domains, history, room)

    def _read_part(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query that a prompt can show: of its domain unless mixed, the latest `max_history`."""
        if self.history_kind == SPECIFIC:
            return tuple(item for item in query.history if item.domain == query.domain)[-self.max_history :]
        return query.history[-self.max_history :]

    def _trie(self, domain: str) -> Trie:
        if domain not in self._tries:
            self._tries[domain] = Trie.build(self._encoder.titles(self.catalogue.rows_of(domain), end=True))
        return self._tries[domain]

    def _rank_catalogue(self, tree: PromptTree, domain: str, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        rows = self.catalogue.rows_of(domain)
        first = int(rows[0])
        excluded = [
            self.catalogue.find(domain, sorted(query.exclude)) - first if query.exclude else np.empty(0, dtype=np.int64)
            for query in queries
        ]
        found = beam_search(tree, self._trie(domain), k=k, width=max(self.beam_width, k), excluded=excluded)
        out = []
        for query, result in zip(queries, found, strict=True):
            ids = self.catalogue.item_id[rows[result.items]]
            out.append(Ranking(query.query_id, tuple(map(str, ids)), tuple(map(float, result.scores))))
        return out

    def _rank_candidates(self, tree: PromptTree, domain: str, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        rows = [self.catalogue.find(domain, list(query.candidates or ())) for query in queries]
        scores = score_candidates(tree, [self._encoder.titles(mine, end=True) for mine in rows])
        out = []
        for query, mine in zip(queries, scores, strict=True):
            ids = np.array(query.candidates, dtype=object)
            kept = np.array([item not in query.exclude for item in ids], dtype=bool)
            order = np.lexsort((ids[kept].astype(str), -mine[kept]))
            out.append(Ranking(query.query_id, tuple(map(str, ids[kept][order])), tuple(map(float, mine[kept][order]))))
        return out
