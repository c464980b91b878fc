"""A small world for systems: a ring of items."""

from __future__ import annotations

import pytest

from cprec.data.splits import Split
from cprec.systems.signals import TrainingSequences


@pytest.fixture(scope="session")
def split(ring: Split) -> Split:
    return ring


@pytest.fixture(scope="session")
def data(split: Split) -> TrainingSequences:
    return TrainingSequences.of(split, "ring")
