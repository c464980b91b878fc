"""How a model represents an item: by a trained vector of its own, a frozen vector through an adapter, or a sum of rows.

Items are numbered as they stand in their domain's part of the catalogue, 0 to V - 1; the numbers from V on are special
rows (padding, mask) that histories hold and nobody recommends. Suffixes: V items, S special rows, X both, D width, L
shared rows of an item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from cprec.errors import ConfigError
from cprec.files import whole_file

PADDING, MASK = 0, 1
"""Special rows: item number V + PADDING fills rows up, V + MASK stands for an item to be guessed."""
NUM_SPECIAL = 2


class ItemTable(nn.Module, ABC):
    """A vector for each item, and for each special row after them."""

    num_items: int
    num_special: int

    @abstractmethod
    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        """The vectors of some items, by number, or of all: [..., D] or [V + S, D]."""

    def given(self) -> torch.Tensor:
        """What the table was made of and does not train: [V, F]; F is 0 where it was made of nothing."""
        return torch.empty(self.num_items, 0)


class IdTable(ItemTable):
    """Trained vectors."""

    def __init__(self, num_items: int, size: int, num_special: int = NUM_SPECIAL) -> None:
        super().__init__()
        self.num_items, self.num_special = num_items, num_special
        self.table = nn.Embedding(num_items + num_special, size)

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.table.weight
        return weight if items is None else nn.functional.embedding(items, weight)


class FrozenTable(ItemTable):
    """Given vectors, which stay as they are, through an adapter, which is trained; special rows are zeros.

    With `rows`, their width, each item has a trained row beside it, which starts at zero and is added.
    """

    def __init__(
        self, vectors_VD: np.ndarray, adapter: nn.Module, num_special: int = NUM_SPECIAL, rows: int | None = None
    ) -> None:
        super().__init__()
        self.num_items, self.num_special = len(vectors_VD), num_special
        padded = np.concatenate([vectors_VD, np.zeros((num_special, vectors_VD.shape[1]))])
        self.register_buffer("frozen", torch.from_numpy(padded.astype(np.float32)), persistent=False)
        self.adapter = adapter
        self.rows = None if rows is None else nn.Parameter(torch.zeros(len(padded), rows))

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        frozen, rows = self.get_buffer("frozen"), self.rows
        adapted: torch.Tensor = self.adapter(frozen if items is None else frozen[items])
        if rows is not None:
            adapted = adapted + (rows if items is None else nn.functional.embedding(items, rows))
        return adapted

    def given(self) -> torch.Tensor:
        return self.get_buffer("frozen")[: self.num_items]

    def fill(self, vectors_VF: np.ndarray) -> None:
        """Take other vectors, of the same width, in place of those that the table was made with."""
        self.get_buffer("frozen")[: self.num_items] = torch.from_numpy(vectors_VF)


class SumTable(ItemTable):
    """Sums of trained rows: an item's own row, and rows that other items share with it, such as those of its codes."""

    def __init__(self, own: IdTable, row_VL: np.ndarray) -> None:
        """`own` may hold the special rows alone, `IdTable(0, D)`: then items are what they share. `row_VL` has the
        numbers of the shared rows of each item, from 0; -1 fills up."""
        super().__init__()
        self.num_items, self.num_special, self.own = len(row_VL), own.num_special, own
        fill = int(row_VL.max()) + 1
        row_XL = np.pad(np.where(row_VL < 0, fill, row_VL), ((0, own.num_special), (0, 0)), constant_values=fill)
        self.register_buffer("row_XL", torch.from_numpy(row_XL), persistent=False)
        self.shared = nn.EmbeddingBag(fill + 1, own.table.embedding_dim, mode="sum", padding_idx=fill)

    def parts(self, items: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Own rows and sums of shared rows, of some items, by number, or of all: [..., D] or [V + S, D] each. What an
        item does not have is zero."""
        own, row = self.own.vectors(), self.get_buffer("row_XL")
        if not self.own.num_items:
            own = nn.functional.pad(own, (0, 0, self.num_items, 0))
        if items is not None:
            own, row = nn.functional.embedding(items, own), row[items]
        return own, self.shared(row.flatten(0, -2)).view_as(own)

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        own, shared = self.parts(items)
        return own + shared


def two_layers(width: int, size: int) -> nn.Sequential:
    """An adapter before training: two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.Linear(size, size))


class TablesTogether(ItemTable):
    """Sums of the vectors of several tables, each of which says something else of the same items."""

    def __init__(self, tables: Sequence[ItemTable]) -> None:
        super().__init__()
        self.num_items, self.num_special = tables[0].num_items, tables[0].num_special
        self.tables = nn.ModuleList(tables)

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        return torch.stack([cast(ItemTable, table).vectors(items) for table in self.tables]).sum(0)


def write_vectors(path: str | Path, item_ids: Sequence[str], vectors_VD: np.ndarray) -> None:
    """Write vectors of items, float[V, D] in the order of `item_ids`, as `read_vectors` reads them."""
    with whole_file(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, item_id=np.array(item_ids), vectors=vectors_VD)


def read_vectors(path: str | Path, item_ids: Sequence[str]) -> np.ndarray:
    """Vectors of items from an `.npz` file with `item_id` and `vectors`, in the order of `item_ids`: float32[V, D].

    Raises ConfigError for a file that holds something else or vectors of no width, or lacks an item.
    """
    try:
        with np.load(path) as file:
            row_of = {str(item): row for row, item in enumerate(file["item_id"].tolist())}
            vectors, num_ids = file["vectors"].astype(np.float32), len(file["item_id"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"vectors={path} is not an .npz file with item_id and vectors ({error})") from None
    if vectors.ndim != 2 or len(vectors) != num_ids or not vectors.shape[1]:
        raise ConfigError(
            f"vectors={path} holds {num_ids:,} item_id and vectors of shape {list(vectors.shape)}: expected a row of "
            "one or more numbers for each item_id, all rows of one width"
        )
    if missing := [item for item in item_ids if item not in row_of]:
        raise ConfigError(f"vectors={path} has no vector of {len(missing):,} items, {missing[0]!r} among them")
    if not np.isfinite(vectors).all():
        raise ConfigError(f"vectors={path} holds values that are not finite")
    found: np.ndarray = vectors[[row_of[item] for item in item_ids]]
    return found
