"""The likeness of titles, and the baseline that knows nothing else: what reads like the last events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy import sparse

from cprec.baselines.domain import DomainRecommender, profiles
from cprec.choices import Choice, Real
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.data.titles import TitleWords
from cprec.errors import ConfigError


@dataclass(frozen=True)
class DomainTitles:
    """The titles of a domain as vectors of words; no event is needed for them."""

    catalogue: Catalogue
    """The one that the words are of."""
    domain: str
    words: TitleWords
    vectors: sparse.csr_array
    """Of the items that there are: csr[N, words]."""

    @classmethod
    def of(cls, catalogue: Catalogue, domain: str) -> DomainTitles:
        """Of a domain's catalogue; see `data.titles.title_vectors`."""
        words = TitleWords(catalogue.titles_of(domain))
        return cls(catalogue, domain, words, words.of_titles)

    def with_catalogue(self, catalogue: Catalogue) -> DomainTitles:
        """With the items that came. Their words count as far as the catalogue before had them, and weigh the same."""
        places = catalogue.places_in(self.catalogue, self.domain)
        return replace(self, vectors=self.words.of_more(catalogue.titles_of(self.domain), places))


@dataclass(frozen=True, kw_only=True)
class TitleSimilarity:
    """Items whose titles read like those of the last events; learns nothing, so that it can rank new items.

        score(j) = sum over items i of the history of decay ** age(i) * cosine(i, j), over TF-IDF of title words

    The frequencies of words are those of the domain's catalogue. The default decay lies between the best of 25 trials
    on the validation queries of Amazon Beauty (0.75) and of MovieLens 100K (0.97).
    """

    decay: float = 0.8
    """Weight of an event of the history relative to the one after it; 1 weighs all alike."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {"decay": Real(low=0.1, high=1)}

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must lie above 0 and at most at 1")

    def make(
        self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None
    ) -> TitleSimilarityRecommender:
        """See `Settings.make`; nothing is random and nothing kept."""
        return TitleSimilarityRecommender(split, domain, self)


class TitleSimilarityRecommender(DomainRecommender):
    """Ranks a domain's items by their titles' likeness to the history's; see `TitleSimilarity`.

    Items that share no word with the history are not returned from the full catalogue, and stand last among
    candidates.
    """

    name = "titles"
    floor = 0.0

    def __init__(self, split: Split, domain: str, settings: TitleSimilarity) -> None:
        super().__init__(split, domain)
        self._decay, self._titles = settings.decay, DomainTitles.of(split.catalogue, domain)

    def history_scores(self, history: Ragged) -> np.ndarray:
        titles = self._titles.vectors
        return title_scores(profiles(history, titles.shape[0], self._decay), titles)

    def state(self) -> dict[str, np.ndarray]:
        return {"decay": np.array(self._decay)}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._restore(arrays)
        self._decay, self._titles = float(arrays["decay"]), DomainTitles.of(self.catalogue, self.domain)

    def with_catalogue(self, catalogue: Catalogue) -> TitleSimilarityRecommender:
        """See `StoredRecommender.with_catalogue`."""
        made = self._over(catalogue)
        made._titles = self._titles.with_catalogue(catalogue)
        return made


def title_scores(profiles_QN: sparse.csr_array, titles: sparse.csr_array) -> np.ndarray:
    """Cosines of titles summed over weighted histories: float64[Q, N]."""
    scores: np.ndarray = ((profiles_QN @ titles) @ titles.T).toarray()
    return scores
