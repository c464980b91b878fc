"""`cprec report`: the page of a training run, or of all runs below a folder, finished or not."""

from __future__ import annotations

from pathlib import Path

from cprec.errors import ConfigError
from cprec.evaluate.training_page import TrainingRun, print_training, training_page
from cprec.files import write_whole
from cprec.progress import say
from cprec.train.folder import LOG, read_done, read_log

PAGE = "training.html"


def training_report(folder: Path | str) -> Path:
    """Write `training.html` into an output folder and print its final numbers; returns the page.

    The folder is that of a run of `pretrain` or `finetune`, or of several, at whatever depth: a recipe's, or that of
    anneal forks. A run under way may be looked at as well. Raises ConfigError where nothing has been logged.
    """
    folder = Path(folder)
    runs, page = training_runs(folder), folder / PAGE
    write_whole(page, training_page(folder.resolve().name, runs))
    print_training(runs)
    say(f"wrote {page}")
    return page


def training_runs(folder: Path) -> list[TrainingRun]:
    """The runs in a folder and below it, pre-training first, then by name; a run without a line of log is left out."""
    found = []
    for log in sorted(folder.rglob(LOG)):
        records = [record for record in read_log(log) if isinstance(record, dict) and {"step", "tokens"} <= set(record)]
        if records:
            path = log.parent.relative_to(folder).as_posix()
            name = folder.resolve().name if path == "." else path
            found.append(TrainingRun(name, records, read_done(log.parent) or {}))
    if not found:
        raise ConfigError(
            f"{folder} holds no training run ({LOG} with a line or more): give the output_dir of pretrain or finetune, "
            "or a folder above"
        )
    return sorted(found, key=lambda run: "pretrain" not in (run.name.split("/")[0], run.about.get("stage")))
