"""A small world for systems: a ring of items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cprec.data.splits import Split
from cprec.systems.signals import TrainingSequences


@pytest.fixture(scope="session")
def split(ring: Split) -> Split:
    return ring


@pytest.fixture(scope="session")
def data(split: Split) -> TrainingSequences:
    return TrainingSequences.of(split, "ring")


@pytest.fixture
def circle(data: TrainingSequences, tmp_path: Path) -> str:
    """A file of vectors of the ring's items on a circle, so that neighbours in the ring are alike."""
    angle = 2 * np.pi * np.arange(data.num_items) / data.num_items
    ids, vectors = np.array(data.item_ids), np.stack([np.cos(angle), np.sin(angle)], 1)
    np.savez(tmp_path / "circle.npz", item_id=ids, vectors=vectors)
    return str(tmp_path / "circle.npz")
