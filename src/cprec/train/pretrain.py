"""Stage: continual pre-training on behaviour sequences of all domains, specific and mixed, under WSA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cprec import distributed
from cprec.data.dataset import read_split
from cprec.data.leakage import Grammar, read_events
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError
from cprec.schema import CONTEXT, KINDS, SPECIFIC, SPLITS, TRAIN
from cprec.text.audit_part import grammar_of
from cprec.text.config import Mixture
from cprec.text.corpus import CURRICULUM, EXAMPLES, ITEM_TEXTS, RULES, TEXT, Corpus, Group, groups_of
from cprec.text.curriculum import CurriculumWriter
from cprec.text.encoding import PromptEncoder, TemplateMarks
from cprec.text.general_text import text_shards
from cprec.text.mixture import shares
from cprec.text.prompts import Template
from cprec.text.shards import TRAINING, Shards, open_shards
from cprec.text.stream import Phase, TokenStream, one_phase
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import PretrainConfig
from cprec.train.plan import ANNEALING, Plan, describe_plan, plan_of, plot_schedule, split_phases
from cprec.train.run import Run
from cprec.train.training import encoder_of, run_training


def pretrain(config: PretrainConfig) -> Path:
    """Continue a model's pre-training on the token shards of a data folder; returns the model folder."""
    distributed.join_processes(config.ddp_timeout)  # one of them makes tokens of general text
    return run_training(_run(config))


def fork(config: PretrainConfig, stable: Path) -> Path:
    """A branch of a run: what the run read until `stable` was saved counts as read, and annealing follows as in
    `config`.

    With `branch_length` equal to the run's own annealing it ends with the weights of the run. Raises ConfigError if the
    checkpoint is not the end of the stable phase of this plan.
    """
    distributed.join_processes(config.ddp_timeout)
    return run_training(replace(_run(config), fork_of=stable, keeps_stable=False))


def show_schedule(config: PretrainConfig) -> None:
    """Print what `pretrain` would do: steps and tokens of each phase, the mixture, the learning rate as a plot."""
    plan = pretrain_plan(config, behaviour_and_more(config))
    describe_plan(plan, print)
    print()
    print(plot_schedule(plan))


def _run(config: PretrainConfig) -> Run:
    groups = behaviour_and_more(config)
    shards = groups[0].shards
    heldout = open_shards(Path(config.data) / "shards" / "heldout", columns=TRAINING)
    text, examples, behaviour, curriculum = (
        list(dict.fromkeys(group.shards.sha256 for group in groups if group.kind in kinds))
        for kinds in ((TEXT,), (EXAMPLES,), KINDS, CURRICULUM)
    )
    more = {"text": text, "curriculum": curriculum}
    return Run(
        config=config,
        make_plan=lambda: pretrain_plan(config, groups),
        trained_on=[*behaviour, *sorted(examples)],
        inputs={"heldout": heldout.sha256} | {name: " ".join(hashes) for name, hashes in more.items() if hashes},
        validation=heldout_streams(
            heldout, eval_tokens=config.eval_tokens, rows=config.rows_per_pass, max_length=config.max_length
        ),
        stage="pretrain",
        about=shards.manifest["about"],
        probe_domains=config.probe_domains,
        start_from=Path(config.continue_from) if config.continue_from else None,
        keeps_stable=config.lr_scheduler_type != "cosine",
    )


def behaviour_and_more(config: PretrainConfig) -> list[Group]:
    """The groups that a run may read: behaviour sequences, and general text, examples and the curriculum where a phase
    asks for them; of a folder of text, its texts.

    Examples are those of pre-training domains, of users whose sequences are in the shards: users who are kept out of
    pre-training do not enter by their examples.
    """
    data = Path(config.data)
    groups = groups_of(open_shards(data / "shards" / "train", columns=TRAINING))
    mixtures = [config.mixture, config.warmup_mixture, config.anneal_mixture]
    if any(mixture and mixture.text_share for mixture in mixtures) and config.replay:
        tokenizer = load_tokenizer(str(data / "tokenizer"))

        def make() -> str:
            begin = groups[0].shards.manifest["about"].get("begin", ())
            where = Path(config.output_dir) / "general_text"
            return text_shards(where, config.replay, tokenizer, config.max_length, begin)

        text = open_shards(Path(distributed.by_first(make)))
        groups.append(Group(TEXT, TEXT, text, np.arange(len(text))))
    asking = [mixture for mixture in mixtures if mixture and mixture.has_curriculum]
    if asking:
        groups += distributed.by_first(lambda: _curriculum(config, groups, asking))
    # Examples come last: a group's order depends on its number, and a branch may ask for examples where its stem did
    # not.
    if any(mixture and mixture.examples_share for mixture in mixtures):
        groups += _examples(data, groups)
    return groups


def _curriculum(config: PretrainConfig, groups: list[Group], mixtures: list[Mixture]) -> list[Group]:
    """Walks, rules and item texts of the domains that a mixture reads."""
    domains = [
        group.domain
        for group in groups
        if group.kind == SPECIFIC and any(mixture.domain_weights.get(group.domain, 1) for mixture in mixtures)
    ]
    if not domains:
        raise ConfigError(
            f"walks, rules and item texts are made of domain-specific sequences, and of data={config.data} none is read"
        )
    return curriculum_writer(config).groups(domains, mixtures)


def curriculum_writer(config: PretrainConfig) -> CurriculumWriter:
    """What writes walks, rules and item texts: of the events that the shards hold, and of no others."""
    data = Path(config.data)
    split, shards = read_split(data), open_shards(data / "shards" / "train")
    about, tokenizer = shards.manifest["about"], load_tokenizer(str(data / "tokenizer"))
    encoder = encoder_of(data, about, tokenizer)
    is_known = events_of_shards(split, shards, encoder)
    return CurriculumWriter(
        replace(split, part=np.where(is_known, split.part, SPLITS.index(CONTEXT))),
        encoder,
        tokenizer,
        config.curriculum,
        max_length=config.max_length,
        seed=config.seed,
        begin=about.get("begin", ()),
    )


def _examples(data: Path, groups: list[Group]) -> list[Group]:
    users = pc.unique(_users(data / "shards" / "train"))
    found = []
    for domain in sorted({group.domain for group in groups if group.domain}):
        folder = data / "examples" / domain / "train"
        if folder.is_dir():
            rows = np.flatnonzero(pc.is_in(_users(folder), users).to_numpy(zero_copy_only=False))
            shards = open_shards(folder, columns=TRAINING)
            if len(rows):
                found.append(Group(f"{EXAMPLES} of {domain}", EXAMPLES, shards, rows, domain, targets_only=True))
    return found


def _users(folder: Path) -> Any:
    """(platform, user) of each document of a shard folder as one text."""
    index = open_shards(folder, verify=False, columns=("platform", "user_id")).documents
    return _joined(index["platform"], index["user_id"])


def _joined(platform: Any, user_id: Any) -> Any:
    return pc.binary_join_element_wise(platform, user_id, "\x00")


def events_of_shards(split: Split, shards: Shards, encoder: PromptEncoder) -> np.ndarray:
    """The events that pre-training may know of: those of the users and domains of which the shards have documents, so
    that users who are kept out of the shards stay out: bool[num_events]. `encoder` writes documents as they do.

    Raises LeakageError where a user has other training events in a domain than the documents tell of.
    """
    log, catalogue = split.interactions, split.catalogue
    rows = np.flatnonzero(pc.equal(shards.documents["kind"], SPECIFIC))
    index = shards.documents.take(rows)
    platforms = np.array(log.platforms, dtype=object)[log.user_platform]
    users = _joined(pa.array(platforms, pa.string()), pa.array(log.user_id, pa.string()))
    user, domain = (
        pc.fill_null(pc.index_in(named, known), -1).to_numpy().astype(np.int64)
        for named, known in (
            (_joined(index["platform"], index["user_id"]), users),
            (index["domain"], pa.array(catalogue.domains, pa.string())),
        )
    )
    # Users and domains as one number each: of the documents, and of the events.
    pair_D, pair_E = (
        u * len(catalogue.domains) + d for u, d in ((user, domain), (log.user, catalogue.domain[log.item]))
    )
    is_known, grammar = np.isin(pair_E, pair_D), grammar_of(encoder)
    held, told = is_known & split.events(TRAIN), read_events(shards.take(rows), domain, grammar)
    _check_equal(
        split,
        grammar,
        held=(pair_E[held], grammar.title_of_row[log.item[held]]),
        told=(pair_D[told.document], told.title),
    )
    return is_known


Titles = tuple[np.ndarray, np.ndarray]
"""Of some events: users and domains as one number each, and the numbers of the titles."""


def _check_equal(split: Split, grammar: Grammar, held: Titles, told: Titles) -> None:
    """Raise LeakageError unless the log holds the same events, in any order, as documents tell of."""
    catalogue, number_N = split.catalogue, grammar.title_of_row
    width = len(catalogue) + 1  # title -1, which the catalogue does not have, has the last place
    codes, place = np.unique(
        np.concatenate([pair * width + title % width for pair, title in (held, told)]), return_inverse=True
    )
    held_C, told_C = (np.bincount(part, minlength=len(codes)) for part in np.split(place, [len(held[0])]))
    wrong = np.flatnonzero(held_C != told_C)
    if len(wrong):
        pair, title = divmod(int(codes[wrong[0]]), width)
        user, domain = divmod(pair, len(catalogue.domains))
        who = repr(str(split.interactions.user_id[user])) if user >= 0 else "one whom the log does not have"
        what = repr(str(catalogue.title[np.argmax(number_N == title)])) if title in number_N else "an unknown title"
        raise LeakageError(
            f"{len(np.unique(codes[wrong] // width)):,} users have other training events in a domain than the "
            f"documents to pre-train on tell of, as {who} in {catalogue.domains[domain]!r}, with {what} "
            f"{held_C[wrong[0]]} times for {told_C[wrong[0]]}: the tables or the shards were changed; run "
            "`cprec prepare` again"
        )


def pretrain_plan(config: PretrainConfig, groups: list[Group]) -> Plan:
    """The batches and learning rates of a run: phases, their mixtures, the order of all documents."""
    if config.continue_from:
        config = replace(config, warmup_steps=0)
    corpus = Corpus(groups)
    stream = TokenStream(
        corpus,
        _phases(config, groups),
        rows_per_step=config.train_batch_size,
        row_tokens=config.max_length,
        seed=config.seed,
        max_passes=config.max_passes,
        is_target=_titles_only(Path(config.data), corpus) if config.loss == "items_only" else None,
    )
    return plan_of(config, stream)


def _phases(config: PretrainConfig, groups: list[Group]) -> list[Phase]:
    """The phases of a run; in a branch of a run, annealing has its share of the tokens in place of its steps."""

    def shares_of(mixture: Mixture | None) -> np.ndarray | None:
        return None if mixture is None else shares(groups, mixture)

    share, annealing = shares(groups, config.mixture), shares_of(config.anneal_mixture)
    phases = split_phases(
        round(config.num_train_epochs * groups[0].shards.manifest["num_tokens"]),
        share,
        tokens_per_step=config.train_batch_size * config.max_length,
        warmup_steps=config.warmup_steps,
        anneal_steps=config.anneal_steps if config.lr_scheduler_type == "wsa" else 0,
        warmup=shares_of(config.warmup_mixture),
        annealing=annealing,
    )
    if not config.branch_length:
        return phases
    trunk = [phase for phase in phases if phase.name != ANNEALING]
    num_tokens = sum(phase.num_tokens for phase in trunk) * config.branch_length / (1 - config.branch_length)
    branch = Phase(name=ANNEALING, num_tokens=num_tokens, share=share if annealing is None else annealing)
    return [*trunk, branch]


def _titles_only(data: Path, corpus: Corpus) -> Callable[[np.ndarray, Ragged], np.ndarray]:
    """Marks the tokens of titles, with the end of sequence, and all tokens of general text and of sentences."""
    domains = [group.domain for group in corpus.groups if group.kind == SPECIFIC]
    about = corpus.groups[0].shards.manifest["about"]
    if not domains:
        raise ConfigError(f"loss=items_only is of the titles in behaviour sequences, and data={data} has none")
    tokenizer, template = load_tokenizer(str(data / "tokenizer")), Template(**about["template"])
    marks = TemplateMarks(tokenizer, template, domains, about.get("begin", ()))
    is_text = np.array([group.kind in (TEXT, RULES, ITEM_TEXTS) for group in corpus.groups])

    def is_target(documents: np.ndarray, tokens: Ragged) -> np.ndarray:
        return marks.in_titles(tokens) | np.repeat(is_text[corpus.group[documents]], tokens.lengths)

    return is_target


def heldout_streams(heldout: Shards, *, eval_tokens: int, rows: int, max_length: int) -> dict[str, TokenStream]:
    """Held-out documents of users never trained on: a stream for each domain's specific ones, one for mixed ones; of
    text a stream for each file."""
    return {
        group.name: TokenStream(
            Corpus([group]),
            one_phase(min(eval_tokens, group.num_tokens)),
            rows_per_step=rows,
            row_tokens=max_length,
            seed=0,
        )
        for group in (groups_of(heldout) if eval_tokens else [])
    }
