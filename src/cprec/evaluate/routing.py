"""Stage: validation and test results of two arms -> the users whom the first serves badly, and whether a router that
sends them to the second beats both.

A user is weak who has few training events and for whom the first arm did badly on validation queries. Both bounds are
chosen on validation queries, and the router is judged on test queries, once. What decides about a test query is known
before the test: training events and validation queries of its user.

Source: Efficient and responsible adaptation of large language models for robust top-k recommendations (Kaur and Shah
2024), who send users with few events and a low AUC to a language model. Theirs: bounds that are given. Ours: bounds
that are chosen, and the metric of the table in place of AUC, since lists are saved and not all scores.
Suffix Q: queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cprec.errors import ConfigError, DataError
from cprec.evaluate.compare import (
    METRICS,
    main_protocol,
    named_runs,
    protocol_differences,
    read_arms,
    read_settings,
    shared_domains,
)
from cprec.evaluate.comparison import PROTOCOLS, settings_line
from cprec.evaluate.grid import Column, Grid, Row, console_for, printable
from cprec.evaluate.pages import Section, print_sections, render
from cprec.evaluate.questions import USER_EVENTS
from cprec.evaluate.rankings import rankings_path, read_rankings
from cprec.evaluate.report_page import UNCERTIFIED
from cprec.evaluate.results import FULL, together
from cprec.evaluate.saved import read_saved
from cprec.evaluate.statistics import MIN_QUERIES, Comparison, adjusted, bootstrap_interval, compare_pair
from cprec.files import write_whole
from cprec.progress import say

WEAK, OTHERS, ALL = "weak", "others", "all"
TRIED = 10
"""Bounds that are tried: so many quantiles of the users' events, and of their quality."""
MAY_DIFFER = ("part", "num_queries", "queries_sha256", "candidates_uniform_sha256", "candidates_popularity_sha256")
"""Settings in which validation and test differ."""

# ---- the router ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Queries of a part of the data, and how well both arms answered them."""

    query_id: Sequence[str]
    user_Q: np.ndarray
    """object[Q]: user ids."""
    events_Q: np.ndarray
    """int64[Q]: training events of the user."""
    first_Q: np.ndarray
    second_Q: np.ndarray
    """float64[Q]: the metric."""


@dataclass(frozen=True)
class Bounds:
    """Who is weak: a user with at most so many events for whom the first arm was at most so good."""

    events: int
    """-1: nobody is weak."""
    quality: float
    """Mean over the user's validation queries; infinite: it does not count, and may be unknown."""

    def weak(self, events_Q: np.ndarray, quality_Q: np.ndarray) -> np.ndarray:
        """Whether the user of each query is weak: bool[Q]. A quality that is not a number is unknown."""
        is_low_Q = np.ones(len(events_Q), dtype=bool) if self.quality == math.inf else quality_Q <= self.quality
        return (events_Q <= self.events) & is_low_Q

    def __str__(self) -> str:
        if self.events < 0:
            return "nobody is weak"
        few = f"at most {self.events:,} training events"
        return few if self.quality == math.inf else f"{few}, and at most {self.quality:.4f} on validation queries"


def choose(validation: Answered) -> Bounds:
    """The bounds with which the router does best on validation queries; of equal ones those that make the fewest weak.

    No query decides about itself: the quality of its user is that on the user's other validation queries, and unknown
    where there is none. So with one validation query a user, as leave-one-out has it, events alone decide: what the
    first arm missed there, the second cannot do worse, which would speak for any second arm.
    """
    quality_Q = quality_on_others(validation)
    known = quality_Q[~np.isnan(quality_Q)]
    gain_Q = validation.second_Q - validation.first_Q
    best, best_key = Bounds(-1, math.inf), (0.0, 0)
    for events in _quantiles(validation.events_Q):
        for quality in (*_quantiles(known), math.inf):
            bounds = Bounds(int(events), float(quality))
            weak_Q = bounds.weak(validation.events_Q, quality_Q)
            key = (round(math.fsum(gain_Q[weak_Q]), 9), -int(weak_Q.sum()))
            if key > best_key:
                best, best_key = bounds, key
    return best


def quality_on_others(validation: Answered) -> np.ndarray:
    """The mean of the first arm over the other queries of each query's user, NaN where there is none: float64[Q]."""
    _, group_Q = np.unique(validation.user_Q, return_inverse=True)
    sums, counts = np.bincount(group_Q, weights=validation.first_Q), np.bincount(group_Q)
    others_Q = counts[group_Q] - 1
    return np.where(others_Q > 0, (sums[group_Q] - validation.first_Q) / np.maximum(others_Q, 1), np.nan)


def quality_of_users(validation: Answered, user_Q: np.ndarray) -> np.ndarray:
    """The mean of the first arm over the validation queries of each of some users, NaN where there is none."""
    users, group_Q = np.unique(validation.user_Q, return_inverse=True)
    means = np.bincount(group_Q, weights=validation.first_Q) / np.bincount(group_Q)
    of_user = dict(zip(users.tolist(), means.tolist(), strict=True))
    return np.array([of_user.get(user, math.nan) for user in user_Q.tolist()])


def _quantiles(values: np.ndarray) -> list[float]:
    """Distinct values at evenly spaced quantiles, the greatest among them, ascending."""
    if not len(values):
        return []
    found: list[float] = np.unique(np.quantile(values, np.arange(1, TRIED + 1) / TRIED, method="inverted_cdf")).tolist()
    return found


# ---- judged ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Group:
    """Test queries of weak users, of the others, or of all."""

    name: str
    num_queries: int
    num_users: int
    means: tuple[tuple[float, float, float], ...]
    """Of the first arm, the second and the router: mean, and the ends of its 95 % interval; none without queries."""
    less: tuple[Comparison | None, Comparison | None]
    """The router less the first arm, and less the second, on the same queries; p is corrected over all groups. None
    where the router is that arm, and without queries."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A router of a domain, and how it did."""

    domain: str
    arms: tuple[str, str]
    metric: str
    protocol: str
    settings: Mapping[str, Any]
    """Of the test, as `protocol.json` has them."""
    bounds: Bounds
    on_validation: tuple[float, float, float]
    """Means of the first arm, the second and the router there; the router's flatters it."""
    quality_counts: bool
    """Whether any user has two validation queries, so that quality could be chosen."""
    num_seeds: int
    """The most that an arm has; their mean is what is judged."""
    groups: tuple[Group, ...]
    changed: tuple[str, ...] = ()
    """Arms whose saved rankings say that another model, other settings or other code made them for the test."""

    @property
    def beats_both(self) -> bool:
        """Whether the router may be said to beat both arms, over all queries."""
        return all(test is not None and test.claim and test.mean > 0 for test in self.groups[-1].less)


def judge(validation: Answered, test: Answered, bounds: Bounds) -> tuple[Group, ...]:
    """The groups of test queries: weak, others, all. Queries of one user go together."""
    weak_Q = bounds.weak(test.events_Q, quality_of_users(validation, test.user_Q))
    router_Q = np.where(weak_Q, test.second_Q, test.first_Q)
    groups = {WEAK: weak_Q, OTHERS: ~weak_Q, ALL: np.ones(len(weak_Q), dtype=bool)}
    # The router is the second arm for the weak, and the first one for the others: there is nothing to test.
    compared: dict[tuple[str, int], np.ndarray] = {}
    if weak_Q.any():
        compared |= {(WEAK, 0): test.first_Q, (ALL, 0): test.first_Q}
    if not weak_Q.all():
        compared |= {(OTHERS, 1): test.second_Q, (ALL, 1): test.second_Q}
    tests = {
        key: compare_pair(router_Q[groups[key[0]]], arm_Q[groups[key[0]]], groups=test.user_Q[groups[key[0]]])
        for key, arm_Q in compared.items()
    }
    tests = dict(zip(tests, adjusted(list(tests.values())), strict=True))
    return tuple(
        Group(
            name=name,
            num_queries=int(in_Q.sum()),
            num_users=len(set(test.user_Q[in_Q].tolist())),
            means=tuple(
                bootstrap_interval(values_Q[in_Q], groups=test.user_Q[in_Q])
                for values_Q in (test.first_Q, test.second_Q, router_Q)
                if in_Q.any()
            ),
            less=(tests.get((name, 0)), tests.get((name, 1))),
        )
        for name, in_Q in groups.items()
    )


# ---- stage -----------------------------------------------------------------------------------------------------------


def route(
    folders: Sequence[str | Path],
    arms: str,
    *,
    domains: Sequence[str] = (),
    metric: str | None = None,
    protocol: str | None = None,
    output: str | Path = "route.html",
    file: TextIO | None = None,
) -> list[Routed]:
    """Choose a router on the validation results of two arms, judge it on their test results, and print and write both.

    `folders` are two evaluations of the same data and settings, one with part=validation and one with part=test; `arms`
    names the arm that answers, and the one that weak users are sent to, with a comma between. The others are as in
    `compare`.

    Raises ConfigError if there are not two such folders or arms, or the runs differ in more than the part; DataError
    for files that are no evaluation, or for a query that is in both.
    """
    runs = named_runs(folders)
    names = [name.strip() for name in arms.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ConfigError(
            f"route={arms!r}: name two arms, the one that answers and the one for weak users: 'EASE, LLM'"
        )
    if len(runs) != 2:
        raise ConfigError(f"{len(runs)} folders to route: give two, evaluated with part=validation and with part=test")
    found = [
        _routed(domain, {name: path / domain for name, path in runs.items()}, (names[0], names[1]), metric, protocol)
        for domain in shared_domains(runs, domains)
    ]
    sections = list(map(_section, found))
    print_sections(console_for(file), sections)
    kind = Path(output).suffix
    text = (
        "\n".join(_for_papers(each, kind) for each in sections)
        if kind in (".md", ".tex")
        else render("Router", sections)
    )
    write_whole(output, text)
    say(f"wrote {output}")
    return found


def _routed(
    domain: str, runs: Mapping[str, Path], arms: tuple[str, str], metric: str | None, protocol: str | None
) -> Routed:
    settings = {name: read_settings(folder) for name, folder in runs.items()}
    of_part = {str(values.get("part")): name for name, values in settings.items()}
    if set(of_part) != {"validation", "test"}:
        told = ", ".join(f"{name} has part={values.get('part')}" for name, values in settings.items())
        raise ConfigError(f"{domain}: {told}; give one folder evaluated with part=validation and one with part=test")
    alike = {
        name: {key: value for key, value in values.items() if key not in MAY_DIFFER}
        for name, values in settings.items()
    }
    if differences := protocol_differences(alike):
        raise ConfigError(f"{domain}: validation and test were not asked the same: {'; '.join(differences)}")
    test_settings = settings[of_part["test"]]
    protocol = protocol or main_protocol(test_settings)
    metric = metric or f"ndcg@{test_settings['k']}"
    validation, of_validation = _answered(runs[of_part["validation"]], arms, metric, protocol)
    test, of_test = _answered(runs[of_part["test"]], arms, metric, protocol)
    if both := sorted(set(validation.query_id) & set(test.query_id)):
        raise DataError(f"{domain}: query {both[0]!r} is in validation and in test: evaluate both anew")
    bounds, quality_Q = choose(validation), quality_on_others(validation)
    weak_Q = bounds.weak(validation.events_Q, quality_Q)
    routed_Q = np.where(weak_Q, validation.second_Q, validation.first_Q)
    return Routed(
        domain=domain,
        arms=arms,
        metric=metric,
        protocol=protocol,
        settings=test_settings,
        bounds=bounds,
        on_validation=(
            float(validation.first_Q.mean()),
            float(validation.second_Q.mean()),
            float(routed_Q.mean()),
        ),
        quality_counts=not np.isnan(quality_Q).all(),
        num_seeds=max(of_validation, of_test),
        groups=judge(validation, test, bounds),
        changed=tuple(name for name in arms if _has_changed(name, *runs.values())),
    )


def _has_changed(name: str, folder: Path, other: Path) -> bool:
    """Whether what made the rankings of an arm, of any seed, differs between two runs, as far as they are saved."""
    before, now = _identities(name, folder), _identities(name, other)
    return any(before[arm] != now[arm] for arm in before.keys() & now.keys())


def _identities(name: str, folder: Path) -> dict[str, Any]:
    """What made the saved rankings of an arm in a run's domain, by the name with the seed."""
    arms = together(read_saved(folder / METRICS, "run `cprec evaluate` anew")["arm"].unique().to_pylist())[name]
    saved = {arm: read_rankings(rankings_path(folder.parent, folder.name, arm, FULL)) for arm in arms}
    return {arm: rankings.answers["identity"] for arm, rankings in saved.items() if rankings is not None}


def _answered(folder: Path, arms: tuple[str, str], metric: str, protocol: str) -> tuple[Answered, int]:
    """The queries of a run with the mean over seeds of each arm, and the most seeds that one has."""
    saved = read_arms({folder.parent.name: folder}, protocol, [metric])
    for name in arms:
        if name not in saved:
            raise ConfigError(f"route: {folder} has no arm {name!r}; it has {', '.join(saved)}")
        if saved[name].bound:
            raise ConfigError(f"route: {name} knows what no recommender can know, so nobody can be sent there")
    path = folder / "queries.parquet"
    queries = read_saved(path, "run `cprec evaluate` anew").sort_by("query_id")
    if USER_EVENTS not in queries.column_names:
        raise DataError(f"{path} is of an earlier version, without the users' events: run `cprec evaluate` anew")
    first, second = (saved[name] for name in arms)
    events_of = dict(zip(queries["query_id"].to_pylist(), queries[USER_EVENTS].to_pylist(), strict=True))
    if missing := [query for query in first.query_id if query not in events_of]:
        raise DataError(f"{path} lacks query {missing[0]!r}: run `cprec evaluate` anew")
    answered = Answered(
        query_id=first.query_id,
        user_Q=np.array(first.user_id, dtype=object),
        events_Q=np.array([events_of[query] for query in first.query_id], dtype=np.int64),
        first_Q=first.values_SQ[metric].mean(axis=0),
        second_Q=second.values_SQ[metric].mean(axis=0),
    )
    return answered, max(len(first.values_SQ[metric]), len(second.values_SQ[metric]))


# ---- in words --------------------------------------------------------------------------------------------------------


def _section(routed: Routed) -> Section:
    first, second = routed.arms
    columns = (Column("", align="left", wrap=True), *map(Column, (routed.metric, "router less this", "p")))
    rows = []
    for group in routed.groups:
        size = f"{group.num_users:,} users, {group.num_queries:,} queries"
        rows.append(Row.of([f"{group.name}: {size}", "", "", ""], "section"))
        of_arms = zip((first, second, "router"), group.means, (*group.less, None), strict=False)
        rows += [Row.of([name, "{:.4f} [{:.4f}, {:.4f}]".format(*mean), *_test(test)]) for name, mean, test in of_arms]
    of_users = f"{routed.groups[0].num_users:,} of {routed.groups[-1].num_users:,} users of test queries"
    on = " ".join(
        f"{name} {mean:.4f}," for name, mean in zip((*routed.arms, "router"), routed.on_validation, strict=True)
    )
    lines = [
        f"Weak: {routed.bounds} ({of_users}). Chosen on validation queries ({on.rstrip(',')}), where the choice "
        "flatters the router; the test was asked once.",
        f"The router {'beats' if routed.beats_both else 'is not shown to beat'} both arms.",
    ]
    if not routed.quality_counts:
        lines.append(
            "No user has two validation queries, so quality could not be judged apart from the query that it is "
            "measured on: events alone decide."
        )
    if routed.changed:
        lines.append(
            f"{' and '.join(routed.changed)}: another model, other settings or other code answered the test than the "
            "validation queries, so the users were chosen for another arm. Evaluate both parts anew."
        )
    if routed.num_seeds > 1:
        lines.append("Arms with several seeds have their mean: intervals are over users alone.")
    num_queries = routed.groups[-1].num_queries
    if num_queries < MIN_QUERIES:
        lines.append(f"No claim under {MIN_QUERIES:,} queries: there are {num_queries:,}.")
    lines.append(
        "Intervals are 95 % over users, differences on the same queries. p: corrected by Holm over the table; * marks "
        "a difference that may be claimed."
    )
    return Section(
        title=f"{routed.domain}: {PROTOCOLS.get(routed.protocol, routed.protocol)}, {routed.metric}, {num_queries:,} "
        f"test queries: {first}, with weak users sent to {second}",
        warning=UNCERTIFIED if routed.settings.get("certificate") == "uncertified" else "",
        tables=[Grid(columns, tuple(rows))],
        notes=[*lines, settings_line(routed.settings)],
    )


def _for_papers(section: Section, kind: str) -> str:
    """The table in Markdown with the notes below it, or in LaTeX with the notes as comments above it."""
    (grid,), lines = section.tables, [section.title, section.warning, *section.notes]
    told = [printable(line) for line in lines if line]
    if kind == ".md":
        return f"{grid.markdown()}\n\n{' '.join(told)}\n"
    return "\n".join(f"% {line}" for line in told) + "\n" + grid.latex([section.warning] if section.warning else [])


def _test(test: Comparison | None) -> tuple[str, str]:
    if test is None:
        return "", ""
    p = ("<0.001" if test.p_adjusted < 0.001 else f"{test.p_adjusted:.3f}") + ("*" if test.claim else "")
    return f"{test.mean:+.4f} [{test.low:+.4f}, {test.high:+.4f}]", p
