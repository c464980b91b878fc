"""A stage of training: losses, a stream of rows and a learning rate, and the recommender that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from cprec.data.ragged import Ragged
from cprec.recommender import Ranking, RankingQuery
from cprec.systems.dot_product import DotProductModel
from cprec.systems.terms import Teacher, Term
from cprec.train.trainable import Stream, Trainable, decay_matrices

NEXT_ITEM = "next_item"
"""The name of the main loss term."""


class TrainedRecommender(Protocol):
    """A recommender that a system makes: it ranks, and counts the ranks of targets itself."""

    name: str
    seconds: float
    """Seconds that training took."""

    @property
    def num_parameters(self) -> int: ...

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        ...

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `DotProductRecommender.target_ranks`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training."""

    trainable: Trainable
    """The losses; of its module's parameters those are trained that require gradients."""
    stream: Stream
    schedule: Callable[[int], float]
    """The learning rate of each step."""
    recommender: Callable[[], TrainedRecommender] | None
    """Makes a recommender of the current weights. A stage without one keeps its last weights; the last stage of a
    system has one."""
    keeps_last: bool = False
    """Validation events cannot judge what is learnt, so that the last weights are kept although there is a
    recommender."""
    refresh: Callable[[], None] = lambda: None
    """Called before each validation, the first of which comes before the first step."""
    begin: Callable[[], None] = lambda: None
    """Called when the stages before this one are done, and before what this one has learnt so far is read back."""


class WeightedTerms:
    """A dot-product model with its loss terms, as a `Trainable`."""

    def __init__(
        self,
        model: DotProductModel,
        terms: Mapping[str, tuple[float, Term]],
        teachers: Mapping[str, tuple[float, Teacher]] | None = None,
    ) -> None:
        self._model, self._terms, self._teachers = model, terms, teachers or {}
        weighted: Mapping[str, tuple[float, Term | Teacher]] = {**terms, **self._teachers}
        learnt = {name.replace(" ", "_"): term for name, (_, term) in weighted.items() if isinstance(term, nn.Module)}
        self.module: nn.Module = nn.ModuleDict({"model": model, **learnt}) if learnt else model

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        vectors = self._model.vectors()
        states, targets = self._model.states(vectors, rows)
        found = {name: weight * term(states, targets, vectors.items_VD) for name, (weight, term) in self._terms.items()}
        for name, (weight, teacher) in self._teachers.items():
            found[name] = weight * teacher(states, rows, vectors.items_VD)
        return found

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return decay_matrices(self.module, weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")
