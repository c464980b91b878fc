"""Stages that open trained models and hand them to `cprec.serve`, which knows recommenders but no language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cprec.baselines.popularity import PopularityRecommender
from cprec.baselines.transition_graph import TransitionGraphRecommender
from cprec.data.catalogue import Catalogue
from cprec.data.dataset import read_split
from cprec.distributed import num_places
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, read_resolved
from cprec.rank.llm import LLMRecommender
from cprec.rank.system import SystemRecommender
from cprec.recipe import CPREC, FINETUNED, Recipe
from cprec.serve.config import RecommendConfig, ServeConfig
from cprec.serve.engine import Baseline
from cprec.serve.parts import Job, write_part
from cprec.serve.recommend import recommend_file, recommend_one
from cprec.trained import Trained, data_of, is_trained_row, open_trained
from cprec.workers import run_parts

VLLM_MEMORY = 0.9
"""Share of a GPU's memory that the vLLM engines of a service take together."""


def open_and_recommend(config: RecommendConfig) -> None:
    """Stage: recommend with a model folder, for one history or query, or for a file of histories."""
    if not config.input:
        recommend_one(config, open_folder(config.model))
    else:
        recommend_file(config, partial(_make_parts, config))


def _make_parts(config: RecommendConfig, folder: Path, job: Job, parts: Sequence[int]) -> None:
    if config.engine:
        if parts:
            _make_on_spark(config.engine, folder, parts)
        return
    workers = num_places() if config.num_processes == "auto" else config.num_processes
    sizes = {part: job.num_users(part) for part in parts}
    run_parts(ANSWER_PART, folder, parts, workers, "recommending", unit="users", sizes=sizes)


def _make_on_spark(engine: str, folder: Path, parts: Sequence[int]) -> None:
    from cprec.data.engine import SparkEngine, connect  # with Ibis, which machines that only rank may lack

    with connect(engine) as spark:
        assert isinstance(spark, SparkEngine)
        spark.run_parts(ANSWER_PART, folder.resolve(), parts, "recommending")


ANSWER_PART = "cprec.serving:answer_part"


def answer_part(folder: Path, part: int) -> None:
    """Write a part of the lists for a file of histories: the work of one process of `cprec recommend`."""
    write_part(folder, part, open_recommender)


Opened = LLMRecommender | SystemRecommender
"""What a folder holds: a language model, or a trained row of an evaluation."""


def open_folder(model: str) -> Opened:
    """The recommender of a model folder, or of the folder of a trained row."""
    return open_trained(model) if is_trained_row(model) else LLMRecommender.from_pretrained(model)


def open_recommender(model: str) -> tuple[Opened, PopularityRecommender | None]:
    """The recommender of a folder, and the popular items, which stand in where a history says nothing."""
    recommender = open_folder(model)
    return recommender, popular_items(model, recommender.catalogue)


def open_and_serve(config: ServeConfig) -> None:
    """Stage: serve model folders over HTTP, with baselines to stand in for a model that is late.

    Raises ConfigError if the folders have different catalogues.
    """
    from cprec.serve.serve import serve  # needs the extra cprec[serve], which `cprec recommend` does without

    engines = open_engines(config)
    serve(config, engines, stand_ins(config, engines[0].catalogue))


def serve_demo(recipe: Recipe) -> None:
    """Stage: serve the models that `cprec demo` made for its first target domain."""
    models = tuple(recipe.model_folder(recipe.prepare.target_domains[0], arm) for arm in (CPREC, FINETUNED))
    state = f"{recipe.evaluate.output_dir}/serve"
    config = ServeConfig(models=models, data=recipe.prepare.output_dir, state=state)
    config.check()
    open_and_serve(config)


def open_engines(config: ServeConfig) -> list[Opened]:
    """A recommender for each model folder, named after the folder or, if it is a trained row, as in tables; where two
    are named alike, by the whole path.

    Raises ConfigError for a trained row that another engine is asked for, and for folders of different catalogues.
    """
    rows = [is_trained_row(folder) for folder in config.models]
    names = [
        Trained.read(folder).name if is_row else folder.rstrip("/").rpartition("/")[2]
        for folder, is_row in zip(config.models, rows, strict=True)
    ]
    if len(set(names)) < len(names):
        names = list(config.models)
    memory = {"gpu_memory_utilization": VLLM_MEMORY / len(config.models)} if config.engine == "vllm" else {}
    if memory and any(rows):
        raise ConfigError(
            f"engine=vllm, and {config.models[rows.index(True)]} is a trained row, which runs in this process: serve "
            "it by itself, without engine"
        )
    engines: list[Opened] = [
        open_trained(folder, name=name, data=config.data)
        if is_row
        else LLMRecommender.from_pretrained(
            folder,
            name=name,
            engine=config.engine,
            engine_options=memory,
            beam_width=config.beam_width,
            max_nodes=config.max_nodes,
            batch_size=config.max_batch,
            cache_bytes=int(config.cache_mb * (1 << 20)),
        )
        for folder, name, is_row in zip(config.models, names, rows, strict=True)
    ]
    digest = engines[0].catalogue.digest()
    for folder, engine in zip(config.models, engines, strict=True):
        if engine.catalogue.digest() != digest:
            raise ConfigError(f"{folder} has another catalogue than {config.models[0]}: serve them by themselves")
    return engines


def popular_items(model: str, catalogue: Catalogue) -> PopularityRecommender | None:
    """The popular items, from the model folder or else from the data folder that it names; None if neither has them."""
    found = PopularityRecommender.read(model, catalogue)
    if found is None and (is_trained_row(model) or Path(model, CONFIG_FILE).is_file()):  # or an older model folder
        data = _data(model)
        found = PopularityRecommender.read(data, catalogue) if data else None
    return found


def _data(model: str) -> str | None:
    """The data folder that a folder was made from, as far as it says."""
    found: str | None = data_of(model) if is_trained_row(model) else read_resolved(model)["config"].get("data")
    return found


def stand_ins(config: ServeConfig, catalogue: Catalogue) -> list[Baseline]:
    """The baselines that answer where the model has no time.

    Without the data that the models were made from, only the popular items are left, if the model folder has them.
    Raises ConfigError where `config.data` has another catalogue than the models.
    """
    data = config.data
    if data is None:
        data = _data(config.models[0])
        if data is None or not Path(data).is_dir():
            return _popular_alone(config, catalogue, f"{data} is not here")
    split = read_split(data)
    if split.catalogue.digest() == catalogue.digest():
        return [TransitionGraphRecommender(split), PopularityRecommender(split)]
    if config.data is not None:
        raise ConfigError(
            f"data={data!r} has another catalogue than {config.models[0]}: give the folder that it was made from"
        )
    return _popular_alone(config, catalogue, f"{data} has another catalogue than {config.models[0]}")


def _popular_alone(config: ServeConfig, catalogue: Catalogue, why: str) -> list[Baseline]:
    popular = popular_items(config.models[0], catalogue)
    stands = "popular items alone stand in" if popular else "no list stands in"
    say(f"{why}: {stands} for a model that is late; give data=FOLDER, the folder that it was made from")
    return [popular] if popular else []
