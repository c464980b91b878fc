"""ICSRec: SASRec with contrasts of histories that show the same intention (Qin et al. 2024, equations 6 to 12).

Every prefix of a sequence is a training row, with the item after it as its target. Two prefixes with one target show
the same coarse intention and are drawn together; prefixes near one centre of all prefixes' states (k-means) show the
same fine intention. Pairs of one label are no negatives. Where they differ this follows the code (which sums the fine
term over both prefixes, compares by products, and encodes prefixes as SASRec does). Deviations: each prefix is encoded
once in a step (there the first of a pair twice, with other dropout); centres are found anew at each of the 15
validations from a sample of prefixes (there at each epoch from all); deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from cprec.choices import Choice, OneOf, Real
from cprec.systems.batches import Prefixes, PrefixStream, SameTarget
from cprec.systems.dot_product import SequenceModel
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import NextItemSettings
from cprec.systems.signals import TrainingSequences, padded
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import SameCluster, Term, of_state, same_target

CLUSTERED = 50_000
"""Prefixes whose states are clustered, at most."""


@dataclass(frozen=True, kw_only=True)
class ICSRec(NextItemSettings, SelfAttentionSettings):
    """Settings of ICSRec; the defaults are ours: annealing, and no more passes than fit into minutes on a CPU."""

    max_length: int = 20
    hidden_size: int = 64
    num_heads: int = 2
    batch_size: int = 256
    num_epochs: float = 8
    num_intentions: int = 256
    """Clusters of prefixes."""
    coarse_weight: float = 0.1
    """Weight of the contrast of prefixes with the same target."""
    fine_weight: float = 0.1
    """Weight of the contrast of prefixes with the centre that is nearest to them."""
    temperature: float = 1.0
    """Products in both contrasts are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_intentions": OneOf(values=(64, 256, 1024)),
        "coarse_weight": Real(low=0.01, high=1, log=True),
        "fine_weight": Real(low=0.01, high=1, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_intentions", "coarse_weight", "fine_weight", "temperature")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        model = SequenceModel(*self.parts(data.num_items))
        fine = SameCluster(self.num_intentions, self.hidden_size, self.temperature)
        (_, main), *_ = self.next_item().values()
        terms: dict[str, tuple[float, Term]] = {
            NEXT_ITEM: (1.0, of_state(main, 0)),
            "same_target": (self.coarse_weight, same_target(self.temperature)),
            "same_cluster": (self.fine_weight, fine),
        }
        views = [SameTarget(Prefixes(data, self.max_length), data.num_items)]
        stream = PrefixStream(data, list(terms), self.max_length, self.passes(seed), views)
        sample = np.random.default_rng(seed).permutation(len(stream.prefixes))[:CLUSTERED]
        refresh = partial(refit, fine, model, stream, sample, seed)
        return [self.stage(data, model, terms, stream, refresh=refresh)]


@torch.no_grad()
def refit(fine: SameCluster, model: SequenceModel, stream: PrefixStream, rows: np.ndarray, seed: int) -> None:
    """Find the centres of the states of some prefixes, without dropout."""
    model.eval()
    vectors = model.vectors()
    states = []
    for some in np.array_split(rows, -(-len(rows) // 512)):
        items = torch.from_numpy(padded(stream.prefixes.take(some), model.items.num_items)[0])
        states.append(model.encode(vectors, {"items": items.to(vectors.inputs.device)}))
    fine.fit(torch.cat(states), seed)


PUBLISHED = ICSRec(max_length=50, learning_rate=1e-3, num_epochs=100, anneal=0.0, patience=3)
"""ICSRec as its code has it for Beauty: 64 dimensions, two layers and heads, learning rate 1e-3, 256 intentions."""
