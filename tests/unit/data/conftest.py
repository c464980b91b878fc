from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.interactions import SECOND, Interactions, stable_order
from cprec.schema import DomainInfo

Log = tuple[Catalogue, Interactions, dict[str, DomainInfo]]


@pytest.fixture
def make_log() -> Callable[..., Log]:
    """A log from rows (user, domain, item, time), in source order; all of one platform."""

    def make(rows: Sequence[tuple[str, str, str, int]], timeless: Sequence[str] = ()) -> Log:
        items = {domain: sorted({i for _, d, i, _ in rows if d == domain}) for _, domain, _, _ in rows}
        catalogue = Catalogue.from_tables(
            {
                domain: pa.table({"item_id": ids, "title": [f"title {name}" for name in ids]})
                for domain, ids in items.items()
            }
        )
        users = sorted({user for user, *_ in rows})
        user = np.array([users.index(name) for name, *_ in rows])
        item = np.array([int(catalogue.find(d, [i])[0]) for _, d, i, _ in rows])
        time = np.array([t for *_, t in rows])
        order = stable_order(user, time)
        log = Interactions(
            platforms=("shop",),
            user_platform=np.zeros(len(users), dtype=np.int16),
            user_id=np.array(users, dtype=object),
            user=user[order],
            item=item[order],
            time=time[order] * SECOND,
            rating=np.full(len(rows), np.nan),
        )
        return catalogue, log, {d: DomainInfo(d, "shop", d not in timeless) for d in catalogue.domains}

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a text file and returns its path."""

    def write_text(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_text
