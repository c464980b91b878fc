"""P5: an item is a number that is written in pieces, and several kinds of prompts teach one model.

Geng et al. 2022, "Recommendation as Language Processing"; Hua et al. 2023, "How to Index Item IDs for Recommendation
Foundation Models", for the numbers. P5 adds two parts to TIGER's decoder: vectors of items' places in the row, which
bind the pieces of an item (whole-word embedding), and three tasks, named by a row's first token: the next item of the
whole history, that of the latest few items, and an item without a history (direct recommendation). Rankings ask for the
first. Without both parts and with `indexing=titles` it is TIGER.

Deviations: a prompt is the token of its task, and pieces are digits in base 100, or codes (theirs are words and pieces
of T5, in some 47 prompts; users are numbers, too, and ratings, explanations and reviews are more tasks). One decoder
reads and writes: each item of a row is a target (there the last one), and the item that is written has the vector of
its place (there only what is read). These vectors start at zero. Clusters are those of the strongest links within five
events (there counts of all pairs of a history), regularised, and each has its token. Categories part where their texts
do. Items without training events have random numbers; Hua et al. number them along held-out events, which gives away a
little, and Geng et al. so number all items (Rajput et al. 2023 report this).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.provenance import file_sha256
from cprec.systems.codes import BEGIN, ItemCodes
from cprec.systems.generator import CodeStream
from cprec.systems.given_numbers import check_numbers, read_numbers
from cprec.systems.indexing import Kind, item_codes, numbers_of, with_own_tokens
from cprec.systems.prompted import Tasks, TaskStream, add_whole_words
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import TrainedRecommender

INDEXINGS = (*get_args(Kind), "titles", "given")


@dataclass(frozen=True, kw_only=True)
class P5(CodeSettings):
    """Settings of P5; clusters and leaves are those of Hua et al. for Beauty, the others ours."""

    num_codes: int = 100
    """Digits, the base of numbers; with indexing=titles codes of a level."""
    indexing: Kind | Literal["titles", "given"] = "sequential"
    """How items get their numbers: in the order of training events, one user after the other; at random; by clusters of
    items that stand near each other in training; by categories; by codes of titles as in TIGER; or from a file."""
    own_tokens: bool = False
    """Each item ends with a token of its own; it takes the place of a number in its cluster or category (hybrid)."""
    num_clusters: int = 20
    """Clusters that all items, and each cluster that is too large, are cut into (collaborative)."""
    leaf_size: int = 200
    """Items of a cluster that is not cut again, at most."""
    num_neighbours: int = 20
    """Items that an item is linked to, the strongest ones (collaborative)."""
    numbers: str = ""
    """An .npz file of codes for indexing=given; see `given_numbers.read_numbers`."""
    whole_words: bool = True
    """Tokens have the vector of their item's place in the row, too."""
    recent_weight: float = 0.2
    """How often a row teaches the next item of the latest few, where whole histories have 1; 0: never."""
    direct_weight: float = 0.1
    """How often a row teaches an item without its history; 0: never."""
    num_recent: int = 3
    """The latest few items, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("leaf_size", "num_neighbours", "num_recent")
        self.require_not_negative("recent_weight", "direct_weight")
        if self.indexing not in INDEXINGS:
            raise ConfigError(f"indexing={self.indexing!r}: expected one of {', '.join(INDEXINGS)}")
        of_titles = {"of", "quantiser", "collisions", "num_levels", "vectors", "text_size"}
        for each in fields(CodeSettings) if self.indexing != "titles" else ():
            if each.name in of_titles and (value := getattr(self, each.name)) != each.default:
                raise ConfigError(f"{each.name}={value!r} says how codes of titles are made: give indexing=titles")
        if (self.indexing == "given") != bool(self.numbers):
            raise ConfigError(f"indexing={self.indexing!r} with numbers={self.numbers!r}: a file goes with given alone")
        if min(self.num_codes, self.num_clusters) < 2:
            raise ConfigError(f"num_codes={self.num_codes}, num_clusters={self.num_clusters}: both must be 2 or more")

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`. Raises LeakageError for a file of numbers that know held-out events."""
        if self.numbers:
            check_numbers(self.numbers, split, domain)
        return super().make(split, domain, seed=seed, folder=folder)

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"numbers": file_sha256(self.numbers)} if self.numbers else {})

    def codes(self, data: TrainingSequences, seed: int) -> ItemCodes:
        """See `CodeSettings.codes`. Where there are several tasks, the last two tokens name them."""
        if self.indexing == "titles":
            found = super().codes(data, seed)
        elif self.indexing == "given":
            found = item_codes(read_numbers(self.numbers, data))
        else:
            names = ("num_codes", "num_clusters", "leaf_size", "num_neighbours")
            sizes = {name: getattr(self, name) for name in names}
            found = item_codes(numbers_of(data, self.indexing, seed, **sizes, runs=not self.own_tokens))
        found = with_own_tokens(found) if self.own_tokens else found
        return replace(found, vocabulary_size=found.vocabulary_size + 2 * (self.recent_weight + self.direct_weight > 0))

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> CodeStream:
        """See `CodeSettings.stream`."""
        size, weights = codes.vocabulary_size, (1, self.recent_weight, self.direct_weight)
        tasks = Tasks(
            weights=weights, marks=(BEGIN, size - 2, size - 1), num_before=(self.max_length, self.num_recent, 0)
        )
        return TaskStream(data, codes, self.max_length, self.passes(seed), tasks)

    def decoder(self, codes: ItemCodes) -> Any:
        """See `CodeSettings.decoder`."""
        model = super().decoder(codes)
        if self.whole_words:
            add_whole_words(model, self.max_length + 2)
        return model


RANDOM, SEMANTIC = P5(indexing="random"), P5(indexing="semantic")
"""Numbers at random, the control of the others; numbers by categories."""
COLLABORATIVE, HYBRID = P5(indexing="collaborative"), P5(indexing="collaborative", own_tokens=True)
"""Numbers by clusters of the training graph; clusters, and then a token of each item's own."""
