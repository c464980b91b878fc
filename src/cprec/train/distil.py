"""Stage: a model with fewer layers than its teacher, which learns from it on one domain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cprec.errors import ConfigError
from cprec.models import blocks_of, unloaded_model
from cprec.provenance import FileHashes
from cprec.train.config import DistilConfig
from cprec.train.distillation import Distillation, spaced
from cprec.train.finetune import examples_of, run_of
from cprec.train.folder import model_identity, read_done
from cprec.train.run import Run
from cprec.train.training import run_training
from cprec.train.trees import Taught


def distil(config: DistilConfig, taught: Taught | None = None) -> Path:
    """Distil a model into one with fewer layers, on what fine-tuning reads; returns the model folder.

    Without weights for what the teacher says, this is fine-tuning of the shallower model. `taught` is what the
    recommenders in `teachers` choose (`cprec.distil` has them). Raises ConfigError without, where no domain is known,
    and where the teacher has not so many layers.
    """
    if config.teachers and taught is None:
        raise ConfigError("this function makes no teachers: call cprec.distil.distil, which does")
    return run_training(_run(config, taught))


def with_domain(config: DistilConfig) -> DistilConfig:
    """The settings with the domain that the teacher was fine-tuned on, where they name none.

    Raises ConfigError where no domain is known, or the data have no examples of it.
    """
    domain = config.domain or (read_done(config.model_name_or_path) or {}).get("domain", "")
    if not domain:
        raise ConfigError(f"{config.model_name_or_path} was fine-tuned for no domain: name one by domain=")
    examples_of(Path(config.data), domain)
    return replace(config, domain=domain)


def _run(config: DistilConfig, taught: Taught | None) -> Run:
    teacher, layers = config.model_name_or_path, _layers(config)
    run = run_of(with_domain(config), taught, more_terms=tuple(config.weights))
    about = {"teacher": model_identity(teacher, FileHashes(config.output_dir)), "layers_of_teacher": list(layers)}
    distillation = Distillation(
        layers=layers, num_groups=config.num_groups, temperature=config.temperature, weights=config.weights
    )
    return replace(run, stage="distil", about={**run.about, **about}, distillation=distillation)


def _layers(config: DistilConfig) -> tuple[int, ...]:
    """The teacher's layers that the student begins as."""
    with torch.device("meta"):
        num_layers = len(blocks_of(unloaded_model(config.model_name_or_path)))
    if config.layers > num_layers:
        raise ConfigError(
            f"layers={config.layers}, but {config.model_name_or_path} has {num_layers}: a student has no more layers "
            "than its teacher"
        )
    return tuple(range(config.layers)) if config.start == "first" else spaced(config.layers, num_layers)
