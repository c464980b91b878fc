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
from typing import Any, Protocol

from cprec import distributed
from cprec.errors import ConfigError
from cprec.files import write_whole
from cprec.progress import say

IDS = "trackers.json"
"""The file with the ids that trackers gave this run."""
PROJECT = "cprec"
"""The project that runs belong to, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT says otherwise."""


class Tracker(Protocol):
    """A program or service that shows the numbers of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values after a step, by name; a slash divides a name into a group and its member."""

    def close(self) -> None:
        """Send what has not been sent. Nothing may be logged afterwards."""


def trackers(
    report_to: str | Sequence[str], output_dir: Path, run_name: str, config: Mapping[str, Any], *, step: int = 0
) -> Tracker:
    """All trackers that `report_to` names, as one; none in processes other than the first.

    `report_to` is one or several (a sequence, or with commas) of tensorboard, wandb, mlflow and trackio; or `none`; or
    `auto`, which is TensorBoard if it is installed. The run goes on from `step`, 0 for a new one. `config` is shown
    beside the run.

    A tracker that fails later is named in a warning and left out from then on; training does not stop for it.

    Raises ConfigError for an unknown name, for one that is not installed, and where a run cannot be opened.
    """
    names = places(report_to)
    if not distributed.is_first():
        return _All({})
    output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tracker] = {}
    for name in names:
        try:
            found[name] = TRACKERS[name](output_dir, run_name, config, step)
        except ImportError as error:
            _All(found).close()
            raise ConfigError(
                f"report_to={name}, but {name} cannot be imported ({error}): pip install {name}, or leave it out "
                "(report_to=none reports nowhere; log.jsonl is written always)"
            ) from error
        except Exception as error:  # services that are not reached or refuse us raise all kinds of errors
            _All(found).close()
            raise ConfigError(
                f"report_to={name} could not open a run ({type(error).__name__}: {error}): log in there, or leave it "
                "out (report_to=none reports nowhere; log.jsonl is written always)"
            ) from error
    return _All(found)


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


class _All:
    """Several trackers as one."""

    def __init__(self, members: dict[str, Tracker]) -> None:
        self._members = members

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._members = {}

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._members.items()):
            try:
                do(tracker)
            except Exception as error:
                del self._members[name]
                say(f"warning: {name} failed ({type(error).__name__}: {error}); nothing more is reported there")


# ---- trackers --------------------------------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        # On resuming, TensorBoard keeps the steps that the log keeps (up to `step`); a new run hides older ones.
        self._writer = writer(str(output_dir / "tensorboard"), purge_step=step + 1 if step else 0)
        if step == 0:
            self._writer.add_text("config", "\n".join(f"    {name}: {config[name]}" for name in config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> None:
        wandb = import_module("wandb")
        kept = _kept_id(output_dir, "wandb", step)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            id=kept,
            resume="allow" if kept else None,
            config=dict(config),
            dir=str(output_dir),
        )
        _keep_id(output_dir, "wandb", self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # wandb's own steps must not go back, as ours do when a run resumes: it counts lines, and draws them over `step`
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> None:
        self._mlflow = mlflow = import_module("mlflow")
        kept = _kept_id(output_dir, "mlflow", step)
        if kept:
            mlflow.start_run(run_id=kept)
            return
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = mlflow.start_run(run_name=run_name)
        _keep_id(output_dir, "mlflow", run.info.run_id)
        mlflow.log_params({name: str(value)[:500] for name, value in config.items()})  # MLflow takes no longer values

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # MLflow refuses other characters, such as the brackets of `books (specific)`
        named = {re.sub(r"[^\w\-. /]", "", name): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], step: int) -> None:
        trackio = import_module("trackio")
        # a run's name is its identity there: two runs of one name would be one
        name = _kept_id(output_dir, "trackio", step) or f"{run_name}-{os.urandom(3).hex()}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with redirect_stdout(sys.stderr):  # it prints, and standard output is for results
            self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow")
        _keep_id(output_dir, "trackio", name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
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
