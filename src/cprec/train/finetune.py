"""Stage: fine-tuning on one domain: its next-item examples, with the loss on their targets alone, or documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cprec import distributed
from cprec.data.dataset import event_files, read_split
from cprec.data.queries import sampled_rows
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.provenance import code_sha256, file_sha256, read_resolved
from cprec.schema import SPECIFIC
from cprec.search.trie import Trie
from cprec.text.corpus import Corpus, Group
from cprec.text.documents import WHOLE, histories, stretches
from cprec.text.shards import TRAINING, Shards, open_shards, read_shard_manifest
from cprec.text.stream import TokenStream, one_phase
from cprec.text.tokenizer import load_tokenizer
from cprec.text.trees import Drawn, grow
from cprec.train.catalogue_loss import TitleNodes
from cprec.train.config import FinetuneConfig
from cprec.train.estimate import Estimate
from cprec.train.plan import Plan, plan_of
from cprec.train.run import Run
from cprec.train.training import encoder_of, run_training, time_training

BRANCH_ENDING = 2
"""Tokens of a branch before its title, about."""


@dataclass(frozen=True)
class Chosen:
    """Items drawn after each of Q histories; all are catalogue rows."""

    items: np.ndarray
    """int64[Q, D]"""
    among: np.ndarray
    """What they were drawn from: int64[Q, M]."""
    chance: np.ndarray
    """Of each of these, float32[Q, M]."""


@dataclass(frozen=True)
class Taught:
    """Targets that other recommenders choose, to be read beside those of the log."""

    made_from: Mapping[str, str]
    """Hashes of what they depend on, beside the settings and the events."""
    choose: Callable[[Split, Ragged, np.ndarray], Chosen]
    """What they choose after histories where some item came next, -1 for none: the same each time."""


def finetune(config: FinetuneConfig, taught: Taught | None = None) -> Path:
    """Fine-tune a model on the next-item examples of a domain, or on its users' documents; returns the model folder.

    `taught` is what the teachers of the configuration choose (`cprec.finetune` has them). Raises ConfigError without.
    """
    if config.teachers and taught is None:
        raise ConfigError("this function makes no teachers: call cprec.finetune.finetune, which does")
    return run_training(_run(config, taught))


def timed(config: FinetuneConfig) -> Estimate:
    """What fine-tuning will take, its speed timed on a micro-batch. Nothing is learnt or written."""
    return time_training(_run(config))


def tokens_of_pass(config: FinetuneConfig) -> int:
    """The tokens that fine-tuning reads in a pass, about."""
    if config.documents != "trees":
        return _sample(config, _documents(config)).num_tokens
    examples = open_shards(_examples_of(Path(config.data), config.domain) / "train", columns=TRAINING)
    # Each event is read once; a branch is about as long as a line of the history, and each event has some.
    branches = (examples.column("length") - examples.column("target_start") + BRANCH_ENDING).sum()
    return int(branches * (2 + config.taught_targets * bool(config.teachers)))


def _sample(config: FinetuneConfig, shards: Shards) -> Group:
    """What fine-tuning reads of documents: all, or a sample."""
    rows = sampled_rows(len(shards), config.max_documents, config.seed)
    return Group("", "", shards, rows, targets_only=config.documents == "examples")


def _trees(config: FinetuneConfig, taught: Taught | None) -> Shards:
    """Each user's events once, and after each of them the log's next item and those that are taught."""
    data = Path(config.data)
    about = read_shard_manifest(_examples_of(data, config.domain) / "train")["about"]
    least = read_resolved(data)["config"]["min_history"]
    split = read_split(data)
    encoder = encoder_of(data, about, load_tokenizer(str(data / "tokenizer")))
    domain, kind = split.catalogue.domain_index(config.domain), about["history"]
    history, _ = histories(split, domain, kind)
    of_domain = split.catalogue.domain[history.values] == domain
    # What came next, of the domain and of the same user; -1 for nothing.
    next_E = np.append(history.values[1:], -1)
    next_E[(history.place_of == history.lengths[history.row_of] - 1) | ~np.append(of_domain[1:], False)] = -1
    next_E[history.place_of + 1 < least] = -1
    branches, drawn = Ragged(next_E, np.arange(len(next_E) + 1)).kept(next_E >= 0), None
    if taught is not None:
        before, _, _ = stretches(split, domain, kind, about["max_history"])
        found = taught.choose(split, before, next_E[of_domain])
        chosen = Ragged(found.items.ravel(), offsets_of(found.items.shape[1] * of_domain))
        # A stable sort by event puts what is chosen behind what came.
        order = np.argsort(np.concatenate([branches.row_of, chosen.row_of]), kind="stable")
        row = np.concatenate([np.full(len(branches.values), -1), np.arange(found.items.size) // found.items.shape[1]])
        drawn = Drawn(row[order], found.among, found.chance)
        items = np.concatenate([branches.values, chosen.values])[order]
        branches = Ragged(items, offsets_of(branches.lengths + chosen.lengths))
    return grow(encoder, kind, domain, history, branches, config.max_length, drawn)


def _run(config: FinetuneConfig, taught: Taught | None = None) -> Run:
    folder = _examples_of(Path(config.data), config.domain)
    documents, validation = _documents(config), open_shards(folder / "validation")

    def stream(corpus: Corpus, num_tokens: float, rows: int, **more: Any) -> TokenStream:
        return TokenStream(
            corpus,
            one_phase(num_tokens),
            rows_per_step=rows,
            row_tokens=config.max_length,
            seed=config.seed,
            **more,
        )

    trie = _titles_of(config, documents.manifest["about"]) if config.weight_of_catalogue else None

    def plan() -> Plan:
        trees = config.documents == "trees"
        group = _sample(config, distributed.by_first(lambda: _trees(config, taught)) if trees else documents)
        num_tokens = round(config.num_train_epochs * group.num_tokens)
        nodes_of = TitleNodes(trie) if trie else None
        return plan_of(config, stream(Corpus([group]), num_tokens, config.train_batch_size, nodes_of=nodes_of))

    held_out = min(config.eval_tokens, validation.manifest["num_tokens"])
    asked = Corpus.of(validation, targets_only=True)
    heldout = stream(asked, held_out, config.rows_per_pass) if held_out else None
    return Run(
        config=config,
        make_plan=plan,
        trained_on=[documents.sha256],
        inputs={"heldout": validation.sha256, **_trees_made_from(config), **(taught.made_from if taught else {})},
        validation={f"{config.domain} (next item)": heldout} if heldout else {},
        stage="finetune",
        about={"domain": config.domain, **documents.manifest["about"], "softmax": config.softmax},
        probe_domains=(config.domain,) if config.probe_queries else (),
        titles_trie=trie,
        weight_of_catalogue=config.weight_of_catalogue,
    )


def _trees_made_from(config: FinetuneConfig) -> dict[str, str]:
    """Hashes of what trees depend on, beside the settings."""
    if config.documents != "trees":
        return {}
    events = {f"trees/{name}": file_sha256(Path(config.data, name)) for name in event_files(config.data)}
    return {"trees": code_sha256("cprec.text.trees"), **events}


def _titles_of(config: FinetuneConfig, about: Mapping[str, Any]) -> Trie:
    """The trie of the titles of the domain's items, as documents have them."""
    data = Path(config.data)
    encoder = encoder_of(data, about, load_tokenizer(str(data / "tokenizer")))
    return Trie.build(encoder.titles(encoder.catalogue.rows_of(config.domain), end=True))


def _documents(config: FinetuneConfig) -> Shards:
    """What is trained on, or the examples that trees are made of the events of. Raises ConfigError where the data have
    no documents of users, or documents unlike prompts."""
    folder = _examples_of(Path(config.data), config.domain)
    if config.documents != "users":
        return open_shards(folder / "train")
    if not (folder / WHOLE).is_dir():
        raise ConfigError(
            f"documents=users, but {folder / WHOLE} is not there: the data were prepared before `cprec prepare` wrote "
            "documents of users. Prepare them anew, or set documents=examples"
        )
    shards = open_shards(folder / WHOLE)
    if shards.manifest["about"]["history"] != SPECIFIC:
        raise ConfigError(
            "documents=users has the events of one domain, but prompts have those of all (history=mixed): prepare the "
            "data with history=specific, or set documents=trees"
        )
    return shards


def _examples_of(data: Path, domain: str) -> Path:
    """The folder of a domain's examples. Raises ConfigError where there is none."""
    folder = data / "examples" / domain
    if folder.is_dir():
        return folder
    if not folder.parent.is_dir():
        what = "is not a data folder of `cprec prepare`" if data.exists() else "does not exist"
        raise ConfigError(f"data={data} {what}: give the folder that `cprec prepare` wrote")
    found = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    raise ConfigError(
        f"domain={domain!r} has no fine-tuning examples in {folder.parent}, which has those of "
        f"{', '.join(found) or 'no domain'}. Name it in target_domains of `cprec prepare`"
    )
