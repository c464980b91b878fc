"""The whole road of a recipe: prepare, pre-train, fine-tune two arms on each target domain, evaluate, report.

The two arms differ in their start alone: the base model as it is, or pre-trained on behaviour sequences of all domains.
Every stage reuses what is complete and resumes what is not, so the same command goes on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.errors import ConfigError
from cprec.recommender import Ranking, RankingQuery

if TYPE_CHECKING:
    from cprec.data.splits import Split
    from cprec.evaluate.evaluate import Entrant, EvaluateConfig
    from cprec.rank.llm import LLMRecommender, Mode
    from cprec.recipe import Recipe
    from cprec.text.prepare import PrepareConfig

FINETUNED, CPREC = "fine-tuning only", "CPRec-style"
NUM_EXAMPLES = 3


def run(recipe: Recipe) -> dict[str, Any]:
    """Run every stage of a recipe; prints the report, writes `report.json` and `report.html`, and returns it."""
    from cprec.progress import say
    from cprec.text.prepare import prepare
    from cprec.train.finetune import finetune
    from cprec.train.pretrain import pretrain

    targets = recipe.prepare.target_domains
    stages = 3 + len(targets)
    say(f"[1/{stages}] prepare: {recipe.description}")
    prepare(recipe.prepare)
    say(f"[2/{stages}] pre-train on behaviour sequences")
    pretrain(recipe.pretrain)
    models: dict[str, dict[str, str]] = {}
    for number, domain in enumerate(targets):
        models[domain] = {}
        for arm, base in ((FINETUNED, recipe.pretrain.model_name_or_path), (CPREC, recipe.pretrain.output_dir)):
            say(f"[{3 + number}/{stages}] fine-tune on {domain}: {arm}")
            folder = f"{recipe.finetune.output_dir}/{domain}/{arm.lower().replace(' ', '-')}"
            finetune(replace(recipe.finetune, domain=domain, model_name_or_path=base, output_dir=folder))
            models[domain][arm] = folder
    say(f"[{stages}/{stages}] evaluate")
    runs = {"pre-training": recipe.pretrain.output_dir}
    runs |= {f"{domain}: {arm}": folder for domain in targets for arm, folder in models[domain].items()}
    return _report(recipe.evaluate, models, runs, title=recipe.name, synthetic=recipe.prepare)


def evaluate_models(config: EvaluateConfig) -> dict[str, Any]:
    """Rank the queries of each domain with the models named in the configuration, beside the baselines."""
    from cprec.train.training import read_done

    models: dict[str, dict[str, str]] = {}
    for domain in config.domains or _queried_domains(config):
        models[domain] = {}
        for arm, folder in config.models.items():
            about = read_done(folder)
            if about is None:
                raise ConfigError(f"models.{arm}={folder}: no finished model of CPRec is there (no cprec.json)")
            if about.get("domain") in (None, domain):
                models[domain][arm] = folder
    runs = {arm: folder for of_domain in models.values() for arm, folder in of_domain.items()}
    return _report(config, models, runs, title="evaluation", synthetic=None)


def _queried_domains(config: EvaluateConfig) -> tuple[str, ...]:
    folder = Path(config.data) / "queries"
    found = tuple(sorted(path.name for path in folder.glob("*") if path.is_dir()))
    if not found:
        raise ConfigError(f"data={config.data!r} holds no queries: give a folder that `cprec prepare` wrote")
    return found


def _report(
    config: EvaluateConfig,
    models: dict[str, dict[str, str]],
    runs: dict[str, str],
    *,
    title: str,
    synthetic: PrepareConfig | None,
) -> dict[str, Any]:
    """Evaluate every arm and baseline on every domain, then write and print the report."""
    from cprec.data.dataset import read_manifest, read_split
    from cprec.evaluate.evaluate import evaluate, protocol_of
    from cprec.evaluate.report import print_report, write_html
    from cprec.progress import say
    from cprec.provenance import read_resolved, save_resolved
    from cprec.train.training import LOG, read_done, read_log

    split = read_split(config.data)
    pretrained = read_resolved(config.data)["config"]["pretrain_domains"] or split.catalogue.domains
    domains: dict[str, Any] = {}
    for domain, arms in models.items():
        entrants = _entrants(config, split, arms, synthetic)
        domains[domain] = {"unseen": domain not in pretrained, **evaluate(config, split, domain, entrants)}
    certificate = Path(config.data) / "certificate.json"
    properties = json.loads(certificate.read_text())["properties"] if certificate.is_file() else []
    finished = {name: read_done(folder) or {} for name, folder in runs.items()}
    report = {
        "title": title,
        "protocol": protocol_of(config, split, read_manifest(config.data)),
        "certificate": {
            "clean": bool(properties) and all(p["violations"] == 0 for p in properties),
            "checked": sum(p["checked"] for p in properties),
            "violations": sum(p["violations"] for p in properties),
            "uncertified": not all(result["certified"] for result in domains.values()),
        },
        "domains": domains,
        "models": {
            name: {field: about[field] for field in ("num_parameters", "tokens", "seconds")}
            for name, about in finished.items()
        },
    }
    examples = [example for domain, arms in models.items() for example in _examples(config, split, domain, list(arms))]
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(folder, config)
    temporary = folder / "report.json.incomplete"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(folder / "report.json")
    logs = {name: read_log(Path(path) / LOG) for name, path in runs.items()}
    write_html(folder / "report.html", report, logs, examples)
    print_report(report, examples[:NUM_EXAMPLES])
    say(f"wrote {folder / 'report.json'} and {folder / 'report.html'}")
    return report


def _entrants(
    config: EvaluateConfig, split: Split, arms: dict[str, str], synthetic: PrepareConfig | None
) -> list[Entrant]:
    """Baselines always; then the models; then, in a synthetic world, the bound that its true probabilities give."""
    from cprec.baselines.popularity import PopularityRecommender
    from cprec.baselines.random import RandomRecommender
    from cprec.baselines.transition_graph import TransitionGraphRecommender
    from cprec.evaluate.evaluate import Entrant

    baselines = (
        RandomRecommender(split.catalogue, config.seed),
        PopularityRecommender(split),
        TransitionGraphRecommender(split),
    )
    entrants = [Entrant(name=each.name, recommender=each, kind="baseline") for each in baselines]
    entrants += model_entrants(config, arms)
    if synthetic is not None and synthetic.synthetic is not None:
        from cprec.data.sources.synthetic import OracleRecommender, SyntheticWorld

        oracle = OracleRecommender(SyntheticWorld(synthetic.synthetic))
        entrants.append(Entrant(name="oracle", recommender=oracle, kind="bound"))
    return entrants


def model_entrants(config: EvaluateConfig, arms: dict[str, str]) -> list[Entrant]:
    """Model folders, by the name they have in tables, as entrants of an evaluation."""
    from cprec.evaluate.evaluate import Entrant
    from cprec.train.training import read_done, weights_sha256

    entrants = []
    for arm, folder in arms.items():
        model = _ModelFolder(arm, folder, config)
        entrants.append(
            Entrant(
                name=arm,
                recommender=model,
                kind="model",
                trained_on=tuple((read_done(folder) or {})["trained_on"]),
                identity=weights_sha256(folder),
                modes={"exact": _InMode(model, "exact"), "generate": _InMode(model, "generate")},
            )
        )
    return entrants


class _ModelFolder:
    """A model folder as a recommender, opened when it is first asked: saved rankings need no model and no torch."""

    def __init__(self, name: str, folder: str, config: EvaluateConfig) -> None:
        self.name, self._folder, self._config = name, folder, config

    @cached_property
    def opened(self) -> LLMRecommender:
        from cprec.rank.llm import LLMRecommender

        names = ("mode", "beam_width", "max_nodes", "score")
        settings = {name: getattr(self._config, name) for name in names}
        return LLMRecommender.from_pretrained(self._folder, name=self.name, **settings)

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        return self.opened.rank(queries, k)


class _InMode:
    """The same model, which ranks in another mode."""

    def __init__(self, model: _ModelFolder, mode: Mode) -> None:
        self.name, self._model, self._mode = model.name, model, mode

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        return self._model.opened.rank(queries, k, self._mode)


def _examples(config: EvaluateConfig, split: Split, domain: str, arms: list[str]) -> list[dict[str, Any]]:
    """A few users of a domain with what each model recommends them, from the saved rankings."""
    import pyarrow.parquet as pq

    from cprec.evaluate.evaluate import FULL, rankings_path, read_questions

    questions = read_questions(config, split, domain)
    catalogue = split.catalogue

    def title(name: str, item: str) -> str:
        return str(catalogue.title[catalogue.find(name, [item])[0]])

    shown = [query.query_id for query in questions.queries[:NUM_EXAMPLES]]
    lists: dict[str, dict[str, list[tuple[str, float]]]] = {query: {} for query in shown}
    for arm in arms:
        table = pq.read_table(rankings_path(config, domain, arm, FULL), filters=[("query_id", "in", shown)])
        for row in table.to_pylist():
            lists[row["query_id"]].setdefault(arm, []).append((title(domain, row["item_id"]), row["score"]))
    return [
        {
            "domain": domain,
            "user": questions.user[number],
            "history": [title(item.domain, item.item_id) for item in query.history],
            "target": title(domain, questions.target[number]),
            "recommendations": {arm: found[:5] for arm, found in lists[query.query_id].items()},
        }
        for number, query in enumerate(questions.queries[:NUM_EXAMPLES])
    ]
