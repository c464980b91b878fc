"""STREAM-Rec: TIGER that thinks before it answers, in tokens that lead from the history to the next item.

Zhang et al. 2025, "Slow Thinking for Sequential Recommendation". Before the codes of each item the decoder writes a
trace of fixed length, whose tokens fit step by step what the history leaves of the item's vector (`traces`), and learns
to write both. A list is made after the likeliest trace, written token by token without looking back; of the items after
it the best are searched until proven. A better item after another trace is not found.

This is the second of three stages. Deviations: no pretraining on targets that are extended by like items, and no
reinforcement learning; a trace begins at the mean vector of the items before (there at the network's own state, and a
network maps what is left); earlier items keep their traces in what is read. Those of TIGER hold as well; with
`trace_length=0` this is TIGER.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeRecommender
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.traces import TracedCodes, TracingRecommender


@dataclass(frozen=True, kw_only=True)
class STREAMRec(CodeSettings):
    """Settings of STREAM-Rec; all are ours, most of them those of TIGER."""

    trace_length: int = 3
    """Tokens of a trace; 0: there is none."""

    LABEL: ClassVar[str] = "STREAM-Rec"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("trace_length")

    def codes(self, data: TrainingSequences, seed: int) -> TracedCodes:
        """See `CodeSettings.codes`."""
        vectors_VF = self.vectors_of(data, self.of)
        return TracedCodes.traced(super().codes(data, seed), vectors_VF, self.trace_length)

    def code_recommender(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
        """See `CodeSettings.code_recommender`."""
        assert isinstance(codes, TracedCodes)
        return TracingRecommender(self.LABEL, data, codes, model, **self.ranking())
