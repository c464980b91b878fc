"""Stage: tuning, in which every row of the line-up gets as many trials and as much time to find its settings on
validation queries."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec import lineup
from cprec.baselines.config import TuneConfig
from cprec.choices import Choice, OneOf, Whole, can_be
from cprec.data.dataset import read_split
from cprec.data.queries import ranking_queries, sampled_rows
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.files import write_whole
from cprec.progress import track
from cprec.provenance import file_sha256
from cprec.ranks import count_rankings, ndcg
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import VALIDATION

if TYPE_CHECKING:  # an extra
    import optuna

K = 10
METRIC = f"ndcg@{K}"
BATCH = 512
"""Queries that are ranked at once."""


def tune(config: TuneConfig, baselines: Mapping[str, lineup.Settings] | None = None) -> dict[str, dict[str, Any]]:
    """Tune baselines and systems for NDCG@10 over validation queries, full catalogue, items of the history left out.

    Settings come from Optuna's TPE sampler (Bergstra et al. 2011). The result, also in `config.output`, is domain ->
    name -> the best `settings`, their `ndcg@10`, that of the `defaults`, the number of `trials` and the `seconds`.
    Where a recommender cannot be made of a domain the result is `unfit`, the reason. The file is written whole after
    each name, so a run that was stopped goes on with the next. The same seed tries the same settings unless the time
    ends first. `baselines` takes the place of those that the configuration names.

    Raises ConfigError where Optuna is missing, a name is unknown, or a domain has no validation query.
    """
    _optuna()
    if baselines is None:  # those set as published are tuned only where they are named
        names = lineup.names_of(config.baselines)
        wanted = [name for name in names if name in config.baselines or not name.endswith("(published)")]
        baselines = {name: lineup.settings_of(name) for name in wanted}
    split, results = read_split(config.data), read_results(config.output)
    domains = config.domains or split.catalogue.domains
    if unknown := sorted(set(domains) - set(split.catalogue.domains)):
        raise ConfigError(
            f"domains: there is no {unknown[0]!r}; {config.data} has {', '.join(split.catalogue.domains)}"
        )
    asked = {name: getattr(config, name) for name in ("trials", "seconds", "max_queries", "seed")}
    asked["data"] = file_sha256(Path(config.data, "dataset.json"))
    with track(len(domains) * len(baselines) * config.trials, "tuning", unit="trials") as progress:
        for domain in domains:
            questions = validation_queries(split, domain, config.max_queries, config.seed)
            for name, settings in baselines.items():
                before = progress.completed
                # A file of earlier defaults, or of other ranges, is of another search.
                searched = asked | {"start": repr(settings), "search": repr(settings.SEARCH)}
                if results.get(domain, {}).get(name, {}).get("asked") != searched:
                    progress.advance(0, domain=domain, baseline=name)
                    found = _search(settings, split, domain, questions, config, tried=lambda: progress.advance(1))
                    results.setdefault(domain, {})[name] = found | {"asked": searched}
                    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                    write_whole(config.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
                progress.advance(before + config.trials - progress.completed)
    return results


def _search(
    start: Any,  # settings, which are a dataclass, as a protocol cannot say
    split: Split,
    domain: str,
    questions: tuple[Sequence[RankingQuery], Sequence[str]],
    config: TuneConfig,
    tried: Callable[[], object],
) -> dict[str, Any]:
    """The best settings of a recommender in a domain, as `tune` reports them; `tried` is called after each trial."""
    optuna = _optuna()
    choices = {name: choice for name, choice in start.SEARCH.items() if can_be(choice, getattr(start, name))}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed))
    study.enqueue_trial({name: getattr(start, name) for name in choices})
    began = time.monotonic()
    values: list[float | None] = []
    for number in range(config.trials if choices else 1):
        if number and time.monotonic() - began >= config.seconds:
            break
        trial = study.ask()
        try:
            settings = replace(start, **{name: _suggest(trial, name, choice) for name, choice in choices.items()})
            with tempfile.TemporaryDirectory() as folder:
                made = settings.make(split, domain, seed=config.seed, folder=Path(folder))
                values.append(mean_ndcg(made, *questions))
            study.tell(trial, values[-1])
        except ConfigError as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if not number and isinstance(error, Unsuitable):
                return {"unfit": str(error)}
            if not number:
                raise
            values.append(None)  # settings that do not go together
        tried()
    return {
        "settings": asdict(replace(start, **study.best_params)),
        METRIC: study.best_value,
        "defaults": values[0],
        "trials": len(values),
        "seconds": round(time.monotonic() - began, 1),
    }


def validation_queries(split: Split, domain: str, max_queries: int, seed: int) -> tuple[list[RankingQuery], list[str]]:
    """Validation queries of a domain with their whole history, whose items are left out, and their targets.

    Raises Unsuitable where there are none.
    """
    asked = split.queries(domain, VALIDATION, max_history=max(1, len(split.interactions)))
    if not len(asked):
        raise Unsuitable(f"domain {domain!r} has no validation query to choose by: choose another domain or split")
    return ranking_queries(split, asked, sampled_rows(len(asked), max_queries, seed))


def mean_ndcg(recommender: Recommender, queries: Sequence[RankingQuery], targets: Sequence[str]) -> float:
    """Mean NDCG@10 of rankings of the queries; ties count with their expected value over all orders."""
    rankings = []
    for start in range(0, len(queries), BATCH):
        rankings += recommender.rank(queries[start : start + BATCH], K)
    return float(ndcg(*count_rankings(rankings, targets), K).mean())


def read_results(output: str | Path) -> dict[str, dict[str, Any]]:
    """The results that an earlier run of tuning wrote; none where there is no such file.

    Raises ConfigError for other files.
    """
    path = Path(output)
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        assert all("asked" in found for of_domain in results.values() for found in of_domain.values())
    except (OSError, ValueError, AttributeError, TypeError, AssertionError):
        raise ConfigError(f"output={path} exists, but holds no results of tuning: choose another name") from None
    return dict(results)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"tuning needs more packages ({error}): pip install 'cprec[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: optuna.Trial, name: str, choice: Choice) -> Any:
    if isinstance(choice, OneOf):
        return trial.suggest_categorical(name, choice.values)
    if isinstance(choice, Whole):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)
