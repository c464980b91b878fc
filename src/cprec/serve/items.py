"""Items that were added, changed or withdrawn since the model was made: a log that survives a kill at any moment.

    STATE/items.log      one change a line: a checksum, a space, JSON

Each checksum covers its line and the checksum before it, so a line that was changed, lost or moved is noticed. A
change counts only once it is flushed to disk. A kill during writing leaves a last line without an end, which never
counted and is cut off. Anything else that does not fit is damage, which is refused and left as it is. A file most of
whose lines are superseded by later ones is rewritten, whole, when it is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.files import aside, flush

log = logging.getLogger("cprec.serve")

FILE = "items.log"
_FIRST = "cprec items 1"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND
SPARE = 1_000
"""How many superseded lines a file may have before it is rewritten, beside one for each item."""


@dataclass(frozen=True, kw_only=True)
class StoredItem:
    """An item that differs from the catalogue of the model folder: it is new, has other text, or was withdrawn."""

    domain: str
    item_id: str
    title: str
    """Cleaned, not empty."""
    brand: str = ""
    categories: str = ""
    withdrawn: bool = False
    """It stays in the catalogue but is never recommended."""


class ItemStore:
    """The changes of items in a folder that one process has to itself. Without a folder it holds and takes none."""

    def __init__(self, folder: str | Path | None) -> None:
        """Raises ConfigError if another process has the folder, DataError if the file is damaged, OSError if it cannot
        be opened."""
        self.items: dict[tuple[str, str], StoredItem] = {}
        """By domain and item id, as the last change left them."""
        self._file: int | None = None
        self._digest = _FIRST
        self._size = 0
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(folder) / FILE
        # The lock is on the open file: it says nothing once another process has replaced that file in the folder.
        created = not self.path.exists()
        self._file = os.open(self.path, _FLAGS, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(self._file).st_ino == self.path.stat().st_ino  # not one that has been replaced meanwhile
        except OSError:
            is_ours = False
        if not is_ours:
            self.close()
            raise ConfigError(
                f"state={str(folder)!r} belongs to another process that serves: give each process a folder of its own"
            )
        if created:
            flush(Path(folder))
        try:
            num_lines = self._read()
        except DataError:
            self.close()
            raise
        if num_lines > 2 * len(self.items) + SPARE:
            self._rewrite()

    @property
    def is_open(self) -> bool:
        """Whether changes can be stored."""
        return self._file is not None

    def append(self, changes: Sequence[StoredItem]) -> None:
        """Store changes, all or none: they are on disk when this returns. Raises OSError if they cannot be stored."""
        if self._file is None:
            raise ConfigError("there is no folder for changes of items: start with state=FOLDER")
        data, digest = _lines(changes, self._digest)
        try:
            _write(self._file, data)
        except OSError:  # a full disk, say: remove the part that was written
            os.ftruncate(self._file, self._size)
            raise
        self._digest = digest
        self._size += len(data)
        self._keep(changes)

    def close(self) -> None:
        """Let another process have the folder."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _keep(self, changes: Iterable[StoredItem]) -> None:
        self.items.update({(change.domain, change.item_id): change for change in changes})

    def _rewrite(self) -> None:
        """Replace the file by a new one with one line for each item; without room for it, the old one stays.

        The new file is locked before it gets the name, so that no other process can take the folder in between.
        """
        assert self._file is not None
        data, digest = _lines(self.items.values(), _FIRST)
        path = self.path.resolve()
        unfinished = aside(path)
        try:
            unfinished.unlink(missing_ok=True)
            new = os.open(unfinished, _FLAGS, 0o600)
            try:
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(new, os.fstat(self._file).st_mode)
                _write(new, data)
                unfinished.replace(path)
            except OSError:
                os.close(new)
                unfinished.unlink()
                raise
        except OSError as error:
            log.warning("%s has many superseded lines, and cannot be rewritten: %s", self.path, error)
            return
        self.close()
        self._file, self._digest, self._size = new, digest, len(data)
        flush(path.parent)

    def _read(self) -> int:
        """Read the file, and return how many lines it has."""
        assert self._file is not None
        data = self.path.read_bytes()
        *lines, unfinished = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            checksum, _, text = line.decode("ascii", "replace").partition(" ")
            expected = _checksum(self._digest, text)
            if checksum != expected:
                raise DataError(
                    f"{self.path}, line {number}: the checksum is {checksum[:40]!r} where it must be {expected!r}; the "
                    "file was damaged or edited. Restore it from a copy, or move it away to begin with the model's "
                    "items alone; it was not changed"
                )
            self._keep([StoredItem(**json.loads(text))])
            self._digest = expected
        # A kill cut off a last line without an end. It was never acknowledged, so it goes.
        self._size = len(data) - len(unfinished)
        if unfinished:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
        return len(lines)


def _lines(changes: Iterable[StoredItem], digest: str) -> tuple[bytes, str]:
    """Changes as lines that follow the one with the checksum `digest`, and the checksum of the last."""
    lines = []
    for change in changes:
        text = json.dumps(asdict(change), ensure_ascii=True, separators=(",", ":"))
        digest = _checksum(digest, text)
        lines.append(f"{digest} {text}\n")
    return "".join(lines).encode(), digest


def _write(file: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(file, data[written:])
    os.fsync(file)


def _checksum(before: str, text: str) -> str:
    return hashlib.sha256(f"{before} {text}".encode()).hexdigest()[:16]


def with_items(catalogue: Catalogue, items: Sequence[StoredItem]) -> Catalogue:
    """A catalogue with items added, or with their text replaced if it has them. The rows stay sorted."""
    columns = {name: getattr(catalogue, name).copy() for name in ("title", "brand", "categories")}
    new: dict[tuple[int, str], StoredItem] = {}
    for item in items:
        row = catalogue.row_of_id(item.domain, item.item_id)
        if row is None:
            new[catalogue.domain_index(item.domain), item.item_id] = item
        else:
            for name, column in columns.items():
                column[row] = getattr(item, name)
    # New items in the order of the rows, and for each the row that it goes before.
    keys = sorted(new)
    at = np.empty(len(keys), dtype=np.int64)
    for number, (index, item_id) in enumerate(keys):
        rows = catalogue.rows_of(catalogue.domains[index])
        at[number] = rows[0] + np.searchsorted(catalogue.item_id[rows], item_id)

    def grown(column: np.ndarray, values: list[object]) -> np.ndarray:
        filled = np.empty(len(values), dtype=column.dtype)  # np.array would make fixed-width text of an object column
        filled[:] = values
        return np.insert(column, at, filled)

    text = {name: grown(column, [getattr(new[key], name) for key in keys]) for name, column in columns.items()}
    return Catalogue(
        domains=catalogue.domains,
        domain=grown(catalogue.domain, [index for index, _ in keys]),
        item_id=grown(catalogue.item_id, [item_id for _, item_id in keys]),
        **text,
    )


def withdrawn_of(items: Iterable[StoredItem]) -> Mapping[str, frozenset[str]]:
    """The ids of withdrawn items, by domain."""
    out: dict[str, set[str]] = {}
    for item in items:
        if item.withdrawn:
            out.setdefault(item.domain, set()).add(item.item_id)
    return {domain: frozenset(ids) for domain, ids in out.items()}
