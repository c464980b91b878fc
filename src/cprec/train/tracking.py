"""Trackers, which show a run's numbers beside its log: TensorBoard, Weights & Biases, MLflow, Trackio.

Each is imported when it is asked for. A resumed run continues as the same run there: TensorBoard drops the steps that
are run again, and the others find the run by its id, which `trackers.json` in the output folder keeps.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cprec import distributed
from cprec.errors import ConfigError
from cprec.files import write_whole
from cprec.progress import say

IDS = "trackers.json"
"""The file with the ids that trackers gave this run."""
PROJECT = "cprec"
"""The project that runs belong to, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT says otherwise."""


class Tracker(NamedTuple):
    """A program or service that shows the numbers of a run."""

    log: Callable[[int, Mapping[str, float]], object]
    """Takes the values after a step, by name; a slash divides a name into a group and its member."""
    close: Callable[[], object]
    """Sends what has not been sent. Nothing may be logged afterwards."""


def trackers(
    report_to: str | Sequence[str], output_dir: Path, run_name: str, config: Mapping[str, Any], *, step: int = 0
) -> Trackers:
    """All trackers that `report_to` names, as one; none in processes other than the first.

    `report_to` is one or several (a sequence, or with commas) of tensorboard, wandb, mlflow and trackio; or `none`; or
    `auto`, which is TensorBoard if it is installed. The run goes on from `step`, 0 for a new one. `config` is shown
    beside the run.

    A tracker that fails later is named in a warning and left out from then on; training does not stop for it.

    Raises ConfigError for an unknown name, for one that is not installed, and where a run cannot be opened.
    """
    names = places(report_to)
    if not distributed.is_first():
        return Trackers({})
    output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tracker] = {}
    for name in names:
        try:
            found[name] = TRACKERS[name](output_dir, run_name, config, step)
        except Exception as error:  # services that are not reached or refuse us raise all kinds of errors
            Trackers(found).close()
            problem = f" could not open a run ({type(error).__name__}: {error}): log in there"
            if isinstance(error, ImportError):
                problem = f", but {name} cannot be imported ({error}): pip install {name}"
            raise ConfigError(
                f"report_to={name}{problem}, or leave it out (report_to=none reports nowhere; log.jsonl is always "
                "written)"
            ) from error
    return Trackers(found)


def places(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The names in a setting, in order, once each; `auto` and `none` resolved.

    >>> places("wandb, mlflow"), places(("none",)), places("")
    (('wandb', 'mlflow'), (), ())

    Raises ConfigError for an unknown name, and for `auto` or `none` beside others.
    """
    words = report_to.split(",") if isinstance(report_to, str) else report_to
    names = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    unknown = [name for name in names if name not in (*TRACKERS, "auto", "none")]
    if unknown or (len(names) > 1 and {"auto", "none"} & set(names)):
        raise ConfigError(
            f"report_to={','.join(names)}: give auto or none alone, or one or more of {', '.join(TRACKERS)}"
        )
    if names == ("auto",):
        return ("tensorboard",) if find_spec("tensorboard") else ()
    return () if names == ("none",) else names


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of log.jsonl, by name, step left out; those of a group are called GROUP/NAME.

    >>> values_of({"step": 5, "loss": 2.5, "heldout": {"mixed": 9.0, "books": float("nan")}, "consumed": "3fa0"})
    {'loss': 2.5, 'heldout/mixed': 9.0}
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{member}": of_member for member, of_member in value.items()}
        elif name != "step":
            flat[name] = value
    return {
        name: float(value)
        for name, value in flat.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


class Trackers:
    """Several trackers as one."""

    def __init__(self, members: dict[str, Tracker]) -> None:
        self._members = members

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._members = {}

    def _each(self, do: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._members.items()):
            try:
                do(tracker)
            except Exception as error:
                del self._members[name]
                say(f"warning: {name} failed ({type(error).__name__}: {error}); nothing more is reported there")


# ---- trackers --------------------------------------------------------------------------------------------------------


def _tensorboard(output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> Tracker:
    # On resuming, TensorBoard keeps the steps that the log keeps (up to `step`); a new run hides older ones.
    writer_class = import_module("torch.utils.tensorboard").SummaryWriter
    writer = writer_class(str(output_dir / "tensorboard"), purge_step=step + 1 if step else 0)
    if step == 0:
        writer.add_text("config", "\n".join(f"    {name}: {config[name]}" for name in config))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> Tracker:
    kept = _kept_id(output_dir, "wandb", step)
    run = import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name,
        id=kept,
        resume="allow" if kept else None,
        config=dict(config),
        dir=str(output_dir),
    )
    _keep_id(output_dir, "wandb", run.id)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    # The steps of wandb itself must not go back, as ours do when a run resumes: it counts lines, and draws over `step`.
    return Tracker(lambda step, values: run.log({**values, "step": step}), run.finish)


def _mlflow(output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> Tracker:
    mlflow = import_module("mlflow")
    kept = _kept_id(output_dir, "mlflow", step)
    if kept:
        mlflow.start_run(run_id=kept)
    else:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        _keep_id(output_dir, "mlflow", mlflow.start_run(run_name=run_name).info.run_id)
        # MLflow takes no longer values.
        mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def log(step: int, values: Mapping[str, float]) -> None:
        # MLflow refuses other characters, such as the brackets of `books (specific)`.
        named = {re.sub(r"[^\w\-. /]", "", name): value for name, value in values.items()}
        mlflow.log_metrics(named, step=step)

    return Tracker(log, mlflow.end_run)


def _trackio(output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> Tracker:
    # The name of a run is its identity in Trackio: two runs of one name would be one.
    name = _kept_id(output_dir, "trackio", step) or f"{run_name}-{os.urandom(3).hex()}"
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    trackio = import_module("trackio")
    with redirect_stdout(sys.stderr):  # it prints, and standard output is for results
        run = trackio.init(project=project, name=name, config=dict(config), resume="allow")
    _keep_id(output_dir, "trackio", name)

    def close() -> None:
        with redirect_stdout(sys.stderr):
            run.finish()

    return Tracker(lambda step, values: run.log(dict(values), step=step), close)


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _ids(output_dir: Path) -> dict[str, str]:
    path = output_dir / IDS
    return json.loads(path.read_text()) if path.is_file() else {}


def _kept_id(output_dir: Path, name: str, step: int) -> str | None:
    """The id of the run to go on with; a run that begins anew gets a new one."""
    return _ids(output_dir).get(name) if step else None


def _keep_id(output_dir: Path, name: str, identity: str) -> None:
    path = output_dir / IDS
    write_whole(path, json.dumps(_ids(output_dir) | {name: identity}) + "\n")
