"""What the numbers of a shortcut audit mean for a claim about recommenders on that data set, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from cprec.evaluate.results import Interval
from cprec.evaluate.shortcut_audit import (
    BACKWARD,
    FROM_ANY,
    ONE_STEP,
    SHUFFLED,
    TITLES,
    TWO_STEPS,
    USERS,
    Dependence,
    K,
    ShortcutAudit,
)
from cprec.evaluate.statistics import MIN_QUERIES

METRIC = f"NDCG@{K}"

SOME, MUCH = 0.05, 0.2
"""Shares of affected targets: from SOME on the page mentions it, from MUCH on it limits what may be concluded.

Differences between published models are often 5 % of a metric, so a fault of 5 % of the targets can make one. With
every fifth target it is no longer a side effect. (`cprec.evaluate.statistics.MIN_QUERIES` bounds claims everywhere.)
"""
EVERYTHING = 0.5
"""A set of items with this share of the training events or more says nothing when it is reached: half of all that is
bought is in it."""
NEARLY_ALL = 0.9
"""Share of a model's NDCG@10 from which the rest is called little: it is no more than published models differ by."""
SHORT = 6
"""Median events of a history below which a data set has no long histories to learn from: the paper of CPRec and most
others show models 10 to 50."""

CANNOT, CARE, CAN = "cannot", "take care", "can"


@dataclass(frozen=True)
class Finding:
    """A sentence on what a data set can and cannot show."""

    kind: str
    """`CAN`, `CARE` or `CANNOT`."""
    text: str


def findings(audit: ShortcutAudit) -> list[Finding]:
    """What the numbers of a domain mean for a claim about recommenders on it, the most serious first."""
    found = [
        *_on_queries(audit),
        *_on_ties(audit),
        *_on_reach(audit),
        *_on_similarity(audit),
        *(finding for each in audit.dependence for finding in _on_dependence(audit, each)),
        *_on_targets(audit),
    ]
    return sorted(found, key=lambda finding: (CANNOT, CARE, CAN).index(finding.kind))


cannot, care, can = (partial(Finding, kind) for kind in (CANNOT, CARE, CAN))


def _on_queries(audit: ShortcutAudit) -> Iterator[Finding]:
    if audit.num_queries < MIN_QUERIES:
        yield cannot(
            f"{audit.num_queries:,} queries, fewer than {MIN_QUERIES:,}: no claim that one recommender beats another"
        )
    elif audit.dependence and audit.sample < MIN_QUERIES:
        yield cannot(
            f"models were asked {audit.sample:,} queries, fewer than {MIN_QUERIES:,}: what they need of a history is "
            "not claimed; ask more (--max-queries)"
        )
    best = max(audit.dependence, key=lambda each: each.ndcg.mean, default=None)
    if best is not None and best.ndcg.mean > 0 < best.smallest_difference:
        share = best.smallest_difference / best.ndcg.mean
        yield (cannot if share > MUCH else care)(
            f"a difference of less than about {best.smallest_difference:.4f} {METRIC} will not show ({share:.0%} of "
            f"the {best.model}'s {best.ndcg.mean:.4f})"
        )
    if audit.median_history < SHORT:
        yield cannot(
            f"half of the histories have {audit.median_history:g} events or fewer: what long histories are worth "
            "cannot be shown"
        )


def _on_ties(audit: ShortcutAudit) -> Iterator[Finding]:
    tied = audit.targets.tied
    decided = f"{tied or 0:.0%} of the targets are decided by the order of events of equal time"
    if tied is None:
        yield care("times are an order only: how many targets the order of equal times decided cannot be known")
    elif tied >= SOME and audit.tie_order == "shuffle":
        yield care(f"{decided}, which was drawn: their order shows nothing of the users")
    elif tied >= SOME:
        yield (cannot if tied >= MUCH else care)(
            f"{decided}, which is the file's and not the user's: what depends on order may be an artefact; prepare "
            "with tie_order=shuffle too and compare"
        )


def _on_reach(audit: ShortcutAudit) -> Iterator[Finding]:
    one, back = audit.reach[ONE_STEP], audit.reach[BACKWARD]
    if one.targets < SOME:
        yield can(
            f"only {one.targets:.0%} of the targets ever followed the last item in training: what a model finds "
            "beyond these is more than a pair that it has seen"
        )
    elif one.popular < EVERYTHING:
        yield care(
            f"{one.targets:.0%} of the targets followed the last item in training before ({one.lift:.1f} times as many "
            "as popularity explains): compare with the transition graph before claiming that a model learnt more"
        )
    if one.targets and back.targets >= NEARLY_ALL * one.targets:
        yield cannot(
            f"the target came before the last item in training as often as after it ({back.targets:.1%} and "
            f"{one.targets:.1%} of the targets): pairs carry no direction, so there is little order to learn from them"
        )
    for name in (TWO_STEPS, FROM_ANY):
        reach = audit.reach[name]
        if reach.popular >= EVERYTHING:
            yield care(
                f"{name}: {reach.targets:.0%} of the targets are in reach, but so are {reach.popular:.0%} of all "
                "training events, so that says nothing"
            )


def _on_similarity(audit: ShortcutAudit) -> Iterator[Finding]:
    for name, by in ((USERS, "by the users they share"), (TITLES, "by the words of their titles")):
        nearest = audit.similarity[name].nearest
        if nearest >= SOME:
            yield care(f"{nearest:.0%} of the targets are among the 1% of the items nearest to the last one {by}")
        elif name == TITLES:
            yield care(
                f"the words of titles hardly lead to the target ({nearest:.1%} are among the nearest 1%): what a model "
                "of text finds here, it knows from elsewhere or from the events"
            )


def _on_dependence(audit: ShortcutAudit, model: Dependence) -> Iterator[Finding]:
    one, shuffled = model.shares["last 1"], model.shares[SHUFFLED]
    enough = audit.sample >= MIN_QUERIES
    if one is not None:
        given = f"{model.model}: the last event alone gives {percent(one)} of the {METRIC}"
        if one.mean >= NEARLY_ALL:
            yield cannot(f"{given}: what it gains from longer histories hardly shows")
        elif one.high < 1 and enough:
            yield can(f"{given}: older events count")
    if shuffled is not None:
        given = f"shuffled histories give {percent(shuffled)} of the {METRIC}"
        if shuffled.high >= 1 and shuffled.mean >= NEARLY_ALL:
            wide = "; so wide an interval leaves open whether it counts" if shuffled.low < NEARLY_ALL else ""
            yield cannot(f"{model.model}: order shows no gain, {given}{wide}")
        elif shuffled.high < 1 and enough and (audit.targets.tied or 0) >= MUCH and audit.tie_order != "shuffle":
            yield care(f"{model.model}: order counts, {given}; part of that may be the file's order of equal times")
        elif shuffled.high < 1 and enough:
            yield can(f"{model.model}: order counts, {given}")
    if one is None or shuffled is None:
        yield cannot(f"{model.model} finds too little to say what it needs of a history")


def _on_targets(audit: ShortcutAudit) -> Iterator[Finding]:
    targets = audit.targets
    if targets.repeated >= SOME:
        yield care(
            f"{targets.repeated:.0%} of the targets are in the history: a ranking that leaves out seen items cannot "
            "find these"
        )
    if targets.cold >= SOME:
        yield care(f"{targets.cold:.0%} of the targets have no training event: a model of item ids cannot find these")
    if targets.popular_10 >= SOME:
        yield care(
            f"the same 10 items for everybody find {targets.popular_10:.0%} of the targets: compare with popularity"
        )


def percent(share: Interval) -> str:
    """A share with its interval.

    >>> percent(Interval(mean=0.954, low=0.874, high=1.036))
    '95% [87, 104]'
    """
    return f"{share.mean:.0%} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
