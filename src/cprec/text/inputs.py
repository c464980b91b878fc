"""Records the input that a data folder was made from, and finds what has changed since."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from cprec.data.config import ConnectionSource, PublicSource, RecBoleSource, Sources, TableSource
from cprec.data.dataset import read_manifest
from cprec.data.sources.files import files_of, matching_files
from cprec.errors import ConfigError, DataError
from cprec.progress import say
from cprec.provenance import TOKENIZER, FileHashes, differences, file_state, model_hashes, read_resolved
from cprec.text.config import TINY

TEXT_TABLE = "text"
"""Stands for a table where a folder is made of text, which belongs to no domain."""
_TOKENIZER_PREFIX = "tokenizer://"
"""Prefix of the names of a tokenizer's files among the recorded inputs; no path has two slashes in a row."""


class InputRecord:
    """Notes the state of all input before it is read, and its hashes once it has been."""

    def __init__(self, sources: Sources, folder: Path) -> None:
        self._folder, self._hashes = folder, FileHashes(folder)
        self._start = time.time_ns()
        self._states = {path: file_state(path) for paths in _files(sources).values() for path in paths}
        self._fingerprints = {
            _fingerprint_name(source, table): found
            for source in sources.connections
            for table, found in _fingerprints(source, self._hashes).items()
            if isinstance(found, str)
        }

    def check_unchanged(self) -> None:
        """Raise DataError for a file that was changed while it was read."""
        for path, state in self._states.items():
            if file_state(path) != state:
                raise DataError(f"{path} was changed while it was read: run the command again once it is written")

    def hashes(self, tokenizer: str) -> dict[str, str]:
        """The hash of everything that was read, for `run.json`; those of files are remembered for the next time."""
        files = {str(source["path"]): str(source["sha256"]) for source in read_manifest(self._folder)["sources"]}
        for path, state in self._states.items():
            if str(path) in files:
                self._hashes.add(path, state, files[str(path)], self._start)
        found = files | self._fingerprints | _tokenizer_hashes(tokenizer, self._hashes)
        self._hashes.save()
        return found


def changed_inputs(sources: Sources, tokenizer: str, folder: Path) -> list[str]:
    """What has changed of the input that a data folder was made from. If nothing has, says what cannot be compared."""
    hashes, recorded = FileHashes(folder), read_resolved(folder)["inputs"]
    compared = (
        _compare_files(sources, folder, hashes),
        *(_compare_connection(source, recorded, hashes) for source in sources.connections),
        _compare_tokenizer(tokenizer, recorded, hashes),
    )
    hashes.save()
    changed = [change for changes, _ in compared for change in changes]
    unknown = [reason for _, reasons in compared for reason in reasons]
    if unknown and not changed:
        say(
            f"note: whether this changed since {folder} was made cannot be seen (delete {folder} to prepare it anew): "
            f"{'; '.join(unknown)}"
        )
    return changed


Comparison = tuple[list[str], list[str]]
"""The changes that were found, and the reasons why something could not be compared."""


def _compare_files(sources: Sources, folder: Path, hashes: FileHashes) -> Comparison:
    before: dict[tuple[str, str], dict[str, str]] = {}
    for entry in read_manifest(folder)["sources"]:
        before.setdefault((entry["domain"], entry["table"]), {})[entry["path"]] = entry["sha256"]
    changed, unknown = [], []
    for (domain, table), paths in _files(sources).items():
        if paths:
            changed += differences(before.get((domain, table), {}), {str(path): hashes.of(path) for path in paths})
        else:
            unknown.append(f"the files of {domain}/{table} are gone")
    return changed, unknown


def _compare_connection(source: ConnectionSource, recorded: Mapping[str, str], hashes: FileHashes) -> Comparison:
    try:
        found = _fingerprints(source, hashes)
    except (ConfigError, DataError) as error:
        return [], [f"the database of {source.domain} cannot be reached now ({error})"]
    changed, unknown = [], []
    for table, now in found.items():
        before, name = recorded.get(_fingerprint_name(source, table)), f"{source.domain}/{table} in {source.shown}"
        if before is None:
            unknown.append(f"{name}, which gave nothing to compare it by")
        elif isinstance(now, DataError):
            changed.append(f"{name} cannot be read now: {now}")
        elif now is None or before.partition(":")[0] != now.partition(":")[0]:
            kinds = [str(value).partition(":")[0] for value in (before, now)]
            unknown.append(f"{name}, which gave the hash of a {kinds[0]} then and of a {kinds[1]} now")
        elif before != now:
            changed.append(f"{name} changed")
    return changed, unknown


def _compare_tokenizer(tokenizer: str, recorded: Mapping[str, str], hashes: FileHashes) -> Comparison:
    before = {name: sha256 for name, sha256 in recorded.items() if name.startswith(_TOKENIZER_PREFIX)}
    if not before:
        return [], []
    now = _tokenizer_hashes(tokenizer, hashes)
    if not now:
        return [], [f"tokenizer={tokenizer} is gone"]
    changes = differences(before, now)
    return [f"{change.removeprefix(_TOKENIZER_PREFIX)} (tokenizer={tokenizer})" for change in changes], []


def _files(sources: Sources) -> dict[tuple[str, str], list[Path]]:
    """The files that each table of each domain is read from, as they are there now; none where all are gone."""
    read: list[TableSource | RecBoleSource | PublicSource] = [*sources.tables, *sources.recbole, *sources.public]
    found = {(source.domain, table): paths for source in read for table, paths in files_of(source).items()}
    return found | ({("", TEXT_TABLE): matching_files(sources.text)} if sources.text else {})


def _fingerprints(source: ConnectionSource, hashes: FileHashes) -> dict[str, str | DataError | None]:
    from cprec.data.sources.connections import fingerprints  # needs Ibis, which machines that train may lack

    return fingerprints(source, hashes.of)


def _fingerprint_name(source: ConnectionSource, table: str) -> str:
    """The name of a table's fingerprint among the recorded inputs."""
    return f"fingerprint://{source.domain}/{table}"


def _tokenizer_hashes(tokenizer: str, hashes: FileHashes) -> dict[str, str]:
    """The hashes of a base model's tokenizer, under the names they are recorded by; none for the tiny one."""
    found = {} if tokenizer == TINY else model_hashes(tokenizer, TOKENIZER, hashes)
    return {_TOKENIZER_PREFIX + name: sha256 for name, sha256 in found.items()}
