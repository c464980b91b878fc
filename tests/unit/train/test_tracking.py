"""TensorBoard is read back; of the services, fakes record what they are told."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cprec import distributed
from cprec.errors import ConfigError
from cprec.train.tracking import IDS, TRACKERS, places, trackers, values_of

CONFIG = {"learning_rate": 1e-3, "mixture": {"mixed_share": 0.5}}


class Fakes:
    """Modules that record every call in `calls` as (function, arguments)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.number = 0
        run = SimpleNamespace(
            log=self._noting("log"), define_metric=self._noting("define_metric"), finish=self._noting("finish")
        )

        def opened(name: str) -> Any:
            def open_run(**arguments: Any) -> Any:
                self.number += 1
                self.calls.append((name, arguments))
                run.id = arguments.get("id") or f"id-{self.number}"
                run.info = SimpleNamespace(run_id=arguments.get("run_id") or f"id-{self.number}")
                return run

            return open_run

        functions = {
            "wandb": {"init": opened("init")},
            "trackio": {"init": opened("init")},
            "mlflow": {
                "start_run": opened("start_run"),
                **{n: self._noting(n) for n in ("set_experiment", "log_params", "log_metrics", "end_run")},
            },
        }
        for name, members in functions.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
        for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
            monkeypatch.delenv(variable, raising=False)

    def _noting(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, {"": arguments} | named))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def tensorboard_values(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: by name, (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_a_resumed_run_as_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = trackers("tensorboard", tmp_path, "run", CONFIG)
    for step in (1, 2, 3, 4, 5):
        first.log(step, {"loss": 10.0 - step, "heldout/books (specific)": 30.0})
    first.close()
    second = trackers("tensorboard", tmp_path, "run", CONFIG, step=3)  # steps 4 and 5 were after the last checkpoint
    second.log(4, {"loss": 5.5})
    second.close()
    shown = tensorboard_values(tmp_path)
    assert shown["loss"] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 5.5)]
    assert [step for step, _ in shown["heldout/books (specific)"]] == [1, 2, 3]


def test_tensorboard_hides_what_a_run_begun_anew_replaces(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for value in (4.0, 5.0):
        tracker = trackers("auto", tmp_path, "run", CONFIG)
        tracker.log(0, {"heldout/mixed": value})
        tracker.log(1, {"loss": value})
        tracker.close()
    assert tensorboard_values(tmp_path) == {"heldout/mixed": [(0, 5.0)], "loss": [(1, 5.0)]}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_config_values_and_the_end(fakes: Fakes, name: str, tmp_path: Path) -> None:
    tracker = trackers(name, tmp_path, "shop", CONFIG)
    tracker.log(7, {"loss": 2.5, "heldout/mixed": 9.0})
    tracker.close()
    (opened,), (logged,) = fakes.of("init"), fakes.of("log")
    assert opened["project"] == "cprec" and opened["config"] == CONFIG and opened["name"].startswith("shop")
    assert {**logged[""][0], "step": logged.get("step", 7)} == {"loss": 2.5, "heldout/mixed": 9.0, "step": 7}
    assert fakes.calls[-1][0] == "finish"


def test_wandb_draws_over_our_steps(fakes: Fakes, tmp_path: Path) -> None:
    trackers("wandb", tmp_path, "shop", CONFIG).log(7, {"loss": 2.5})
    assert {"": ("*",), "step_metric": "step"} in fakes.of("define_metric")
    (logged,) = fakes.of("log")
    assert logged == {"": ({"loss": 2.5, "step": 7},)}, "no step of wandb's own: those may not go back on a resume"


def test_mlflow_gets_names_that_it_takes(fakes: Fakes, tmp_path: Path) -> None:
    tracker = trackers("mlflow", tmp_path, "shop", CONFIG | {"long": "x" * 900})
    tracker.log(7, {"heldout/books (specific)": 9.0})
    tracker.close()
    (parameters,) = fakes.of("log_params")
    assert parameters[""][0]["learning_rate"] == "0.001" and len(parameters[""][0]["long"]) == 500
    assert fakes.of("log_metrics") == [{"": ({"heldout/books specific": 9.0},), "step": 7}]
    assert [name for name, _ in fakes.calls] == ["set_experiment", "start_run", "log_params", "log_metrics", "end_run"]


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name"), ("mlflow", "run_id")])
def test_a_resumed_run_is_the_same_run_and_a_new_one_is_another(
    fakes: Fakes, name: str, key: str, tmp_path: Path
) -> None:
    opening = "start_run" if name == "mlflow" else "init"
    trackers(name, tmp_path, "shop", CONFIG).close()
    kept = json.loads((tmp_path / IDS).read_text())[name]
    trackers(name, tmp_path, "shop", CONFIG, step=5).close()
    assert fakes.of(opening)[-1][key] == kept
    assert name == "mlflow" or fakes.of(opening)[-1]["resume"] == "allow"
    assert len(fakes.of("log_params")) == (1 if name == "mlflow" else 0), "MLflow refuses settings given twice"
    trackers(name, tmp_path, "shop", CONFIG).close()
    assert json.loads((tmp_path / IDS).read_text())[name] != kept


def test_several_at_once_and_one_that_fails_does_not_stop_the_others(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError("no route to host")

    tracker = trackers(("mlflow", "trackio"), tmp_path, "shop", CONFIG)
    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", refuse)
    tracker.log(1, {"loss": 3.0})
    tracker.log(2, {"loss": 2.0})
    tracker.close()
    assert [logged["step"] for logged in fakes.of("log")] == [1, 2]
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == ["warning: mlflow failed (OSError: no route to host); nothing more is reported there"]


def test_other_processes_than_the_first_report_nothing(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    tracker = trackers("tensorboard,wandb", tmp_path / "out", "shop", CONFIG)
    tracker.log(1, {"loss": 3.0})
    tracker.close()
    assert fakes.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", tuple(TRACKERS))
def test_what_is_missing_is_named_with_what_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=f"report_to={name}.*pip install {name}.*report_to=none"):
        trackers(name, tmp_path, "shop", CONFIG)


def test_a_service_that_cannot_be_reached_is_said_before_training(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**named: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match=r"report_to=wandb could not open a run \(RuntimeError: not logged in\)"):
        trackers("trackio,wandb", tmp_path, "shop", CONFIG)
    assert fakes.calls[-1][0] == "finish", "what was opened before is closed"


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.train.tracking.find_spec", lambda name: None)
    assert places("auto") == ()
    monkeypatch.setattr("cprec.train.tracking.find_spec", lambda name: name)
    assert places(["auto"]) == ("tensorboard",)


@pytest.mark.parametrize("wrong", ["wandbb", "auto,wandb", ("none", "mlflow"), "all"])
def test_wrong_names_are_refused_with_what_is_accepted(wrong: Any) -> None:
    with pytest.raises(
        ConfigError, match="report_to=.*: give auto or none alone, or one or more of tensorboard, wandb"
    ):
        places(wrong)


def test_only_numbers_are_reported() -> None:
    record = {"step": 3, "loss": 2, "done": True, "consumed": "00", "mfu": None, "grad_norm": math.inf}
    assert values_of(record | {"mixture": {"books (specific)": 0.5}}) == {"loss": 2.0, "mixture/books (specific)": 0.5}
