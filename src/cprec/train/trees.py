"""What fine-tuning reads with documents=trees: each user's events once, with branches for what may come next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cprec.data.dataset import event_files, read_split
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.provenance import code_sha256, file_sha256, read_resolved
from cprec.text.documents import histories, stretches
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import Shards, read_shard_manifest
from cprec.text.tokenizer import load_tokenizer
from cprec.text.trees import Drawn, grow
from cprec.train.config import FinetuneConfig
from cprec.train.training import encoder_of


@dataclass(frozen=True)
class Chosen:
    """Items drawn after each of Q histories; all are catalogue rows."""

    items: np.ndarray
    """int64[Q, D]; -1 where there was no other."""
    among: np.ndarray
    """What they were drawn from: int64[Q, M]."""
    chance: np.ndarray
    """Of each of these, float32[Q, M]."""


@dataclass(frozen=True)
class Taught:
    """Targets that other recommenders choose, to be read beside those of the log."""

    made_from: Mapping[str, str]
    """Hashes of what they depend on, beside the settings and the events."""
    choose: Callable[[Split, Ragged, np.ndarray], Chosen]
    """What they choose after histories where some item came next, -1 for none: the same each time."""


def trees_of(config: FinetuneConfig, taught: Taught | None) -> Shards:
    """Each user's events once, and after each of them the log's next item and those that are taught.

    Raises ConfigError where a row has no room for an event and its branches.
    """
    data = Path(config.data)
    about = read_shard_manifest(data / "examples" / config.domain / "train")["about"]
    least, most = read_resolved(data)["config"]["min_history"], about["max_history"]
    split = read_split(data)
    encoder = encoder_of(data, about, load_tokenizer(str(data / "tokenizer")))
    domain, kind = split.catalogue.domain_index(config.domain), about["history"]
    history, _ = histories(split, domain, kind)
    of_domain = split.catalogue.domain[history.values] == domain
    # What came next, of the domain and of the same user; -1 for nothing.
    came_E = np.append(history.values[1:], -1)
    came_E[(history.place_of == history.lengths[history.row_of] - 1) | ~np.append(of_domain[1:], False)] = -1
    is_asked = (came_E >= 0) & (history.place_of + 1 >= least)
    branches, drawn = Ragged(came_E, np.arange(len(came_E) + 1)).kept(is_asked), None
    if taught is not None:
        before, _, _ = stretches(split, domain, kind, most)
        found = taught.choose(split, before, came_E[of_domain])
        every = found.items.ravel()
        chosen = Ragged(every, offsets_of(found.items.shape[1] * of_domain)).kept(every >= 0)
        # A stable sort by event puts what is chosen behind what came.
        order = np.argsort(np.concatenate([branches.row_of, chosen.row_of]), kind="stable")
        row = np.concatenate([np.full(len(branches.values), -1), np.nonzero(found.items >= 0)[0]])
        drawn = Drawn(row[order], found.among, found.chance)
        items = np.concatenate([branches.values, chosen.values])[order]
        branches = Ragged(items, offsets_of(branches.lengths + chosen.lengths))
    if config.preference:
        beside = rejected(config, split, encoder, branches.values)
        branches = Ragged(np.column_stack([branches.values, beside]).ravel(), branches.offsets * (1 + beside.shape[1]))
    trees = grow(
        *(encoder, kind, domain, history, branches, config.max_length, most, drawn),
        learns_history=not config.preference,
    )
    longest = int(trees.column("length").max(initial=0))
    if longest > config.max_length:
        raise ConfigError(
            f"max_length={config.max_length} has no room for an event with its branches, which has up to {longest:,} "
            "tokens: raise it, or lower taught_targets or preference"
        )
    return trees


def rejected(config: FinetuneConfig, split: Split, encoder: PromptEncoder, chosen_B: np.ndarray) -> np.ndarray:
    """Items of the domain that are set against each chosen one: catalogue rows, int64[B, K].

    They are drawn among those with training events, since others would be rejected always and chosen never, uniformly
    or by how many events they have; by the seed and the place of the event alone. No two of the K and the chosen one
    have the same title. Items of the history may be drawn.

    Raises ConfigError where too few titles were chosen in training.
    """
    rows = split.catalogue.rows_of(config.domain)
    counts_V = np.bincount(split.train.item, minlength=len(split.catalogue))[rows]
    text_V, number = encoder.titles(rows).numbers(), config.preference
    if (there := len(np.unique(text_V[counts_V > 0]))) <= number:
        raise ConfigError(
            f"preference={number} sets {number} titles against each, and training events of {config.domain} have "
            f"{there:,} different titles: set it to {there - 1} at most"
        )
    weights_V = counts_V if config.rejected == "popularity" else counts_V > 0
    until_V, generator = np.cumsum(weights_V), np.random.default_rng(config.seed)
    items_BX = np.column_stack([chosen_B - rows[0], np.full((len(chosen_B), number), -1)])
    while len(open_B := np.flatnonzero((items_BX < 0).any(1))):
        some = items_BX[open_B]
        some[some < 0] = np.searchsorted(until_V, generator.integers(until_V[-1], size=(some < 0).sum()), side="right")
        # What has the title of one before it is drawn anew.
        text_BX = text_V[some]
        same_BXX = np.tril(text_BX[:, :, None] == text_BX[:, None], k=-1)
        items_BX[open_B] = np.where(same_BXX.any(2), -1, some)
    return rows[0] + items_BX[:, 1:]


def trees_made_from(config: FinetuneConfig) -> dict[str, str]:
    """Hashes of what trees depend on, beside the settings."""
    events = {f"trees/{name}": file_sha256(Path(config.data, name)) for name in event_files(config.data)}
    return {"trees": code_sha256("cprec.train.trees"), **events}
