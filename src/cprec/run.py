"""The whole road of a recipe: prepare, pre-train, fine-tune two arms on each target domain, evaluate, report.

The two arms differ in their start alone: the base model as it is, or pre-trained on behaviour sequences of all domains.
Every stage reuses what is complete and resumes what is not, so the same command goes on after an interruption. What a
stage read decides that too: nothing is made from a log, a base model or a text that has changed since.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.errors import ConfigError, InputChanged
from cprec.recommender import Ranking, RankingQuery, Recommender

if TYPE_CHECKING:
    from cprec.data.splits import Split
    from cprec.evaluate.config import EvaluateConfig
    from cprec.evaluate.evaluate import Entrant
    from cprec.rank.llm import LLMRecommender, Mode
    from cprec.recipe import Recipe
    from cprec.text.config import PrepareConfig

FINETUNED, CPREC = "fine-tuning only", "CPRec-style"
NUM_EXAMPLES = 3


def run(recipe: Recipe) -> dict[str, Any]:
    """Run every stage of a recipe; prints the report, writes `report.json` and `report.html`, and returns it.

    Raises InputChanged where a folder that is there was made from other input, and names those that were made from it.
    """
    from cprec.baselines.lineup import names_of
    from cprec.progress import say
    from cprec.text.prepare import prepare
    from cprec.train.finetune import finetune
    from cprec.train.pretrain import pretrain

    names_of(recipe.evaluate.baselines)  # what the last stage would refuse is refused before the first
    if recipe.evaluate.tuned and not Path(recipe.evaluate.tuned).is_file():
        raise ConfigError(f"tuned={recipe.evaluate.tuned!r} does not exist: make it with `cprec tune`")
    targets = recipe.prepare.target_domains
    pretraining, finetuning = recipe.pretrain, recipe.finetune
    stages = 2 + bool(pretraining) + (len(targets) if finetuning else 0)
    done = 1

    def begin(what: str) -> None:
        nonlocal done
        say(f"[{done}/{stages}] {what}")
        done += 1

    later = [stage.output_dir for stage in (pretraining, finetuning) if stage]
    begin(f"prepare: {recipe.description}")
    with _naming(later):
        prepare(recipe.prepare)
    models: dict[str, dict[str, str]] = {domain: {} for domain in targets}
    runs: dict[str, str] = {}
    bases: dict[str, str] = {}
    if finetuning:
        bases[FINETUNED] = pretraining.model_name_or_path if pretraining else finetuning.model_name_or_path
    if pretraining:
        begin("pre-train on behaviour sequences")
        with _naming(later[1:]):
            pretrain(pretraining)
        runs["pre-training"] = bases[CPREC] = pretraining.output_dir
    for domain in targets:
        if finetuning is None:
            models[domain] = dict(bases)
            continue
        for arm, base in bases.items():
            if arm == FINETUNED:
                begin(f"fine-tune on {domain}")
            say(f"{domain}: {arm}")
            folder = f"{finetuning.output_dir}/{domain}/{arm.lower().replace(' ', '-')}"
            finetune(replace(finetuning, domain=domain, model_name_or_path=base, output_dir=folder))
            models[domain][arm] = runs[f"{domain}: {arm}"] = folder
    begin("evaluate")
    return _report(recipe.evaluate, models, runs, title=recipe.name, synthetic=recipe.prepare)


@contextmanager
def _naming(later: Sequence[str]) -> Iterator[None]:
    """Where input has changed, name the folders too that were made from what the stage made."""
    try:
        yield
    except InputChanged as error:
        there = [folder for folder in later if Path(folder).exists()]
        raise InputChanged(
            f"{error}. Delete what was made from it, too: {', '.join(there)}" if there else error
        ) from None


def evaluate_models(config: EvaluateConfig) -> dict[str, Any]:
    """Rank the queries of each domain with the models named in the configuration, beside the baselines.

    A model folder that is gone is no hindrance where its rankings were saved: they are scored again.
    """
    from cprec.evaluate.evaluate import saved_model
    from cprec.train.training import read_done

    models: dict[str, dict[str, str]] = {domain: {} for domain in config.domains or _queried_domains(config)}
    for arm, folder in config.models.items():
        about = read_done(folder)
        for domain, arms in models.items():
            fits = about.get("domain") in (None, domain) if about else saved_model(config, domain, arm) is not None
            if fits:
                arms[arm] = folder
        if about is None and not any(arm in arms for arms in models.values()):
            raise ConfigError(f"models.{arm}={folder}: no finished model of CPRec is there (no cprec.json)")
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
    from cprec.evaluate.report_page import latex_table, markdown_table, print_report, write_report_page
    from cprec.evaluate.results import Example, read_report
    from cprec.evaluate.training_run import TrainingRun
    from cprec.progress import say
    from cprec.provenance import read_resolved, save_resolved
    from cprec.train.training import LOG, read_done, read_log

    split = read_split(config.data)
    pretrained = read_resolved(config.data)["config"]["pretrain_domains"] or split.catalogue.domains
    domains: dict[str, Any] = {}
    for domain, arms in models.items():
        entrants = _entrants(config, split, domain, arms, synthetic)
        unseen = domain not in pretrained if arms else None
        domains[domain] = {"unseen": unseen, **evaluate(config, split, domain, entrants)}
    certificate = Path(config.data) / "certificate.json"
    properties = json.loads(certificate.read_text())["properties"] if certificate.is_file() else []
    finished = {name: about for name, folder in runs.items() if (about := read_done(folder))}
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
    examples = [
        example
        for domain, arms in models.items()
        for example in _examples(config, split, domain, list(arms) or _best_baseline(domains[domain], config.k))
    ]
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(folder, config)
    temporary = folder / "report.json.incomplete"
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    temporary.replace(folder / "report.json")
    trained = {name: TrainingRun(name, read_log(Path(runs[name]) / LOG), about) for name, about in finished.items()}
    results = read_report(folder / "report.json")
    shown = [Example(**example) for example in examples]
    write_report_page(folder / "report.html", results, trained, shown)
    for name, table_of in (("tables.md", markdown_table), ("tables.tex", latex_table)):
        (folder / name).write_text("\n".join(table_of(results, domain) for domain in domains))
    print_report(results, shown[:NUM_EXAMPLES])
    say(f"wrote {folder / 'report.json'}, report.html, tables.md and tables.tex")
    return report


def _entrants(
    config: EvaluateConfig, split: Split, domain: str, arms: dict[str, str], synthetic: PrepareConfig | None
) -> list[Entrant]:
    """The baselines that are asked for; then the models; then, in a synthetic world, the bound that its true
    probabilities give."""
    from cprec.evaluate.evaluate import Entrant

    entrants = baseline_entrants(config, split, domain)
    entrants += model_entrants(config, domain, arms)
    if synthetic is not None and synthetic.synthetic is not None:
        from cprec.data.sources.synthetic import OracleRecommender, SyntheticWorld

        oracle = OracleRecommender(SyntheticWorld(synthetic.synthetic))
        entrants.append(Entrant(name="oracle", recommender=oracle, kind="bound"))
    return entrants


def baseline_entrants(config: EvaluateConfig, split: Split, domain: str) -> list[Entrant]:
    """The baselines of an evaluation as entrants, each made when it is first asked; those that cannot be made of this
    data are left out, with a note.

    Raises ConfigError for names that are none.
    """
    from cprec.baselines.lineup import BASELINES, identity_of, is_trained, names_of
    from cprec.evaluate.evaluate import Entrant
    from cprec.evaluate.seeds import arm_of
    from cprec.progress import say

    names = names_of(config.baselines)
    tuned = _tuned(config, domain, names)
    entrants = []
    for name in names:
        if reason := BASELINES[name].unfit(split, domain):
            say(f"{domain}: {name} is left out: {reason}")
            continue
        for seed in config.seeds if is_trained(name) else [config.seed]:
            shown = arm_of(name, seed) if len(config.seeds) > 1 and is_trained(name) else name
            baseline = _Baseline(shown, name, config, split, domain, seed, tuned.get(name))
            identity = f"{identity_of(name)} seed {seed} {json.dumps(tuned.get(name), sort_keys=True)}"
            entrants.append(
                Entrant(
                    name=shown,
                    recommender=baseline,
                    kind="baseline",
                    stochastic=is_trained(name),
                    identity=identity,
                    open=partial(getattr, baseline, "made"),
                    cost=baseline.cost,
                    close=baseline.close,
                )
            )
    return entrants


def _tuned(config: EvaluateConfig, domain: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings that tuning has found for a domain, by baseline; those set as published stay as they are.

    Raises ConfigError for a file that is none, or of other data.
    """
    from cprec.baselines.tune import read_results
    from cprec.progress import say
    from cprec.provenance import file_sha256

    if not config.tuned:
        return {}
    if not Path(config.tuned).is_file():
        raise ConfigError(f"tuned={config.tuned!r} does not exist: make it with `cprec tune`")
    found = read_results(config.tuned).get(domain, {})
    data = file_sha256(Path(config.data) / "dataset.json")
    if any(entry["asked"]["data"] != data for entry in found.values()):
        raise ConfigError(f"tuned={config.tuned!r} was found on other data than {config.data}: tune on that folder")
    wanted = [name for name in names if not name.endswith("(published)")]
    if missing := [name for name in wanted if name not in found]:
        say(f"{domain}: {config.tuned} has no settings of {', '.join(missing)}, which keep their defaults")
    return {name: found[name]["settings"] for name in wanted if "settings" in found.get(name, {})}


class _Baseline:
    """A baseline that is made, trained perhaps, when it is first asked: saved rankings need none."""

    def __init__(
        self,
        shown: str,
        name: str,
        config: EvaluateConfig,
        split: Split,
        domain: str,
        seed: int,
        tuned: dict[str, Any] | None,
    ) -> None:
        self.name, self._name, self._config, self._split = shown, name, config, split
        self._domain, self._seed, self._tuned = domain, seed, tuned

    @cached_property
    def made(self) -> Recommender:
        from cprec.baselines.lineup import settings_of
        from cprec.provenance import file_sha256

        settings = settings_of(self._name, self._tuned)
        data = file_sha256(Path(self._config.data) / "dataset.json")
        made_of = hashlib.sha256(f"{settings} {self._seed} {data}".encode()).hexdigest()[:8]  # others train elsewhere
        name = re.sub("[^a-z0-9]+", "-", self._name.lower()).strip("-")
        folder = Path(self._config.output_dir) / "baselines" / self._domain / f"{name}-{made_of}"
        return settings.make(self._split, self._domain, seed=self._seed, folder=folder)

    def close(self) -> None:
        self.__dict__.pop("made", None)

    def cost(self) -> dict[str, float]:
        names = {"num_parameters": "num_parameters", "seconds": "train_seconds"}
        return {shown: getattr(self.made, name) for name, shown in names.items() if hasattr(self.made, name)}

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        return self.made.rank(queries, k)


SCORES = "P(item) = P(title) / n, n the items in stock that have the title"
"""The rule by which models score items (`rank.llm`), which saved rankings are tied to: change it with the rule."""


def model_entrants(config: EvaluateConfig, domain: str, arms: dict[str, str]) -> list[Entrant]:
    """Model folders, by the name they have in tables, as entrants of an evaluation; of one that is gone, or whose
    weights are, what it ranked before in the domain."""
    from cprec.evaluate.evaluate import Entrant, saved_model
    from cprec.progress import say
    from cprec.provenance import FileHashes
    from cprec.train.training import model_identity, read_done

    entrants, hashes = [], FileHashes(config.output_dir)
    for arm, folder in arms.items():
        model, about = _ModelFolder(arm, folder, config), read_done(folder)
        here = about is not None and any(Path(folder).glob("*.safetensors"))
        if not here:
            say(f"{domain}: {arm}: no weights in {folder}, so its saved rankings are scored as they are")
        trained_on = about["trained_on"] if about else saved_model(config, domain, arm) or ()
        entrants.append(
            Entrant(
                name=arm,
                recommender=model,
                kind="model",
                stochastic=True,
                trained_on=tuple(trained_on),
                identity=model_identity(folder, hashes) if here else None,
                scores=SCORES,
                modes={"exact": _InMode(model, "exact"), "generate": _InMode(model, "generate")},
                open=partial(getattr, model, "opened") if here else partial(_gone, arm, folder),
                cost=partial(_model_cost, folder),
                close=model.close,
            )
        )
    hashes.save()
    return entrants


def _gone(arm: str, folder: str) -> None:
    raise ConfigError(
        f"models.{arm}={folder} holds no weights, and its saved rankings answer other questions than those asked now: "
        "ask as they were (k, max_queries, seed, num_candidates, mode, score), or bring the model back. Rankings "
        "that were saved before the items of a title shared its probability need the model, too"
    )


def _model_cost(folder: str) -> dict[str, float]:
    from cprec.train.training import read_done

    about = read_done(folder) or {}
    names = {"num_parameters": "num_parameters", "seconds": "train_seconds"}
    return {shown: about[name] for name, shown in names.items() if name in about}


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

    def close(self) -> None:
        self.__dict__.pop("opened", None)

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        return self.opened.rank(queries, k)


class _InMode:
    """The same model, which ranks in another mode."""

    def __init__(self, model: _ModelFolder, mode: Mode) -> None:
        self.name, self._model, self._mode = model.name, model, mode

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        return self._model.opened.rank(queries, k, self._mode)


def _best_baseline(result: dict[str, Any], k: int) -> list[str]:
    """The arm to show examples of where there is no model."""
    found = {name: arm[f"ndcg@{k}"]["mean"] for name, arm in result["arms"].items() if arm["kind"] == "baseline"}
    return [max(found, key=lambda name: found[name])] if found else []


def _examples(config: EvaluateConfig, split: Split, domain: str, arms: list[str]) -> list[dict[str, Any]]:
    """A few users of a domain with what each of some arms recommends them, from the saved rankings."""
    import pyarrow.parquet as pq

    from cprec.evaluate.evaluate import rankings_path
    from cprec.evaluate.questions import FULL, read_questions

    questions = read_questions(config, split, domain)
    catalogue = split.catalogue

    def title(name: str, item: str) -> str:
        return str(catalogue.title[catalogue.find(name, [item])[0]])

    shown = [query.query_id for query in questions.queries[:NUM_EXAMPLES]]
    lists: dict[str, dict[str, list[tuple[str, float]]]] = {query: {} for query in shown}
    for arm in arms:
        table = pq.read_table(rankings_path(config, domain, arm, FULL), filters=[("query_id", "in", shown)])
        for row in table.to_pylist():
            if row["seen"] and config.exclude_seen:
                continue
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
