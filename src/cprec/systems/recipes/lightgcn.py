"""LightGCN: vectors of users and items, smoothed over the graph of who had what (He et al. 2020, equations 3 and 4).

It knows no order: what a user had lately counts as much as the rest. Deviations from paper and code: there is no
penalty on the vectors' squares, and negatives may be items of the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cprec.choices import Choice, OneOf, Real, Whole
from cprec.systems.dot_product import GraphModel
from cprec.systems.fit import NEXT_ITEM, NextItemSettings, Stage
from cprec.systems.graph import UserItemGraph
from cprec.systems.items import IdTable
from cprec.systems.signals import TrainingSequences, UserItemStream
from cprec.systems.terms import Objective


@dataclass(frozen=True, kw_only=True)
class GraphSettings(NextItemSettings):
    """Settings of systems that smooth vectors over the graph of users and items."""

    objective: Objective = "sampled_softmax"
    num_negatives: int = 2048
    hidden_size: int = 64
    dropout: float = 0.0
    learning_rate: float = 5e-3
    batch_size: int = 4096
    num_epochs: float = 30
    max_length: int = 1000
    num_layers: int = 2
    """Smoothing steps."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128)),
        "learning_rate": Real(low=1e-3, high=2e-2, log=True),
        "num_layers": Whole(low=1, high=4),
        "num_epochs": OneOf(values=(10, 30, 60)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_layers")


@dataclass(frozen=True, kw_only=True)
class LightGCN(GraphSettings):
    """Settings of LightGCN; the defaults are ours: cross-entropy against shared negatives, which needs far fewer passes
    than pairs."""

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        users = IdTable(len(data.users), self.hidden_size, num_special=0)
        items = IdTable(data.num_items, self.hidden_size, num_special=0)
        for table in (users, items):
            nn.init.normal_(table.table.weight, std=0.1)
        graph = UserItemGraph(data.sequences, data.num_items)
        model = GraphModel(users, items, graph, self.num_layers)
        stream = UserItemStream(data, [NEXT_ITEM], self.passes(seed))
        return [self.stage(data, model, self.next_item(), stream)]


PUBLISHED = LightGCN(
    objective="bpr",
    num_negatives=1,
    num_layers=3,
    learning_rate=1e-3,
    batch_size=2048,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""LightGCN as first published: pairs with one negative (BPR), three layers, learning rate 1e-3, batches of 2,048; 200
passes for 1,000."""
