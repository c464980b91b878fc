"""The command line with stages of these tests: what reaches a stage, exit codes, messages, help."""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cprec import __version__, cli, config, verbs
from cprec.errors import ConfigError, TrainingError
from cprec.progress import say


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """Settings of every stage here."""

    output_dir: str
    """Where the results go."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class FakeRecommendConfig:
    """Settings of recommend."""

    model: str
    history: tuple[str, ...] = ()
    domain: str | None = None
    k: int = 10
    input: str | None = None
    output: str | None = None
    beam: int = 4
    """Beams."""


@dataclass(frozen=True, kw_only=True)
class FakeServeConfig:
    """Settings of serve."""

    models: tuple[str, ...]
    data: str | None = None
    port: int = 8080
    """Port."""

    def check(self) -> None:
        if self.port == 1:
            raise ConfigError("port=1: not here")


calls: list[tuple[Any, ...]] = []
failures: list[BaseException] = []


certificate: dict[str, Any] = {"clean": True}
"""What audit returns here; the other stages return it too, and nobody looks at it."""


def stage(path: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    calls.append((path, *arguments, *([options] if options else [])))
    if failures:
        raise failures.pop()
    return certificate


def fake(*, data: Path, seed: int = 0) -> config.Recipe:
    """A recipe of these tests.

    And what else there is to say.
    """
    stages: Any = {name: FakeConfig(output_dir=f"{data}/{name}", seed=seed) for name in STAGES}
    return config.Recipe(name="fake", description="for tests", **stages)


def demo() -> config.Recipe:
    """The demo of these tests."""
    return fake(data=Path("demo"))


STAGES = ("prepare", "pretrain", "finetune", "evaluate")
FUNCTIONS = {verb.name: verb.function for verb in verbs.VERBS}


@pytest.fixture(autouse=True)
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    failures.clear()
    stages = dict.fromkeys((*STAGES, "anneal", "blend", "refit", "tune", "fit", "shrink", "distil"), FakeConfig)
    stages |= {"recommend": FakeRecommendConfig, "serve": FakeServeConfig}
    monkeypatch.setattr(config, "STAGE_CONFIGS", stages)
    monkeypatch.setattr(config, "RECIPES", {"fake": fake, "demo": demo})
    monkeypatch.setattr(verbs, "load", lambda path: functools.partial(stage, path))
    monkeypatch.setattr(verbs.Verb, "require_folders", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_character_can_be_written_to_any_console(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    from rich.console import Console
    from rich.table import Table

    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}

    def talk(_: object) -> None:
        table = Table("№ 苹果")
        table.add_row("✓ → \udce9")
        Console().print(table)
        print("苹果")
        say("… → 苹果")
        warnings.simplefilter("always")
        warnings.warn_explicit("苹果 → ≥", UserWarning, cli.__file__, 1)
        raise TrainingError("苹果: loss → ∞")

    monkeypatch.setattr(verbs, "load", lambda path: talk)
    monkeypatch.setenv("CPREC_PROGRESS", "plain")
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert cli.main(["prepare", "fake", "data=x"]) == cli.EXIT_ERROR
    for stream in streams.values():
        stream.flush()
        assert r"\u82f9\u679c" in stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a call that only prints prints."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", STAGES)
def test_a_stage_gets_its_resolved_configuration(verb: str) -> None:
    assert cli.main([verb, "fake", "data=logs", "seed=3", f"{verb}.output_dir=x"]) == 0
    assert calls == [(FUNCTIONS[verb], FakeConfig(output_dir="x", seed=3))]


def test_run_and_demo_get_the_whole_recipe() -> None:
    assert cli.main(["run", "fake", "data=logs", "finetune.seed=3"]) == 0
    assert cli.main(["demo", "finetune.seed=4"]) == 0
    (ran, of_run), (demonstrated, of_demo) = calls
    assert ran == demonstrated == "cprec.run:run"
    assert of_run.finetune == FakeConfig(output_dir="logs/finetune", seed=3)
    assert of_demo.finetune == FakeConfig(output_dir="demo/finetune", seed=4)


def test_a_stage_runs_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("output_dir: runs/mine\nseed: 5\n")
    assert cli.main(["pretrain", str(path), "seed=6"]) == 0
    assert calls == [(FUNCTIONS["pretrain"], FakeConfig(output_dir="runs/mine", seed=6))]


def test_recommend_for_a_history_on_the_command_line() -> None:
    assert cli.main(["recommend", "model", "--history", "Red car, small", "b", "--k", "3", "beam=8"]) == 0
    assert cli.main(["recommend", "model", "beam=8", "--domain", "toys", "--history", "a=b", "--history", "c"]) == 0
    (path, first), (_, second) = calls
    assert path == "cprec.serving:open_and_recommend"
    assert first == FakeRecommendConfig(model="model", history=("Red car, small", "b"), k=3, beam=8)
    assert second == FakeRecommendConfig(model="model", history=("a=b", "c"), domain="toys", beam=8)


def test_recommend_for_a_file() -> None:
    assert cli.main(["recommend", "model", "--input", "in.csv", "--output", "out.parquet"]) == 0
    assert calls[0][1] == FakeRecommendConfig(model="model", input="in.csv", output="out.parquet")


def test_serve_gets_the_models_among_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "a/x", "port=9", "b/x"]) == 0
    assert calls == [("cprec.serving:open_and_serve", FakeServeConfig(models=("a/x", "b/x"), port=9))]
    assert cli.main(["serve", "a/x", "port=1"]) == 2
    assert "port=1: not here" in capsys.readouterr().err
    assert len(calls) == 1


def test_fit_tells_files_from_the_folder_and_settings_change_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "a.csv", "minutes=3", "b.csv.gz", "out", "interactions.separator=;"]) == 0
    assert cli.main(["fit", "a.parquet", "columns.user_id=who"]) == 0
    (path, first), (_, second) = calls
    assert path == "cprec.fit.fit:fit" and (first.minutes, first.output_dir) == (3, "out")
    assert first.items == ("b.csv.gz",) and (first.interactions.path, first.interactions.separator) == (("a.csv",), ";")
    assert (second.items, second.columns, second.output_dir) == (None, {"user_id": "who"}, "runs/fit")
    for words in (["out"], ["a.csv", "b.csv", "c.csv"], ["a.csv", "x", "y"]):
        assert cli.main(["fit", *words]) == 2
        assert "the log, the items and the folder" in capsys.readouterr().err
    assert len(calls) == 2


def test_demo_may_end_in_a_service() -> None:
    assert cli.main(["demo"]) == cli.main(["demo", "--serve"]) == 0
    assert calls == [(path, demo()) for path in ("cprec.run:run", "cprec.run:run", "cprec.serving:serve_demo")]


def test_audit_gets_a_folder(tmp_path: Path) -> None:
    assert cli.main(["audit", str(tmp_path)]) == 0
    assert calls == [(FUNCTIONS["audit"], tmp_path)]


def test_audit_of_shortcuts(tmp_path: Path) -> None:
    assert cli.main(["audit", str(tmp_path), "--shortcuts"]) == 0
    words = ["--domain", "books", "toys", "--model", "a", "--model", "b", "--max-queries", "50"]
    assert cli.main(["audit", "--shortcuts", str(tmp_path), *words]) == 0
    given = {"domains": ["books", "toys"], "models": ["a", "b"], "max_queries": 50}
    path = "cprec.shortcuts:audit_shortcuts"
    assert calls == [(path, tmp_path), (path, tmp_path, given)]


def test_compare_gets_folders_and_what_was_chosen() -> None:
    assert cli.main(["compare", "a", "b", "--domain", "books", "--metric", "recall@5", "--force"]) == 0
    given = {"domains": ("books",), "force": True, "metric": "recall@5"}
    assert calls == [("cprec.evaluate.compare:compare", ["a", "b"], given)]


def test_report_gets_a_folder() -> None:
    assert cli.main(["report", "runs/demo"]) == 0
    assert calls == [("cprec.report:training_report", "runs/demo")]


@pytest.mark.parametrize("words", ["data recbole out", "data recbole --output out", "--output out data recbole"])
def test_export_gets_a_folder_a_format_and_where_to_write(words: str) -> None:
    assert cli.main(["export", *words.split(), "--domain", "books", "toys", "--domain", "films"]) == 0
    assert calls == [(FUNCTIONS["export"], "data", "recbole", "out", ("books", "toys", "films"))]


def test_export_names_its_folder_itself() -> None:
    assert cli.main(["export", "data", "text"]) == 0
    assert calls == [(FUNCTIONS["export"], "data", "text", None, ())]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prepare", "the following arguments are required: RECIPE_OR_YAML; see cprec prepare --help"),
        ("prepare fake", "fake needs data=FOLDER"),
        ("prepare fake data=x sead=1", "FakeConfig has no field 'sead'; did you mean 'seed'?"),
        ("prepare fake data=x seed=-1", "seed=-1: must not be negative"),
        ("prepare fake data=x --seed 1", "there is no option --seed; settings have no dashes, as in seed=VALUE"),
        ("prepare fake data=x seed", "'seed' is not a setting; write key=value"),
        ("prepare fkae", "there is no recipe 'fkae'; did you mean 'fake'?"),
        ("prepare none.yaml", "none.yaml does not exist"),
        ("prapare fake", "invalid choice: 'prapare'"),
        ("recommend model --k many", "k=many: expected a whole number"),
        ("audit no/such/folder", "no/such/folder is not a folder"),
        ("audit . x", "x: more than cprec audit takes; see cprec audit --help"),
        ("audit . --model a", "--domain, --model and --max-queries go with --shortcuts"),
        ("audit . --shortcuts --max-queries few", "argument --max-queries: invalid int value: 'few'"),
        ("export data", "the following arguments are required: format; see cprec export --help"),
        ("export data text a b", "b: more than cprec export takes; see cprec export --help"),
        ("export data text a --output b", "two folders to write: a and b; give one"),
    ],
)
def test_a_wrong_command_line_exits_with_2(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("cprec: error: ") and message in err
    assert not calls


def test_no_verb_prints_the_help_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: cprec VERB" in capsys.readouterr().out


def test_a_failure_exits_with_1_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    failures.append(TrainingError("the loss is not finite at step 7"))
    assert cli.main(["pretrain", "fake", "data=x"]) == 1
    assert capsys.readouterr().err == "cprec: error: the loss is not finite at step 7\n"
    failures.append(PermissionError(13, "Permission denied", "/runs"))
    assert cli.main(["pretrain", "fake", "data=x"]) == 1
    assert capsys.readouterr().err == "cprec: error: [Errno 13] Permission denied: '/runs' (--debug shows where)\n"


@pytest.mark.parametrize(("options", "expected"), [([], "cprec: warning: a long history\n"), (["--debug"], None)])
def test_our_warnings_are_one_line(
    options: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*_: object) -> None:
        warnings.simplefilter("always")
        warnings.warn_explicit("a long history", UserWarning, cli.__file__, 1)

    monkeypatch.setattr(verbs, "load", lambda path: warned)
    monkeypatch.setattr(warnings, "showwarning", lambda *_: None)  # where --debug leaves it to Python
    assert cli.main(["pretrain", "fake", "data=x", *options]) == 0
    assert capsys.readouterr().err == (expected or "")


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    failures.append(KeyboardInterrupt())
    assert cli.main(["run", "fake", "data=my logs"]) == 130
    assert capsys.readouterr().err == (
        "\ncprec: interrupted. What is complete is kept; to go on from there: cprec run fake 'data=my logs'\n"
    )


@pytest.mark.parametrize("failure", [TrainingError("no"), ConfigError("no"), KeyboardInterrupt(), OSError("no")])
@pytest.mark.parametrize("arguments", [["--debug", "run", "fake", "data=x"], ["run", "fake", "--debug", "data=x"]])
def test_debug_raises(failure: BaseException, arguments: list[str]) -> None:
    failures.append(failure)
    with pytest.raises(type(failure)):
        cli.main(arguments)


def test_a_mistake_of_ours_is_not_hidden() -> None:
    failures.append(AssertionError("ours"))
    with pytest.raises(AssertionError):
        cli.main(["run", "fake", "data=x"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"cprec {__version__}\n"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    for verb in verbs.VERBS:
        assert f"\n  {verb.name:<10} {verb.summary}\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_of_a_stage_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "finetune", "--help")
    assert text.startswith("usage: cprec finetune RECIPE_OR_YAML [key=value ...]\n\nFine-tunes a model")
    assert text.endswith(
        "needed, from the recipe or from you, as key=value:\n"
        "  output_dir: text\n"
        "      Where the results go.\n"
        "\n"
        "settings, as key=value:\n"
        "  seed: int = 0\n"
        "      Seed of everything random.\n"
        "\n"
        "example: cprec finetune my_recipe.yaml seed=1\n"
    )


def test_help_of_run_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "run", "--help")
    assert "  fake data=FOLDER [seed=0]\n      A recipe of these tests.\n" in text
    assert "  demo\n      The demo of these tests.\n" in text


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_help_fits_the_terminal(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, verb, "--help")
    assert text.startswith(f"usage: cprec {verb}")
    assert max(map(len, text.splitlines())) <= 100


# ---- threads on a busy machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (0.9, {}, {}),
        (1.1, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (2.5, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (2.5, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (None, {}, {}),
    ],
)
def test_waiting_threads_sleep_on_a_busy_machine_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, load: float | None, given: dict[str, str], expected: dict[str, str]
) -> None:
    def getloadavg() -> tuple[float, float, float]:
        if load is None:
            raise OSError
        return load, 0.0, 0.0

    monkeypatch.setattr(os, "getloadavg", getloadavg)
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr("cprec.machine.num_cores", lambda: 4)
    cli.main([])
    assert os.environ == expected
