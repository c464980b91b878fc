"""A small world for systems: a ring of items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec
from cprec.data.interactions import Interactions
from cprec.data.ragged import Ragged
from cprec.data.splits import Split, make_split
from cprec.schema import DomainInfo
from cprec.systems.indexing import numbers_along
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


@pytest.fixture(scope="session")
def split_of(split_of_rows: Callable[..., Split]) -> Callable[..., Split]:
    """The split of a log whose users had some of so many items, of the domain `tiny`."""

    def make(histories: Sequence[Sequence[int]], num_items: int) -> Split:
        rows = [(f"u{user}", item, time) for user, row in enumerate(histories) for time, item in enumerate(row)]
        return split_of_rows("tiny", [f"i{number}" for number in range(num_items)], rows)

    return make


@pytest.fixture(scope="session")
def shop() -> Split:
    """A shop with thirty kinds of things: each user has six of one or two kinds, and nearly all are rare."""
    generator, num_users, num_things = np.random.default_rng(3), 150, 900
    names = [f"t{n:03}" for n in range(num_things)]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": names, "title": names})})
    histories = []
    for _ in range(num_users):
        of_kinds = [np.arange(kind, num_things, 30) for kind in generator.choice(30, 2)]
        histories.append(generator.permutation(np.unique(np.concatenate(of_kinds)))[:6])
    log = Interactions(
        platforms=("p",),
        user_platform=np.zeros(num_users, dtype=np.int16),
        user_id=np.array([f"u{n:03}" for n in range(num_users)], dtype=object),
        user=np.repeat(np.arange(num_users), 6),
        item=np.concatenate(histories),
        time=np.tile(np.arange(6), num_users),
        rating=np.full(6 * num_users, np.nan),
    )
    return make_split(catalogue, log, {"shop": DomainInfo("shop", "p", True)}, SplitSpec())


@pytest.fixture(scope="session")
def shopped(shop: Split) -> TrainingSequences:
    return TrainingSequences.of(shop, "shop")


@pytest.fixture(scope="session")
def along_whole_histories(shop: Split) -> np.ndarray:
    """The well-known leak: each user's items are numbered, one user after the other, with those that are held out."""
    return numbers_along(Ragged.of([shop.interactions.item]), len(shop.catalogue), np.random.default_rng(0))
