from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.text.tokenizer import train_tokenizer

TITLES = ("Dune", "War & Peace, Vol. 2", "Émile", "Go 19x19 (wood)", "Ludo!", "Чай № 5")


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
