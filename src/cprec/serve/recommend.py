"""Stage: histories in (command line or file), titles with scores out."""

from __future__ import annotations

import itertools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cprec.errors import ConfigError
from cprec.progress import say, track
from cprec.serve.config import RecommendConfig
from cprec.serve.engine import Baseline, Recommends
from cprec.serve.histories import ROWS_AT_ONCE, count_rows, read_histories
from cprec.serve.lists import Answers, ListStore, Rejected, list_writer, made_of

USERS_AT_ONCE = ROWS_AT_ONCE
"""Users that are read, ranked and written together, so that memory does not grow with the file. Their lists are what a
kill may cost."""


def recommend(config: RecommendConfig, recommender: Recommends, popular: Baseline | None = None) -> None:
    """Print recommendations for one history, or write those for a file of histories.

    `popular` answers for histories of which the model reads no event.
    """
    if config.history:
        _show(config, recommender)
    else:
        _answer_file(config, recommender, popular)


def _show(config: RecommendConfig, recommender: Recommends) -> None:
    try:
        found = recommender.recommend(config.history, config.k, domain=config.domain, exclude_seen=config.exclude_seen)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = Table(box=None)
    for name, justify in (("rank", "right"), ("title", "left"), ("item", "left"), ("score", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for rank, item in enumerate(found, 1):
        table.add_row(str(rank), item.title, item.item_id, f"{item.score:.2f}")
    Console().print(table)


def _answer_file(config: RecommendConfig, recommender: Recommends, popular: Baseline | None) -> None:
    assert config.input and config.output
    source, output = Path(config.input), Path(config.output)
    domain = config.domain or recommender.domain
    if domain is None or domain not in recommender.catalogue.domains:
        raise ConfigError(f"domain={domain!r}: name one of {', '.join(recommender.catalogue.domains)}")
    num_rows = count_rows(source)
    if (old := _beside(output, ".parts")).is_dir():
        say(f"{old} is of an earlier version, and is not read: remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    key = made_of(config.model, domain, config.k, config.exclude_seen)
    with (
        ListStore(_beside(output, ".lists"), key) as lists,
        Rejected(_beside(output, ".rejected.csv"), source, config.strict) as rejected,
    ):
        answers = Answers(
            recommender, popular, lists, rejected, domain=domain, k=config.k, exclude_seen=config.exclude_seen
        )
        with list_writer(output) as write, track(num_rows, "recommending", unit="users") as progress:
            histories = read_histories(source)
            while rows := list(itertools.islice(histories, USERS_AT_ONCE)):
                write(answers.of(rows))
                progress.advance(len(rows))
            answers.require_some()
            rejected.finish()
        lists.is_kept = bool(rejected.counts)
    say(f"{output}: {answers.summary()}")
    if rejected.counts:
        what = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(rejected.counts.items()))
        say(f"{rejected.path} lists what was left out ({what})")
    if lists.path.exists():
        say(f"{lists.path} keeps the lists: once {source} is mended, only changed users are ranked. Or remove it")


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)
