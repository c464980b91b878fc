"""Finds the files that sources read."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

from cprec.data.config import PublicSource, RecBoleSource, TableSource
from cprec.data.sources.layouts import public_files
from cprec.errors import DataError

DELIMITED = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
"""Suffix of delimited text -> its usual separator."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")


def files_of(source: TableSource | RecBoleSource | PublicSource) -> dict[str, list[Path]]:
    """The files of each table (interactions, items) that are there now."""
    if isinstance(source, PublicSource):
        return public_files(source)
    return {table: matching_files(form.path) for table, form in source.forms().items()}


def matching_files(patterns: str | Sequence[str]) -> list[Path]:
    """The files that paths and patterns name and that are there, each once, in their order."""
    found: list[Path] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        path = Path(pattern).expanduser()
        found += [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    return list(dict.fromkeys(found))


def find_files(domain: str, what: str, patterns: str | Sequence[str]) -> tuple[Path, ...]:
    """The files that paths and patterns name. Raises DataError for one that is missing or of no known kind."""
    found: list[Path] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        path, matches = Path(pattern).expanduser(), matching_files(pattern)
        if path.is_dir():
            raise DataError(
                f"{path} is a folder; for the {what} of domain {domain!r} give its files, as {path}/*.parquet"
            )
        if not matches:
            raise DataError(f"{path} does not exist ({what} of domain {domain!r}){_similar(path)}")
        found += matches
    found = list(dict.fromkeys(found))  # patterns may overlap
    for path in found:
        if suffix_of(path) not in (*PARQUET, *JSON_LINES, *DELIMITED):
            raise DataError(
                f"{path}: the suffix tells the kind of a file, and {path.suffix or 'none'} is not known; accepted are "
                ".parquet, .csv, .tsv, .jsonl, and the latter three with .gz"
            )
        if path.is_dir():
            raise DataError(f"{path} is a folder; for the {what} of domain {domain!r} give its files, as {path}/*")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty ({what} of domain {domain!r})")
    return tuple(found)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without a .gz behind it; empty for Parquet that is compressed once more."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return "" if path.suffix.lower() == ".gz" and suffix in PARQUET else suffix


def _similar(path: Path) -> str:
    """The names in the same folder that are most like one that is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    names = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    return f"; {folder} has {', '.join(names)}" if names else ""
