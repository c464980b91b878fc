"""What every test shares: when marked tests are skipped, how Hypothesis runs, and that nothing waits for the disk or
looks through what will never be garbage."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every run; a deadline would be a timed test, and machines differ.
settings.register_profile("cprec", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("cprec")

gc.disable()  # until all tests are collected: what imports make stays


def pytest_collection_finish() -> None:
    gc.freeze()  # collections look at what tests have made, not at each module of PyTorch and transformers
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Waiting for the disk is slow and changes nothing that a test sees; tests of flushing note the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Writes a model folder as `cprec finetune` leaves it; what is given by keyword goes into its `cprec.json`."""

    def write(folder: Path, model: Any, tokenizer: Any, catalogue: Any, **about: Any) -> Path:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        catalogue.write(folder)
        common = {"template": {}, "max_title_tokens": 32, "history": "specific", "max_history": 10}
        (folder / "cprec.json").write_text(json.dumps(common | about))
        return folder

    return write


@pytest.fixture
def real_data() -> Path:
    """The folder of real logs that CPREC_DATA names."""
    return Path(os.environ["CPREC_DATA"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("CPREC_DATA"):
        skip = pytest.mark.skip(reason="needs real logs: set CPREC_DATA to their folder")
        for item in items:
            if item.get_closest_marker("real_data") or "real_data" in getattr(item, "fixturenames", ()):
                item.add_marker(skip)
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in for_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
