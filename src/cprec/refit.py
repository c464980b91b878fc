"""Stage: what stands beside a model learns the latest events too, once everything is chosen.

Validation and test events are each user's last ones. A model that is chosen and judged without them has not seen what
is most like the events to come. A refitted model is the same language model, with the same weights of its blend; its
item head and the parts of the blend are made anew, of training events and held-out ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cprec import lineup
from cprec.card import fill_in
from cprec.config import from_mapping
from cprec.data.catalogue import Catalogue
from cprec.data.dataset import POPULARITY, event_files, read_split
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError, Unsuitable
from cprec.files import aside, whole_folder, write_whole
from cprec.finetune import head_to_start_from
from cprec.item_head import ARRAYS, ItemHead, load_heads, made_from, save_heads
from cprec.item_head import FOLDER as HEAD
from cprec.progress import say
from cprec.provenance import code_sha256, file_sha256, read_resolved
from cprec.rank.blend import FOLDER as PARTS
from cprec.rank.blend import KINDS, identity, read_part, write_blend
from cprec.rank.blend_file import BLEND, SETTINGS, Setting, read_about
from cprec.rank.config import RefitConfig
from cprec.schema import CONTEXT, TEST, VALIDATION
from cprec.systems.recipes.sasrec import CausalRecommender
from cprec.text.documents import write_popularity
from cprec.train.config import FinetuneConfig, under_current_names
from cprec.train.folder import LOG, REFIT, read_done, refitted_on

LEARNT = {"validation": (VALIDATION,), "all": (VALIDATION, TEST, CONTEXT)}
"""The parts that are learnt beside the training events, by the setting `events`."""
_MADE_ANEW = (HEAD, PARTS, BLEND, REFIT, POPULARITY, "checkpoint-*", "stable-*", "best", "*.incomplete")
"""Of a model's folder, what is made anew or only needed to go on with training."""


def refit(config: RefitConfig) -> Path:
    """Write a model whose item head and blend have learnt held-out events as well; returns its folder.

    Nothing is chosen again: weights of the blend stay, and networks train as many passes as before and keep their last
    weights. The language model learns nothing. A folder that was made from the same is reused; interrupted training of
    networks goes on.

    Raises ConfigError where `model` is no fine-tuned model, is refitted itself or lacks the base that its head went on
    from, and where `output_dir` is in use for something else; Unsuitable where the model has neither an item head nor a
    blend; LeakageError where these have learnt from other events than those of the data folder.
    """
    model, folder = Path(config.model), Path(config.output_dir)
    training = _training_of(model)
    data, learnt = config.data or training.data, LEARNT[config.events]
    events = {name: file_sha256(Path(data, name)) for name in event_files(data)}
    blend = read_about(model) if (model / BLEND).is_file() else None
    head = made_from(model)
    if not (blend or head):
        raise Unsuitable(f"{model} has neither an item head nor a blend, so nothing beside it can learn more events")
    if any(one["data"] != events for one in (head, blend and blend["asked"]) if one):
        raise LeakageError(f"{model} has learnt from other events than those of {data}: give data=FOLDER of its own")
    start = _start(Path(training.model_name_or_path), head)
    asked = {
        "of": os.path.relpath(model.resolve(), folder.resolve().parent),  # holds when all of it is moved
        "held_out": list(learnt),
        "data": events,
        "model": identity(model),
        "blend": file_sha256(model / BLEND) if blend else "",
        "code": code_sha256("cprec.refit"),
    }
    if _is_there(folder, asked):
        say(f"{folder}: refitted from the same, reused")
        return folder
    split = read_split(data).learning(*learnt)
    catalogue = Catalogue.read(model)
    networks = aside(folder.with_name(f"{folder.name}.networks"))  # whole_folder removes what is unfinished in its own
    with whole_folder(folder) as made:
        shutil.copytree(
            model, made, copy_function=_link, ignore=shutil.ignore_patterns(*_MADE_ANEW), dirs_exist_ok=True
        )
        if head:
            was = load_heads(model, catalogue)[training.domain]
            now = was.trained_again(split, seed=head["seed"], folder=networks, start=start)
            save_heads(made, {training.domain: now}, head | {"held_out": learnt})
        if blend:
            _refit_blend(model, blend, made, split, networks)
        if (model / POPULARITY).is_file():
            write_popularity(made, catalogue, np.bincount(split.train.item, minlength=len(catalogue)))
        fill_in(made, _in_card(model, learnt), [])
        write_whole(made / REFIT, json.dumps({"held_out": learnt, "made_from": asked}, indent=1) + "\n")
    shutil.rmtree(networks, ignore_errors=True)
    say(f"{folder}: written; it has learnt the {_in_words(learnt)} events, too")
    return folder


def _training_of(model: Path) -> FinetuneConfig:
    """The settings that a fine-tuned model was made with."""
    if read_done(model) is None:
        raise ConfigError(f"model={str(model)!r} holds no finished model of CPRec (no cprec.json)")
    record = read_resolved(model)
    if record["stage"] != FinetuneConfig.__name__:
        raise ConfigError(f"{model} was fine-tuned for no domain, so no events are its own: fine-tune it first")
    if learnt := refitted_on(model):
        raise ConfigError(f"{model} has learnt the {_in_words(learnt)} events already: give the model it came from")
    return from_mapping(FinetuneConfig, under_current_names(record["config"]))


def _start(base: Path, head: Mapping[str, Any]) -> ItemHead | None:
    """The head of the base model that a head went on from; None where it began by itself."""
    arrays = base / HEAD / ARRAYS
    if head.get("start") != (file_sha256(arrays) if "start" in head and arrays.is_file() else None):
        raise ConfigError(
            f"the item head went on from that of {base}, which is not there as it was: bring it back (a relative path "
            "is looked for from the current folder)"
        )
    return head_to_start_from(base) if "start" in head else None


def _is_there(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a folder holds what is asked for. Raises ConfigError where it holds anything but the same model's."""
    if (folder / REFIT).is_file():
        there = json.loads((folder / REFIT).read_text())["made_from"]
        if there["of"] == asked["of"]:
            return bool(there == asked)
        raise ConfigError(f"output_dir={str(folder)!r} holds a refit of {there['of']}: name a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output_dir={str(folder)!r} is in use for something else: name a new folder")
    return False


def _refit_blend(model: Path, about: Mapping[str, Any], made: Path, split: Split, networks: Path) -> None:
    """Write the blend of a model with parts that are made of the split. Columns stay, which no event changes."""
    if about["asked"]["code"] != code_sha256("cprec.blend"):
        say(f"note: the weights of {model / BLEND} were chosen by another version of CPRec than makes its parts now")
    catalogue, domain, seed = Catalogue.read(model), about["domain"], about["asked"]["seed"]
    parts: dict[str, Any] = {}
    for name, sha256 in about["files"].items():
        parts[name] = part = read_part(model, name, sha256, catalogue)
        if name in KINDS:
            by: Any = part.settings if isinstance(part, CausalRecommender) else lineup.settings_of(name)
            parts[name] = by.make(split, domain, seed=seed, folder=networks)
    settings = {name: Setting.from_json(about[name]) for name in SETTINGS if name in about}
    kept = {name: about[name] for name in ("asked", "num_queries", "certified", "left_out")}
    write_blend(made, domain, parts, settings, kept)


def _in_card(model: Path, learnt: Sequence[str]) -> str:
    """What the card of a refitted model says in place of results."""
    return (
        f"None of its own: the item head and the parts of the blend have learnt the {_in_words(learnt)} events, "
        f"too, after everything was chosen without them. Results of `{model.name}`, which it was made from, are those "
        "of the same recommender with less to learn from."
    )


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy on another disk. Only a log is ever changed in place."""
    try:
        if Path(source).name == LOG:
            raise OSError("to be copied")
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _in_words(parts: Sequence[str]) -> str:
    """
    >>> _in_words(["validation", "test", "context"]), _in_words(["validation"])
    ('validation, test and context', 'validation')
    """
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
