"""What training reads: documents of several shard folders in groups, and the share of the tokens of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.schema import MIXED, SPECIFIC

if TYPE_CHECKING:
    from cprec.text.shards import Shards

TEXT, EXAMPLES = "general text", "examples"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the tokens that a phase of training reads; shards are made once, whatever these say."""

    mixed_share: float = 0.5
    """Of the behaviour sequences' tokens, the share of all-domain mixed ones; the rest is domain-specific (our
    reconstruction: 1:1)."""
    domain_temperature: float = 0.7
    """Domains share the specific tokens in proportion to (number of events) ** this: 1 as they come, 0 all alike."""
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    """Factors on what the temperature gives single domains: 2 doubles a domain's weight, 0 leaves it out."""
    text_share: float = 0.0
    """Share of all tokens from the general text in `replay`."""
    examples_share: float = 0.0
    """Share of all tokens from fine-tuning examples of the pre-training domains (loss on their targets only)."""

    def __post_init__(self) -> None:
        for name in ("mixed_share", "text_share", "examples_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..1")
        if self.text_share + self.examples_share > 1:
            raise ConfigError(
                f"text_share={self.text_share} and examples_share={self.examples_share} are more than all tokens"
            )
        for domain, weight in self.domain_weights.items():
            if not weight >= 0:
                raise ConfigError(f"domain_weights.{domain}={weight} must be 0 or more")


@dataclass(frozen=True, eq=False)
class Group:
    """Documents that a mixture weighs together: one domain's specific ones, all mixed ones, or those of one source."""

    name: str
    """As `books (specific)`, `mixed`, `general text`, `examples of books`."""
    kind: str
    """specific, mixed, general text or examples."""
    shards: Shards
    documents: np.ndarray
    """Their row numbers in the shards: int64[D]."""
    domain: str = ""
    """Of specific ones and examples."""
    targets_only: bool = False
    """Whether the loss covers the target's tokens alone."""

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.shards.column("length")[self.documents]

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def num_events(self) -> int:
        return int(self.shards.column("num_events")[self.documents].sum())


def behaviour_groups(shards: Shards) -> list[Group]:
    """The groups of a shard folder of behaviour sequences: specific ones by domain, then mixed ones.

    Read from the manifest's list of pieces (runs of documents of one domain and kind).
    """
    rows: dict[tuple[bool, str], list[np.ndarray]] = {}
    start = 0
    for piece in shards.manifest["pieces"]:
        stop = start + piece["num_documents"]
        mixed = piece["kind"] == MIXED
        rows.setdefault((mixed, "" if mixed else piece["domain"]), []).append(np.arange(start, stop))
        start = stop
    return [
        Group(MIXED, MIXED, shards, np.concatenate(parts))
        if mixed
        else Group(f"{domain} ({SPECIFIC})", SPECIFIC, shards, np.concatenate(parts), domain)
        for (mixed, domain), parts in sorted(rows.items())
    ]


class Corpus:
    """The documents of several groups as one list; suffix D = documents in all, the first group's first."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._starts = np.cumsum([0, *(len(group.documents) for group in groups)])
        self.lengths = np.concatenate([np.empty(0, np.int64), *(group.lengths for group in groups)])
        """int64[D]"""
        self.group = np.repeat(np.arange(len(groups), dtype=np.int16), np.diff(self._starts))
        """The place of each document's group: int16[D]."""

    @classmethod
    def of(cls, shards: Shards, *, targets_only: bool = False) -> Corpus:
        """All documents of one shard folder as one group."""
        return cls([Group("", "", shards, np.arange(len(shards)), targets_only=targets_only)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def names(self) -> list[str]:
        return [group.name for group in self.groups]

    def take(self, documents: np.ndarray) -> tuple[Ragged, np.ndarray]:
        """Tokens of some documents, int64, and the place of each one's first token that is a target: int64[len]."""
        offsets = offsets_of(self.lengths[documents])
        tokens = np.empty(offsets[-1], dtype=np.int64)
        first_target = np.ones(len(documents), dtype=np.int64)
        of = self.group[documents]
        for number in np.unique(of):
            group, mine = self.groups[number], np.flatnonzero(of == number)
            rows = group.documents[documents[mine] - self._starts[number]]
            found = group.shards.take(rows)
            tokens[np.repeat(offsets[mine] - found.offsets[:-1], found.lengths) + np.arange(len(found.values))] = (
                found.values
            )
            if group.targets_only:
                first_target[mine] = group.shards.column("target_start")[rows]
        return Ragged(tokens, offsets), first_target


def shares(groups: Sequence[Group], mixture: Mixture) -> np.ndarray:
    """The share of all tokens that each group is to have, float64[groups], summing to 1.

    General text and examples get their shares; of the rest, mixed sequences get `mixed_share` and domains divide what
    is left in proportion to (events in the domain) ** temperature, times their weight. A kind without documents leaves
    its share to the others. Raises ConfigError for a weight of a domain that is not there, for a share of text or
    examples that are not there, and where nothing is left to read.
    """
    domains = [group.domain for group in groups if group.kind == SPECIFIC]
    for domain in mixture.domain_weights:
        if domain not in domains:
            raise ConfigError(
                f"domain_weights.{domain}: no such domain in the shards; there are {', '.join(domains) or 'none'}"
            )
    kind = np.array([group.kind for group in groups], dtype=object)
    weight = np.zeros(len(groups))
    for name, share, what in (
        (TEXT, mixture.text_share, "name files of general text in `replay`"),
        (EXAMPLES, mixture.examples_share, "prepare the data with a pre-training domain among target_domains"),
    ):
        if share and name not in kind:
            raise ConfigError(f"the mixture asks for {share:.1%} {name}, but there are none: {what}")
        tokens = np.array([group.num_tokens for group in groups]) * (kind == name)
        weight += share * tokens / max(1, tokens.sum())
    rest = 1 - weight.sum()
    specific, mixed = kind == SPECIFIC, kind == MIXED
    by_domain = np.array([_domain_weight(group, mixture) for group in groups]) * specific
    of_mixed = mixture.mixed_share if by_domain.any() else 1.0
    if not mixed.any():
        of_mixed = 0.0
    weight[mixed] = rest * of_mixed
    if by_domain.any():
        weight += rest * (1 - of_mixed) * by_domain / by_domain.sum()
    if not weight.sum() > 0:
        raise ConfigError("the mixture leaves nothing to read: every share or weight that has documents is 0")
    return weight / weight.sum()


def _domain_weight(group: Group, mixture: Mixture) -> float:
    events = float(group.num_events)
    return events**mixture.domain_temperature * mixture.domain_weights.get(group.domain, 1.0) if events else 0.0


def within_caps(share: np.ndarray, tokens: float, room: np.ndarray) -> np.ndarray:
    """Tokens of each group: its share of `tokens`, but no more than its room; what is over goes to the others.

    The others take it in proportion to their shares, as far as they have room; where no group has any, less is read
    than was asked for.

    >>> within_caps(np.array([0.5, 0.3, 0.2]), 100, np.array([20, 1000, 30])).tolist()
    [20.0, 50.0, 30.0]
    """
    wanted = np.zeros(len(share))
    open_ = share > 0
    while open_.any():
        left = tokens - wanted[~open_].sum()
        wanted[open_] = left * share[open_] / share[open_].sum()
        full = open_ & (wanted > room)
        if not full.any():
            break
        wanted[full] = room[full]
        open_ &= ~full
    return wanted
