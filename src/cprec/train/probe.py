"""The ranking probe: validation queries that a model ranks while it is trained, so that its best weights can be kept.

It reads one file of queries and nothing else that was held out; test queries have a file of their own. Q: queries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cprec import distributed
from cprec.data.queries import sampled_rows
from cprec.data.ragged import Ragged
from cprec.errors import CheckpointError, ConfigError
from cprec.ranks import ndcg
from cprec.schema import SPECIFIC, VALIDATION
from cprec.search.attention import PromptTree
from cprec.search.decoding import search
from cprec.search.normaliser import Over, normaliser_of
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie
from cprec.text.encoding import PromptEncoder
from cprec.train.checkpoint import TrainState, checkpoint_folder, remove_folder
from cprec.train.folder import METRIC
from cprec.train.loss import PackedLoss

K = 10
"""The rank that NDCG is cut at."""
SEED = 0
"""Of the sample of queries: every run on the same data ranks the same ones, so that their curves can be compared."""
BATCH = 64
"""Queries that are ranked at once."""
WIDTH = 16
"""Prefixes of titles that the search reads at a time for a query; more than K, so that a first beam finds K items."""
MOST_NODES = 2000
"""Prefixes that it reads for a query at most; a target that was not found by then is a miss."""
BEST, WEIGHTS, KEPT = "best", "weights.safetensors", "kept.json"
"""The folder with the best weights of a run under way, and its files: the weights, and which they are."""


def queries_of(data: Path, domain: str) -> Path:
    """The file of a domain's validation queries in a data folder. Raises ConfigError where there are none."""
    path = data / "queries" / domain / f"{VALIDATION}.parquet"
    if not path.is_file() or not pq.read_metadata(path).num_rows:
        raise ConfigError(
            f"probe_queries: {data} has no validation queries of {domain!r} (no rows in {path}). Name it in "
            "target_domains of `cprec prepare`, or set probe_queries=0"
        )
    return path


@dataclass(frozen=True, eq=False)
class Probe:
    """Queries over the full catalogue of a domain, items of the history left out, and their targets.

    An item's score is the probability of its title, shared among the items that have it, as in `rank.llm`.
    """

    prompts: Ragged
    """Tokens of each query's prompt."""
    seen: Sequence[np.ndarray]
    """Positions in the domain of the items that each query leaves out."""
    target_Q: np.ndarray
    """Position of each query's target."""
    trie: Trie
    """Titles of the domain's items."""
    over: Over
    """What the probabilities of a step sum to one over."""
    pad_id: int

    @classmethod
    def read(
        cls,
        path: Path,
        num_queries: int,
        encoder: PromptEncoder,
        about: Mapping[str, Any],
        *,
        context: int,
        pad_id: int,
    ) -> Probe:
        """A sample of the queries of a file that `cprec prepare` wrote.

        `about` is how the model's documents were made, with `encoder`; prompts leave room for a title in `context`.
        """
        table = pq.read_table(path, columns=["domain", "history_domain", "history_item", "target"])
        rows = table.take(sampled_rows(len(table), num_queries, SEED)).to_pylist()
        catalogue, kind, domain = encoder.catalogue, about["history"], rows[0]["domain"]
        mine = catalogue.rows_of(domain)
        histories, seen = [], []
        for row in rows:
            events = list(zip(row["history_domain"], row["history_item"], strict=True))
            own = catalogue.find(domain, [item for name, item in events if name == domain])
            seen.append(np.unique(own) - mine[0])
            every = (
                own
                if kind == SPECIFIC
                else np.array([catalogue.find(name, [item])[0] for name, item in events], dtype=np.int64)
            )
            histories.append(every[-about["max_history"] :])
        domains = np.full(len(rows), catalogue.domain_index(domain))
        fitting = encoder.fit(kind, domains, Ragged.of(histories), context - encoder.max_item_tokens - 1)
        return cls(
            prompts=encoder.prompts(kind, domains, fitting),
            seen=seen,
            target_Q=catalogue.find(domain, [row["target"] for row in rows]) - mine[0],
            trie=Trie.build(encoder.titles(mine, end=True)),
            over="vocabulary" if about.get("softmax", "vocabulary") == "vocabulary" else "catalogue",
            pad_id=pad_id,
        )

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # prompts have all lengths: blocks would be compiled again and again
    def __call__(self, model: Any, *, bf16: bool) -> float:
        """Mean NDCG@10; ties count with their expected value. Nothing about the model changes."""
        was_training = model.training
        model.eval()
        better_Q, tied_Q = np.zeros((2, len(self.target_Q)), dtype=np.int64)
        order = np.argsort(self.prompts.lengths, kind="stable")  # prompts of similar length share a batch
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            tree = PromptTree(model, [self.prompts[row] for row in rows], bf16=bf16, pad_id=self.pad_id)
            better_Q[rows], tied_Q[rows] = self._count(tree, rows)
        model.train(was_training)
        return float(ndcg(better_Q, tied_Q, K).mean())

    def _count(self, tree: PromptTree, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`ranks.count` of some queries, for targets among the first K."""
        normaliser, targets = normaliser_of(self.over, self.trie), [self.target_Q[row, None] for row in rows]
        scores = score_candidates(tree, self.trie, targets, normaliser)
        found = search(
            tree,
            self.trie,
            k=K,
            width=WIDTH,
            excluded=[self.seen[row] for row in rows],
            max_nodes=MOST_NODES,
            normaliser=normaliser,
            place_of=[float(s[0] + self.trie.log_share(t)[0]) for s, t in zip(scores, targets, strict=True)],
        )
        counts = np.zeros((2, len(rows)), dtype=np.int64)
        for place, (one, target) in enumerate(zip(found, targets, strict=True)):
            if len(mine := one.scores[one.items == target]):
                counts[:, place] = (one.scores > mine).sum(), (one.scores == mine).sum()
        return counts[0], counts[1]


class BestWeights:
    """Ranks with a model whenever it is asked to, and keeps its best weights in the folder `best` of its run.

    The first process ranks while the others wait. What is kept outlasts the process, and a run that goes on from a
    checkpoint, whichever, goes on from what was the best.
    """

    def __init__(self, loss: PackedLoss, probes: Mapping[str, Probe], output_dir: Path, *, keep: bool) -> None:
        """The probes by domain, in the first process; the others have none."""
        self._loss, self._probes, self._keep, self.folder = loss, probes, keep, output_dir / BEST
        self._ranks = distributed.any_rank(bool(probes))

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """NDCG@10 by domain, and how long it took, as fields of the log; the weights are kept if none were better."""
        return distributed.by_first(lambda: self._measure(state)) if self._ranks else {}

    def _measure(self, state: TrainState) -> dict[str, Any]:
        started, model = time.perf_counter(), self._loss.module
        if state.step == 0:
            self.forget()  # of an earlier start
        values = {domain: probe(model, bf16=self._loss.bf16) for domain, probe in self._probes.items()}
        seconds = time.perf_counter() - started
        if self._keep:
            best = self._kept()
            if best is None or _mean(values) >= _mean(best[METRIC]):
                self._write({"step": state.step, METRIC: values})
        return {METRIC: values, "probe_seconds": round(seconds, 3)}

    def _kept(self) -> dict[str, Any] | None:
        """Step and values of the weights in the folder; None where there are none."""
        path = self.folder / KEPT
        return json.loads(path.read_text()) if path.is_file() else None

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self._loss.module.named_parameters() if weight.requires_grad}

    def _write(self, kept: Mapping[str, Any]) -> None:
        with checkpoint_folder(self.folder) as unfinished:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trained().items()}
            save_file(weights, unfinished / WEIGHTS)
            (unfinished / KEPT).write_text(json.dumps(kept) + "\n")

    def restore(self) -> dict[str, Any] | None:
        """Put the weights that were kept back into the model, in the first process, which is the one that writes it;
        returns their step and values. None: the last weights stay. Raises CheckpointError where they cannot be read."""
        return distributed.by_first(self._restore) if self._ranks and self._keep else None

    @torch.no_grad()
    def _restore(self) -> dict[str, Any] | None:
        kept = self._kept()
        if kept is None:
            return None
        try:
            weights = load_file(self.folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder} cannot be read ({error!r}): delete it and start the same command again, which keeps "
                "the best from its newest checkpoint on"
            ) from error
        for name, weight in self._trained().items():
            weight.copy_(weights[name])
        return kept

    def forget(self) -> None:
        """Remove what was kept. The first process calls it."""
        remove_folder(self.folder)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
