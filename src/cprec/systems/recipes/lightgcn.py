"""NGCF and LightGCN: vectors of users and items, smoothed over the graph of who had what.

In each step NGCF adds up the neighbours' vectors and their products with the own one, both mapped by matrices, and sets
the vectors of all steps side by side (Wang et al. 2019, equations 3 to 9). LightGCN is the special case without
matrices, products and dropout, with the mean over the steps (He et al. 2020, equations 3 and 4). Neither knows order:
what a user had lately counts as much as the rest.

Where they differ NGCF follows its paper (the code divides by the degree of the reader alone, counts each as its own
neighbour in both sums, has biases and two activations, and scales the vectors of each step to length one), but message
dropout leaves out entries of the new vectors, as in the code. Deviations of all settings: there is no penalty on the
vectors' squares, and negatives may be items of the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cprec.choices import Choice, Real
from cprec.errors import ConfigError
from cprec.systems.batches import UserItemStream
from cprec.systems.dot_product import GraphModel
from cprec.systems.graph import Step, UserItemGraph
from cprec.systems.items import IdTable
from cprec.systems.settings import GraphSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage


@dataclass(frozen=True, kw_only=True)
class NGCF(GraphSettings):
    """Settings of NGCF; the defaults are ours: cross-entropy against shared negatives, which needs far fewer passes
    than pairs."""

    dropout: float = 0.1
    weights: bool = True
    """Each step maps messages by matrices of its own, and its vectors stand beside those of the others; without, the
    mean is taken."""
    product: bool = True
    """A message holds the product of both vectors, too."""
    node_dropout: float = 0.0
    """Share of users and items that send no message in a step of training."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**GraphSettings.SEARCH, "dropout": Real(low=0.05, high=0.5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.node_dropout < 1:
            raise ConfigError(f"node_dropout={self.node_dropout} must lie in 0..1, 1 left out")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        users = IdTable(len(data.users), self.hidden_size, num_special=0)
        items = IdTable(data.num_items, self.hidden_size, num_special=0)
        for table in (users, items):
            nn.init.normal_(table.table.weight, std=0.1)
        steps = [
            Step(self.hidden_size, weights=self.weights, product=self.product, dropout=self.dropout)
            for _ in range(self.num_layers)
        ]
        graph = UserItemGraph(data.sequences, data.num_items, self.node_dropout)
        model = GraphModel(users, items, graph, steps, side_by_side=self.weights)
        stream = UserItemStream(data, [NEXT_ITEM], self.passes(seed))
        return [self.stage(data, model, self.next_item(), stream)]


@dataclass(frozen=True, kw_only=True)
class LightGCN(NGCF):
    """Settings of LightGCN; the defaults are ours, as those of NGCF."""

    dropout: float = 0.0
    weights: bool = False
    product: bool = False


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
PUBLISHED_NGCF = NGCF(
    objective="bpr",
    num_negatives=1,
    num_layers=3,
    learning_rate=1e-4,
    batch_size=1024,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""NGCF as its code has it for Gowalla: BPR, three layers, message dropout 0.1; 200 passes for 400."""
