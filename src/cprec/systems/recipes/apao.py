"""APAO: TIGER that also learns to keep the prefixes of the next item in a beam (Yu et al. 2026).

To the loss of next tokens it adds beta times the sum of w_t L_t over the prefixes of 1 to L codes; the weights w_t grow
with the losses and have no gradient (see `prefixes`). Pairwise, L_t compares a target's prefix with those of items
drawn at random; pointwise, it is the mean loss of the prefix's tokens. This follows the code. Deviations: 16 items are
drawn (there 100), for one item of each row, which changes from step to step (there a row has one target); they stand
for the N - 1 prefixes other than the target's by the number of others kept (there that number counts the target, too);
the pointwise loss has no temperature, which would only be one more weight; the code that tells items of equal codes
apart belongs to no prefix. Deviations of TIGER hold too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cprec import distributed
from cprec.choices import Choice, Real
from cprec.search.trie import Trie
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeStream
from cprec.systems.prefixes import PREFIXES, ChoiceStream, NodeStream, PairwiseLoss, PointwiseLoss
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.text.stream import NEXT_TOKEN
from cprec.train.trainable import Stream, Trainable


@dataclass(frozen=True, kw_only=True)
class APAO(CodeSettings):
    """Settings of APAO: weight, temperature and growth are those of its scripts, the others TIGER's."""

    prefix_weight: float = 0.1
    """Weight of the term over prefixes (beta); 0: there is none."""
    growth: float = 0.0
    """Weights of prefixes are multiplied by exp(growth * loss) (eta)."""
    num_negatives: int = 16
    """Items drawn for a target; 0: the loss is pointwise."""
    temperature: float = 1.0
    """Log-probabilities of prefixes that are compared are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **CodeSettings.SEARCH,
        "prefix_weight": Real(low=0.03, high=1.0, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("temperature")
        self.require_not_negative("prefix_weight", "growth", "num_negatives")

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """See `CodeSettings.stream`."""
        rows = CodeStream(data, codes, self.max_length, self.passes(seed))
        if not self.prefix_weight:
            return rows
        trie = Trie.build(codes.sequences)
        if self.num_negatives:
            return ChoiceStream(rows, codes, trie, self.num_negatives, seed)
        return NodeStream(rows, codes, trie, (NEXT_TOKEN, PREFIXES), whole=True)

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """See `CodeSettings.trainable`."""
        if not self.prefix_weight:
            return super().trainable(data, codes, model)
        made_of = model, Trie.build(codes.sequences), codes.num_levels
        shared: dict[str, Any] = {"weight": self.prefix_weight, "growth": self.growth}
        shared["bf16"] = distributed.use_bf16("auto", distributed.pick_device())
        if self.num_negatives:
            return PairwiseLoss(*made_of, **shared, temperature=self.temperature)
        return PointwiseLoss(*made_of, **shared)


POINTWISE = APAO(num_negatives=0)
"""The loss of prefixes is the mean of their tokens'."""
