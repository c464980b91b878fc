"""`cprec audit --shortcuts`: what a prepared data set can and cannot show, measured before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cprec.data.dataset import data_folder, read_manifest, read_split
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.evaluate.shortcut_audit import ShortcutAudit, shortcut_audit
from cprec.evaluate.shortcut_page import print_shortcuts, write_shortcuts
from cprec.lineup import LINEUP, settings_of
from cprec.progress import say
from cprec.provenance import file_sha256, git_commit, versions
from cprec.rank.llm import LLMRecommender
from cprec.recommender import Recommender
from cprec.schema import TEST
from cprec.train.folder import read_done

GRAPH = "transition graph"
PAGE, RECORD = "shortcuts.html", "shortcuts.json"

Opened = dict[str, tuple[str | None, Recommender]]
"""Models by folder: the domain that each was fine-tuned on, None for every domain, and its recommender."""


def audit_shortcuts(
    folder: Path | str, domains: Sequence[str] = (), models: Sequence[str] = (), max_queries: int = 2000
) -> list[ShortcutAudit]:
    """Write `shortcuts.html` and `shortcuts.json` into a data folder and print the table; returns what was measured.

    The folder is one that `cprec prepare` wrote, or that of a run, whose data folder is `data`. Every domain with test
    queries is measured where none is named. The transition graph is always asked what it needs of a history; beside it
    `models`: baselines by name, which learn from the training part now (one that is trained by gradient steps keeps its
    weights below `shortcuts/` and is reused), and folders of CPRec. A model of one domain is asked there only.
    `max_queries` bounds the queries of a domain that similarity and models are measured on.

    Raises ConfigError for a folder, domain or model that is not there.
    """
    folder = data_folder(folder)
    split, tie_order = read_split(folder), read_manifest(folder)["rules"]["tie_order"]
    asked = _domains(folder, split, domains)
    opened = {model: _open(model) for model in models if model not in LINEUP}
    baselines = [GRAPH, *(model for model in models if model in LINEUP and model != GRAPH)]
    audits = []
    for domain in asked:
        recommenders = _recommenders(folder, split, domain, baselines, opened)
        audits.append(shortcut_audit(split, domain, recommenders, max_queries=max_queries, tie_order=tie_order))
    title = folder.resolve().parent.name if folder.name == "data" else folder.resolve().name
    write_shortcuts(folder / PAGE, folder / RECORD, title, audits, _protocol(folder, split, tie_order, max_queries))
    print_shortcuts(audits)
    say(f"wrote {folder / PAGE} and {folder / RECORD}")
    return audits


def _domains(folder: Path, split: Split, wanted: Sequence[str]) -> Sequence[str]:
    """The domains that are wanted, or else all that have a test event."""
    if unknown := [domain for domain in wanted if domain not in split.catalogue.domains]:
        raise ConfigError(f"domain {unknown[0]!r} is not in {folder}: it has {', '.join(split.catalogue.domains)}")
    tested = set(split.catalogue.domain[split.interactions.item[split.events(TEST)]].tolist())
    found = wanted or [name for number, name in enumerate(split.catalogue.domains) if number in tested]
    if not found:
        raise ConfigError(f"{folder} has no test event in any domain: there is nothing to audit")
    return found


def _recommenders(
    folder: Path, split: Split, domain: str, baselines: Sequence[str], opened: Opened
) -> dict[str, Recommender]:
    """The baselines that suit a domain and the models that know it, by name."""
    recommenders: dict[str, Recommender] = {}
    for name in baselines:
        weights = folder / "shortcuts" / re.sub("[^a-z0-9]+", "-", name.lower()) / domain
        try:
            recommenders[name] = settings_of(name).make(split, domain, folder=weights)
        except Unsuitable as error:
            say(f"{domain}: without {name}: {error}")
    return recommenders | {name: model for name, (of_domain, model) in opened.items() if of_domain in (None, domain)}


def _protocol(folder: Path, split: Split, tie_order: str, max_queries: int) -> dict[str, str]:
    """What every number depends on, for people."""
    commit = git_commit()
    code = f"CPRec {versions()['cprec']}" + (f", commit {commit['id'][:10]}" if commit else "")
    return {
        "learnt from": "training events of the domain; graphs, popularity and shared users know no held-out event",
        "asked for": f"every test event ({split.spec.method}) with a history in the domain, which is shown whole",
        "ties in time": f"{tie_order} order",
        "sample": f"similarity and models on at most {max_queries:,} queries a domain, drawn with seed 0",
        "seen items": "those of the whole history are left out of every ranking, whatever part of it is shown",
        "intervals": "95% bootstrap intervals over users; shares of NDCG are paired",
        "data": f"dataset.json {file_sha256(folder / 'dataset.json')[:12]}",
        "code": code + (", with changes" if commit and commit["modified"] else ""),
    }


def _open(model: str) -> tuple[str | None, Recommender]:
    about = read_done(model)
    if about is None:
        raise ConfigError(
            f"model {model!r} is neither a folder with a finished model of CPRec nor a baseline; these are "
            f"{', '.join(LINEUP)}"
        )
    return about.get("domain"), LLMRecommender.from_pretrained(model, blend=False)
