"""The comparison of histories with walks in its smallest form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.curriculum import main

pytestmark = pytest.mark.slow


def test_the_comparison_prints_losses_entropy_and_laws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--folder", str(tmp_path), "--users", "120", "--items", "20", "--tokens", "64_000", "--budgets", "4"]
    main(small)
    told = capsys.readouterr().out
    alone, mixed = (
        float(re.search(rf"  {name} +(\S+)", told).group(1)) for name in ("histories alone", "histories and walks")
    )  # type: ignore[union-attr]
    entropy, loss = map(float, re.search(r"exact entropy +(\S+)\n +histories and walks +(\S+)\n", told).groups())  # type: ignore[union-attr]
    assert 0 < alone < 3 and 0 < mixed < 3
    # No model is below the entropy, up to the error of the sample; this one has learnt more than how often items occur.
    assert entropy - 0.05 < loss < 2 * entropy
    assert told.count("E = ") == 2 and told.count(" at ") == 8
    main(small)
    assert capsys.readouterr().out == told, "nothing is made again"
