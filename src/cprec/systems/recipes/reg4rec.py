"""REG4Rec: MDGR whose codes are filled in one by one, the surest first, in training as well, and whose items are pruned
where their codes disagree.

Xing et al. 2025, "REG4Rec: Reasoning-Enhanced Generative Model for Large-Scale Recommendation Systems". An item has
many unordered codes, and the order in which they are written, a path of reasoning, is chosen by confidence for each
history. In training the masked codes are those that the network is least sure of when it knows none, since they come
last on such a path; how many there are is uniform. Of what the search finds, items are pruned that have a code which
the network does not expect when it knows the history and all the other codes (`least_agreement`).

There is no code of the authors, and how they measure confidence and agreement is known to us from summaries alone. More
deviations: no reinforcement learning, for paths or for later events; codes are product-quantised slices of title
vectors (there by a mixture of experts); the decoder reads both ways and fills in codes (there it writes them one after
the other); an item is read as the sum of its codes' rows (there by a small network). Those of MDGR hold as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cprec.systems.cloze import ClozeLoss, CodeCloze
from cprec.systems.paths import Order
from cprec.systems.recipes.mdgr import MDGR


@dataclass(frozen=True, kw_only=True)
class REG4Rec(MDGR):
    """Settings of REG4Rec; all are ours."""

    num_levels: int = 8
    growth: float = 0.0
    warm_up: int = 0
    at_once: int = 1
    beam_width: int = 10
    guided: bool = True
    """What is masked in training are the codes that the network is least sure of; otherwise random ones."""
    least_agreement: float = 0.1
    """An item is pruned if one of its codes, given the history and all its other codes, is less than this many times as
    probable as if all codes of its slice were equally so; 0: none is."""

    VALIDATION_QUERIES: ClassVar[int] = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("least_agreement")

    def loss(self, model: CodeCloze) -> ClozeLoss:
        return ClozeLoss(model, guided=self.guided)

    def order(self) -> Order:
        return replace(super().order(), least_agreement=self.least_agreement)
