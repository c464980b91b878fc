"""Settings of data preparation and of the mixture that training reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from cprec.data.config import Rules, Sources, SplitSpec
from cprec.errors import ConfigError
from cprec.partition import share_of
from cprec.schema import TITLE
from cprec.text.prompts import Template

TINY = "tiny"
"""The tokenizer that is trained on the titles of the data."""
ROUNDING = 1e-9
"""What shares may sum to above 1."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the tokens that a phase of training reads. Shards do not depend on them."""

    mixed_share: float = 0.5
    """Of the behaviour sequences' tokens, the share of all-domain mixed ones; the rest is domain-specific (our
    reconstruction: 1:1)."""
    domain_temperature: float = 0.7
    """Domains share the specific tokens in proportion to (number of events) ** this: 1 keeps their sizes, 0 makes them
    equal."""
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    """Factors on the weights of single domains: 2 doubles the weight that the temperature gives, 0 leaves it out."""
    text_share: float = 0.0
    """Share of all tokens from the general text in `replay`."""
    examples_share: float = 0.0
    """Share of all tokens from fine-tuning examples of the pre-training domains (loss on their targets only)."""
    walks_share: float = 0.0
    """Share of all tokens from random walks on the graph of training events, written as histories (`curriculum`)."""
    rules_share: float = 0.0
    """Share of all tokens from sentences on pairs of items that training users had both of (`curriculum`)."""
    item_text_share: float = 0.0
    """Share of all tokens from sentences on the brand and the categories of items with training events."""

    def __post_init__(self) -> None:
        of_all = ("text_share", "examples_share", "walks_share", "rules_share", "item_text_share")
        for name in ("mixed_share", *of_all):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..1")
        if math.fsum(getattr(self, name) for name in of_all) > 1 + ROUNDING:
            asked = [f"{name}={getattr(self, name)}" for name in of_all if getattr(self, name)]
            raise ConfigError(f"{', '.join(asked[:-1])} and {asked[-1]} are more than all tokens: lower one of them")
        for domain, weight in self.domain_weights.items():
            if not weight >= 0:
                raise ConfigError(f"domain_weights.{domain}={weight} must be 0 or more")

    @property
    def has_curriculum(self) -> bool:
        """Whether it asks for documents that are made of training events or of items."""
        return self.walks_share > 0 or self.rules_share > 0 or self.item_text_share > 0


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """How the documents are made that no user wrote, for the shares of a mixture that ask for them."""

    walk_p: float = 1.0
    """A walk goes back to the item before the last with the weight of the link over this (node2vec's p)."""
    walk_q: float = 1.0
    """A walk goes to an item that the one before the last does not lead to with the weight of the link over this
    (node2vec's q)."""
    walk_length: int = 20
    """Items of a walk; the latest ones that fit a row."""
    walks_per_item: int = 10
    """Walks in a domain, for each of its items with training events."""
    min_support: int = 5
    """Training users who had both items of a rule, at least."""

    def __post_init__(self) -> None:
        for name in ("walk_p", "walk_q"):
            if not 0.01 <= getattr(self, name) <= 100:  # beyond that, drawing a step may take thousands of trials
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0.01..100")
        for name in ("walk_length", "min_support"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 2")
        _check_positive(self, "walks_per_item")


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """How the events of users become documents, examples and queries."""

    target_domains: tuple[str, ...]
    """Domains to fine-tune and evaluate on."""
    pretrain_domains: tuple[str, ...] = ()
    """Domains to pre-train on; none named means all. A target that is not among them is *unseen*: neither its items
    nor the users it is tested on occur in pre-training."""
    split: SplitSpec = SplitSpec()
    """What is held out, in every domain."""
    mixed_order: Literal["time", "interleave"] = "time"
    """How mixed sequences order events of several domains: by time, which leaves out domains whose times are only an
    order; or interleaved, which spreads the events of those evenly among the user's others (no one knows when they
    happened)."""
    document_order: Literal["time", "shuffled"] = "time"
    """Events inside the documents to pre-train on: in time order, or shuffled, to measure what the order contributes.
    Held-out documents, examples and queries stay in time order."""
    min_events: int = 5
    """Shortest behaviour sequence to pre-train on."""
    max_events: int = 20
    """Longer sequences are cut into chunks of nearly equal size."""
    max_document_tokens: int = 1024
    """A chunk with more tokens is cut in two again."""
    history: Literal["specific", "mixed"] = "specific"
    """What prompts of fine-tuning and evaluation show: the target domain's events, or those of all domains."""
    max_history: int = 10
    """Events in a prompt at most, the latest ones; queries keep the whole history."""
    min_history: int = 3
    """Events in a prompt at least; shorter ones give no example and no query."""
    heldout_share: float = 0.005
    """Share of users whose sequences are only used to measure perplexity, by hash of the user."""
    seed: int = 0
    """Decides the held-out users and shuffled ties."""

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"heldout_share={self.heldout_share} must lie in 0..1")
        _check_positive(self, "min_events", "max_events", "max_history", "max_document_tokens")
        if self.min_events < 2 or self.max_events < self.min_events:
            raise ConfigError(
                f"min_events={self.min_events} must be at least 2 and at most max_events={self.max_events}"
            )
        if not 0 <= self.min_history <= self.max_history:
            raise ConfigError(f"min_history={self.min_history} must lie in 0..max_history={self.max_history}")


TitleCut = Literal["plain", "distinct"]
PLAIN: TitleCut = "plain"
DISTINCT: TitleCut = "distinct"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(DocumentRules, Rules, Sources):
    """Settings of data preparation: where logs come from, which rows are kept, and what documents are made of them."""

    output_dir: str
    """The data folder to write."""
    tokenizer: str = TINY
    """The base model's tokenizer (a Hugging Face name, a folder or a GGUF file), or `tiny`: a byte-level BPE trained on
    the titles."""
    vocabulary_size: int = 8192
    """Of the tiny tokenizer."""
    add_bos_token: Literal["auto", "true", "false"] = "auto"
    """Whether documents and prompts begin with the tokenizer's beginning-of-sequence token; auto: as it begins a text
    itself, which is how its model was trained."""
    max_title_tokens: int = 32
    """Titles are cut to this many tokens; items whose cut titles are equal cannot be told apart."""
    title_cut: TitleCut = PLAIN
    """Which tokens of a longer title are kept: plain, the first ones; distinct, where that leaves titles of a domain
    equal, three quarters of them and then those from where these titles differ."""
    item_fields: tuple[str, ...] = (TITLE,)
    """What stands for an item in every text: title, or title and brand or categories or both, each cut to
    max_title_tokens; they tell items of equal titles apart."""
    engine: str = "duckdb"
    """What runs the steps that concern all rows: duckdb, or a Spark session (spark://...)."""
    memory_limit: str | None = None
    """Memory for the table engine, as 8GB; None: 60 % of the free memory."""
    spill_dir: str | None = None
    """Where the table engine puts data that do not fit into memory; None: inside the unfinished data folder."""
    workers: int | None = None
    """Processes that write documents side by side; None: one for each core. The result does not depend on it."""
    partition: str | None = None
    """i/n, from 0/n to (n-1)/n: write only every n-th part of the documents, on a scheduler, say; the same command with
    each i, in any order or at once, gives the same folder as one without. The last to finish puts the parts
    together."""

    def __post_init__(self) -> None:
        for settings in (Sources, Rules, DocumentRules):
            settings.__post_init__(self)
        if not self.target_domains and not self.text:
            raise ConfigError("target_domains is empty: name at least one domain to fine-tune and evaluate on")
        if self.text and (self.target_domains or self.pretrain_domains):
            raise ConfigError("a folder of text has no domains: leave target_domains and pretrain_domains empty")
        _check_positive(self, "max_title_tokens")
        if self.workers is not None:
            _check_positive(self, "workers")
        self.template()
        share_of(self.partition)

    def document_rules(self) -> DocumentRules:
        """How events become documents, as a record of its own."""
        return DocumentRules(**{field.name: getattr(self, field.name) for field in fields(DocumentRules)})

    def template(self) -> Template:
        """The template with the item fields that are asked for. Raises ConfigError for others than there are."""
        return Template(item_fields=self.item_fields)


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} must be at least 1")
