"""`cprec report`: which runs a folder holds, and the page that is written there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cprec.errors import ConfigError
from cprec.report import PAGE, training_report, training_runs


def write_run(folder: Path, loss: float, *, stage: str = "") -> None:
    folder.mkdir(parents=True)
    lines = [{"step": 1, "tokens": 100, "loss": 9.0}, {"step": 2, "tokens": 200, "loss": loss}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tok')
    if stage:
        (folder / "cprec.json").write_text(json.dumps({"stage": stage, "seconds": 61.0, "num_parameters": 1_000_000}))


def test_a_run_is_named_by_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "shop", 1.25, stage="pretrain")
    page = training_report(tmp_path / "shop")
    assert page == tmp_path / "shop" / PAGE
    assert "<h2>shop</h2>" in page.read_text() and "1.250" in page.read_text()
    out, err = capsys.readouterr()
    assert "1.250" in out and "1:01" in out and f"wrote {page}" in err


def test_all_runs_below_a_folder_with_pretraining_first(tmp_path: Path) -> None:
    write_run(tmp_path / "finetune" / "books" / "cprec-style", 2.0)
    write_run(tmp_path / "pretrain", 3.0, stage="pretrain")
    write_run(tmp_path / "finetune" / "books" / "plain", 4.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text('{"step": 0}\n[1, 2]\n')
    runs = training_runs(tmp_path)
    assert [run.name for run in runs] == ["pretrain", "finetune/books/cprec-style", "finetune/books/plain"]
    assert [run.last("loss") for run in runs] == [3.0, 2.0, 4.0]
    assert [bool(run.about) for run in runs] == [True, False, False]


def test_a_run_under_way_may_be_looked_at(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2.0)
    assert "not finished" in training_report(tmp_path / "run").read_text()


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no training run \(log.jsonl with a line or more\): give the output"):
        training_report(tmp_path)
    assert not list(tmp_path.iterdir())
