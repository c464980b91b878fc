"""Every path of the study on a generated world, by its command; started again, it does nothing anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def study(output: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.study", "--small", "--output", str(output), *arguments]
    environment = {**os.environ, "CPREC_PROGRESS": "plain"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_small_study_answers_every_question_that_has_arms(tmp_path: Path) -> None:
    told = study(tmp_path, "--seeds", "0", "--dry-run")
    assert "no mixed" in told and not (tmp_path / "models").exists(), "nothing is trained"
    study(tmp_path, "--seeds", "0")
    study(tmp_path, "--seeds", "0,1", "--arms", "no annealing")
    page = (tmp_path / "docs" / "study.md").read_text()
    sections = page.split("\n## ")
    assert [part[0] for part in sections if "Not run yet" in part] == ["7", "8"]
    means = pq.read_table(tmp_path / "docs" / "study" / "means.parquet").to_pylist()
    pooled = {line["arm"] for line in means if line["num_seeds"] == 2}
    assert pooled == {"no annealing"}, "the arm that has two seeds"
    assert all(0 <= line["low"] <= line["high"] and line["num_queries"] == 30 for line in means if line["seed"] == 0)
    again = study(tmp_path, "--seeds", "0")
    assert "[" not in again.partition("at 8,000")[2], "every job is done"
    assert (tmp_path / "docs" / "study.md").read_text() == page
