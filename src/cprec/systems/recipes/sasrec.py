"""SASRec: self-attention over the latest items of a history (Kang and McAuley 2018).

Each position of a sequence predicts the next item by the product of its state with the items' vectors (their equation
6). Deviations from the paper and its code: positions are counted from the end of a history, and unless `block` and
`attention_dropout` say otherwise blocks normalise before their layers, nothing is dropped out inside attention, and the
feed-forward layers have a GELU.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import nn

from cprec.choices import Choice, OneOf, Real, Whole
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.scoring import StoredRecommender
from cprec.systems.batches import POOL, WindowStream
from cprec.systems.dot_product import DotProductModel, DotProductRecommender, MeanOfNetworks, SequenceModel, mean_of
from cprec.systems.encoders import BlockKind, SelfAttention
from cprec.systems.items import IdTable
from cprec.systems.sampled import SampledItemsLoss
from cprec.systems.settings import NextItemSettings, SystemSettings
from cprec.systems.signals import TrainingSequences, windows
from cprec.systems.stage import NEXT_ITEM, Stage, TrainedRecommender
from cprec.systems.terms import Term, product_dtype

INITIAL = 0.02
"""Standard deviation of vectors before training."""
WEIGHT = "model."
"""Before the name of each weight among stored arrays."""
UNNAMED = {"block": "pre_norm", "attention_dropout": 0.0, "beta2": 0.95, "sorted_batches": POOL, "min_steps": 0}
"""What these were before they were settings: files of earlier versions do not name them."""


@dataclass(frozen=True, kw_only=True)
class SelfAttentionSettings(SystemSettings):
    """Settings of systems that read histories with blocks of self-attention."""

    num_blocks: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Heads; must divide hidden_size."""
    attention_dropout: float = 0.0
    """Share of attention weights left out in training."""
    block: BlockKind = "pre_norm"
    """What blocks normalise and where they drop out; see `encoders.Block`."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**SystemSettings.SEARCH, "num_blocks": Whole(low=1, high=3)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_blocks", "num_heads")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout={self.attention_dropout} must lie in 0..1, 1 left out")
        if self.block not in get_args(BlockKind):
            raise ConfigError(f"block={self.block!r}: expected {' or '.join(get_args(BlockKind))}")

    def parts(self, num_items: int, *, causal: bool = True, time_angles: bool = False) -> tuple[IdTable, SelfAttention]:
        """Item vectors and an encoder before training."""
        items = IdTable(num_items, self.hidden_size)
        encoder = self.encoder(causal=causal, time_angles=time_angles)
        for table in (items.table, encoder.position):
            nn.init.normal_(table.weight, std=INITIAL)
        return items, encoder

    def encoder(self, *, causal: bool = True, span: int = 1, time_angles: bool = False) -> SelfAttention:
        """An encoder before training."""
        sizes = {"max_length": self.max_length, "num_blocks": self.num_blocks, "num_heads": self.num_heads}
        return SelfAttention(
            self.hidden_size,
            **sizes,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            causal=causal,
            block=self.block,
            span=span,
            time_angles=time_angles,
        )


@dataclass(frozen=True, kw_only=True)
class CausalSettings(NextItemSettings, SelfAttentionSettings):
    """Settings of systems in which each position of a sequence predicts the next item, and which can be stored."""

    min_steps: int = 0
    """Optimizer steps at least: where sequences are few, there are as many passes as that takes."""
    sampled_items: int = 0
    """Items drawn in each step that, with those of its rows, stand for all in the objective `softmax`, where the
    catalogue has more than `LARGE` times as many; 0: all items."""
    thinned_rows: float = 0.0
    """Share of a step's rows that lose events at random, so that training sees short histories as well: the masks of
    AW-MoE (Gong et al. 2023), whose contrast of gates is not here. A row keeps any number of its events, two at least,
    and each kept one predicts the next kept one."""
    num_networks: int = 1
    """Networks that are trained apart, each with a seed of its own; their scores are averaged."""

    LARGE: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampled_items < 0:
            raise ConfigError(f"sampled_items={self.sampled_items} must be 0 or more")
        if not 0 <= self.thinned_rows <= 1:
            raise ConfigError(f"thinned_rows={self.thinned_rows} must lie in 0..1: it is a share of rows")
        self.require_positive("num_networks")

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`. No two networks have one seed, nor have those of two seeds."""
        one, first = replace(self, num_networks=1), seed * self.num_networks
        networks, seconds = [], 0.0
        for number, own_seed in enumerate(range(first, first + self.num_networks), 1):
            if self.num_networks > 1:
                say(f"{domain}: network {number} of {self.num_networks}")
            made = one.make_one(split, domain, seed=own_seed, folder=folder)
            assert isinstance(made, CausalRecommender) and isinstance(made.model, SequenceModel)
            networks.append(made.model)
            seconds += made.seconds
        averaged = self.recommender(TrainingSequences.of(split, domain), mean_of(networks))
        averaged.seconds = seconds
        return averaged

    def make_one(self, split: Split, domain: str, *, seed: int, folder: Path | None) -> TrainedRecommender:
        """See `SystemSettings.make`: a single network."""
        return super().make(split, domain, seed=seed, folder=folder)

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        return [self.of_network(self.network(self.frozen(data)), data, seed)]

    def of_network(
        self, model: SequenceModel, data: TrainingSequences, seed: int, terms: Mapping[str, tuple[float, Term]] = {}
    ) -> Stage:
        """The stage that trains a network; `terms` by name, with their weights, come beside the main one."""
        rows = windows(data.sequences, self.max_length)
        steps_of_pass = -(-len(rows) // self.batch_size)
        num_epochs = max(self.num_epochs, self.min_steps / steps_of_pass)
        passes = replace(self.passes(seed), num_epochs=num_epochs)
        names, share = [NEXT_ITEM, *terms], self.thinned_rows
        stream = WindowStream(data, names, self.max_length, passes, whole=bool(terms), thinned_rows=share)
        stage = self.stage(data, model, {**self.next_item(), **terms}, stream)
        is_sampled = self.objective == "softmax" and self.sampled_items * self.LARGE < data.num_items
        if not (self.sampled_items and is_sampled):
            return stage
        loss = SampledItemsLoss(model, rows, data.num_items, self.sampled_items, product_dtype())
        return replace(stage, trainable=loss)

    def frozen(self, data: TrainingSequences) -> np.ndarray:
        """The vectors that the domain's items come with: float32[V, F]; F is 0 where they come with nothing."""
        return np.empty((data.num_items, 0), dtype=np.float32)

    @abstractmethod
    def network(self, frozen_VF: np.ndarray) -> SequenceModel:
        """A network before training, over the frozen vectors of all items."""

    def model(self, frozen_VF: np.ndarray) -> SequenceModel | MeanOfNetworks:
        """All networks before training."""
        return mean_of([self.network(frozen_VF) for _ in range(self.num_networks)])


class CausalRecommender(DotProductRecommender, StoredRecommender):
    """What such a system makes. Stored are its weights, the vectors that the items came with, and its settings."""

    SETTINGS: ClassVar[type[CausalSettings]]
    model: SequenceModel | MeanOfNetworks

    def __init__(self, settings: CausalSettings, data: TrainingSequences, model: DotProductModel) -> None:
        super().__init__(type(settings).__name__, data, model, settings.max_length)
        self.settings = settings

    def arrays(self) -> dict[str, np.ndarray]:
        """See `StoredRecommender.arrays`."""
        weights = {WEIGHT + name: value.cpu().numpy() for name, value in self.model.state_dict().items()}
        settings = np.array(json.dumps(asdict(self.settings)))
        vectors_VF = self.model.items.given().cpu().numpy()
        return {"domain": np.array(self.domain), "settings": settings, "vectors": vectors_VF, **weights}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError for arrays that do not fit the catalogue or each other."""
        stored = UNNAMED | json.loads(str(arrays["settings"]))
        settings, vectors_VF = self.SETTINGS(**stored), arrays["vectors"]
        data = TrainingSequences(self.catalogue, str(arrays["domain"]), Ragged.of([]), ())
        if len(vectors_VF) != data.num_items:
            raise ValueError(f"{len(vectors_VF)} vectors for the {data.num_items} items of {data.domain!r}")
        model = settings.model(vectors_VF)
        weights = {name: torch.from_numpy(value) for name, value in arrays.items() if name.startswith(WEIGHT)}
        try:
            model.load_state_dict({name.removeprefix(WEIGHT): value for name, value in weights.items()})
        except RuntimeError as error:
            raise ValueError(f"weights of another model: {error}") from None
        CausalRecommender.__init__(self, settings, data, model)


@dataclass(frozen=True, kw_only=True)
class SASRec(CausalSettings):
    """Settings of SASRec: blocks, dropout, batches and sizes of a public replication, with our annealing in place of a
    constant learning rate for 200 passes; chosen on the validation queries of Amazon Beauty, Amazon Scientific and
    MovieLens-100K (docs/experiments.md)."""

    hidden_size: int = 64
    num_heads: int = 1
    block: BlockKind = "query_norm"
    dropout: float = 0.6
    attention_dropout: float = 0.6
    learning_rate: float = 1e-3
    beta2: float = 0.999
    batch_size: int = 512
    sorted_batches: int = 1
    num_epochs: float = 60
    min_steps: int = 600

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **CausalSettings.SEARCH,
        "batch_size": OneOf(values=(128, 256, 512)),
        "attention_dropout": Real(low=0.0, high=0.7),
    }

    tied: bool = True
    """An item has one vector. Otherwise it has a second one as a target, whose gradients do not pull at what histories
    are read by: what DARE (Feng et al. 2025), which parts attention from representation, has for the next item."""

    def network(self, frozen_VF: np.ndarray) -> SequenceModel:
        items, encoder = self.parts(len(frozen_VF))
        if self.tied:
            return SequenceModel(items, encoder)
        output = IdTable(len(frozen_VF), self.hidden_size, num_special=0)
        nn.init.normal_(output.table.weight, std=INITIAL)
        return SequenceModel(items, encoder, output=output)

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> SASRecRecommender:
        return SASRecRecommender(self, data, model)


class SASRecRecommender(CausalRecommender):
    """Ranks by a trained SASRec."""

    SETTINGS = SASRec


WIDE = SASRec(
    hidden_size=256,
    num_heads=4,
    block="pre_norm",
    dropout=0.5,
    attention_dropout=0.0,
    learning_rate=2e-3,
    beta2=0.95,
    batch_size=128,
    sorted_batches=POOL,
    num_epochs=14,
    min_steps=0,
)
"""The block, the batches and the optimizer that other systems have by default: the control of those that add something
to self-attention."""

SAMPLED = replace(WIDE, objective="sampled_softmax", num_negatives=1024, num_epochs=20)
"""Against 1,024 negatives that the targets of a step share: nearly as good as all items, and quicker where these are
many."""

PUBLISHED = replace(
    WIDE,
    objective="bce",
    num_negatives=1,
    hidden_size=50,
    num_heads=1,
    learning_rate=1e-3,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""SASRec as first published, for sparse data: binary cross-entropy against one negative, 50 dimensions, one head,
dropout 0.5, no annealing. Negatives may be items of the user's history (there they are drawn outside it)."""
