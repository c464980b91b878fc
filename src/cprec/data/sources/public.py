"""Public data sets in their own files, downloaded where that is asked for."""

from __future__ import annotations

from pathlib import Path

from cprec.data.config import PublicSource
from cprec.data.download import download_files, verify_files
from cprec.data.engine import TableEngine
from cprec.data.sources.formats import FORMATS
from cprec.data.sources.layouts import LAYOUTS, find_file
from cprec.data.sources.tables import SourceTables, canonical_tables
from cprec.errors import ConfigError, DataError


def load(engine: TableEngine, source: PublicSource) -> SourceTables:
    """The rows of the files, downloaded first if asked for. Raises DataError for a file that is missing."""
    layout, form = LAYOUTS[source.format], FORMATS[source.format]
    tables = [names for names in (layout.interactions, layout.items) if names]
    if source.download and any(find_file(source, names) is None for names in tables):
        _download(source)
    paths = tuple(_found(source, names) for names in tables)
    verify_files(Path(source.folder), paths)
    log = form.interactions(engine, "interactions", paths[:1])
    items = form.items(engine, "items", paths[1:]) if form.items else None
    return canonical_tables(engine, source.domain, log, items, form.columns, form.timestamps)


def _download(source: PublicSource) -> None:
    layout = LAYOUTS[source.format]
    if not layout.urls:
        files = " and ".join(names[0] for names in (layout.interactions, layout.items) if names)
        raise ConfigError(
            f"{source.format} cannot be downloaded directly: get {files} from {layout.page} and put them into "
            f"{source.folder}. {layout.licence}"
        )
    urls = [url.format(category=source.category) for url in layout.urls]
    download_files(urls, Path(source.folder), f"{source.format}: {layout.licence} ({layout.page})")


def _found(source: PublicSource, names: tuple[str, ...]) -> Path:
    """One of some files. Raises DataError where none of them is there."""
    if path := find_file(source, names):
        return path
    layout = LAYOUTS[source.format]
    wanted = " or ".join(name.format(category=source.category) for name in names)
    how = "set download=true, or get it" if layout.urls else "get it"
    raise DataError(f"{source.folder} has no {wanted}, which {source.format} needs: {how} from {layout.page}")
