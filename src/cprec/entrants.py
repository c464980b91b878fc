"""Who takes part in an evaluation: baselines, models, and in a generated world the best result that is possible.

Nothing is made before its turn comes: where saved rankings answer the questions, neither torch nor a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cprec import lineup
from cprec.data.catalogue import Catalogue
from cprec.data.config import SyntheticConfig
from cprec.data.dataset import event_files
from cprec.data.sources.synthetic import OracleRecommender, SyntheticWorld
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError
from cprec.evaluate.asking import EXACT, Entrant, Opened
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.rankings import rankings_path, read_rankings, slug
from cprec.evaluate.results import BLENDED, BY_HEAD, FULL, GENERATED, arm_of, model_of
from cprec.progress import say
from cprec.provenance import FileHashes, code_sha256, differences, file_sha256, shortened, to_dict
from cprec.rank.blend_file import BLEND, read_about
from cprec.rank.config import RankConfig
from cprec.schema import VALIDATION
from cprec.scoring import ScoringRecommender
from cprec.settings import update
from cprec.train.folder import model_identity, read_done, refitted_on
from cprec.tune import read_results

COSTS = {"num_parameters": "num_parameters", "seconds": "train_seconds"}
"""What recommenders and model folders say of their cost, and the names it has in a report."""


# ---- baselines -------------------------------------------------------------------------------------------------------


def baselines_folder(output_dir: str, domain: str) -> Path:
    """Where an evaluation keeps what is trained for baselines of a domain, in a folder of its own for each."""
    return Path(output_dir, "baselines", domain)


def baseline_entrants(config: EvaluateConfig, split: Split, domain: str) -> list[Entrant]:
    """The baselines of an evaluation as entrants; one that is trained enters once for each seed.

    Raises ConfigError for names of no baseline, and for settings that one does not have.
    """
    check_baselines(config)
    names = lineup.names_of(config.baselines)
    tuned = _tuned(config, domain, names)
    learnt = split.learning(VALIDATION) if config.refit else split

    def made(name: str, seed: int) -> Opened:
        folder = baselines_folder(config.output_dir, domain) / slug(name)
        recommender = _settings_of(config, name, tuned).make(learnt, domain, seed=seed, folder=folder)
        if lineup.is_trained(name) and seed == config.seeds[0]:
            _note_trained(config, name, domain, tuned.get(name, {}), folder)
        cost = {shown: getattr(recommender, told) for told, shown in COSTS.items() if hasattr(recommender, told)}
        modes = {GENERATED: recommender.generate} if lineup.LINEUP[name].writes else {}  # type: ignore[attr-defined]
        once = isinstance(recommender, ScoringRecommender)
        return Opened(recommender=recommender, modes=modes, cost=cost, scores_once=once)

    return [
        Entrant(
            name=arm_of(name, seed) if trained and len(config.seeds) > 1 else name,
            kind="baseline",
            open=partial(made, name, seed),
            identity={"code": lineup.identity_of(name), "seed": seed, "tuned": tuned.get(name)}
            | ({"settings": _identity_of(_settings_of(config, name, tuned))} if name in config.settings else {})
            | ({"refit": True} if config.refit else {}),
            stochastic=trained,
            writes=lineup.LINEUP[name].writes,
        )
        for name in names
        for trained in [lineup.is_trained(name)]
        for seed in (config.seeds if trained else [config.seed])
    ]


def _note_trained(config: EvaluateConfig, name: str, domain: str, tuned: Mapping[str, Any], folder: Path) -> None:
    """Have the folder of a trained row say what opens it again, as its first seed made it."""
    from cprec.trained import Trained, hashes_of_events  # loads torch, as the row has

    hashes = FileHashes(config.output_dir)
    about = Trained(
        name=name,
        domain=domain,
        seed=config.seeds[0],
        refit=config.refit,
        tuned=to_dict(tuned),
        settings=to_dict(config.settings.get(name, {})),
        data=str(Path(config.data).resolve()),
        events=hashes_of_events(config.data, hashes),
        code=lineup.identity_of(name),
    )
    hashes.save()
    about.write(folder)


def _tuned(config: EvaluateConfig, domain: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings that tuning has found for a domain, by baseline; those set as published stay as they are.

    Raises ConfigError for a file that is missing, or of other data.
    """
    if not config.tuned:
        return {}
    found = read_results(config.tuned).get(domain, {})
    data = file_sha256(Path(config.data) / "dataset.json")
    if any(entry["asked"]["data"] != data for entry in found.values()):
        raise ConfigError(f"tuned={config.tuned!r} was found on other data than {config.data}: tune on that folder")
    if missing := [name for name in names if not _is_published(name) and name not in found]:
        say(f"{domain}: {config.tuned} has no settings of {', '.join(missing)}, which keep their defaults")
    return _found_settings(found, names)


def _found_settings(found: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The settings that tuning has found of baselines that may have other ones than their own, by name."""
    return {
        name: found[name]["settings"] for name in names if not _is_published(name) and "settings" in found.get(name, {})
    }


def _is_published(name: str) -> bool:
    return name.endswith("(published)")


def _settings_of(config: EvaluateConfig, name: str, tuned: Mapping[str, Mapping[str, Any]]) -> lineup.Settings:
    """The settings of a baseline. Raises ConfigError for one that it does not have, or that cannot be."""
    return update(lineup.settings_of(name, tuned.get(name)), config.settings.get(name, {}), f"settings.{name}.")


def _identity_of(settings: Any) -> dict[str, Any]:
    """What tells settings from others: of files that they name, the content where they say so."""
    found: dict[str, Any] = settings.identity() if hasattr(settings, "identity") else asdict(settings)
    return to_dict(found)


def check_baselines(config: EvaluateConfig) -> None:
    """Raises ConfigError for names of no baseline, settings that one does not have or that are of none of those asked
    for, also beside those that tuning found for any domain, and where the file of these is missing."""
    names = lineup.names_of(config.baselines)
    if others := [name for name in config.settings if name not in names]:
        raise ConfigError(f"settings.{others[0]}: {others[0]!r} is none of baselines={','.join(config.baselines)}")
    for name in config.settings:
        _settings_of(config, name, {})
    if config.tuned and not Path(config.tuned).is_file():
        raise ConfigError(f"tuned={config.tuned!r} does not exist: make it with `cprec tune`")
    for found in read_results(config.tuned).values() if config.tuned else ():
        tuned = _found_settings(found, config.settings)
        for name in tuned:
            _settings_of(config, name, tuned)


# ---- models ----------------------------------------------------------------------------------------------------------

CODE = "cprec.rank.by_values"
"""The module that ranks with models: a change of it, or of what it imports, makes their rankings anew."""
WITHOUT_MODEL = "blend without the model"
HEAD = "item_head/*.safetensors"
"""In a model folder: the weights of an item head."""
SCORES = "P(item) = P(title) / n, n the items in stock that have the title"
"""The rule by which models score items (`rank.llm`), which saved rankings are tied to: change it with the rule."""


def model_entrants(config: EvaluateConfig, domain: str, models: Mapping[str, str]) -> list[Entrant]:
    """Model folders, by the name they have in tables, as entrants of an evaluation.

    One with a blend beside it is three rows: the best blend without the model, which models may share, the model alone,
    and the blend. One with an item head for the domain has a row by that, too. A model that is gone, or whose weights
    are, enters with the rankings that it left there.

    Raises LeakageError and ConfigError where the events that stand beside a model learnt are not those to be learnt.
    """
    check_learnt(config, models)
    rank, output_dir, hashes = config.rank, config.output_dir, FileHashes(config.output_dir)
    entrants = _without_models(models, domain)
    for name, folder in models.items():
        about = read_done(folder)
        if about is not None and any(Path(folder).glob("*.safetensors")):
            entrants.append(_model(name, folder, about, rank, hashes))
            if rank.mode != "vectors" and about.get("domain", domain) == domain and any(Path(folder).glob(HEAD)):
                entrants.append(_model(renamed(name, BY_HEAD), folder, about, RankConfig(mode="vectors"), hashes))
            entrants += _blended(name, config.data, folder, about, domain, rank, hashes)
        else:
            say(f"{domain}: {name}: no weights in {folder}, so its saved rankings are scored as they are")
            rankings = rankings_path(output_dir, domain, name, FULL)
            entrants.append(_gone(name, folder, about, rank, rankings, refit=config.refit))
    hashes.save()
    return entrants


def check_learnt(config: EvaluateConfig, models: Mapping[str, str]) -> None:
    """Raises LeakageError where what stands beside a model has learnt the events that are asked for, and ConfigError
    where it has learnt others than the baselines, or cannot."""
    for name, folder in models.items():
        arm, about, held_out = f"models.{name}={folder}", read_done(folder), refitted_on(folder)
        if config.part in held_out:
            raise LeakageError(
                f"{arm} has learnt the {config.part} events that it is to be tried on: give the model that it was "
                "refitted from, or refit that with events=validation and ask for test events"
            )
        if held_out and not config.refit:
            raise ConfigError(
                f"{arm} has learnt the validation events, and baselines would not: set refit=true, or give the model "
                "that it was refitted from"
            )
        if config.refit and not held_out and (Path(folder, BLEND).is_file() or any(Path(folder).glob(HEAD))):
            refit = f"run `cprec refit {folder} {folder}-refit events=validation`, and give that folder"
            none = "and cannot, since it is of no one domain: leave it out"
            raise ConfigError(
                f"refit=true, but what stands beside {arm} has not learnt the validation events"
                + (f": {refit}" if about and about.get("domain") else f", {none}")
            )


def _model(
    name: str,
    folder: str,
    about: Mapping[str, Any],
    rank: RankConfig,
    hashes: FileHashes,
    blend: str | None = None,
    weight: float = 1.0,
) -> Entrant:
    """A model alone, or with the blend beside it, whose hash is `blend`, and which gives log P a `weight`."""
    cost = {shown: about[key] for key, shown in COSTS.items()}
    reads_titles = rank.mode != "vectors" and weight > 0
    return Entrant(
        name=name,
        kind="model",
        open=partial(_open_model, folder, name, rank, cost, blend=blend is not None),
        identity={"model": model_identity(folder, hashes), "code": code_sha256(CODE), **_rule(rank)}
        | ({"blend": blend} if blend else {})
        | ({"refit": True} if refitted_on(folder) else {}),
        stochastic=True,
        trained_on=tuple(about["trained_on"]),
        beam=rank.mode == "beam",
        num_places=_num_places if reads_titles else None,
    )


def _open_model(folder: str, name: str, rank: RankConfig, cost: Mapping[str, Any], *, blend: bool) -> Opened:
    from cprec.rank.by_values import ByValues  # loads torch
    from cprec.rank.llm import LLMRecommender

    model = LLMRecommender.from_pretrained(folder, name=name, blend=blend, **asdict(rank))
    modes = {GENERATED: partial(model.rank, mode="generate"), EXACT: partial(model.rank, mode="exact")}
    recommender = model if model.reads_titles else ByValues(model)
    return Opened(recommender=recommender, modes=modes, cost=cost, scores_once=not model.reads_titles)


def _num_places() -> int:
    from cprec.distributed import num_places  # loads torch

    return num_places()


def _blended(
    name: str, data: str, folder: str, about: Mapping[str, Any], domain: str, rank: RankConfig, hashes: FileHashes
) -> list[Entrant]:
    """The blend of a model, where the folder has one for the domain.

    Raises LeakageError where its parts have learnt from other events than those of the data folder.
    """
    path = Path(folder, BLEND)
    if not path.is_file() or (found := read_about(folder))["domain"] != domain:
        return []
    if not rank.suits_blends:
        say(
            f"{domain}: the blend of {name} is left out: its weights are for rank.score=sum and rank.normaliser=auto, "
            f"not for score={rank.score}, normaliser={rank.normaliser}"
        )
        return []
    learnt = {file: hashes.of(Path(data, file)) for file in event_files(data)}
    if changed := differences(found["asked"]["data"], learnt):
        raise LeakageError(
            f"the parts of {path} have learnt from other events than those of {data} ({shortened(changed)}), perhaps "
            f"from held out ones: run `cprec blend {folder} data={data}`"
        )
    weight = found["blend"]["model"]
    return [_model(renamed(name, BLENDED), folder, about, rank, hashes, hashes.of(path), weight)]


def _without_models(models: Mapping[str, str], domain: str) -> list[Entrant]:
    """The best blends without the model beside the models, those that are equal once."""
    entrants: list[Entrant] = []
    for name, folder in models.items():
        if not Path(folder, BLEND).is_file() or (found := read_about(folder))["domain"] != domain:
            continue
        weights = found["without_model"]["parts"]
        identity = {
            "code": code_sha256("cprec.rank.blend"),
            "without_model": found["without_model"],
            "files": {part: found["files"][part] for part, chosen in weights.items() if chosen["weight"]},
            "catalogue": found["catalogue"],
        }
        if identity in [entrant.identity for entrant in entrants]:
            continue
        row = renamed(name, f" {WITHOUT_MODEL}") if entrants else WITHOUT_MODEL
        entrants.append(Entrant(name=row, kind="baseline", open=partial(_open_parts, folder), identity=identity))
    return entrants


def _open_parts(folder: str) -> Opened:
    from cprec.rank.blend import BlendedParts, read_blend  # loads torch

    parts = BlendedParts(read_blend(folder, Catalogue.read(folder), "without_model"))
    return Opened(recommender=parts, scores_once=True)


def renamed(name: str, what: str) -> str:
    """The name of an arm that is made of another; its seed stays at the end.

    >>> renamed("CPRec-style", " blend"), renamed("CPRec-style (seed 1)", " blend")
    ('CPRec-style blend', 'CPRec-style blend (seed 1)')
    """
    model = model_of(name)
    return f"{model}{what}{name[len(model) :]}"


def _gone(
    name: str, folder: str, about: Mapping[str, Any] | None, rank: RankConfig, rankings: Path, *, refit: bool
) -> Entrant:
    """A model without weights: its saved rankings are used, if they are of the rule that holds now, and if it had
    learnt what the others have."""
    saved = read_rankings(rankings)
    identity = dict(saved.answers["identity"]) if saved else {}
    if identity.get("refit", False) != refit:
        identity = {}

    def opened() -> Opened:
        raise ConfigError(
            f"models.{name}={folder} holds no weights, and its saved rankings answer other questions than those asked "
            "now: ask as they were (k, max_queries, seed, num_candidates, rank, refit), or bring the model back. "
            "Rankings that were saved before the items of a title shared its probability need the model, too"
        )

    return Entrant(
        name=name,
        kind="model",
        open=opened,
        identity={**identity, **_rule(rank)},
        stochastic=True,
        trained_on=tuple(about["trained_on"] if about else saved.trained_on if saved else ()),
    )


def _rule(rank: RankConfig) -> dict[str, Any]:
    """How a model ranks, beside its weights and the code."""
    return {"rank": asdict(rank), "scores": SCORES}


# ---- the bound -------------------------------------------------------------------------------------------------------


def oracle(world: SyntheticConfig) -> Entrant:
    """The bound of a generated world, from its true chances."""
    return Entrant(
        name="oracle",
        kind="bound",
        open=lambda: Opened(recommender=OracleRecommender(SyntheticWorld(world))),
        identity={"code": code_sha256("cprec.data.sources.synthetic"), "world": to_dict(world)},
    )
