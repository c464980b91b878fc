"""Computes a mixture: the share of the tokens that each domain and kind of document has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cprec.errors import ConfigError
from cprec.schema import MIXED, SPECIFIC
from cprec.text.config import Mixture
from cprec.text.corpus import CURRICULUM, EXAMPLES, TEXT, Group


def shares(groups: Sequence[Group], mixture: Mixture) -> np.ndarray:
    """The share of all tokens that each group should have: float64[groups], summing to 1.

    General text, examples and the kinds of the curriculum get their shares; text that stands alone gets all. Of the
    rest, mixed sequences get `mixed_share`, and the domains divide what is left in proportion to (events in the
    domain) ** temperature, times their weight; so they divide each kind of the curriculum. Mixed or specific sequences
    that have no documents leave their share to the others. Raises ConfigError for the weight of a domain that has no
    documents, for a share of another kind where there are none, and where nothing is left to read.
    """
    domains = [group.domain for group in groups if group.kind == SPECIFIC]
    for domain in mixture.domain_weights:
        if domain not in domains:
            raise ConfigError(
                f"domain_weights.{domain}: no such domain in the shards; there are {', '.join(domains) or 'none'}"
            )
    kind = np.array([group.kind for group in groups], dtype=object)
    weight = np.zeros(len(groups))
    text_share = 1.0 if groups and (kind == TEXT).all() else mixture.text_share
    for name, share, what in (
        (TEXT, text_share, "name files of general text in `replay`"),
        (EXAMPLES, mixture.examples_share, "prepare the data with a pre-training domain among target_domains"),
    ):
        if share and name not in kind:
            raise ConfigError(f"the mixture asks for {share:.1%} {name}, but there are none: {what}")
        # Groups of one kind divide its share in proportion to their tokens.
        tokens = np.array([group.num_tokens for group in groups]) * (kind == name)
        weight += share * tokens / max(1, tokens.sum())
    of_domain = {group.domain: _domain_weight(group, mixture) for group in groups if group.kind == SPECIFIC}
    for name, share in zip(
        CURRICULUM, (mixture.walks_share, mixture.rules_share, mixture.item_text_share), strict=True
    ):
        divided = np.array([of_domain.get(group.domain, 0.0) for group in groups]) * (kind == name)
        if share and not divided.any():
            raise ConfigError(
                f"the mixture asks for {share:.1%} {name}, but no domain that is read has any: leave it out"
            )
        weight += share * divided / (divided.sum() or 1)
    rest = max(0.0, 1 - weight.sum())
    mixed = kind == MIXED
    by_domain = np.array([_domain_weight(group, mixture) for group in groups]) * (kind == SPECIFIC)
    mixed_share = mixture.mixed_share if by_domain.any() else 1.0
    if not mixed.any():
        mixed_share = 0.0
    weight[mixed] = rest * mixed_share
    if by_domain.any():
        weight += rest * (1 - mixed_share) * by_domain / by_domain.sum()
    if not weight.sum() > 0:
        raise ConfigError("the mixture leaves nothing to read: whatever has documents has a share or weight of 0")
    return weight / weight.sum()


def _domain_weight(group: Group, mixture: Mixture) -> float:
    events = float(group.num_events)
    return events**mixture.domain_temperature * mixture.domain_weights.get(group.domain, 1.0) if events else 0.0
