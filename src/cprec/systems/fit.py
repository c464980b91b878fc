"""Training a system: its stages one after the other through the one training loop, the best weights by validation, and
a record of what made them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from cprec import distributed
from cprec.data.queries import sampled_rows
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import DataError, Unsuitable
from cprec.files import whole_file, write_whole
from cprec.progress import say
from cprec.provenance import code_sha256, file_sha256
from cprec.ranks import ndcg
from cprec.schema import VALIDATION
from cprec.systems.signals import TrainingSequences, user_names
from cprec.systems.stage import Stage, TrainedRecommender
from cprec.train.checkpoint import newest_intact, remove_checkpoints
from cprec.train.folder import LOG, read_log
from cprec.train.loop import Cadence, Optimisation, train

RECORD, WEIGHTS = "system.json", "best.safetensors"
VALIDATIONS = 15
"""Validations in a stage, beside the one before its first step."""
_MAY_TRAIN = ContextVar("may train", default=True)


@contextmanager
def without_training() -> Iterator[None]:
    """A block in which `fit` opens what is trained, and writes nothing: a stage that is not finished is a DataError."""
    token = _MAY_TRAIN.set(False)
    try:
        yield
    finally:
        _MAY_TRAIN.reset(token)


class System(Protocol):
    """What can be trained: the settings of a system, which say its stages. See `settings.SystemSettings`."""

    @property
    def LABEL(self) -> str: ...

    @property
    def VALIDATION_QUERIES(self) -> int: ...

    @property
    def beta2(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def patience(self) -> int: ...

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]: ...

    def identity(self) -> dict[str, Any]: ...


class _Enough(Exception):
    """Ends training early: validation has not improved for `patience` times."""


@dataclass(frozen=True)
class Validation:
    """Held-out queries that choose the weights."""

    histories: Ragged
    targets: np.ndarray
    users: Sequence[str]

    @classmethod
    def of(cls, split: Split, domain: str, seed: int, most: int) -> Validation:
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
    settings: System,
    split: Split,
    domain: str,
    seed: int,
    folder: Path,
    data: TrainingSequences | None = None,
    stages_of: Callable[[TrainingSequences, int], Sequence[Stage]] | None = None,
) -> TrainedRecommender:
    """See `settings.SystemSettings.make`; `folder` is where the folder of this run stands beside those of others,
    `data` takes the place of the split's training events, and `stages_of` that of the settings' `stages`, where these
    need what was learnt before by the same settings, data and seed."""
    name, device = type(settings).__name__, distributed.pick_device()
    if settings.patience and not split.validates:
        raise Unsuitable(
            f"patience={settings.patience} ends training by validation events, which are to be learnt here"
        )
    data = TrainingSequences.of(split, domain) if data is None else data
    validation = Validation.of(split, domain, seed, settings.VALIDATION_QUERIES) if split.validates else None
    made_from = {
        **{"system": name, "settings": settings.identity(), "domain": domain, "seed": seed, "data": data.digest()},
        **{"validation": validation.digest() if validation else None, "code": code_sha256(type(settings).__module__)},
    }
    folder = folder / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    torch.manual_seed(seed)
    stages = (stages_of or settings.stages)(data, seed)
    finished = []
    for number, stage in enumerate(stages, 1):
        stage.trainable.module.to(device)
        stage_in_words = f", stage {number} of {len(stages)}" if len(stages) > 1 else ""
        title = f"{domain}: training {settings.LABEL or name}{stage_in_words}"
        finished.append(_fit_stage(settings, stage, validation, seed, folder / f"stage-{number}", title))
    seconds = round(sum(done["seconds"] for done in finished), 3)
    record = {"made_from": made_from, "stages": finished, "seconds": seconds}
    if _MAY_TRAIN.get():
        write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
    assert stages[-1].recommender is not None
    recommender = stages[-1].recommender()
    recommender.seconds = seconds
    return recommender


def fit_best(
    settings: System,
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
    validation = Validation.of(split, domain, seed, settings.VALIDATION_QUERIES)
    values = {name: validation.ndcg(each) for name, each in made.items()}
    best = max(values, key=lambda name: values[name])
    shown = ", ".join(f"{value:.4f} from {name}" for name, value in values.items())
    say(f"{domain}: NDCG@10 on validation queries is {shown}; {best} it is")
    made[best].seconds = sum(each.seconds for each in made.values())
    return made[best]


def seconds_to_fit(
    settings: System, split: Split, domain: str, seed: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """About how long `fit` takes: of each stage one step, the second of two, and one validation are timed."""
    data = TrainingSequences.of(split, domain)
    validation = Validation.of(split, domain, seed, settings.VALIDATION_QUERIES)
    device, seconds = distributed.pick_device(), 0.0
    for stage in settings.stages(data, seed):
        stage.trainable.module.to(device)
        stage.refresh()
        times = [clock()]
        for step in (0, 1):
            rows = distributed.to_device(stage.stream.batch(step).rows, device)
            sum(stage.trainable.losses(rows).values(), torch.zeros((), device=device)).backward()
            times.append(clock())
        seconds += stage.stream.num_steps * (times[2] - times[1])
        if stage.recommender is not None:
            validation.ndcg(stage.recommender())
            seconds += (VALIDATIONS + 1) * (clock() - times[2])
    return seconds


def _fit_stage(
    settings: System, stage: Stage, validation: Validation | None, seed: int, folder: Path, title: str
) -> dict[str, Any]:
    """Train a stage unless its folder says that it is done; then its module has the best weights by validation, or the
    last ones without it or a recommender, or where the stage keeps these. Raises DataError where these are not the file
    that training wrote."""
    record, weights, module = folder / RECORD, folder / WEIGHTS, stage.trainable.module
    is_validated = validation is not None and stage.recommender is not None and not stage.keeps_last
    stage.begin()
    if not (record.is_file() or _MAY_TRAIN.get()):
        raise DataError(
            f"{title}: {folder} is not there, or not finished, and nothing is trained here: train it again. Other "
            "settings, data or code make another folder"
        )
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)

        def validate() -> dict[str, Any]:
            stage.refresh()
            value = validation.ndcg(stage.recommender()) if is_validated and validation and stage.recommender else None
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
        if not is_validated:
            with whole_file(weights) as unfinished:
                save_model(module, str(unfinished))
        last = [line for line in read_log(folder / LOG) if "loss" in line][-1]
        seconds = round(last["tokens"] / last["tokens_per_second"], 3)
        values = _validations(folder)
        best = max(values, default=None)
        if best is not None and values[0] == best:
            say(f"{title}: note: no step made it better on validation, so it keeps the weights it began with")
        done = {"best": best, "seconds": seconds, "sha256": file_sha256(weights)}
        write_whole(record, json.dumps(done) + "\n")
        remove_checkpoints(folder)
    found: dict[str, Any] = json.loads(record.read_text())
    if not weights.is_file() or file_sha256(weights) != found["sha256"]:
        raise DataError(f"{weights} is gone, or is not what training wrote: remove {folder}, and it is trained again")
    load_model(module, str(weights))
    return found


def _validations(folder: Path) -> list[float]:
    """What the validations of a stage have measured so far."""
    path = folder / LOG
    lines = read_log(path) if path.is_file() else []
    return [line["validation"]["ndcg@10"] for line in lines if "validation" in line]
