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

from cprec import lineup
from cprec.card import CARD
from cprec.config import from_mapping
from cprec.data.catalogue import Catalogue
from cprec.data.dataset import event_files, read_split
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError, Unsuitable
from cprec.files import aside, whole_folder, write_whole
from cprec.finetune import head_to_start_from
from cprec.item_head import FOLDER as HEAD
from cprec.item_head import load_heads, made_from, save_heads
from cprec.progress import say
from cprec.provenance import code_sha256, file_sha256, read_resolved
from cprec.rank.blend import FOLDER as PARTS
from cprec.rank.blend import KINDS, identity, read_part, write_blend
from cprec.rank.blend_file import BLEND, Setting, read_about
from cprec.rank.config import RefitConfig
from cprec.schema import TEST, VALIDATION
from cprec.train.config import FinetuneConfig, under_current_names
from cprec.train.folder import REFIT, learnt_besides, read_done

HELD_OUT = {"validation": (VALIDATION,), "all": (VALIDATION, TEST)}
"""The parts that are learnt, by the setting `events`."""
_OWN = (HEAD, PARTS, BLEND, REFIT, "checkpoint-*", "stable-*", "best", "*.incomplete")
"""Of a model's folder, what is made anew or only needed to go on with training."""


def refit(config: RefitConfig) -> Path:
    """Write a model whose item head and blend have learnt held-out events as well; returns its folder.

    Nothing is chosen again: weights of the blend stay, and networks train as many passes as before and keep their last
    weights. The language model learns nothing. A folder that was made from the same is reused; interrupted training of
    networks goes on.

    Raises ConfigError where `model` is no fine-tuned model, or is refitted itself, or `output_dir` is in use for
    something else, Unsuitable where the model has neither an item head nor a blend, and LeakageError where these have
    learnt from other events than those of the data folder.
    """
    model, folder = Path(config.model), Path(config.output_dir)
    training = _training_of(model)
    data, held_out = config.data or training.data, HELD_OUT[config.events]
    events = {name: file_sha256(Path(data, name)) for name in event_files(data)}
    if any(learnt_from != events for learnt_from in _events_of(model)):
        raise LeakageError(f"{model} has learnt from other events than those of {data}: give data=FOLDER of its own")
    asked = {
        **{"held_out": list(held_out), "data": events, "model": identity(model)},
        **{
            "blend": file_sha256(model / BLEND) if (model / BLEND).is_file() else "",
            "code": code_sha256("cprec.refit"),
        },
    }
    if _is_there(folder, asked):
        say(f"{folder}: refitted from the same, reused")
        return folder
    split = read_split(data).learning(*held_out)
    networks = aside(folder.with_name(f"{folder.name}.networks"))  # whole_folder removes what is unfinished in its own
    with whole_folder(folder) as made:
        leave = shutil.ignore_patterns(*_OWN)
        shutil.copytree(model, made, copy_function=_link, ignore=leave, dirs_exist_ok=True)
        if learnt_from := made_from(model):
            head, start = load_heads(model, Catalogue.read(model))[training.domain], Path(training.model_name_or_path)
            again = head.trained_again(
                split, seed=learnt_from["seed"], folder=networks, start=head_to_start_from(start)
            )
            save_heads(made, {training.domain: again}, learnt_from | {"held_out": held_out})
        if (model / BLEND).is_file():
            _refit_blend(model, made, split, networks)
        _note_in_card(made / CARD, model, held_out)
        write_whole(made / REFIT, json.dumps({"held_out": held_out, "made_from": asked}, indent=1) + "\n")
    shutil.rmtree(networks, ignore_errors=True)
    say(f"{folder}: written; it has learnt the {' and '.join(held_out)} events, too")
    return folder


def _training_of(model: Path) -> FinetuneConfig:
    """The settings that a fine-tuned model was made with."""
    if read_done(model) is None:
        raise ConfigError(f"model={str(model)!r} holds no finished model of CPRec (no cprec.json)")
    record = read_resolved(model)
    if record["stage"] != FinetuneConfig.__name__:
        raise ConfigError(f"{model} was fine-tuned for no domain, so no events are its own: fine-tune it first")
    if held_out := learnt_besides(model):
        raise ConfigError(
            f"{model} has learnt the {' and '.join(held_out)} events already: give the model it came from"
        )
    return from_mapping(FinetuneConfig, under_current_names(record["config"]))


def _events_of(model: Path) -> list[Mapping[str, str]]:
    """The hashes of the event files that the head and the blend of a model have learnt from."""
    found = [made_from(model)["data"]] if made_from(model) else []
    found += [read_about(model)["asked"]["data"]] if (model / BLEND).is_file() else []
    if not found:
        raise Unsuitable(f"{model} has neither an item head nor a blend, so nothing beside it can learn more events")
    return found


def _is_there(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a folder holds what is asked for. Raises ConfigError where it holds anything but a refitted model."""
    if (folder / REFIT).is_file():
        return bool(json.loads((folder / REFIT).read_text())["made_from"] == asked)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output_dir={str(folder)!r} is in use for something else: name a new folder")
    return False


def _refit_blend(model: Path, made: Path, split: Split, networks: Path) -> None:
    """Write the blend of a model with parts that are made of the split, but for columns, which no event changes."""
    about, catalogue = read_about(model), Catalogue.read(model)
    domain, seed = about.pop("domain"), about["asked"]["seed"]
    settings = {name: Setting.from_json(about.pop(name)) for name in list(about) if "ndcg@10" in _fields(about[name])}
    parts: dict[str, Any] = {
        name: lineup.settings_of(name).make(split, domain, seed=seed, folder=networks)
        if name in KINDS
        else read_part(model, name, sha256, catalogue)
        for name, sha256 in about.pop("files").items()
    }
    for name in ("schema_version", "catalogue", "model"):
        about.pop(name)
    write_blend(made, domain, parts, settings, about)


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _note_in_card(card: Path, model: Path, held_out: Sequence[str]) -> None:
    """Say in the model card what the refitted model has learnt."""
    if card.is_file():
        note = (
            f"\n## Refitted\n\nThe item head and the parts of the blend have learnt the {' and '.join(held_out)} "
            "events as well, after everything was chosen without them. Results of events that it has learnt would say "
            f"nothing. Those of `{model.name}`, which it was made from, are about the same recommender with less to "
            "learn from.\n"
        )
        write_whole(card, card.read_text(encoding="utf-8") + note)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy on another disk. No file of a model is ever changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
