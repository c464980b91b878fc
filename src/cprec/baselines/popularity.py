"""The most frequent items of the training part, of all its time or of the latest.

All rank inside the query's domain, so they are popular in that domain. Popularity over all domains of a platform would
be the same order: an item belongs to one domain, and only its own events count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow.parquet as pq

from cprec.baselines.domain import DomainRecommender
from cprec.choices import Choice, OneOf, Real
from cprec.data.catalogue import Catalogue
from cprec.data.dataset import POPULARITY
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.recommender import RankingQuery
from cprec.scoring import StoredRecommender


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """All training events count alike: there is nothing to set."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {}

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> PopularityRecommender:
        """See `Settings.make`; nothing is random, and the recommender serves every domain."""
        return PopularityRecommender(split)


class PopularityRecommender(StoredRecommender):
    """Ranks by the number of training events of each item; the history changes nothing."""

    name = "popularity"

    def __init__(self, split: Split) -> None:
        self.catalogue = split.catalogue
        self._count = np.bincount(split.train.item, minlength=len(split.catalogue))

    @classmethod
    def read(cls, folder: str | Path, catalogue: Catalogue) -> PopularityRecommender | None:
        """By the counts that a data folder or a model folder holds; None where it holds none."""
        path = Path(folder, POPULARITY)
        if not path.is_file():
            return None
        table = pq.read_table(path)
        row = catalogue.rows_of_pairs(table["domain"], table["item_id"])
        made = cls.__new__(cls)
        made.catalogue = catalogue
        made._count = np.bincount(row[row >= 0], table["num_events"].to_numpy()[row >= 0], len(catalogue))
        return made

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        count_N = self._count[self.catalogue.rows_of(domain)]
        return np.broadcast_to(count_N, (len(queries), len(count_N)))

    def arrays(self) -> dict[str, np.ndarray]:
        """See `StoredRecommender.arrays`."""
        return {"count": self._count}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._count = arrays["count"]


@dataclass(frozen=True, kw_only=True)
class RecentPopularity:
    """Only the latest training events of the domain count (Ji et al. 2020, "A re-visit of the popularity baseline").

    Theirs counts up to the moment of each query; here it is up to the end of the training part for all of them, which
    with leave-one-out lies after many targets, as it does for everything that is trained. Events of one time count
    together. Items without a recent event tie at 0. Defaults lie between the best of 25 trials on the validation
    queries of Amazon Beauty (0.16 of the span) and of MovieLens 100K (0.24 of it).
    """

    share: float = 0.2
    """How much of the domain's training part counts, the latest; above 0, 1 counts all."""
    of: Literal["events", "span"] = "span"
    """span: that share of the time from the first to the last training event; events: of the events themselves."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "share": Real(low=0.002, high=1, log=True),
        "of": OneOf(values=("events", "span")),
    }

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share} must lie above 0 and at most at 1")
        if self.of not in ("events", "span"):
            raise ConfigError(f"of={self.of!r}: expected events or span")

    def make(
        self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None
    ) -> RecentPopularityRecommender:
        """See `Settings.make`; nothing is random and nothing kept."""
        return RecentPopularityRecommender(split, domain, self)


class RecentPopularityRecommender(DomainRecommender):
    """Ranks a domain's items by their latest training events; see `RecentPopularity`."""

    name = "recent popularity"

    def __init__(self, split: Split, domain: str, settings: RecentPopularity) -> None:
        """Raises Unsuitable where the domain's times are not real, or it has no training event."""
        super().__init__(split, domain)
        if not split.domains[domain].has_times:
            raise Unsuitable(
                f"recent popularity: the times of domain {domain!r} only order the events of one user, so none is "
                "more recent than another's; use popularity"
            )
        log, rows = split.train, split.catalogue.rows_of(domain)
        mine = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
        if not mine.any():
            raise Unsuitable(f"domain {domain!r} has no training event to count: choose another domain or split")
        time = log.time[mine]
        if settings.of == "span":
            since = time.max() - settings.share * (time.max() - time.min())
        else:
            since = np.sort(time)[-math.ceil(settings.share * len(time))]
        self._count = np.bincount(log.item[mine][time >= since] - rows[0], minlength=len(rows))

    def history_scores(self, history: Ragged) -> np.ndarray:
        return np.broadcast_to(self._count, (len(history), len(self._count)))

    def state(self) -> dict[str, np.ndarray]:
        return {"count": self._count}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._restore(arrays)
        self._count = arrays["count"]
