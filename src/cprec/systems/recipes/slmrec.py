"""SLMRec: a shallow SASRec that learns from a deep one (Xu et al. 2025).

A deep SASRec is trained first, and then stays as it is. A shallow one learns the next item and, beside it, the deep
one's states: both are cut into as many groups of blocks, and after each group the direction and the distance of their
states are matched. States in the middle of the shallow one predict the next item, too, each through a matrix of its
own. Weights and the rule for the states are those of the code, whose other variant matches scores of all items instead;
here both are matched. Deviations: there both models are a language model that reads frozen vectors of a SASRec, the
shallow one its first layers, tuned by low-rank matrices; here both begin with random weights, and have items of their
own. States are matched at all positions (there at the last). Deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from cprec.choices import Choice, Real
from cprec.errors import ConfigError
from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import SequenceModel, states_of
from cprec.systems.encoders import Layers, SelfAttention
from cprec.systems.items import IdTable
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import NextItemSettings, SystemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Distillation, MiddleHeads, Teacher, of_state


@dataclass(frozen=True, kw_only=True)
class SLMRec(NextItemSettings, SelfAttentionSettings):
    """Settings of SLMRec; the defaults are those of `SASRec (wide)`, with the weights and the ratio of depths of the
    code. `num_blocks` are those of the shallow model."""

    hidden_size: int = 256
    learning_rate: float = 2e-3
    num_epochs: float = 14
    teacher_blocks: int = 8
    """Blocks of the deep model."""
    num_groups: int = 2
    """Groups that the blocks of either model are cut into; must divide both numbers of blocks."""
    direction_weight: float = 1.0
    """Weight of one minus the cosine of two states."""
    distance_weight: float = 0.1
    """Weight of their distance."""
    score_weight: float = 1.0
    """Weight of the divergence of the shallow model's item distribution from the deep one's. With this and the two
    weights above at 0 there is no deep model."""
    head_weight: float = 1.0
    """Weight of the predictions from states in the middle, after each group but the last; 0: there are none."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SystemSettings.SEARCH,
        **{f"{name}_weight": Real(low=0.01, high=3, log=True) for name in ("direction", "distance", "score", "head")},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("teacher_blocks", "num_groups")
        self.require_not_negative("direction_weight", "distance_weight", "score_weight", "head_weight")
        if self.num_blocks > self.teacher_blocks:
            raise ConfigError(
                f"num_blocks={self.num_blocks} must not be above teacher_blocks={self.teacher_blocks}: the model that "
                "is taught has no more blocks than its teacher"
            )
        for name in ("num_blocks", "teacher_blocks"):
            if getattr(self, name) % self.num_groups:
                raise ConfigError(f"{name}={getattr(self, name)} must be a multiple of num_groups={self.num_groups}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        items, encoder = self.parts(data.num_items)
        terms, teachers, stages = self.next_item(), dict[str, tuple[float, Teacher]](), list[Stage]()
        _, main = terms[NEXT_ITEM]
        if self.head_weight and self.num_groups > 1:
            terms["heads"] = self.head_weight, MiddleHeads(main, self.num_groups - 1, self.hidden_size)
        weights = {"direction": self.direction_weight, "distance": self.distance_weight, "scores": self.score_weight}
        if any(weights.values()):
            deep = replace(self, num_blocks=self.teacher_blocks).parts(data.num_items)
            windows = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
            stages.append(self.stage(data, SequenceModel(*deep), self.next_item(), windows))
            teachers["teacher"] = 1.0, Distillation(partial(states_of, self.in_groups(*deep)), **weights)
        model = SequenceModel(items, encoder)
        if len(terms) > 1 or teachers:
            model, terms[NEXT_ITEM] = self.in_groups(items, encoder), (1.0, of_state(main, -1))
        stream = WindowStream(data, [*terms, *teachers], self.max_length, self.passes(seed))
        return [*stages, self.stage(data, model, terms, stream, teachers=teachers)]

    def in_groups(self, items: IdTable, encoder: SelfAttention) -> SequenceModel:
        """A model that gives its states after each group of blocks."""
        size = len(encoder.blocks) // self.num_groups
        return SequenceModel(items, Layers(encoder, range(size, len(encoder.blocks) + 1, size)))
