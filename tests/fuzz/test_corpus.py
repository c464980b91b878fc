"""Replays what the fuzzing of `fuzz_lines.py` found worth keeping; it needs no fuzzer."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

FUZZ = runpy.run_path(str(Path(__file__).with_name("fuzz_lines.py")))


def test_every_input_of_the_corpus_passes_its_check() -> None:
    seen: Counter[str] = Counter()
    for data in FUZZ["corpus"]():
        try:
            FUZZ["check"](data)
        except BaseException as error:
            error.add_note(f"input: {data!r}")
            raise
        seen[chr(data[0]) if data else ""] += 1
    assert set(seen) >= set(FUZZ["CHECKS"]), "each check has an input"
