from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cprec.data import build
from cprec.data.catalogue import Catalogue
from cprec.data.config import Rules
from cprec.text.tokenizer import train_tokenizer

TITLES = ("Dune", "War & Peace, Vol. 2", "Émile", "Go 19x19 (wood)", "Ludo!", "Чай № 5")


@pytest.fixture(scope="module")
def tables_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal sources and rules give a copy of the tables made first: tables take most of the time of a small `prepare`.

    For modules whose files of a log never change.
    """
    made: dict[str, Path] = {}
    real = build.build_tables

    def build_tables(sources: Any, folder: Path, rules: Rules, *, seed: int = 0, **settings: Any) -> None:
        chosen = {field.name: getattr(rules, field.name) for field in fields(Rules)}
        key = repr((sources, chosen, seed, build.PART_EVENTS))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tables")
            real(sources, made[key], rules, seed=seed, **settings)
        shutil.copytree(made[key], folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_tables", build_tables)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([f" {title}" for title in TITLES] * 5, 320)


@pytest.fixture(scope="session")
def make_catalogue() -> Callable[..., Catalogue]:
    """A catalogue from titles per domain; rows keep the order given, domain by domain in alphabetical order."""

    def make(**titles: Sequence[str]) -> Catalogue:
        return Catalogue.from_tables(
            {
                domain: pa.table({"item_id": [f"{domain}{row:03}" for row in range(len(names))], "title": list(names)})
                for domain, names in titles.items()
            }
        )

    return make


@pytest.fixture(scope="session")
def catalogue(make_catalogue: Callable[..., Catalogue]) -> Catalogue:
    return make_catalogue(books=TITLES[:3], games=TITLES[3:])
