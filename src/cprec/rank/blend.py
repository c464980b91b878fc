"""A blend: log-probabilities by the model and log-scores of other recommenders, weighted; its files beside a model.

    score(item) = weight * log P(item | history) + weight * log P(item | history) by the item head, if there is one
                + sum over parts of weight * log max(score / best score, floor)

`cprec blend` chooses the numbers and writes `blend.json` and the arrays of the parts, `blend/PART.npz`.
Suffixes: Q queries, N items of the domain.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from scipy import sparse

from cprec.baselines.ease import EASERecommender
from cprec.baselines.ials import IALSRecommender
from cprec.baselines.item_knn import ItemKNNRecommender
from cprec.baselines.item_values import FreshnessRecommender, ItemValuesRecommender
from cprec.baselines.popularity import PopularityRecommender, RecentPopularityRecommender
from cprec.baselines.text import TitleSimilarityRecommender
from cprec.baselines.transition_graph import TransitionGraphRecommender
from cprec.data.catalogue import Catalogue
from cprec.data.titles import ALIKE, TitleWords
from cprec.data.word_index import QUERY
from cprec.errors import ConfigError, DataError, ModelError
from cprec.files import whole_folder, write_whole
from cprec.provenance import file_sha256
from cprec.rank.blend_file import AGAIN, BLEND, ITEM_HEAD, MODEL, VERSION, Setting, read_about
from cprec.rank.why import THE_MODEL
from cprec.recommender import RankingQuery
from cprec.scoring import ScoringRecommender, StoredRecommender, check_domain
from cprec.search.priors import Priors
from cprec.systems.recipes.sasrec import SASRecRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRecRecommender

FOLDER = "blend"
"""The folder of the parts' arrays, in that of the model."""
KINDS: Mapping[str, type[StoredRecommender]] = {
    "popularity": PopularityRecommender,
    "recent popularity": RecentPopularityRecommender,
    "freshness": FreshnessRecommender,
    "titles": TitleSimilarityRecommender,
    "transition graph (last item)": TransitionGraphRecommender,
    "transition graph": TransitionGraphRecommender,
    "transition graph (two hops)": TransitionGraphRecommender,
    "transition graph (titles)": TransitionGraphRecommender,
    "ItemKNN": ItemKNNRecommender,
    "ItemKNN (published)": ItemKNNRecommender,
    "EASE": EASERecommender,
    "EASE (published)": EASERecommender,
    "iALS": IALSRecommender,
    "iALS (published)": IALSRecommender,
    "SASRec": SASRecRecommender,
    "SASRec (sampled softmax)": SASRecRecommender,
    "SASRec (wide)": SASRecRecommender,
    "SASRec (titles)": TitleSASRecRecommender,
    "SASRec (titles x3)": TitleSASRecRecommender,
}
"""What a blend can hold, by the names of tables: all whose state is a few arrays. Any other part is a column of a
file."""


def check_parts(names: Sequence[str], columns: Iterable[str] = ()) -> None:
    """Raise ConfigError for names that no blend can hold or that stand twice, and columns whose names are taken."""
    if unknown := [name for name in names if name not in KINDS]:
        raise ConfigError(f"parts: a blend cannot hold {unknown[0]!r}; it can hold {', '.join(KINDS)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"parts={', '.join(names)}: give one or more, all different, of {', '.join(KINDS)}")
    if taken := [name for name in columns if name in (*KINDS, THE_MODEL, QUERY, "model", "item head")]:
        raise ConfigError(f"columns: {taken[0]!r} is the name of another part of blends: rename the column")


# ---- the blend -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A recommender in a blend."""

    name: str
    """Its name in tables, which no other part has: a baseline and its published variant call themselves alike."""
    recommender: ScoringRecommender
    weight: float
    floor: float
    """The least share of the query's best score that counts: an item with less has this share."""

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf and 0 < self.floor <= 1):
            raise ConfigError(
                f"{self.name}: weight={self.weight} must be a number above 0, and floor={self.floor} lie "
                "above 0 and at most at 1"
            )

    @property
    def least(self) -> float:
        """The prior of an item of which the recommender says nothing."""
        return self.weight * math.log(max(self.floor, self.recommender.least_share))


@dataclass(frozen=True)
class Blend:
    """Priors from the scores of recommenders, and the model's weight among them: a `PriorSource` for one domain."""

    domain: str
    catalogue: Catalogue
    """The items that are asked for."""
    learnt: Catalogue
    """Those that the parts have learnt. Parts that read titles know items that came after by theirs. Of the others such
    an item has the mean of what they say of the `ALIKE` items with the most similar titles, and of a column, which is
    learnt from nothing, the least prior; none of these sees it in a history."""
    parts: tuple[Part, ...]
    """Those with a weight above 0."""
    weight: float
    """Of the model's log-probability; 0 where that says nothing."""
    item_head: float = 0.0
    """Of the log-probability by the model's item head, which knows new items as the model does."""

    def __post_init__(self) -> None:
        for name, weight in (("model", self.weight), ("item head", self.item_head)):
            if not 0 <= weight < math.inf:
                raise ConfigError(f"the weight {weight} of the {name} must be a number of 0 or more")
        if not (self.weight or self.item_head or self.parts):
            raise ConfigError("all weights of the blend are zero: give the model or a part a weight above 0")

    @classmethod
    def of(cls, setting: Setting, domain: str, parts: Mapping[str, ScoringRecommender], catalogue: Catalogue) -> Blend:
        """The blend of these numbers; `parts` has those with a weight, made for the catalogue."""
        weighted = (Part(name, parts[name], weight, floor) for name, (weight, floor) in setting.parts.items() if weight)
        return cls(domain, catalogue, catalogue, tuple(weighted), setting.model, setting.item_head)

    @property
    def weights(self) -> dict[str, float]:
        """See `PriorSource.weights`."""
        model = self.weight + self.item_head
        of_model = {THE_MODEL: model} if model else {}
        return of_model | {part.name: part.weight for part in self.parts}

    def priors(self, domain: str, queries: Sequence[RankingQuery]) -> Priors:
        """The sum of the parts' weighted log-scores, in the order of the catalogue, and the weights of the model.

        Raises ConfigError for another domain than its own, ModelError for scores that are not finite.
        """
        values_QN = np.zeros((len(queries), len(self.catalogue.rows_of(self.domain))))
        for prior_QN in self.priors_of_parts(domain, queries).values():
            values_QN += prior_QN
        return Priors(values_QN, self.weight, self.item_head)

    def priors_of_parts(self, domain: str, queries: Sequence[RankingQuery]) -> dict[str, np.ndarray]:
        """The weighted log-scores of each part, by its name: float64[Q, N]. Raises as `priors` does."""
        check_domain("the blend", (self.domain,), domain)
        known = [self._known(query) for query in queries]
        out = {}
        for part in self.parts:
            grown = self._grown.get(part.name)
            if grown:
                share_QN = shares(grown, domain, queries)
            else:
                share_QN = self._carried_over(part.recommender, shares(part.recommender, domain, known))
            out[part.name] = part.weight * np.log(np.maximum(share_QN, part.floor))
        return out

    def _carried_over(self, recommender: ScoringRecommender, share_QL: np.ndarray) -> np.ndarray:
        """Shares of all items of the catalogue, from those of the items that a part has learnt: float64[Q, N]."""
        if self.catalogue is self.learnt:
            return share_QL
        new_N = self._place_N < 0
        share_QN = share_QL[:, self._place_N]
        if isinstance(recommender, ItemValuesRecommender):
            share_QN[:, new_N] = recommender.least_share
        else:
            share_QN[:, new_N] = share_QL @ self._alike_ML.T
        return share_QN

    @cached_property
    def _grown(self) -> dict[str, ScoringRecommender]:
        """Parts that know the items of the catalogue that came after, by name."""
        if self.catalogue is self.learnt:
            return {}
        stored = {part.name: part.recommender for part in self.parts if isinstance(part.recommender, StoredRecommender)}
        made = {name: recommender.with_catalogue(self.catalogue) for name, recommender in stored.items()}
        return {name: recommender for name, recommender in made.items() if recommender is not None}

    @cached_property
    def _alike_ML(self) -> sparse.csr_array:
        """Weights of the learnt items by whose titles each item that came after is guessed."""
        titles = np.array(self.catalogue.titles_of(self.domain), dtype=object)[self._place_N < 0]
        return TitleWords(self.learnt.titles_of(self.domain)).nearest(list(titles), ALIKE)

    @cached_property
    def _place_N(self) -> np.ndarray:
        """Where each item of the catalogue stands among those that were learnt; -1 for one that came after."""
        return self.catalogue.places_in(self.learnt, self.domain)

    def _known(self, query: RankingQuery) -> RankingQuery:
        """The query, without events that the parts cannot know."""
        if self.catalogue is self.learnt:
            return query
        known = (item for item in query.history if self.learnt.row_of_id(item.domain, item.item_id) is not None)
        return replace(query, history=tuple(known))

    def with_catalogue(self, catalogue: Catalogue) -> Blend:
        """See `PriorSource.with_catalogue`. Raises ConfigError where the domain is not there."""
        check_domain("the catalogue", catalogue.domains, self.domain)
        made = replace(self, catalogue=catalogue)
        _ = made._grown, made._alike_ML  # now, and not when the first query waits for them
        return made


def shares(recommender: ScoringRecommender, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
    """Scores as shares of each query's best: float64[Q, N], from 0 to 1. All are 0 where nothing speaks for any item.

    Raises ModelError for scores that are not finite.
    """
    scores_QN = recommender.scores_once(domain, queries).astype(float)
    if not np.isfinite(scores_QN).all():
        raise ModelError(f"{recommender.name} has scores that are not finite: its files are broken, blend again")
    best_Q1 = scores_QN.max(axis=1, keepdims=True)
    if recommender.scale == "logit":
        result: np.ndarray = np.exp(scores_QN - best_Q1)
    else:
        result = np.maximum(scores_QN, 0) / np.where(best_Q1 > 0, best_Q1, 1)
    return result


class BlendedParts(ScoringRecommender):
    """A blend without the model. Items at the floor of every part are not returned from the full catalogue."""

    name = "blend without the model"

    def __init__(self, blend: Blend) -> None:
        self.catalogue, self._blend = blend.catalogue, blend
        self.floor = sum(part.least for part in blend.parts) + 1e-9  # the same sum, rounded otherwise, is no more

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`."""
        return self._blend.priors(domain, queries).values_UN


# ---- files -----------------------------------------------------------------------------------------------------------


def write_blend(
    model: str | Path,
    domain: str,
    parts: Mapping[str, StoredRecommender],
    settings: Mapping[str, Setting],
    about: Mapping[str, Any],
) -> None:
    """Write a blend beside a model, in place of any that is there.

    `settings` are those that `cprec.blend.choose` finds; parts that none gives a weight are left out. `about` says what
    they were chosen on.
    """
    used = [name for name in parts if any(setting.parts[name][0] for setting in settings.values())]
    with whole_folder(Path(model, FOLDER)) as folder:
        for name in used:
            np.savez(folder / _file(name), **parts[name].arrays())  # type: ignore[arg-type]
    content = {
        "schema_version": VERSION,
        "domain": domain,
        **{name: setting.to_json() for name, setting in settings.items()},
        "files": {name: file_sha256(Path(model, FOLDER, _file(name))) for name in used},
        "catalogue": Catalogue.read(model).digest(),
        "model": identity(model),
        **about,
    }
    write_whole(Path(model, BLEND), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def identity(model: str | Path) -> dict[str, str]:
    """Hashes of the files that tell what a blend belongs to: what the model says of itself, and its item head."""
    files = [Path(model, name) for name in (MODEL, ITEM_HEAD)]
    return {path.name: file_sha256(path) for path in files if path.is_file()}


def read_blend(model: str | Path, catalogue: Catalogue, setting: str = "blend") -> Blend:
    """The blend beside a model, by the numbers of `setting`: `blend`; `vectors`, the best without log P; or
    `without_model`, the best of parts alone.

    Raises ConfigError or DataError, which name the file, where it is missing or damaged, belongs to another model or
    catalogue, or its parts are gone or changed.
    """
    path, about = Path(model, BLEND), read_about(model)
    if about["model"] != identity(model):
        raise ConfigError(f"{path} was chosen for another model than {model} holds now{AGAIN}")
    if about["catalogue"] != catalogue.digest():
        raise ConfigError(f"{path} was chosen for another catalogue than that of {model}{AGAIN}")
    if setting not in about:
        raise ConfigError(f"{path} has no numbers for {setting!r}: the model had no item head then{AGAIN}")
    try:
        chosen, domain = Setting.from_json(about[setting]), str(about["domain"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}){AGAIN}") from None
    used = [name for name, (weight, _) in chosen.parts.items() if weight]
    parts = {name: read_part(Path(model), name, about["files"].get(name), catalogue) for name in used}
    try:
        return Blend.of(chosen, domain, parts, catalogue)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_part(model: Path, name: str, sha256: str | None, catalogue: Catalogue) -> StoredRecommender:
    """A part of a model's blend, from its file. Raises DataError where that is gone, damaged, or another one."""
    path = model / FOLDER / _file(name)
    if sha256 is None:
        raise DataError(f"{model / BLEND} has a part {name!r} without a file that it knows{AGAIN}")
    if not path.is_file():
        raise DataError(f"{path} is gone, a part of the blend of {model}{AGAIN}")
    if file_sha256(path) != sha256:
        raise DataError(f"{path} is not the file that {model / BLEND} was written with{AGAIN}")
    try:
        with np.load(path) as arrays:
            return KINDS.get(name, ItemValuesRecommender).from_arrays(dict(arrays), catalogue)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}){AGAIN}") from None


def _file(name: str) -> str:
    """The name of a part's file; columns have any names, which may not be those of files."""
    if name not in KINDS:
        return f"column-{quote(name, safe='')}.npz"
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".npz"
