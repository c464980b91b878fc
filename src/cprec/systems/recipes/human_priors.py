"""Human priors: SASRec with a head for each group of items, of which only the target's own learns (Zhang et al. 2025).

Items are grouped by something known of them before any query: their category, the cluster of their title, or how often
they were had. A head maps the state of a history. A target is learnt by the head of its own group alone, against the
items of that group; with a horizon, those after it are learnt as well, by heads for what is near and what is far. In
ranking every head scores the items of its own group, and all are one list. Nothing is asked about a target then, while
some of the public scripts let the target's own action choose the head. This follows the code: scores are cosines over a
temperature, and the heads of group and stretch are crossed. Deviations: cross-entropy over all items of the group
(there against sampled ones), with all targets alike, which weighs groups by their shares of the targets; the
temperature is fixed; deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from cprec.choices import Choice, OneOf, Real, Whole
from cprec.errors import ConfigError
from cprec.systems.batches import WindowStream
from cprec.systems.priors import HeadModel, OwnHeads, by_category, by_popularity, by_title
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage

Prior = Literal["category", "titles", "popularity"]


@dataclass(frozen=True, kw_only=True)
class HumanPriors(TextSettings, SelfAttentionSettings):
    """Settings of SASRec with human priors; the defaults are those of `SASRec (wide)`, with the temperature and the
    discount of the code."""

    hidden_size: int = 256
    learning_rate: float = 2e-3
    num_epochs: float = 14
    prior: Prior = "category"
    """What items are grouped by."""
    num_groups: int = 8
    """Groups of items; 1: all are in one."""
    horizon: int = 1
    """Events ahead that each position learns to predict."""
    num_stretches: int = 1
    """Stretches of as many events that the horizon is cut into; must divide it."""
    discount: float = 0.99
    """Weight of an event ahead relative to that of the one before it."""
    temperature: float = 0.05
    """Cosines are divided by it; 0: scores are products, as SASRec's are."""

    LABEL: ClassVar[str] = "Human priors"
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_groups": Whole(low=2, high=32, log=True),
        "horizon": OneOf(values=(2, 4, 8)),
        "temperature": Real(low=0.02, high=0.2, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_groups", "horizon", "num_stretches", "discount")
        self.require_not_negative("temperature")
        if self.prior not in get_args(Prior):
            raise ConfigError(f"prior={self.prior!r}: expected {', '.join(get_args(Prior))}")
        if self.horizon % self.num_stretches:
            raise ConfigError(f"horizon={self.horizon} must be a multiple of num_stretches={self.num_stretches}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        group_V = self.groups(data, seed)
        model = HeadModel(*self.parts(data.num_items), group_V, self.num_stretches, self.temperature)
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        own = OwnHeads(model, self.horizon, self.discount)
        return [self.stage(data, model, {}, stream, teachers={NEXT_ITEM: (1.0, own)})]

    def groups(self, data: TrainingSequences, seed: int) -> np.ndarray:
        """The group of each item: int64[V]. Raises Unsuitable where there are not so many."""
        if self.num_groups == 1:
            return np.zeros(data.num_items, dtype=np.int64)
        if self.prior == "category":
            return by_category(data.categories, self.num_groups)
        if self.prior == "titles":
            return by_title(self.frozen(data), self.num_groups, seed)
        return by_popularity(np.bincount(data.sequences.values, minlength=data.num_items), self.num_groups)


TITLES = HumanPriors(prior="titles")
"""Clusters of titles, where there are no categories."""
POPULARITY = HumanPriors(prior="popularity")
"""Popular and rare items have heads of their own."""
HORIZON = HumanPriors(num_groups=1, horizon=4, num_stretches=2)
"""Heads for the next two events and for the two after them; all items are one group."""
