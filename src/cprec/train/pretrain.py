"""Stage: continual pre-training on behaviour sequences of all domains, specific and mixed, under WSA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.schema import SPECIFIC
from cprec.text.config import Mixture
from cprec.train.config import PretrainConfig, TrainingConfig

if TYPE_CHECKING:
    import numpy as np

    from cprec.data.ragged import Ragged
    from cprec.text.corpus import Corpus, Group
    from cprec.text.shards import Shards
    from cprec.text.stream import TokenStream
    from cprec.train.plan import Plan


def pretrain(config: PretrainConfig) -> Path:
    """Continue a model's pre-training on the token shards of a data folder; returns the model folder."""
    return _pretrain(config)


def fork(config: PretrainConfig, stable: Path) -> Path:
    """A branch of a run: what it read until `stable` was saved is taken as read, and annealing follows as in `config`.

    With `branch_length` as the run's own annealing it comes to the same weights as the run. Raises ConfigError if the
    checkpoint is not the end of the stable phase of this plan.
    """
    return _pretrain(config, fork_of=stable)


def _pretrain(config: PretrainConfig, fork_of: Path | None = None) -> Path:
    from cprec import distributed
    from cprec.text.mixture import EXAMPLES, TEXT
    from cprec.text.shards import TRAINING, open_shards
    from cprec.train.training import run_training

    distributed.join_processes(config.ddp_timeout)  # general text is tokenised by one of them
    folder = Path(config.data) / "shards"
    groups = behaviour_and_more(config)
    shards, heldout = groups[0].shards, open_shards(folder / "heldout", columns=TRAINING)
    examples = sorted({group.shards.sha256 for group in groups if group.kind == EXAMPLES})
    text = sorted({group.shards.sha256 for group in groups if group.kind == TEXT})
    return run_training(
        config,
        make_plan=lambda: pretrain_plan(config, groups),
        trained_on=[shards.sha256, *examples],
        inputs={"heldout": heldout.sha256} | ({"text": text[0]} if text else {}),
        validation=heldout_streams(heldout, config),
        about={"stage": "pretrain", **shards.manifest["about"]},
        start_from=Path(config.continue_from) if config.continue_from else None,
        fork_of=fork_of,
    )


def show_schedule(config: PretrainConfig) -> None:
    """Print what `pretrain` would do: steps and tokens of each phase, the mixture, the learning rate as a plot."""
    from cprec.train.plan import describe_plan, plot_schedule

    plan = pretrain_plan(config, behaviour_and_more(config))
    describe_plan(config, plan, print)
    print()
    print(plot_schedule(plan))


def behaviour_and_more(config: PretrainConfig) -> list[Group]:
    """The groups that a run may read: behaviour sequences, and general text and examples where a phase asks for them.

    Examples are those of pre-training domains, of users who stand in the shards: nobody enters by them who was kept out
    of pre-training.
    """
    import numpy as np

    from cprec import distributed
    from cprec.text.corpus import Group, behaviour_groups
    from cprec.text.general_text import text_shards
    from cprec.text.mixture import TEXT
    from cprec.text.shards import TRAINING, open_shards
    from cprec.text.tokenizer import load_tokenizer

    data = Path(config.data)
    groups = behaviour_groups(open_shards(data / "shards" / "train", columns=TRAINING))
    mixtures = [config.mixture, config.warmup_mixture, config.anneal_mixture]
    if any(mixture and mixture.text_share for mixture in mixtures) and config.replay:
        tokenizer = load_tokenizer(str(data / "tokenizer"))

        def make() -> str:
            begin = groups[0].shards.manifest["about"].get("begin", ())
            where = Path(config.output_dir) / "general_text"
            return text_shards(where, config.replay, tokenizer, config.max_length, begin)

        text = open_shards(Path(distributed.by_first(make)))
        groups.append(Group(TEXT, TEXT, text, np.arange(len(text))))
    if any(mixture and mixture.examples_share for mixture in mixtures):
        groups += _examples(data, groups)
    return groups


def _examples(data: Path, groups: list[Group]) -> list[Group]:
    import numpy as np
    import pyarrow.compute as pc

    from cprec.text.corpus import Group
    from cprec.text.mixture import EXAMPLES
    from cprec.text.shards import TRAINING, open_shards

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
    import pyarrow.compute as pc

    from cprec.text.shards import open_shards

    index = open_shards(folder, verify=False, columns=("platform", "user_id")).documents
    return pc.binary_join_element_wise(index["platform"], index["user_id"], "\x00")


def pretrain_plan(config: PretrainConfig, groups: list[Group]) -> Plan:
    """The batches and learning rates of a run: phases, their mixtures, the order of all documents."""
    from cprec.text.corpus import Corpus
    from cprec.text.mixture import shares
    from cprec.text.stream import Phase, TokenStream
    from cprec.train.plan import ANNEALING, make_plan, split_phases

    def of_phase(mixture: Mixture | None) -> np.ndarray | None:
        return None if mixture is None else shares(groups, mixture)

    shards = groups[0].shards
    if config.continue_from:
        config = replace(config, warmup_steps=0)
    share, annealing = shares(groups, config.mixture), of_phase(config.anneal_mixture)
    phases = split_phases(
        config,
        round(config.num_train_epochs * shards.manifest["num_tokens"]),
        share,
        warmup=of_phase(config.warmup_mixture),
        annealing=annealing,
    )
    if config.branch_length:
        trunk = [phase for phase in phases if phase.name != ANNEALING]
        num_tokens = sum(phase.num_tokens for phase in trunk) * config.branch_length / (1 - config.branch_length)
        phases = [
            *trunk,
            Phase(name=ANNEALING, num_tokens=num_tokens, share=share if annealing is None else annealing),
        ]
    corpus = Corpus(groups)
    stream = TokenStream(
        corpus,
        phases,
        rows_per_step=config.rows_per_step,
        row_tokens=config.max_length,
        seed=config.seed,
        max_passes=config.max_passes,
        is_target=_titles_only(config, corpus) if config.loss == "items_only" else None,
    )
    return make_plan(config, stream)


def _titles_only(config: PretrainConfig, corpus: Corpus) -> Callable[[np.ndarray, Ragged], np.ndarray]:
    """Which tokens are of titles (with the end that closes the last); all are where a document is general text."""
    import numpy as np

    from cprec.text.config import Template
    from cprec.text.encoding import TemplateMarks
    from cprec.text.mixture import TEXT
    from cprec.text.tokenizer import load_tokenizer

    domains = [group.domain for group in corpus.groups if group.kind == SPECIFIC]
    about = corpus.groups[0].shards.manifest["about"]
    tokenizer, template = load_tokenizer(f"{config.data}/tokenizer"), Template(**about["template"])
    marks = TemplateMarks(tokenizer, template, domains, about.get("begin", ()))
    is_text = np.array([group.kind == TEXT for group in corpus.groups])

    def is_target(documents: np.ndarray, tokens: Ragged) -> np.ndarray:
        return marks.in_titles(tokens) | np.repeat(is_text[corpus.group[documents]], tokens.lengths)

    return is_target


def heldout_streams(heldout: Shards, config: TrainingConfig) -> dict[str, TokenStream]:
    """Held-out documents of users never trained on: one stream per domain for specific ones, one for mixed ones."""
    from cprec.text.corpus import Corpus, behaviour_groups
    from cprec.text.stream import TokenStream, one_phase

    return {
        group.name: TokenStream(
            Corpus([group]),
            one_phase(min(config.eval_tokens, group.num_tokens)),
            rows_per_step=config.per_device_train_batch_size,
            row_tokens=config.max_length,
            seed=0,
        )
        for group in (behaviour_groups(heldout) if config.eval_tokens else [])
    }
