"""Public data sets in their own files: each family of formats has a module, and `FORMATS` names them all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from cprec.data.sources import amazon_reviews, goodreads, lastfm, movielens, online_retail, steam, yelp
from cprec.data.sources.readers import Read
from cprec.data.sources.tables import SourceTables, canonical_tables, check_names
from cprec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cprec.data.engine import TableEngine

FormatName = Literal[
    "amazon-2014",
    "amazon-2018",
    "amazon-2023",
    "movielens-100k",
    "movielens-1m",
    "movielens-20m",
    "movielens-25m",
    "movielens-32m",
    "steam",
    "goodreads",
    "yelp",
    "lastfm-hetrec",
    "online-retail",
]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one public data set is laid out, and where it is from."""

    platform: str
    """Whose users they are: data sets of one platform share them."""
    interactions: tuple[str, ...]
    """Names that the file of events may have, the first one that is there is read; {category} is filled in."""
    items: tuple[str, ...]
    """Names that the file of items may have; empty where the events name their item."""
    read_interactions: Read
    read_items: Read
    timestamps: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Canonical column to the source's, where the usual names do not find it."""
    licence: str
    """One sentence, said before a download."""
    urls: tuple[str, ...] = ()
    """What to download: files, or one archive; {category} is filled in. Empty where it cannot be fetched directly."""
    page: str
    """Where the data set is described, and to be had by hand."""


FORMATS: dict[str, Format] = {
    name: Format(**parts)
    for module in (amazon_reviews, movielens, steam, goodreads, yelp, lastfm, online_retail)
    for name, parts in module.FORMATS.items()
}


@dataclass(frozen=True, kw_only=True)
class PublicSource:
    """A public data set in its own files."""

    format: FormatName
    """Which data set, and which year or size of it."""
    folder: str
    """The folder with its files; with `download`, where they go."""
    category: str | None = None
    """Amazon and Goodreads: the category as their files name it, as Gift_Cards."""
    domain: str = ""
    """Name of the domain; empty: made of the format and the category."""
    platform: str = ""
    """Users of one platform are the same people in all its domains; empty: the data set's own."""
    download: bool = False
    """Fetch the files that are missing. You must agree to the data set's licence, which is shown."""

    def __post_init__(self) -> None:
        if self.format not in get_args(FormatName):
            raise ConfigError(f"format={self.format!r}: expected {', '.join(get_args(FormatName))}")
        needs = any("{category}" in name for name in FORMATS[self.format].interactions)
        example = "Gift_Cards" if self.format.startswith("amazon") else "poetry"
        if needs and not self.category:
            raise ConfigError(f"format={self.format} needs a category as its files name it, as category={example}")
        if self.category and not needs:
            raise ConfigError(f"format={self.format} has no categories: leave category={self.category!r} out")
        if self.category and not re.fullmatch("[A-Za-z0-9_]+", self.category):
            raise ConfigError(
                f"category={self.category!r}: write it as the names of its files have it, without suffixes and spaces, "
                f"as {example}"
            )
        if not self.domain:
            name = f"{self.format}_{self.category}" if self.category else self.format
            object.__setattr__(self, "domain", re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"))
        if not self.platform:
            object.__setattr__(self, "platform", FORMATS[self.format].platform)
        check_names(self.domain, self.platform)

    def load(self, engine: TableEngine) -> SourceTables:
        """The rows of the files, downloaded first if asked for. Raises DataError for a file that is missing."""
        from cprec.data.download import verify_files

        layout = FORMATS[self.format]
        if self.download and any(self._find(names) is None for names in (layout.interactions, layout.items) if names):
            self._download(layout)
        events = self._found(layout.interactions)
        things = self._found(layout.items) if layout.items else None
        verify_files(Path(self.folder), [events, *([things] if things else [])])
        log = layout.read_interactions(engine, "interactions", (events,))
        items = layout.read_items(engine, "items", (things,)) if things else log
        return canonical_tables(
            engine,
            self.domain,
            log,
            items,
            layout.columns,
            layout.timestamps,
            items_in_log=things is None,
        )

    def files(self) -> dict[str, list[Path]]:
        """The files of each table (interactions, items) that are there now."""
        layout = FORMATS[self.format]
        named = {"interactions": layout.interactions, "items": layout.items}
        return {table: [path for path in [self._find(names)] if path] for table, names in named.items() if names}

    def _download(self, layout: Format) -> None:
        from cprec.data.download import download_files

        if not layout.urls:
            files = " and ".join(names[0] for names in (layout.interactions, layout.items) if names)
            raise ConfigError(
                f"{self.format} cannot be downloaded directly: get {files} from {layout.page} and put them into "
                f"{self.folder}. {layout.licence}"
            )
        urls = [url.format(category=self.category) for url in layout.urls]
        download_files(urls, Path(self.folder), f"{self.format}: {layout.licence} ({layout.page})")

    def _find(self, names: tuple[str, ...]) -> Path | None:
        """The first of some files that is there, in the folder or one below it."""
        for name in names:
            name = name.format(category=self.category)
            for path in (Path(self.folder, name), *sorted(Path(self.folder).glob(f"*/{name}"))):
                if path.is_file():
                    return path
        return None

    def _found(self, names: tuple[str, ...]) -> Path:
        path = self._find(names)
        if path is None:
            wanted = " or ".join(name.format(category=self.category) for name in names)
            layout = FORMATS[self.format]
            how = "set download=true, or get it" if layout.urls else "get it"
            raise DataError(f"{self.folder} has no {wanted}, which {self.format} needs: {how} from {layout.page}")
        return path
