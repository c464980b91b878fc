"""Stage: distilling a language model into a shallower one, and an item head after it."""

from __future__ import annotations

from pathlib import Path

from cprec.errors import LeakageError
from cprec.evaluate.coverage import gap_of_certificate
from cprec.finetune import give_item_head
from cprec.provenance import FileHashes
from cprec.schema import VALIDATION
from cprec.teaching import taught_by
from cprec.train import distil as language_model
from cprec.train.config import DistilConfig
from cprec.train.folder import read_done, refitted_on


def distil(config: DistilConfig) -> Path:
    """Distil a model, and train the student's item head where asked; returns the model folder.

    Raises LeakageError where the certificate of the data does not cover what the teacher was trained on, and what
    training the student and `give_heads` raise.
    """
    config = language_model.with_domain(config)
    _check_teacher(config)
    folder = language_model.distil(config, taught_by(config))
    give_item_head(config)
    return folder


def _check_teacher(config: DistilConfig) -> None:
    teacher = config.model_name_or_path
    if learnt := refitted_on(teacher):
        raise LeakageError(
            f"{teacher} has learnt the {', '.join(learnt)} events: distil the model that it was refitted from"
        )
    shards = (read_done(teacher) or {}).get("trained_on")  # none of a base model, or of one that read text alone
    trained_on = {teacher: shards} if shards else {}
    hashes = FileHashes(config.output_dir)
    if problem := gap_of_certificate(Path(config.data), config.domain, VALIDATION, trained_on, hashes):
        raise LeakageError(problem)
