"""`study.md` from the tables under `study/` alone: for each question a table, a plot, a paragraph by rules.

Nothing on the page is written by hand but the words of the questions: every number comes from the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from benchmarks.study.arms import ALL, ARMS, CPREC, RANDOM, REFERENCE, ZERO
from benchmarks.study.plot import forest
from benchmarks.study.plot import lines as line_chart
from benchmarks.study.questions import QUESTIONS, Claim, Question
from benchmarks.study.results import CANDIDATES, DIFFERENCES, EVERY, LOSSES, MAIN, MEANS, PLAN
from cprec.errors import ConfigError
from cprec.evaluate.statistics import MIN_QUERIES
from cprec.files import write_whole
from cprec.scaling import FEWEST, fit_power_law

TOKENS_PER_SECOND, OPEN_MODEL_TOKENS_PER_SECOND = 8000, 290
"""Of training on one core, by the tiny decoder and by a model of 135 M parameters: for what is not run yet."""
REGIMES = {ZERO: "zero-shot", "64": "64 examples", "256": "256 examples", "1024": "1,024 examples", ALL: "all events"}

SIZES = ("10 % of the tokens", REFERENCE, CPREC)
"""Arms that differ in how many tokens they read."""

Line = Mapping[str, Any]


def write_page(docs: Path) -> None:
    """Write `study.md` and the plots of its questions."""
    tables = {name: _read(docs / "study" / name) for name in (MEANS, DIFFERENCES, LOSSES, PLAN)}
    parts = [*_head(tables)]
    for question in QUESTIONS:
        parts += [f"## {question.number}. {question.title}", *_section(question, tables, docs / "study")]
    parts += ["## All rows", "NDCG@10, full catalogue:", _all_rows(tables[MEANS], MAIN)]
    parts += ["Recall@1 among the target and 19 others, drawn uniformly:", _all_rows(tables[MEANS], CANDIDATES)]
    write_whole(docs / "study.md", "\n\n".join(parts) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist() if path.is_file() else []


# ---- the head --------------------------------------------------------------------------------------------------------


def _head(tables: Mapping[str, Sequence[Line]]) -> list[str]:
    plan, means = tables[PLAN], tables[MEANS]
    done = [line for line in plan if line["done"]]
    seeds = sorted({line["seed"] for line in done})
    domains = sorted({line["domain"] for line in plan})
    asked = {line["domain"]: line["num_queries"] for line in means if line["protocol"] == MAIN[0]}
    shown = ", ".join(f"{name} ({asked[name]:,} queries)" if name in asked else f"{name} (not run)" for name in domains)
    return [
        "# The study of CPRec's claims",
        "Made by `python -m benchmarks.study` from the files in [study/](study/): run it again, do not edit this page.",
        f"**State.** {len(done)} of {len(plan)} jobs are done (seeds: {', '.join(map(str, seeds)) or 'none'}). A job "
        "is an arm after a regime of fine-tuning, on a domain, with a seed (of pre-training, fine-tuning and the few "
        "examples alike).",
        f"**Protocol.** Domains: {shown}. Main figure: NDCG@10, full catalogue, exact search (after many prefixes the "
        "best found), items of the history left out. Brackets hold 95 % intervals: over queries for one seed, over "
        "queries and seeds for several. Differences are paired on the same queries; a difference is *shown* if its p "
        "value, corrected by Holm over all differences of a question, is below 0.05 and there are at least "
        f"{MIN_QUERIES:,} queries. Few-shot models read so many examples several times; *all events* reads each user's "
        "training events in documents. No model has seen the domain, or a user who is tested there, in pre-training: "
        "the certificate is checked for each row.",
    ]


# ---- questions -------------------------------------------------------------------------------------------------------


def _section(question: Question, tables: Mapping[str, Sequence[Line]], folder: Path) -> Iterable[str]:
    """The parts of a question: what is shown, the table, the plot; or that it was not run, and its cost."""
    lines = [line for line in tables[DIFFERENCES] if line["question"] == question.number]
    whole = [line for line in lines if line["group"] == EVERY]
    figure = folder / f"question-{question.number}.svg"
    if not lines:
        yield f"Not run yet. {_cost(question, tables[PLAN])}"
        if not question.claims:
            yield f"{question.needed}."
        return
    for claim in question.claims:
        own = [line for line in whole if (line["a"], line["b"]) == (claim.a, claim.b)]
        yield _paragraph(claim, own) if own else f"{_capital(claim.thing)}: not run yet."
    shown = {(line["a"], line["b"]) for line in whole if line["claim"] and line["mean"] > 0}
    if any((claim.a, claim.b) not in shown for claim in question.claims):
        yield f"At this scale the rest cannot be claimed. For it to hold, {question.needed}."
    if any(line["seeds_a"] < 2 for line in whole):
        yield "Intervals of comparisons with one seed do not cover the luck of training."
    if question.losses and tables[LOSSES]:
        yield from _loss_parts(tables[LOSSES], folder)
    yield _difference_table(whole, tables[MEANS])
    if question.sliced:
        yield "By groups of queries, a - b, bold where it is shown (of repeats and others with seen items kept):"
        yield _slice_table([line for line in lines if line["group"] != EVERY])
    write_whole(figure, forest({_label(line): _interval(line) for line in whole}, "difference in NDCG@10"))
    yield f"![Differences in NDCG@10 with 95 % intervals](study/{figure.name})"


def _paragraph(claim: Claim, lines: Sequence[Line]) -> str:
    """What the differences of a claim show, by rules."""
    better = [line for line in lines if line["claim"] and line["mean"] > 0]
    worse = [line for line in lines if line["claim"] and line["mean"] < 0]
    rest = [line for line in lines if not line["claim"]]
    thing, said = _capital(claim.thing), []
    if better:
        said.append(f"**{thing} helps** in {len(better)} of {len(lines)} comparisons: {_listed(better)}.")
    if worse:
        said.append(f"**{thing} hurts** in {len(worse)} of {len(lines)} comparisons: {_listed(worse)}.")
    if rest:
        start = "In the others nothing is shown" if said else f"**That {claim.thing} helps is not shown**"
        said.append(f"{start}: {_listed(rest)}.")
        if finds := sorted({f"{line['detectable']:.4f}" for line in rest if line["detectable"]}):
            said.append(
                f"These tests find differences of {' to '.join({finds[0]: 0, finds[-1]: 0})} four times in five."
            )
    return " ".join(said)


def _listed(lines: Sequence[Line]) -> str:
    """Differences in words, at most four; the others are in the table."""
    told = [
        f"{_where(line)} {mean:+.4f} ({low:+.4f} to {high:+.4f})"
        for line in lines[:4]
        for mean, low, high in [_interval(line)]
    ]
    more = [f"and {len(lines) - 4} more in the table"] if len(lines) > 4 else []
    return "; ".join([*told, *more])


def _where(line: Line) -> str:
    return f"{line['domain']}, {REGIMES[line['regime']]}"


def _label(line: Line) -> str:
    return f"{line['a']} - {line['b']}: {_where(line)}"


def _interval(line: Line) -> tuple[float, float, float]:
    """A difference with its interval; nothing lies beyond 1, whatever the few degrees of freedom of few seeds say."""
    return line["mean"], max(line["low"], -1.0), min(line["high"], 1.0)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _difference_table(lines: Sequence[Line], means: Sequence[Line]) -> str:
    """Every difference of a question, with the means of both arms."""
    rows = []
    for line in lines:
        both = tuple(_mean(means, line, line[side]) for side in ("a", "b"))
        seeds = f"{line['seeds_a']}, {line['seeds_b']}"
        p_value = f"{line['p_adjusted']:.3f}"
        number = f"{line['num_queries']:,}"
        rows.append((line["a"], line["b"], _where(line), *both, _bracketed(line), p_value, number, seeds))
    heads = ("a", "b", "where", "a: NDCG@10", "b", "a - b", "p", "queries", "seeds of a, b")
    return _table(heads, rows)


def _bracketed(line: Line) -> str:
    mean, low, high = _interval(line)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _slice_table(lines: Sequence[Line]) -> str:
    """Differences by groups of queries: a row for each group and rival, a column for each domain."""
    domains = sorted({line["domain"] for line in lines})
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        mark = "**" if line["claim"] else ""
        cell = f"{mark}{_bracketed(line)}{mark} ({line['num_queries']:,})"
        rows.setdefault((line["b"], line["group"]), {})[line["domain"]] = cell
    heads = ("b", "queries of", *(f"{domain} (queries)" for domain in domains))
    return _table(heads, [(*key, *(cells.get(domain, "") for domain in domains)) for key, cells in rows.items()])


def _mean(means: Sequence[Line], about: Line, arm: str) -> str:
    """The mean of an arm over all its seeds, with the regime of a difference or as a rival."""
    found = [
        line
        for line in means
        if (line["arm"], line["domain"]) == (arm, about["domain"])
        and (line["protocol"], line["metric"]) == MAIN
        and line["regime"] in (about["regime"], "")
    ]
    return f"{max(found, key=lambda line: line['num_seeds'])['mean']:.4f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- losses ----------------------------------------------------------------------------------------------------------


def _loss_parts(losses: Sequence[Line], folder: Path) -> Iterable[str]:
    """Held-out loss by tokens read: at the end of annealing, and on the way there without it."""
    curves: dict[str, dict[int, list[float]]] = {}
    for line in losses:
        if line["arm"] in SIZES and line["seed"] == 0:
            kind = "annealed" if line["annealed"] else f"{line['arm']}, on the way"
            curves.setdefault(kind, {}).setdefault(line["tokens"], []).append(line["loss"])
    points = {name: [(x, fmean(own)) for x, own in sorted(curve.items()) if x] for name, curve in curves.items()}
    figure = folder / "question-4-losses.svg"
    write_whole(figure, line_chart({k: v for k, v in points.items() if v}, "tokens read", "held-out loss a token"))
    yield "Held-out loss a token, mean over domains and kinds, seed 0, at the end of annealing:"
    yield _table(("tokens", "loss"), [(f"{x:,}", f"{y:.4f}") for x, y in points.get("annealed", [])])
    if len(points.get("annealed", [])) < FEWEST:
        yield (
            "`L(D) = E + B D^-b` has three numbers to find, so fewer than four sizes say nothing of how well it fits: "
            "no fit is given."
        )
    else:
        try:
            yield f"`L(D) = E + B D^-b` through these: {fit_power_law(*zip(*points['annealed'], strict=True))}."
        except ConfigError as error:
            yield f"`L(D) = E + B D^-b` does not fit these: {error}."
    yield f"![Held-out loss by tokens read](study/{figure.name})"


# ---- costs, and all rows ---------------------------------------------------------------------------------------------


def _cost(question: Question, plan: Sequence[Line]) -> str:
    """What the arms of a question would cost from a fresh start, in hours of one core."""
    arms = {arm.name for arm in ARMS if question.number in arm.questions}
    own = [line for line in plan if line["arm"] in arms]
    if own:
        tokens = sum(line["pretraining"] + line["finetuning"] for line in own)
        hours = tokens / TOKENS_PER_SECOND + sum(line["other_seconds"] for line in own)
        return f"It would cost {tokens:,} tokens, {hours / 3600:.1f} hours of one core with ranking."
    first = [line for line in plan if line["arm"] in (REFERENCE, RANDOM) and line["seed"] == plan[0]["seed"]]
    tokens = sum(line["pretraining"] + line["finetuning"] for line in first if line["regime"] in (ZERO, ALL))
    return (
        f"As much pre-training as the arm {REFERENCE!r} has, with fine-tuning and without it, one seed ({tokens:,} "
        f"tokens), would take a model of 135 M parameters {tokens / OPEN_MODEL_TOKENS_PER_SECOND / 3600:.0f} hours of "
        "two cores."
    )


def _all_rows(means: Sequence[Line], how: tuple[str, str]) -> str:
    """A protocol's metric of every arm: a row for each arm and regime, a column for each domain; seeds together."""
    best: dict[tuple[str, str], dict[str, Line]] = {}
    for line in means:
        if (line["protocol"], line["metric"]) == how:
            own = best.setdefault((line["arm"], line["regime"]), {})
            if line["domain"] not in own or line["num_seeds"] > own[line["domain"]]["num_seeds"]:
                own[line["domain"]] = line
    if not best:
        return "None yet."
    domains = sorted({domain for own in best.values() for domain in own})
    rows = [
        (arm, REGIMES.get(regime, ""), *(_cell(own.get(domain)) for domain in domains))
        for (arm, regime), own in best.items()
    ]
    return _table(("arm", "fine-tuned on", *domains), rows)


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    seeds = f" ({line['num_seeds']} seeds)" if line["num_seeds"] > 1 else ""
    return f"{line['mean']:.4f} [{line['low']:.4f}, {line['high']:.4f}]{seeds}"
