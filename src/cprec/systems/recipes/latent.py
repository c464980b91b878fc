"""What systems with latent steps share: a stage of training without the steps, then one with them.

The first trains on windows, as the authors of ReaRec advise against losses that are not finite; in the second every
prefix of a sequence is a row. Each recipe has a `CONTROL` beside its defaults, which takes no step and has more blocks
instead: as many as make its floating-point operations for a history of `max_length` events (of the encoder, without the
products with all items) nearest to those of the defaults. They are counted by torch's FlopCounterMode as this code
runs, where a step reads the row anew. With cached keys and values a step would cost one position and no block would
match it: the control is then SASRec itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from cprec.choices import Choice, Whole
from cprec.systems.batches import PrefixStream, WindowStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import SelfAttention
from cprec.systems.items import IdTable
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Teacher, Term, next_item


@dataclass(frozen=True, kw_only=True)
class LatentSettings(SelfAttentionSettings):
    """Settings of systems with latent steps; the defaults are ours: a long first stage, which is cheap, and a short
    second one."""

    max_length: int = 20
    num_heads: int = 2
    learning_rate: float = 2e-3
    num_epochs: float = 3
    first_epochs: float = 10
    """Passes over the training windows without reasoning, before `num_epochs` passes over all prefixes with it; 0: no
    such stage."""
    num_steps: int = 2
    """Steps of reasoning; 0: the encoder answers at once."""
    temperature: float = 1.0
    """Scores are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**SelfAttentionSettings.SEARCH, "num_steps": Whole(low=1, high=3)}
    """A control, whose steps and blocks lie outside, stays one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("temperature")
        self.require_not_negative("first_epochs", "num_steps")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        items, encoder = self.parts(data.num_items)
        second = self.second(data, items, encoder, seed)
        if not self.first_epochs:
            return [second]
        passes = replace(self, num_epochs=self.first_epochs).passes(seed)
        windows = WindowStream(data, [NEXT_ITEM], self.max_length, passes)
        first = SequenceModel(items, encoder)
        return [self.stage(data, first, {NEXT_ITEM: (1.0, self.main())}, windows), second]

    @abstractmethod
    def second(self, data: TrainingSequences, items: IdTable, encoder: SelfAttention, seed: int) -> Stage:
        """The stage with steps."""

    def main(self) -> Term:
        """Cross-entropy over all items."""
        return next_item("softmax", temperature=self.temperature)

    def on_prefixes(
        self,
        data: TrainingSequences,
        model: SequenceModel,
        terms: Mapping[str, tuple[float, Term]],
        seed: int,
        *,
        teachers: Mapping[str, tuple[float, Teacher]] | None = None,
        whole: bool = False,
        begin: Callable[[], None] = lambda: None,
    ) -> Stage:
        """A stage on all prefixes; terms of weight 0 are left out. `whole` as in `PrefixStream`, `begin` in `Stage`."""
        terms = {name: (weight, term) for name, (weight, term) in terms.items() if weight}
        teachers = {name: (weight, teacher) for name, (weight, teacher) in (teachers or {}).items() if weight}
        prefixes = PrefixStream(data, [*terms, *teachers], self.max_length, self.passes(seed), whole=whole)
        return self.stage(data, model, terms, prefixes, teachers=teachers, begin=begin)
