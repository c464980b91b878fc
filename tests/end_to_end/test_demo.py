"""The demo's recipe by the real command line, made tiny; the quick suite walks the same road as the README shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cprec.cli import main

pytestmark = pytest.mark.slow

TINY = [
    "prepare.synthetic.num_market_users=200",
    "prepare.synthetic.num_library_users=150",
    "prepare.synthetic.items_per_domain=60",
    "prepare.vocabulary_size=600",
    "prepare.heldout_share=0.05",
    "pretrain.num_train_epochs=0.3",
    "pretrain.tiny.hidden_size=32",
    "pretrain.tiny.num_hidden_layers=1",
    "finetune.num_train_epochs=0.3",
    "finetune.tiny.hidden_size=32",
    "finetune.tiny.num_hidden_layers=1",
    "blend.max_queries=40",
    "evaluate.max_queries=40",
]
BASELINES = {"random", "popularity", "titles", "transition graph", "transition graph (titles)", "EASE"}
MODELS = {name + row for name in ("fine-tuning only", "CPRec-style") for row in ("", " blend")}
ARMS = BASELINES | MODELS | {"blend without the model", "oracle"}


Demo = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """By a process of its own, as people start it."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "CPREC_PROGRESS": "plain"}
    command = [sys.executable, "-m", "cprec", "demo", *TINY]
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cprec(demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in this process, in the demo's folder: nothing is imported again."""
    monkeypatch.chdir(demo[0])

    def answer(*arguments: str) -> Answer:
        return Answer(main(arguments), *capsys.readouterr())

    return answer


def test_demo_runs_and_reports_every_arm_with_intervals(demo: Demo) -> None:
    folder, result = demo
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "runs/demo/report.json").read_text())
    assert set(report["domains"]) == {"kitchen", "books"}
    assert [report["domains"][domain]["unseen"] for domain in ("kitchen", "books")] == [False, True]
    for domain in report["domains"].values():
        assert set(domain["arms"]) == ARMS
        for arm in domain["arms"].values():
            assert arm["num_queries"] == 40
            for metric in ("ndcg@10", "recall@10"):
                assert 0 <= arm[metric]["low"] <= arm[metric]["mean"] <= arm[metric]["high"] <= 1
    assert "all items at once by the item head" in report["protocol"]["language models"]
    assert report["certificate"]["clean"] and not report["certificate"]["uncertified"]
    assert "<html" in (folder / "runs/demo/report.html").read_text()
    for word in ("CPRec-style", "oracle", "kitchen", "books", "95 %"):
        assert word in result.stdout


def test_second_demo_reuses_what_is_complete_and_says_so(demo: Demo, cprec: Callable[..., Answer]) -> None:
    folder, _ = demo
    before = json.loads((folder / "runs/demo/report.json").read_text())
    again = cprec("demo", *TINY)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("reused") >= 6  # data, pre-training and four fine-tuned models, then the rankings
    assert json.loads((folder / "runs/demo/report.json").read_text()) == before


def test_other_settings_in_the_same_folder_are_refused(cprec: Callable[..., Answer]) -> None:
    result = cprec("demo", *TINY, "pretrain.learning_rate=1e-3")
    assert result.returncode == 2
    assert "learning_rate was 0.003, now 0.001" in result.stderr
    assert "choose another output_dir or delete it" in result.stderr


def test_recommend_by_title_and_by_unknown_title(demo: Demo, cprec: Callable[..., Answer]) -> None:
    folder, _ = demo
    model = "runs/demo/finetune/kitchen/cprec-style"
    items = json.loads((folder / "runs/demo/data/dataset.json").read_text())
    assert items["domains"]
    import pyarrow.parquet as pq

    titles = pq.read_table(folder / "runs/demo/data/items/domain=kitchen")["title"].to_pylist()[:2]
    result = cprec("recommend", model, "--history", *titles, "--k", "3")
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if line.strip()]) == 4  # a header and three items
    assert not any(title in result.stdout for title in titles)
    unknown = cprec("recommend", model, "--history", "Solid Gold Teapot of Kings")
    assert unknown.returncode == 1 and "nearest" in unknown.stderr
    many = cprec("recommend", model, "--history", titles[0], "--k", "1000")
    assert many.returncode == 2 and "59 items outside this history" in many.stderr


def test_a_model_without_a_covering_certificate_is_refused(demo: Demo, cprec: Callable[..., Answer]) -> None:
    folder, _ = demo
    path = folder / "runs/demo/data/certificate.json"
    kept = path.read_text()
    certificate = json.loads(kept)
    certificate["artifacts"]["shards/train"] = "0" * 64
    try:
        path.write_text(json.dumps(certificate))
        refused = cprec("demo", *TINY)
        assert refused.returncode == 1
        assert "does not cover the data that CPRec-style, CPRec-style blend was trained on" in refused.stderr
        allowed = cprec("demo", *TINY, "evaluate.uncertified=true")
        assert allowed.returncode == 0 and "uncertified" in allowed.stdout.lower()
    finally:
        path.write_text(kept)
