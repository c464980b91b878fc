"""Checks whether an output folder already holds the requested run: the same settings on the same input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError, InputChanged
from cprec.progress import say
from cprec.provenance import (
    CONFIG_FILE,
    WEIGHTS,
    FileHashes,
    differences,
    model_hashes,
    read_resolved,
    shortened,
    to_dict,
)
from cprec.train.config import TrainingConfig, under_current_names
from cprec.train.folder import DONE, read_done

WITHOUT_EFFECT = (
    *("resume_from_checkpoint", "save_steps", "save_total_limit", "dry_run", "report_to", "run_name", "output_dir"),
    *("micro_batch_size", "fsdp", "gradient_checkpointing", "torch_compile", "ddp_timeout"),
    *("item_head", "head_networks"),  # it comes after the model
)
"""Settings that may change between the starts of one run: they do not decide what is learnt."""

INPUT_SETTINGS = {"data": "data", "model_name_or_path": "base", "continue_from": "start"}
"""Settings that name an input, and the group that its files have among the recorded inputs. The same files in another
place are the same input."""

GROUPS_IN_WORDS = {
    "trained_on": "the documents to train on",
    "heldout": "the held-out documents",
    "trees": "the events of the trees, or the code that makes them",
    "taught": "the code of the teachers",
    "queries": "the validation queries that are ranked",
    "text": "the general text to replay",
    "curriculum": "the walks, rules and item texts",
    "general_text": "the text of general_text",
    "base": "the weights of the base model",
    "start": "the weights of the checkpoint to continue from",
    "fork": "the weights of the stable checkpoint",
}


def is_finished(config: TrainingConfig, inputs: Mapping[str, str]) -> bool:
    """Whether output_dir holds the finished run of these settings on these inputs.

    Raises ConfigError if it holds a run with other settings, finished or not, and InputChanged if one on other input:
    nothing is overwritten or mixed up. Says which inputs are gone and cannot be compared.
    """
    output_dir = Path(config.output_dir)
    if not (output_dir / CONFIG_FILE).is_file():
        return False
    record = read_resolved(output_dir)
    # A run from before there was a setting went by what is its default now.
    defaults = {field.name: to_dict(field.default) for field in fields(config) if field.default is not MISSING}
    old, new = defaults | under_current_names(record["config"]), to_dict(config)
    before, now, gone = _comparable(record["inputs"], dict(inputs), old)
    changes = [_in_words(change, config) for change in differences(before, now)]
    changed = [
        name
        for name in sorted(new.keys() | old.keys())
        if name not in WITHOUT_EFFECT and new.get(name) != old.get(name)
    ]
    if not changes:  # a setting that names another place of the same files
        read = {name.partition("/")[0] for name in now if "/" in name}
        changed = [name for name in changed if INPUT_SETTINGS.get(name) not in read]
    if changed:
        what = ", ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in changed)
        raise ConfigError(
            f"{output_dir} holds a run with other settings ({what}): choose another output_dir or delete it"
        )
    if changes:
        raise InputChanged(
            f"{output_dir} holds a run on other input: {shortened(changes)}. Choose another output_dir, or delete "
            f"{output_dir} to train anew"
        )
    if gone:
        say(f"note: cannot tell whether this changed since {output_dir} was made, because it is gone: {gone}")
    return (output_dir / DONE).is_file()


def _comparable(
    before: dict[str, str], now: dict[str, str], config: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str], str]:
    """The recorded inputs and the present ones, without those of groups that are gone; and these groups in words."""
    if "base" in before:  # an early run, which recorded one hash of all weights and no other files
        names = {"base": config["model_name_or_path"], "start": config.get("continue_from"), "fork": None}
        weights = {group: _hash_of_weights(now, group) or _sha256(str(name)) for group, name in names.items()}
        gone = {group for group, name in names.items() if weights[group] == _sha256(str(name)) != before.get(group)}
        gone &= before.keys()
        now = {name: value for name, value in (now | weights).items() if name in before}
    else:
        gone = {name.partition("/")[0] for name in before} - {name.partition("/")[0] for name in now}

    def without_gone(inputs: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in inputs.items() if name.partition("/")[0] not in gone}

    return without_gone(before), without_gone(now), ", ".join(GROUPS_IN_WORDS.get(name, name) for name in sorted(gone))


def _in_words(change: str, config: TrainingConfig) -> str:
    """A difference between inputs (`NAME changed`) as people read it."""
    name, _, what = change.partition(" ")
    group, _, file = name.partition("/")
    if not file:
        return f"{GROUPS_IN_WORDS.get(name, name)} {what}"
    settings = [setting for setting, named in INPUT_SETTINGS.items() if named == group]
    return f"{file} {what}" + "".join(f" ({setting}={getattr(config, setting, '')})" for setting in settings)


def file_inputs(
    config: TrainingConfig,
    hashes: FileHashes,
    *,
    start_from: Path | None,
    fork_of: Path | None,
    general_text: str | None,
) -> dict[str, str]:
    """SHA-256 of the files that a run reads, by group and name."""
    data = Path(config.data)
    # A run takes the tokenizer, and the items that the finished model folder will hold, as they are.
    files = [path for name in ("tokenizer", "items") for path in sorted((data / name).rglob("*")) if path.is_file()]
    found = {f"data/{path.relative_to(data).as_posix()}": hashes.of(path) for path in files}
    for group, model in (("base", config.model_name_or_path), ("start", start_from), ("fork", fork_of)):
        if model is not None:
            of_model = model_hashes(model, (*WEIGHTS, "files.json"), hashes)
            found |= {f"{group}/{file}": sha256 for file, sha256 in of_model.items()}
    if general_text and Path(general_text).is_file():
        found["general_text"] = hashes.of(general_text)
    return found


def shards_of(start: Path) -> list[str]:
    """Hashes of the shards that one of our models was trained on, or the run that saved this stable checkpoint."""
    done = read_done(start)
    if done:
        return list(done["trained_on"])
    if start.name.startswith("stable-"):
        return read_resolved(start.parent)["inputs"]["trained_on"].split()
    return []


def _hash_of_weights(inputs: dict[str, str], group: str) -> str:
    """One hash of a group's weight files; empty where it has none."""
    parts = [value for name, value in sorted(inputs.items()) if re.fullmatch(rf"{group}/[^/]+\.safetensors", name)]
    return _sha256(" ".join(parts)) if parts else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
