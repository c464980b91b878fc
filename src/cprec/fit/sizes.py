"""What fits a log and the time: the size of the model, its passes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cprec.errors import ConfigError
from cprec.progress import format_seconds
from cprec.train.config import TinyModel

SIZES: tuple[tuple[TinyModel, float], ...] = (
    (TinyModel(hidden_size=128, num_hidden_layers=2, num_attention_heads=4), 0),
    (TinyModel(hidden_size=192, num_hidden_layers=3, num_attention_heads=6), 0.5e6),
    (TinyModel(hidden_size=256, num_hidden_layers=4, num_attention_heads=8), 5e6),
    (TinyModel(hidden_size=384, num_hidden_layers=6, num_attention_heads=6), 20e6),
)
"""Models from random weights, the smallest first, each with the tokens of a pass from which it has enough to learn."""
PASSES, MOST_PASSES = 3.0, 5.0
"""Passes over the examples that a larger model must have time for, and that are worth while at most."""
FEW_TOKENS, MOST_OF_FEW = 1e6, 20.0
"""A small log is read more often, until so many tokens were read, but not more often than that."""
FEWEST_PASSES = 0.2
"""Passes below which a model has learnt too little to be judged."""
REACHED = 0.8
"""Share of the rate of a timed pass that training reaches, for there is the optimizer, too, and what else runs."""
NETWORKS, OF_NETWORKS = 3, 0.4
"""Networks of the item head, and as many over words, where they take at most this share of the time that is left;
otherwise one of each, and where these take more, the head's alone."""
TRAINING = 0.7
"""Share of the time left, less that of these networks, that training the model and reading titles may take; the rest is
for the blend, simple recommenders, statistics and delays."""
READING = 1 / 3
"""What reading a token takes of the time of learning from it: the forward pass."""


@dataclass(frozen=True)
class Choice:
    """A model and how long it is trained."""

    size: TinyModel
    tokens_per_second: float
    passes: float
    seconds: float
    """Of training and of reading all titles."""


def sizes_for(tokens: int) -> list[TinyModel]:
    """The sizes that a pass of so many tokens can teach, the smallest first."""
    return [size for size, least in SIZES if tokens >= least]


def networks_for(seconds_of_one: float, seconds_left: float) -> int:
    """Networks of the item head, and over words, where one of each takes `seconds_of_one`; 0 where there is no time for
    those over words."""
    fitting = (number for number in (NETWORKS, 1) if number * seconds_of_one <= OF_NETWORKS * seconds_left)
    return next(fitting, 0)


def choose(
    rates: Sequence[tuple[TinyModel, float]], tokens: int, seconds: float, *, titles: int, may_stay: bool = False
) -> Choice:
    """The largest model that has time for `PASSES`, else the smallest, with as many passes as fit into `seconds`.

    `rates` has tokens a second of each size, the smallest first; `tokens` are those of a pass, `titles` those of all
    titles, which are read once. What `may_stay` as it is has no passes where there is no time to learn.

    Raises ConfigError where even the smallest model has no time for what it needs.
    """
    reading = READING * titles
    fitting = [(size, rate) for size, rate in rates if rate * seconds >= PASSES * tokens + reading]
    size, rate = fitting[-1] if fitting else rates[0]
    most = max(MOST_PASSES, min(MOST_OF_FEW, FEW_TOKENS / tokens))
    passes = int(100 * min(most, (rate * seconds - reading) / tokens)) / 100
    if passes < FEWEST_PASSES:
        passes, least = 0.0, reading + (0 if may_stay else FEWEST_PASSES * tokens)
        if rate * seconds < least:
            more = max(1, math.ceil((least / rate - seconds) / TRAINING / 60))
            raise ConfigError(
                f"the time is too short for this log: the model takes {format_seconds(least / rate)} at least "
                f"({tokens:,} tokens a pass, {rate:,.0f} a second), and {format_seconds(max(0, seconds))} is left for "
                f"it beside the item head and the evaluation. Give {more:,} minute{'s' * (more > 1)} more, a part of "
                "the log, or a machine with a GPU"
            )
    return Choice(size, rate, passes, (passes * tokens + reading) / rate)
