"""Stage: fine-tuning on one domain: its next-item examples, with the loss on their targets alone, or documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cprec import distributed
from cprec.data.queries import sampled_rows
from cprec.errors import ConfigError
from cprec.schema import SPECIFIC
from cprec.search.trie import Trie
from cprec.text.corpus import Corpus, Group
from cprec.text.documents import WHOLE
from cprec.text.shards import TRAINING, Shards, open_shards
from cprec.text.stream import TokenStream, one_phase
from cprec.text.tokenizer import load_tokenizer
from cprec.train.catalogue_loss import TitleNodes
from cprec.train.config import FinetuneConfig
from cprec.train.estimate import Estimate
from cprec.train.plan import Plan, plan_of
from cprec.train.preference import Preference, PreferenceStream
from cprec.train.run import Run
from cprec.train.training import encoder_of, run_training, time_training
from cprec.train.trees import Taught, trees_made_from, trees_of

BRANCH_ENDING = 2
"""Tokens of a branch before its title, about."""


def finetune(config: FinetuneConfig, taught: Taught | None = None) -> Path:
    """Fine-tune a model on the next-item examples of a domain, or on its users' documents; returns the model folder.

    `taught` is what the teachers of the configuration choose (`cprec.finetune` has them). Raises ConfigError without.
    """
    if config.teachers and taught is None:
        raise ConfigError("this function makes no teachers: call cprec.finetune.finetune, which does")
    return run_training(run_of(config, taught))


def timed(config: FinetuneConfig) -> Estimate:
    """What fine-tuning will take, its speed timed on a micro-batch, without what teachers would choose.

    Nothing is learnt or written.
    """
    return time_training(run_of(config))


def tokens_of_pass(config: FinetuneConfig) -> int:
    """The tokens that fine-tuning reads in a pass, about."""
    if not config.teachers:
        documents = trees_of(config, None) if config.documents == "trees" else _documents(config)
        return _sample(config, documents).num_tokens
    examples = open_shards(examples_of(Path(config.data), config.domain) / "train", columns=TRAINING)
    # Each event is read once; a branch is about as long as a line of the history, and each event has some.
    branches = (examples.column("length") - examples.column("target_start") + BRANCH_ENDING).sum()
    return int(branches * (2 + config.taught_targets))


def _sample(config: FinetuneConfig, shards: Shards) -> Group:
    """What fine-tuning reads of documents: all, or a sample."""
    rows = sampled_rows(len(shards), config.max_documents, config.seed)
    return Group("", "", shards, rows, targets_only=config.documents == "examples")


def run_of(config: FinetuneConfig, taught: Taught | None = None, more_terms: Sequence[str] = ()) -> Run:
    """The run of a configuration; `more_terms` names loss terms beside the usual one, means over targets like it."""
    folder = examples_of(Path(config.data), config.domain)
    documents, validation = _documents(config), open_shards(folder / "validation")

    def stream(
        corpus: Corpus, num_tokens: float, rows: int, made: Callable[..., TokenStream] = TokenStream, **more: Any
    ) -> TokenStream:
        return made(
            corpus,
            one_phase(num_tokens),
            rows_per_step=rows,
            row_tokens=config.max_length,
            seed=config.seed,
            **more,
        )

    trie = _titles_of(config, documents.manifest["about"]) if config.weight_of_catalogue else None

    made_from = trees_made_from(config) if config.documents == "trees" else {}
    number, beta = config.preference, config.preference_beta
    preference = Preference(num_rejected=number, beta=beta) if number else None

    def plan() -> Plan:
        trees = config.documents == "trees"
        group = _sample(config, distributed.by_first(lambda: trees_of(config, taught)) if trees else documents)
        num_tokens = round(config.num_train_epochs * group.num_tokens)
        more: dict[str, Any] = {"nodes_of": TitleNodes(trie) if trie else None, "more_terms": more_terms}
        if preference is not None:
            more["made"] = partial(PreferenceStream, num_rejected=preference.num_rejected)
        return plan_of(config, stream(Corpus([group]), num_tokens, config.train_batch_size, **more))

    held_out = min(config.eval_tokens, validation.manifest["num_tokens"])
    asked = Corpus.of(validation, targets_only=True)
    heldout = stream(asked, held_out, config.rows_per_pass) if held_out else None
    return Run(
        config=config,
        make_plan=plan,
        trained_on=[documents.sha256],
        inputs={"heldout": validation.sha256, **made_from, **(taught.made_from if taught else {})},
        validation={f"{config.domain} (next item)": heldout} if heldout else {},
        stage="finetune",
        about={"domain": config.domain, **documents.manifest["about"], "softmax": config.softmax},
        probe_domains=(config.domain,) if config.probe_queries else (),
        titles_trie=trie,
        weight_of_catalogue=config.weight_of_catalogue,
        preference=preference,
    )


def _titles_of(config: FinetuneConfig, about: Mapping[str, Any]) -> Trie:
    """The trie of the titles of the domain's items, as documents have them."""
    data = Path(config.data)
    encoder = encoder_of(data, about, load_tokenizer(str(data / "tokenizer")))
    return Trie.build(encoder.titles(encoder.catalogue.rows_of(config.domain), end=True))


def _documents(config: FinetuneConfig) -> Shards:
    """What is trained on, or the examples that trees are made of the events of. Raises ConfigError where the data have
    no documents of users, or documents unlike prompts."""
    folder = examples_of(Path(config.data), config.domain)
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


def examples_of(data: Path, domain: str) -> Path:
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
