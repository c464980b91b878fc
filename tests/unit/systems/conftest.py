"""A small world for systems: a ring of items."""

from __future__ import annotations

import pyarrow as pa
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec
from cprec.data.dataset import read_dataset
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import Split, make_split
from cprec.systems.signals import TrainingSequences

NUM_ITEMS = 12


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """After item n comes item n + 1, round and round, from a start of each user's own."""
    events = [(f"u{user:02}", (user + n) % NUM_ITEMS, n) for user in range(90) for n in range(4 + user % 9)]
    items = pa.table({"item_id": [f"i{n:02}" for n in range(NUM_ITEMS)], "title": [f"thing {n}" for n in range(12)]})
    log = pa.table(
        {
            "user_id": [user for user, _, _ in events],
            "item_id": [f"i{item:02}" for _, item, _ in events],
            "timestamp": [time for _, _, time in events],
        }
    )
    folder = tmp_path_factory.mktemp("ring") / "data"
    build_dataset([MemorySource("ring", "p", items, log)], folder, Rules(k_core=0))
    return make_split(*read_dataset(folder), SplitSpec())


@pytest.fixture(scope="session")
def data(split: Split) -> TrainingSequences:
    return TrainingSequences.of(split, "ring")
