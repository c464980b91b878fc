"""Runs all stages of a recipe: prepare, pre-train, fine-tune two arms on each target domain, evaluate, report.

The two arms differ only in their start: the base model as it is, or pre-trained on behaviour sequences of all domains.
Every stage reuses what is complete and resumes what is not, so the same command goes on after an interruption. Nothing
is made from a log, a base model or a text that has changed since.

Stages are imported where a recipe runs: scoring saved rankings again needs neither torch nor Ibis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, product
from pathlib import Path

from cprec.card import CARD, Score, fill_in
from cprec.data.dataset import read_split
from cprec.data.item_columns import existing
from cprec.data.splits import Split
from cprec.entrants import (
    baseline_entrants,
    baselines_folder,
    check_baselines,
    check_learnt,
    model_entrants,
    oracle,
    renamed,
)
from cprec.errors import ConfigError, InputChanged, Unsuitable
from cprec.evaluate.asking import Entrant
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.coverage import certificate_summary
from cprec.evaluate.evaluate import evaluate, protocol_of
from cprec.evaluate.examples import NUM_EXAMPLES, examples_of
from cprec.evaluate.questions import read_queries
from cprec.evaluate.rankings import rankings_path, read_rankings
from cprec.evaluate.report_page import (
    latex_table,
    markdown_table,
    metric_name,
    print_report,
    report_page,
    results_of_model,
)
from cprec.evaluate.results import (
    BLENDED,
    FULL,
    DomainResult,
    Example,
    Report,
    TrainedModel,
    arm_of,
    write_report,
)
from cprec.evaluate.training_page import TrainingRun
from cprec.files import write_whole
from cprec.progress import say
from cprec.provenance import read_resolved, save_resolved
from cprec.rank.config import RankConfig, RefitConfig
from cprec.recipe import CPREC, FINETUNED, UNTRAINED, Recipe
from cprec.report import training_report
from cprec.text.config import PrepareConfig
from cprec.train.folder import LOG, read_done, read_log

Models = Mapping[str, Mapping[str, str]]
"""Domain -> the name of an arm -> the folder of its model."""


def run(recipe: Recipe) -> Report | None:
    """Run every stage of a recipe; prints the report, writes `report.json` and `report.html`, and returns it.

    Without a domain to recommend in there is nothing to evaluate: then it writes `training.html` alone, and returns
    None. Raises InputChanged where a folder that is there was made from other input, and names those that were made
    from it.
    """
    from cprec.budget import within_hours
    from cprec.pretrain import pretrain
    from cprec.rank.blend import check_parts
    from cprec.shrink import shrink
    from cprec.text.prepare import prepare

    check_baselines(recipe.evaluate)  # what the last stage would refuse is refused before the first
    if recipe.finetune and recipe.blend:
        check_parts(recipe.blend.parts, recipe.blend.columns)
        for path in recipe.blend.columns.values():
            existing(path)
    targets = recipe.prepare.target_domains
    if unknown := sorted(set(recipe.evaluate.domains) - set(targets)):
        raise ConfigError(
            f"evaluate.domains: {unknown[0]!r} is no target domain; there are {', '.join(targets) or 'none'}"
        )
    later = [stage.output_dir for stage in (recipe.pretrain, recipe.finetune) if stage]
    total = 2 + bool(recipe.shrink) + bool(recipe.pretrain) + (len(targets) if recipe.finetune else 0)
    steps = (f"[{number}/{total}]" for number in count(1))

    if recipe.shrink:
        say(f"{next(steps)} shrink {recipe.shrink.model} to what the data need")
        with _naming([recipe.shrink.output_dir, recipe.prepare.output_dir, *later]):
            prepare(replace(recipe.prepare, output_dir=recipe.shrink.data, tokenizer=recipe.shrink.model))
            shrink(recipe.shrink)
    say(f"{next(steps)} prepare: {recipe.description}")
    with _naming(later):
        prepare(recipe.prepare)
    if recipe.hours:
        recipe = within_hours(recipe)
    runs: dict[str, str] = {}
    if recipe.pretrain:
        say(f"{next(steps)} pre-train on {'behaviour sequences' if targets else 'text'}")
        with _naming(later[1:]):
            pretrain(recipe.pretrain)
        runs["pre-training"] = recipe.pretrain.output_dir
    models = {domain: _arms(recipe, domain, steps) for domain in targets}
    if recipe.finetune:
        runs |= {f"{domain}: {arm}": folder for domain, arms in models.items() for arm, folder in arms.items()}
    if not targets:
        say(f"{next(steps)} report")
        training_report(recipe.evaluate.output_dir)
        return None
    say(f"{next(steps)} evaluate")
    if recipe.evaluate.models:
        say("evaluate.models are left out: `cprec run` ranks the models that it makes, `cprec evaluate` those named")
    ranked = {domain: models[domain] for domain in recipe.evaluate.domains or targets}
    return _report(recipe.evaluate, ranked, runs, title=recipe.name, generated=recipe.prepare)


def _arms(recipe: Recipe, domain: str, steps: Iterator[str]) -> dict[str, str]:
    """The models of a domain by arm, fine-tuned and blended now where the recipe says so."""
    from cprec.blend import blend
    from cprec.finetune import finetune

    bases = {CPREC: recipe.pretrain.output_dir} if recipe.pretrain else {}
    if recipe.finetune is None:
        return bases
    start = (recipe.pretrain or recipe.finetune).model_name_or_path
    folders = {}
    say(f"{next(steps)} fine-tune on {domain}")
    first = FINETUNED if recipe.finetune.num_train_epochs else UNTRAINED
    for (model, base), seed in product({first: start, **bases}.items(), recipe.evaluate.seeds):
        several = len(recipe.evaluate.seeds) > 1
        arm = arm_of(model, seed) if several else model
        say(f"{domain}: {arm}")
        folders[arm] = recipe.model_folder(domain, model, seed)
        settings = replace(recipe.finetune, domain=domain, model_name_or_path=base, output_dir=folders[arm])
        finetune(replace(settings, seed=seed) if several else settings)
        if recipe.blend:
            try:
                uncertified = recipe.blend.uncertified or recipe.evaluate.uncertified
                networks = baselines_folder(recipe.evaluate.output_dir, domain)
                blend(replace(recipe.blend, model=folders[arm], uncertified=uncertified), networks)
            except Unsuitable as error:
                say(f"{folders[arm]} is not blended: {error}")
        if recipe.evaluate.refit:
            folders[arm] = _refitted(folders[arm])
    return folders


def _refitted(model: str) -> str:
    """The model that is tested in place of one: what stands beside it has learnt the validation events."""
    from cprec.refit import refit

    try:
        return str(refit(RefitConfig(model=model, output_dir=f"{model}-refit", events="validation")))
    except Unsuitable as error:
        say(f"{model} is tested as it is: {error}")
        return model


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


def evaluate_models(config: EvaluateConfig) -> Report:
    """Rank the queries of each domain with the models named in the configuration, beside the baselines.

    Where a model folder is gone but its rankings were saved, these are scored again.
    """
    queried = sorted(path.name for path in Path(config.data, "queries").glob("*") if path.is_dir())
    models: dict[str, dict[str, str]] = {domain: {} for domain in config.domains or queried}
    if not models:
        raise ConfigError(f"data={config.data!r} holds no queries: give a folder that `cprec prepare` wrote")
    for arm, folder in config.models.items():
        about = read_done(folder)
        for domain, arms in models.items():
            if about is None:
                fits = read_rankings(rankings_path(config.output_dir, domain, arm, FULL)) is not None
            else:
                fits = about.get("domain") in (None, domain)
            if fits:
                arms[arm] = folder
        if about is None and not any(arm in arms for arms in models.values()):
            raise ConfigError(f"models.{arm}={folder}: no finished model of CPRec is there (no cprec.json)")
    return _report(config, models, config.models, title="evaluation")


# ---- report ----------------------------------------------------------------------------------------------------------


def _report(
    config: EvaluateConfig,
    models: Models,
    runs: Mapping[str, str],
    *,
    title: str,
    generated: PrepareConfig | None = None,
) -> Report:
    """Evaluate every arm and baseline on every domain, then write and print the report.

    `runs` are the folders of training runs to report, by name. Where `generated` says that the data are a generated
    world, its bound stands in every table.
    """
    for arms in models.values():
        check_learnt(config, arms)  # of all domains, before the first is ranked
    split = read_split(config.data)
    domains = {domain: _evaluate(config, split, domain, arms, generated) for domain, arms in models.items()}
    finished = {name: about for name, folder in runs.items() if (about := read_done(folder))}
    report = Report(
        title=title,
        protocol=protocol_of(config, split, _in_words(config.rank)),
        certificate=certificate_summary(
            config.data, uncertified=not all(result.certified for result in domains.values())
        ),
        domains=domains,
        models={
            name: TrainedModel(num_parameters=about["num_parameters"], tokens=about["tokens"], seconds=about["seconds"])
            for name, about in finished.items()
        },
    )
    examples = [
        example for domain, result in domains.items() for example in _examples(config, split, result, models[domain])
    ]
    save_resolved(config.output_dir, config)
    _publish(Path(config.output_dir), report, examples, {name: runs[name] for name in finished})
    _fill_in_cards(report, models, config.part)
    return report


def _evaluate(
    config: EvaluateConfig, split: Split, domain: str, arms: Mapping[str, str], generated: PrepareConfig | None
) -> DomainResult:
    """The results of a domain: baselines, then models, then the bound of a generated world."""
    entrants = baseline_entrants(config, split, domain)
    entrants += model_entrants(config, domain, arms)
    if generated is not None and generated.synthetic is not None:
        entrants.append(oracle(generated.synthetic))
    result = evaluate(config, split, domain, entrants)
    if not _any_pretrained(entrants, arms):
        return result
    pretrained = read_resolved(config.data)["config"]["pretrain_domains"] or split.catalogue.domains
    return replace(result, unseen=domain not in pretrained)


def _any_pretrained(entrants: Sequence[Entrant], arms: Mapping[str, str]) -> bool:
    """Whether a model of these was pre-trained: it is of that stage, or rests on more than its own examples."""
    stages = {(read_done(folder) or {}).get("stage") for folder in arms.values()}
    return "pretrain" in stages or any(len(entrant.trained_on) > 1 for entrant in entrants)


def _in_words(rank: RankConfig) -> str:
    """How language models rank, for people."""
    if rank.mode == "vectors":
        return "all items at once by the item head, candidates too; no titles read"
    search = {
        "exact": "exact search of the catalogue's titles, each list proven",
        "auto": f"exact search of the catalogue's titles; after {rank.max_nodes:,} prefixes the best found",
        "beam": f"beam search of width {rank.beam_width} over the catalogue's titles, not exact",
    }[rank.mode]
    scores = {"sum": "", "mean": "; scores are means over tokens", "corrected": "; scores corrected for popularity"}
    over = {
        "auto": "normalised as trained",
        "vocabulary": "normalised over the vocabulary",
        "catalogue": "normalised over the catalogue",
    }[rank.normaliser]
    shared = "items of one title share its probability"
    return f"{search}; candidates by exact log-likelihood; {over}; {shared}{scores[rank.score]}"


def _examples(config: EvaluateConfig, split: Split, result: DomainResult, models: Collection[str]) -> list[Example]:
    """What models (their blends, where they have some), or the best baseline where there are no models, recommend a few
    users of a domain, by saved rankings."""
    domain, best = result.domain, result.best()
    blends = [renamed(name, BLENDED) for name in models]
    arms = [blend if blend in result.arms else name for name, blend in zip(models, blends, strict=True)]
    arms = arms or ([best.name] if best else [])
    questions = read_queries(config.data, domain, config.part, max_queries=config.max_queries, seed=config.seed)
    rankings = {arm: rankings_path(config.output_dir, domain, arm, FULL) for arm in arms}
    return examples_of(questions, split.catalogue, rankings, exclude_seen=config.exclude_seen)


def _publish(folder: Path, report: Report, examples: Sequence[Example], runs: Mapping[str, str]) -> None:
    """Write a report in all its forms, and print it."""
    logged = {name: Path(run) for name, run in runs.items() if Path(run, LOG).is_file()}  # not where nothing is trained
    trained = {name: TrainingRun(name, read_log(run / LOG), read_done(run) or {}) for name, run in logged.items()}
    write_report(folder / "report.json", report)
    write_whole(folder / "report.html", report_page(report, trained, examples))
    for name, table_of in (("tables.md", markdown_table), ("tables.tex", latex_table)):
        write_whole(folder / name, "\n".join(table_of(report, domain) for domain in report.domains))
    print_report(report, examples[:NUM_EXAMPLES])
    say(f"wrote {folder / 'report.json'}, report.html, tables.md and tables.tex")


def _fill_in_cards(report: Report, models: Models, part: str) -> None:
    """Put the results of each model into the card of its folder, where it has one."""
    rows: dict[str, dict[str, list[str]]] = {}
    for domain, arms in models.items():
        judged = report.domains[domain].arms
        for arm, folder in arms.items():
            own = [row for row in (arm, renamed(arm, BLENDED)) if row in judged]
            rows.setdefault(folder, {}).setdefault(domain, []).extend(own)
    for folder, mine in rows.items():
        try:
            if fill_in(folder, results_of_model(report, mine), _scores(report, mine, part)):
                say(f"{Path(folder, CARD)}: results written")
        except (OSError, UnicodeError) as error:
            say(f"note: the model card is left as it was: {error}")


def _scores(report: Report, rows: Mapping[str, Sequence[str]], part: str) -> list[Score]:
    """NDCG and Recall of a model's rows, for the metadata of its card."""
    found = []
    for domain, mine in rows.items():
        result = report.domains[domain]
        warning = "" if result.certified else ", uncertified"
        for row, metric in product(mine, (result.main, replace(result.main, name="recall"))):
            name = f"{metric_name(metric)} ({row}{warning})"
            value = result.arms[row].metrics[metric].mean
            found.append(Score(domain, part, f"{metric.name}_at_{metric.k}", name, value))
    return found
