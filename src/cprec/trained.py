"""Trained rows of the line-up, as an evaluation keeps them in `OUT/baselines/DOMAIN/NAME`, opened for people: what a
row's folder says of itself, the recommender that it was trained to, and the way in for folders of both kinds.

A system's scores may depend on its training events (a graph, a retriever, a user's own vector), so that a row needs the
data folder that it was trained on. It is opened by the path that training took, of which everything is there already;
so nothing can differ from what was evaluated, and what does differ is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cprec import lineup
from cprec.data.dataset import event_files, read_split
from cprec.errors import ConfigError, DataError
from cprec.files import write_whole
from cprec.progress import say
from cprec.provenance import FileHashes, differences, shortened
from cprec.rank.llm import LLMRecommender
from cprec.rank.system import SystemRecommender
from cprec.schema import VALIDATION
from cprec.settings import update
from cprec.systems.fit import without_training

TRAINED = "trained.json"
"""In a row's folder: what it is, and what it was trained on."""
VERSION = 1
DATA = "data"
"""In a row's folder: its data folder, if somebody has put it there."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained row, and all that decided its weights."""

    name: str
    """In the line-up."""
    domain: str
    seed: int
    refit: bool
    """Whether it has learnt the validation events."""
    tuned: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Settings that differ from its own, as tuning found them and as they were given: the latter hold."""
    data: str
    """The data folder, by its whole path."""
    events: Mapping[str, str]
    """SHA-256 of the files that are read there."""
    code: str
    """`lineup.identity_of` the row."""
    schema_version: int = VERSION

    def write(self, folder: str | Path) -> None:
        """Note it in the row's folder, in place of what is there."""
        write_whole(Path(folder, TRAINED), json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Trained:
        """What a row's folder says. Raises DataError where that is damaged or of another version."""
        path = Path(folder, TRAINED)
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}){ANEW}") from None
        if found.schema_version != VERSION:
            raise DataError(f"{path} has schema version {found.schema_version}, this program reads {VERSION}{ANEW}")
        return found


AGAIN = ": evaluate it again, which trains it where it has to"
ANEW = (
    ": remove the saved rankings of this row, OUT/DOMAIN/NAME.*.parquet, and evaluate again; its weights are kept, and "
    "the file is written"
)
"""Where only this file is wrong: an evaluation that reuses all rankings of a row does not open it."""


def is_trained_row(folder: str | Path) -> bool:
    """Whether a folder is that of a trained row."""
    return Path(folder, TRAINED).is_file()


def hashes_of_events(data: str, hashes: FileHashes) -> dict[str, str]:
    """SHA-256 of the files of a data folder that recommenders learn from."""
    return {file: hashes.of(Path(data, file)) for file in event_files(data)}


def data_of(folder: str | Path, data: str | None = None) -> str:
    """The data folder of a trained row: the one given, else that in its folder, else that which it was trained on.

    Raises ConfigError where it is not there.
    """
    recorded = Trained.read(folder).data
    found = data or next((str(path) for path in (Path(folder, DATA), Path(recorded)) if path.is_dir()), recorded)
    if not Path(found).is_dir():
        raise ConfigError(
            f"{folder} was trained on the data folder {found}, which is not here, and needs its training events: give "
            f"data=FOLDER, or copy that folder to {Path(folder, DATA)}"
        )
    return found


def open_trained(folder: str | Path, *, name: str | None = None, data: str | None = None) -> SystemRecommender:
    """The recommender of a trained row, called `name` in answers or else as in the line-up.

    Raises DataError where the row's files or its data are not those of its training, or it was trained by other code;
    ConfigError where the data folder, or a file that its settings name, is not there.
    """
    row, found, hashes = Trained.read(folder), data_of(folder, data), FileHashes(folder)
    if row.name not in lineup.LINEUP or lineup.identity_of(row.name) != row.code:
        raise DataError(f"{folder} was trained by another version of the code of {row.name}{AGAIN}")
    changed = differences(row.events, hashes_of_events(found, hashes))
    hashes.save()
    if changed:
        raise DataError(f"{folder} was trained on other data than {found} holds ({shortened(changed)}){AGAIN}")
    split = read_split(found)
    settings = update(lineup.settings_of(row.name, row.tuned), row.settings, f"settings.{row.name}.")
    with without_training():
        learnt = split.learning(VALIDATION) if row.refit else split
        made = settings.make(learnt, row.domain, seed=row.seed, folder=Path(folder))
    opened = SystemRecommender(made, name or row.name)
    say(f"{folder}: {row.name}, trained on {row.domain!r}, ranks by {opened.way or 'the tokens of items'}")
    return opened


class Recommender:
    """The way in for a trained model: a model folder, or the folder of a trained row of an evaluation."""

    @staticmethod
    def from_pretrained(folder: str | Path, **options: Any) -> LLMRecommender | SystemRecommender:
        """The recommender of a folder. Options of a model folder are those of `LLMRecommender.from_pretrained`, and of
        a row's folder `name` and `data`, those of `open_trained`. Raises as these do."""
        if not is_trained_row(folder):
            return LLMRecommender.from_pretrained(folder, **options)
        if unknown := sorted(options.keys() - {"name", "data"}):
            raise ConfigError(f"{folder} is a trained row, which has no option {unknown[0]!r}; it has name and data")
        return open_trained(folder, **options)
