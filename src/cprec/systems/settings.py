"""Settings that systems share: of all of them, of those that predict next items, read a graph, or read texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from cprec.choices import Choice, OneOf, Real, Whole
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.provenance import file_sha256
from cprec.systems.batches import POOL, Passes
from cprec.systems.dot_product import DotProductModel, DotProductRecommender
from cprec.systems.fit import fit
from cprec.systems.items import read_vectors
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage, TrainedRecommender, WeightedTerms
from cprec.systems.terms import Objective, Teacher, Term, check_objective, next_item
from cprec.systems.vectors import TitleSpace, share_words, text_vectors
from cprec.train.schedule import WSA
from cprec.train.trainable import Stream


@dataclass(frozen=True, kw_only=True)
class SystemSettings(ABC):
    """Settings that all systems share."""

    max_length: int = 50
    """Events of a history that are read, the latest ones; longer training sequences are cut into windows of as many
    targets."""
    hidden_size: int = 128
    """Width of the items' vectors."""
    dropout: float = 0.5
    """Share of activations left out in training."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW (0.9, `beta2`)."""
    beta2: float = 0.95
    """AdamW remembers squared gradients for about 1 / (1 - beta2) steps. Where an item has no event for longer, the
    small gradients in between, which push its scores down, count for too much."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    batch_size: int = 128
    """Rows of an optimizer step."""
    sorted_batches: int = POOL
    """Batches among which rows are sorted by length, so that there is little padding. As a step's loss is the mean over
    its targets, those of long rows count less than those of short ones. 1: a step's rows are a random sample, and all
    targets count alike."""
    num_epochs: float = 20
    """Passes over the training rows."""
    anneal: float = 0.4
    """Share of the steps at the end over which the learning rate falls to zero, linearly."""
    patience: int = 0
    """Validations (of `fit.VALIDATIONS`) without a better one after which a stage ends; 0: it goes to the end."""

    LABEL: ClassVar[str] = ""
    """What it is called; nothing: as its settings are."""
    VALIDATION_QUERIES: ClassVar[int] = 4000
    """Validation queries, a seeded sample at most, that decide which weights are kept."""
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128, 256)),
        "dropout": Real(low=0.1, high=0.7),
        "learning_rate": Real(low=3e-4, high=3e-3, log=True),
        "weight_decay": OneOf(values=(0.0, 0.01, 0.1)),
        "batch_size": OneOf(values=(64, 128, 256)),
    }

    def __post_init__(self) -> None:
        self.require_positive(
            "max_length", "hidden_size", "learning_rate", "batch_size", "sorted_batches", "num_epochs"
        )
        for name in ("dropout", "beta2", "anneal"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..1, 1 left out")

    def require_positive(self, *names: str) -> None:
        """Raise ConfigError unless these settings are above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")

    def require_not_negative(self, *names: str) -> None:
        """Raise ConfigError for settings below 0."""
        for name in names:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be below 0")

    @abstractmethod
    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """The stages of training, in order, on the CPU; torch's seed decides the first weights."""

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """The recommender of a domain, trained on its training events.

        It is trained in a folder of its own under `folder`, whose name is a hash of settings, data, seed and code: a
        finished one is used again, an interrupted one goes on. After each stage the weights with the best NDCG@10 on
        the validation queries are kept (full catalogue, items of the history left out); the last ones where the split
        has validation events learnt, too (`Split.validates`).

        Raises Unsuitable where the domain has nothing to train on or to validate with, and where validation should end
        training (`patience`) but its events are learnt.
        """
        if folder is None:
            with TemporaryDirectory() as temporary:
                return fit(self, split, domain, seed, Path(temporary))
        return fit(self, split, domain, seed, folder)

    def identity(self) -> dict[str, Any]:
        """What tells these settings from others."""
        return asdict(self)

    def passes(self, seed: int) -> Passes:
        """The passes of a `RowStream` over its rows."""
        return Passes(batch_size=self.batch_size, num_epochs=self.num_epochs, seed=seed, pool=self.sorted_batches)

    def stage(
        self,
        data: TrainingSequences,
        model: DotProductModel,
        terms: Mapping[str, tuple[float, Term]],
        stream: Stream,
        *,
        teachers: Mapping[str, tuple[float, Teacher]] | None = None,
        history: Callable[[Ragged], np.ndarray] | None = None,
        refresh: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> Stage:
        """A stage of a dot-product model, with its loss terms, and those that read whole rows (`teachers`), by name:
        (weight, term). `history` makes rows of item numbers of histories; without it they are the latest `max_length`
        events."""
        return Stage(
            trainable=WeightedTerms(model, terms, teachers),
            stream=stream,
            schedule=self.schedule(stream.num_steps),
            recommender=lambda: self.recommender(data, model, history),
            refresh=refresh,
            begin=begin,
        )

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> DotProductRecommender:
        """A recommender of a model's current weights; `history` as for `stage`."""
        return DotProductRecommender(self.LABEL or type(self).__name__, data, model, self.max_length, history)

    def schedule(self, num_steps: int) -> Callable[[int], float]:
        """A short warm-up, the peak, and a linear fall to zero."""
        wsa = WSA(
            total=num_steps,
            peak=self.learning_rate,
            warmup=min(100, num_steps // 10),
            anneal=round(self.anneal * num_steps),
            shape="linear",
        )
        return lambda step: wsa.after(step + 1)


@dataclass(frozen=True, kw_only=True)
class NextItemSettings(SystemSettings):
    """Settings of systems whose main loss term is `terms.next_item`."""

    objective: Objective = "softmax"
    """The main loss term; see `terms.objective_loss`."""
    num_negatives: int = 0
    """Items drawn for an objective that does not rank them all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_objective(self.objective, self.num_negatives)

    def next_item(self) -> dict[str, tuple[float, Term]]:
        """The main loss term, of weight 1."""
        return {NEXT_ITEM: (1.0, next_item(self.objective, self.num_negatives))}


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
class TextSettings(SystemSettings):
    """Settings of systems that read frozen vectors of titles."""

    vectors: str = ""
    """An .npz file with `item_id` and `vectors` of the domain's items; empty: TF-IDF of titles, reduced by SVD."""
    text_size: int = 256
    """Directions that the TF-IDF of titles is reduced to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("text_size")

    def frozen(self, data: TrainingSequences) -> np.ndarray:
        """The vectors of the domain's items: float32[V, F]. Raises Unsuitable for titles that say nothing."""
        if self.vectors:
            return read_vectors(self.vectors, data.item_ids)
        vectors_VF = text_vectors(data.titles, self.text_size)
        if not vectors_VF.any():
            raise Unsuitable(
                f"{type(self).__name__} reads titles, and those of domain {data.domain!r} have no word that tells its "
                "items apart: give vectors=FILE, or take a system that needs no text"
            )
        return vectors_VF

    def frozen_new(self, data: TrainingSequences, item_ids: Sequence[str], titles: Sequence[str]) -> np.ndarray:
        """The vectors of items that are not among those of `frozen`, in the same directions: float32[N, F]. Titles
        count as far as they have words of the domain's; a file must hold these items as well."""
        if self.vectors:
            return read_vectors(self.vectors, item_ids)
        return TitleSpace(data.titles, self.text_size).of(titles)

    def frozen_alike(self, data: TrainingSequences) -> np.ndarray:
        """As `frozen`, for systems that need some items to be more alike than others. Raises Unsuitable also where no
        two titles share a word."""
        if not self.vectors and not share_words(data.titles):
            raise Unsuitable(
                f"{self.LABEL or type(self).__name__}: no two titles of domain {data.domain!r} share a word that tells "
                "them from others, so none are alike: give a file of vectors (vectors=FILE) or leave it out"
            )
        return self.frozen(data)

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"vectors": file_sha256(self.vectors)} if self.vectors else {})
