"""Tuning: every baseline gets as many trials and as much time to find its settings on validation queries."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.baselines.config import TuneConfig
from cprec.errors import ConfigError

if TYPE_CHECKING:
    import optuna

    from cprec.baselines.search import Choice, Settings
    from cprec.data.splits import Split
    from cprec.recommender import RankingQuery, Recommender

K = 10
METRIC = f"ndcg@{K}"
BATCH = 512
"""Queries that are ranked between two looks at them."""


def tune(config: TuneConfig, baselines: Mapping[str, Settings] | None = None) -> dict[str, dict[str, Any]]:
    """Tune baselines for NDCG@10 over validation queries, full catalogue, items of the history left out.

    Settings come from Optuna's TPE sampler (Bergstra et al. 2011). The result, also in `config.output`, is domain ->
    baseline -> its best `settings`, their `ndcg@10`, that of the `defaults`, the `trials` made and the `seconds` taken;
    a baseline that cannot be made of a domain has `unfit`, the reason, instead. The file is replaced as a whole when a
    baseline is done, so that a run that was stopped goes on with the next. The same seed tries the same settings
    unless the time ends first. `baselines` takes the place of those that the configuration names.

    Raises ConfigError where Optuna is missing, a name is unknown, or a domain has no validation query.
    """
    from cprec.baselines import lineup
    from cprec.data.dataset import read_split
    from cprec.progress import track
    from cprec.provenance import file_sha256

    _optuna()
    if baselines is None:
        names = lineup.names_of(config.baselines)
        baselines = {
            name: lineup.settings_of(name)
            for name in names
            if name in config.baselines or not name.endswith("(published)")
        }
    split = read_split(config.data)
    domains = config.domains or split.catalogue.domains
    asked = {name: getattr(config, name) for name in ("trials", "seconds", "max_queries", "seed")} | {
        "data": file_sha256(Path(config.data, "dataset.json"))
    }
    results = read_results(config.output)
    if unknown := sorted(set(domains) - set(split.catalogue.domains)):
        raise ConfigError(
            f"domains: there is no {unknown[0]!r}; {config.data} has {', '.join(split.catalogue.domains)}"
        )
    with track(len(domains) * len(baselines) * config.trials, "tuning", unit="trials") as progress:
        for domain in domains:
            questions = validation_queries(split, domain, config.max_queries, config.seed)
            for name, settings in baselines.items():
                before = progress.completed
                if results.get(domain, {}).get(name, {}).get("asked") != asked:
                    progress.advance(0, domain=domain, baseline=name)
                    found = search(settings, split, domain, questions, config, lambda: progress.advance(1))
                    results.setdefault(domain, {})[name] = found | {"asked": asked}
                    _write(results, Path(config.output))
                progress.advance(before + config.trials - progress.completed)
    return results


def search(
    start: Settings,
    split: Split,
    domain: str,
    questions: tuple[Sequence[RankingQuery], Sequence[str]],
    config: TuneConfig,
    tried: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """The best settings of one baseline in one domain, as `tune` reports them; `tried` is called after each trial."""
    from cprec.baselines.search import can_be

    optuna = _optuna()
    template: Any = start  # that it is a dataclass, a protocol cannot say
    choices = {name: choice for name, choice in start.SEARCH.items() if can_be(choice, getattr(start, name))}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed))
    study.enqueue_trial({name: getattr(start, name) for name in choices})
    began = time.monotonic()
    values: list[float | None] = []
    for number in range(config.trials if choices else 1):
        if number and time.monotonic() - began >= config.seconds:
            break
        trial = study.ask()
        settings = replace(template, **{name: _suggest(trial, name, choice) for name, choice in choices.items()})
        try:
            with tempfile.TemporaryDirectory() as folder:
                recommender = settings.make(split, domain, seed=config.seed, folder=Path(folder))
                values.append(mean_ndcg(recommender, *questions))
        except ConfigError as error:
            if not number:
                return {"unfit": str(error)}
            values.append(None)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, values[-1])
        tried()
    return {
        "settings": asdict(replace(template, **study.best_params)),
        METRIC: study.best_value,
        "defaults": values[0],
        "trials": len(values),
        "seconds": round(time.monotonic() - began, 1),
    }


def validation_queries(split: Split, domain: str, max_queries: int, seed: int) -> tuple[list[RankingQuery], list[str]]:
    """Validation queries of a domain with their whole history, whose items are left out, and their targets.

    Raises ConfigError where there are none.
    """
    import numpy as np

    from cprec.recommender import RankingQuery
    from cprec.schema import VALIDATION, Item

    asked = split.queries(domain, VALIDATION, max_history=max(1, len(split.interactions)))
    if not len(asked):
        raise ConfigError(f"domain {domain!r} has no validation query to tune on: choose another domain or split")
    chosen = np.arange(len(asked))
    if 0 < max_queries < len(asked):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(asked))[:max_queries])
    ids, log = split.catalogue.item_id, split.interactions
    queries = []
    for number in chosen.tolist():
        history = tuple(Item(domain, str(ids[row])) for row in asked.history[number])
        seen = frozenset(item.item_id for item in history)
        row = asked.user[number]
        user = f"{log.platforms[log.user_platform[row]]}/{log.user_id[row]}"
        queries.append(RankingQuery(str(asked.query_id[number]), domain, history, exclude=seen, user=user))
    return queries, [str(ids[row]) for row in asked.target[chosen]]


def mean_ndcg(recommender: Recommender, queries: Sequence[RankingQuery], targets: Sequence[str]) -> float:
    """Mean NDCG@10 of rankings of the queries; ties count with their expected value over all orders."""
    import numpy as np

    from cprec.ranks import ndcg

    better, tied = [], []
    for start in range(0, len(queries), BATCH):
        rankings = recommender.rank(queries[start : start + BATCH], K)
        for ranking, target in zip(rankings, targets[start : start + BATCH], strict=True):
            own = ranking.scores[ranking.item_ids.index(target)] if target in ranking.item_ids else np.inf
            scores = np.array(ranking.scores)
            better.append(int((scores > own).sum()))
            tied.append(int((scores == own).sum()))
    return float(ndcg(np.array(better), np.array(tied), K).mean())


def read_results(output: str | Path) -> dict[str, dict[str, Any]]:
    """What an earlier run of tuning wrote; nothing where there is no such file. Raises ConfigError for other files."""
    path = Path(output)
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        assert all("asked" in found for of_domain in results.values() for found in of_domain.values())
    except (OSError, ValueError, AttributeError, TypeError, AssertionError):
        raise ConfigError(f"output={path} is there, but no result of tuning: choose another name") from None
    return dict(results)


def tuned_settings(output: str | Path, domain: str, name: str) -> dict[str, Any]:
    """The fields that tuning chose for a baseline in a domain, to replace its defaults; none where it was not tuned."""
    return dict(read_results(output).get(domain, {}).get(name, {}).get("settings", {}))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"tuning needs more packages ({error}): pip install 'cprec[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: optuna.Trial, name: str, choice: Choice) -> Any:
    from cprec.baselines.search import OneOf, Whole

    if isinstance(choice, OneOf):
        return trial.suggest_categorical(name, choice.values)
    if isinstance(choice, Whole):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)


def _write(results: dict[str, dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".incomplete")
    aside.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)
