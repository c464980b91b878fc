"""Training a system: its stages one after the other through the one training loop, the best weights by validation, and
a record of what made them."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from cprec import distributed
from cprec.choices import Choice, OneOf, Real, Whole
from cprec.data.queries import sampled_rows
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.files import whole_file, write_whole
from cprec.progress import say
from cprec.provenance import code_sha256, file_sha256
from cprec.ranks import ndcg
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import VALIDATION
from cprec.systems.dot_product import DotProductModel, DotProductRecommender
from cprec.systems.items import read_vectors
from cprec.systems.signals import POOL, Passes, TrainingSequences, user_names
from cprec.systems.terms import Objective, Teacher, Term, check_objective, next_item
from cprec.systems.vectors import share_words, text_vectors
from cprec.train.checkpoint import newest_intact, remove_checkpoints
from cprec.train.folder import LOG, read_log
from cprec.train.loop import Cadence, Optimisation, train
from cprec.train.schedule import WSA
from cprec.train.trainable import Stream, Trainable, decay_matrices

NEXT_ITEM = "next_item"
"""The name of the main loss term."""
RECORD, WEIGHTS = "system.json", "best.safetensors"
VALIDATIONS = 15
"""Validations in a stage, beside the one before its first step."""


class TrainedRecommender(Protocol):
    """A recommender that a system makes: it ranks, and counts the ranks of targets itself."""

    name: str
    seconds: float
    """Seconds that training took."""

    @property
    def num_parameters(self) -> int: ...

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        ...

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `DotProductRecommender.target_ranks`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training."""

    trainable: Trainable
    """The losses; of its module's parameters those are trained that require gradients."""
    stream: Stream
    schedule: Callable[[int], float]
    """The learning rate of each step."""
    recommender: Callable[[], TrainedRecommender]
    """Makes a recommender of the current weights."""
    refresh: Callable[[], None] = lambda: None
    """Called before each validation, the first of which comes before the first step."""
    begin: Callable[[], None] = lambda: None
    """Called when the stages before this one are done, and before what this one has learnt so far is read back."""


@dataclass(frozen=True, kw_only=True)
class SystemSettings(ABC):
    """Settings that all systems share."""

    max_length: int = 50
    """Events of a history that are read, the latest ones; longer training sequences are cut into windows of as many
    targets."""
    hidden_size: int = 128
    """Width of the items' vectors."""
    dropout: float = 0.5
    """Share of activations left out in training."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW (0.9, `beta2`)."""
    beta2: float = 0.95
    """AdamW remembers squared gradients for about 1 / (1 - beta2) steps. Where an item has no event for longer, the
    small gradients in between, which push its scores down, count for too much."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    batch_size: int = 128
    """Rows of an optimizer step."""
    sorted_batches: int = POOL
    """Batches among which rows are sorted by length, so that there is little padding. As a step's loss is the mean over
    its targets, those of long rows count less than those of short ones. 1: a step's rows are a random sample, and all
    targets count alike."""
    num_epochs: float = 20
    """Passes over the training rows."""
    anneal: float = 0.4
    """Share of the steps at the end over which the learning rate falls to zero, linearly."""
    patience: int = 0
    """Validations (of `VALIDATIONS`) without a better one after which a stage ends; 0: it goes to the end."""

    LABEL: ClassVar[str] = ""
    """What it is called; nothing: as its settings are."""
    VALIDATION_QUERIES: ClassVar[int] = 4000
    """Validation queries, a seeded sample at most, that decide which weights are kept."""
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128, 256)),
        "dropout": Real(low=0.1, high=0.7),
        "learning_rate": Real(low=3e-4, high=3e-3, log=True),
        "weight_decay": OneOf(values=(0.0, 0.01, 0.1)),
        "batch_size": OneOf(values=(64, 128, 256)),
    }

    def __post_init__(self) -> None:
        self.require_positive(
            "max_length", "hidden_size", "learning_rate", "batch_size", "sorted_batches", "num_epochs"
        )
        for name in ("dropout", "beta2", "anneal"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..1, 1 left out")

    def require_positive(self, *names: str) -> None:
        """Raise ConfigError unless these settings are above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")

    def require_not_negative(self, *names: str) -> None:
        """Raise ConfigError for settings below 0."""
        for name in names:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be below 0")

    @abstractmethod
    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """The stages of training, in order, on the CPU; torch's seed decides the first weights."""

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """The recommender of a domain, trained on its training events.

        It is trained in a folder of its own under `folder`, whose name is a hash of settings, data, seed and code: a
        finished one is used again, an interrupted one goes on. After each stage the weights with the best NDCG@10 on
        the validation queries are kept (full catalogue, items of the history left out); the last ones where the split
        has validation events learnt, too (`Split.validates`).

        Raises Unsuitable where the domain has nothing to train on or to validate with, and where validation should end
        training (`patience`) but its events are learnt.
        """
        if folder is None:
            with TemporaryDirectory() as temporary:
                return fit(self, split, domain, seed, Path(temporary))
        return fit(self, split, domain, seed, folder)

    def identity(self) -> dict[str, Any]:
        """What tells these settings from others."""
        return asdict(self)

    def passes(self, seed: int) -> Passes:
        """The passes of a `RowStream` over its rows."""
        return Passes(batch_size=self.batch_size, num_epochs=self.num_epochs, seed=seed, pool=self.sorted_batches)

    def stage(
        self,
        data: TrainingSequences,
        model: DotProductModel,
        terms: Mapping[str, tuple[float, Term]],
        stream: Stream,
        *,
        teachers: Mapping[str, tuple[float, Teacher]] | None = None,
        history: Callable[[Ragged], np.ndarray] | None = None,
        refresh: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> Stage:
        """A stage of a dot-product model, with its loss terms, and those that read whole rows (`teachers`), by name:
        (weight, term). `history` makes rows of item numbers of histories; without it they are the latest `max_length`
        events."""
        return Stage(
            trainable=WeightedTerms(model, terms, teachers),
            stream=stream,
            schedule=self.schedule(stream.num_steps),
            recommender=lambda: self.recommender(data, model, history),
            refresh=refresh,
            begin=begin,
        )

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> DotProductRecommender:
        """A recommender of a model's current weights; `history` as for `stage`."""
        return DotProductRecommender(self.LABEL or type(self).__name__, data, model, self.max_length, history)

    def schedule(self, num_steps: int) -> Callable[[int], float]:
        """A short warm-up, the peak, and a linear fall to zero."""
        wsa = WSA(
            total=num_steps,
            peak=self.learning_rate,
            warmup=min(100, num_steps // 10),
            anneal=round(self.anneal * num_steps),
            shape="linear",
        )
        return lambda step: wsa.after(step + 1)


@dataclass(frozen=True, kw_only=True)
class NextItemSettings(SystemSettings):
    """Settings of systems whose main loss term is `terms.next_item`."""

    objective: Objective = "softmax"
    """The main loss term; see `terms.objective_loss`."""
    num_negatives: int = 0
    """Items drawn for an objective that does not rank them all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_objective(self.objective, self.num_negatives)

    def next_item(self) -> dict[str, tuple[float, Term]]:
        """The main loss term, of weight 1."""
        return {NEXT_ITEM: (1.0, next_item(self.objective, self.num_negatives))}


@dataclass(frozen=True, kw_only=True)
class GraphSettings(NextItemSettings):
    """Settings of systems that smooth vectors over the graph of users and items."""

    objective: Objective = "sampled_softmax"
    num_negatives: int = 2048
    hidden_size: int = 64
    dropout: float = 0.0
    learning_rate: float = 5e-3
    batch_size: int = 4096
    num_epochs: float = 30
    max_length: int = 1000
    num_layers: int = 2
    """Smoothing steps."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128)),
        "learning_rate": Real(low=1e-3, high=2e-2, log=True),
        "num_layers": Whole(low=1, high=4),
        "num_epochs": OneOf(values=(10, 30, 60)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_layers")


@dataclass(frozen=True, kw_only=True)
class TextSettings(SystemSettings):
    """Settings of systems that read frozen vectors of titles."""

    vectors: str = ""
    """An .npz file with `item_id` and `vectors` of the domain's items; empty: TF-IDF of titles, reduced by SVD."""
    text_size: int = 256
    """Directions that the TF-IDF of titles is reduced to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("text_size")

    def frozen(self, data: TrainingSequences) -> np.ndarray:
        """The vectors of the domain's items: float32[V, F]. Raises Unsuitable for titles that say nothing."""
        if self.vectors:
            return read_vectors(self.vectors, data.item_ids)
        vectors_VF = text_vectors(data.titles, self.text_size)
        if not vectors_VF.any():
            raise Unsuitable(
                f"{type(self).__name__} reads titles, and those of domain {data.domain!r} have no word that tells its "
                "items apart: give vectors=FILE, or take a system that needs no text"
            )
        return vectors_VF

    def frozen_alike(self, data: TrainingSequences) -> np.ndarray:
        """As `frozen`, for systems that need some items to be more alike than others. Raises Unsuitable also where no
        two titles share a word."""
        if not self.vectors and not share_words(data.titles):
            raise Unsuitable(
                f"{self.LABEL or type(self).__name__}: no two titles of domain {data.domain!r} share a word that tells "
                "them from others, so none are alike: give a file of vectors (vectors=FILE) or leave it out"
            )
        return self.frozen(data)

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"vectors": file_sha256(self.vectors)} if self.vectors else {})


class WeightedTerms:
    """A dot-product model with its loss terms, as a `Trainable`."""

    def __init__(
        self,
        model: DotProductModel,
        terms: Mapping[str, tuple[float, Term]],
        teachers: Mapping[str, tuple[float, Teacher]] | None = None,
    ) -> None:
        self._model, self._terms, self._teachers = model, terms, teachers or {}
        weighted: Mapping[str, tuple[float, Term | Teacher]] = {**terms, **self._teachers}
        learnt = {name.replace(" ", "_"): term for name, (_, term) in weighted.items() if isinstance(term, nn.Module)}
        self.module: nn.Module = nn.ModuleDict({"model": model, **learnt}) if learnt else model

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        vectors = self._model.vectors()
        states, targets = self._model.states(vectors, rows)
        found = {name: weight * term(states, targets, vectors.items_VD) for name, (weight, term) in self._terms.items()}
        for name, (weight, teacher) in self._teachers.items():
            found[name] = weight * teacher(states, rows, vectors.items_VD)
        return found

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return decay_matrices(self.module, weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")


class _Enough(Exception):
    """Ends training early: validation has not improved for `patience` times."""


@dataclass(frozen=True)
class _Validation:
    """Held-out queries that choose the weights."""

    histories: Ragged
    targets: np.ndarray
    users: Sequence[str]

    @classmethod
    def of(cls, split: Split, domain: str, seed: int, most: int) -> _Validation:
        """A seeded sample of at most `most` validation queries of a domain. Raises Unsuitable where there are none."""
        queries = split.queries(domain, VALIDATION, max_history=max(1, len(split.interactions)))
        if not len(queries):
            raise Unsuitable(f"domain {domain!r} has no validation event to choose the weights of a system by")
        chosen = sampled_rows(len(queries), most, seed)
        first = int(split.catalogue.rows_of(domain)[0])
        asked = queries.history.take(chosen)
        users = user_names(split.interactions, queries.user[chosen])
        return cls(Ragged(asked.values - first, asked.offsets), queries.target[chosen] - first, users)

    def digest(self) -> str:
        """SHA-256 of histories and targets."""
        return hashlib.sha256(self.histories.values.tobytes() + self.targets.tobytes()).hexdigest()

    def ndcg(self, recommender: TrainedRecommender) -> float:
        """Mean NDCG@10 over the full catalogue, items of the history left out."""
        ranks = recommender.target_ranks(self.histories, self.targets, users=self.users, exclude_seen=True)
        return float(ndcg(*ranks, 10).mean())


def fit(
    settings: SystemSettings,
    split: Split,
    domain: str,
    seed: int,
    folder: Path,
    data: TrainingSequences | None = None,
) -> TrainedRecommender:
    """See `SystemSettings.make`; `folder` is where the folder of this run stands beside those of others. `data` takes
    the place of the split's training events."""
    name, device = type(settings).__name__, distributed.pick_device()
    if settings.patience and not split.validates:
        raise Unsuitable(
            f"patience={settings.patience} ends training by validation events, which are to be learnt here"
        )
    data = TrainingSequences.of(split, domain) if data is None else data
    validation = _Validation.of(split, domain, seed, settings.VALIDATION_QUERIES) if split.validates else None
    made_from = {
        **{"system": name, "settings": settings.identity(), "domain": domain, "seed": seed, "data": data.digest()},
        **{"validation": validation.digest() if validation else None, "code": code_sha256(type(settings).__module__)},
    }
    folder = folder / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    torch.manual_seed(seed)
    stages = settings.stages(data, seed)
    finished = []
    for number, stage in enumerate(stages, 1):
        stage.trainable.module.to(device)
        stage_in_words = f", stage {number} of {len(stages)}" if len(stages) > 1 else ""
        title = f"{domain}: training {settings.LABEL or name}{stage_in_words}"
        finished.append(_fit_stage(settings, stage, validation, seed, folder / f"stage-{number}", title))
    seconds = round(sum(done["seconds"] for done in finished), 3)
    record = {"made_from": made_from, "stages": finished, "seconds": seconds}
    write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
    recommender = stages[-1].recommender()
    recommender.seconds = seconds
    return recommender


def fit_best(
    settings: SystemSettings,
    split: Split,
    domain: str,
    seed: int,
    folder: Path,
    choices: Mapping[str, TrainingSequences],
) -> TrainedRecommender:
    """A recommender trained on each of these data, by name, as `fit` does: the one with the best NDCG@10 on the
    validation queries, the first of equals; which it is is said. Its seconds are those of all.

    Raises Unsuitable where validation events are learnt.
    """
    if not split.validates:
        raise Unsuitable(
            f"which of {len(choices)} kinds of training sequences is best is chosen by validation events, which are to "
            "be learnt here"
        )
    made = {name: fit(settings, split, domain, seed, folder, data) for name, data in choices.items()}
    validation = _Validation.of(split, domain, seed, settings.VALIDATION_QUERIES)
    values = {name: validation.ndcg(each) for name, each in made.items()}
    best = max(values, key=lambda name: values[name])
    shown = ", ".join(f"{value:.4f} from {name}" for name, value in values.items())
    say(f"{domain}: NDCG@10 on validation queries is {shown}; {best} it is")
    made[best].seconds = sum(each.seconds for each in made.values())
    return made[best]


def seconds_to_fit(
    settings: SystemSettings, split: Split, domain: str, seed: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """About how long `fit` takes: of each stage one step, the second of two, and one validation are timed."""
    data = TrainingSequences.of(split, domain)
    validation = _Validation.of(split, domain, seed, settings.VALIDATION_QUERIES)
    device, seconds = distributed.pick_device(), 0.0
    for stage in settings.stages(data, seed):
        stage.trainable.module.to(device)
        stage.refresh()
        times = [clock()]
        for step in (0, 1):
            rows = distributed.to_device(stage.stream.batch(step).rows, device)
            sum(stage.trainable.losses(rows).values(), torch.zeros((), device=device)).backward()
            times.append(clock())
        validation.ndcg(stage.recommender())
        seconds += stage.stream.num_steps * (times[2] - times[1]) + (VALIDATIONS + 1) * (clock() - times[2])
    return seconds


def _fit_stage(
    settings: SystemSettings, stage: Stage, validation: _Validation | None, seed: int, folder: Path, title: str
) -> dict[str, Any]:
    """Train a stage unless its folder says that it is done; then its module has the best weights by validation, or the
    last ones without it."""
    record, weights, module = folder / RECORD, folder / WEIGHTS, stage.trainable.module
    stage.begin()
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)

        def validate() -> dict[str, Any]:
            stage.refresh()
            value = validation.ndcg(stage.recommender()) if validation else None
            module.train()
            if value is None:
                return {}
            earlier = _validations(folder)
            if value > max(earlier, default=-1.0):
                with whole_file(weights) as unfinished:
                    save_model(module, str(unfinished))
            elif settings.patience and len(earlier) - int(np.argmax(earlier)) >= settings.patience:
                raise _Enough
            return {"validation": {"ndcg@10": value}}

        num_steps = stage.stream.num_steps
        try:
            train(
                stage.trainable,
                stage.stream,
                stage.schedule,
                output_dir=folder,
                optimisation=Optimisation(
                    weight_decay=settings.weight_decay, max_grad_norm=5.0, beta2=settings.beta2, seed=seed
                ),
                cadence=Cadence(
                    logging_steps=max(1, num_steps // 100),
                    eval_steps=max(1, num_steps // VALIDATIONS),
                    save_steps=max(1, num_steps // 4),
                    save_total_limit=1,
                ),
                validate=validate,
                resume_from=newest_intact(folder),
                description=title,
            )
        except _Enough:
            say(f"{title}: not better for {settings.patience} validations")
        if validation is None:
            with whole_file(weights) as unfinished:
                save_model(module, str(unfinished))
        last = [line for line in read_log(folder / LOG) if "loss" in line][-1]
        seconds = round(last["tokens"] / last["tokens_per_second"], 3)
        best = max(_validations(folder), default=None)
        write_whole(record, json.dumps({"best": best, "seconds": seconds}) + "\n")
        remove_checkpoints(folder)
    load_model(module, str(weights))
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def _validations(folder: Path) -> list[float]:
    """What the validations of a stage have measured so far."""
    path = folder / LOG
    lines = read_log(path) if path.is_file() else []
    return [line["validation"]["ndcg@10"] for line in lines if "validation" in line]
