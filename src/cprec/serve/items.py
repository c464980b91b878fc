"""Items that were added, changed or withdrawn since the model was made: a log that survives a kill at any moment, and
that any number of processes of one machine share.

    STATE/items.log      the items of one change a line: a checksum, a space, JSON
    STATE/items.lock     is locked by the process that makes a change

Each checksum covers its line and the checksum before it, so a line that was changed, lost or moved is noticed. A
change counts only once it is flushed to disk. A kill during writing leaves a last line without an end, which never
counted and is cut off. Anything else that does not fit is damage, which is refused and left as it is. A file most of
whose lines are superseded by later ones is rewritten, whole, when it is opened.

The log is locked while a line is written or lines are read, so that nobody reads a line whose writing may yet fail. A
file that replaces it is locked before it gets the name, and who has locked a file checks that it still has the name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.files import aside, flush

log = logging.getLogger("cprec.serve")

FILE = "items.log"
LOCK = "items.lock"
_FIRST = "cprec items 1"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND
SPARE = 1_000
"""How many superseded items a file may have before it is rewritten, beside one for each item."""
PATIENCE_SECONDS = 30.0
"""How long to wait for a lock: others have it for one change, or one line, at a time."""
RETRY_SECONDS = 0.005


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
    """The changes of items in a folder that processes share. Without a folder it holds and takes none.

    One thread at a time may call its methods.
    """

    def __init__(self, folder: str | Path | None) -> None:
        """Raises ConfigError if another process keeps the file locked, DataError if the file is damaged, OSError if it
        cannot be opened."""
        self.items: dict[tuple[str, str], StoredItem] = {}
        """By domain and item id, as the last change that was read left them. Each change makes another dict."""
        self._file: int | None = None
        self._digest, self._size, self._num_lines = _FIRST, 0, 0
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = (Path(folder) / FILE).resolve()
        self._file = os.open(self.path, _FLAGS, 0o644)
        try:
            flush(self.path.parent)
            with self._locked(fcntl.LOCK_EX):
                num_stored = self._take_in()
                self._cut_off()
                if num_stored > 2 * len(self.items) + SPARE:
                    self._rewrite()
        except TimeoutError as error:
            self.close()
            raise ConfigError(
                f"state={str(folder)!r} belongs to another process ({error.strerror}): an older cprec serve keeps a "
                "folder for itself; stop it, or give this one another folder"
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether changes can be stored."""
        return self._file is not None

    @property
    def has_news(self) -> bool:
        """Whether the file is another, or of another size, than when it was read. Raises OSError where it is gone."""
        if self._file is None:
            return False
        now = self.path.stat()
        return now.st_size != self._size or not os.path.samestat(now, os.fstat(self._file))

    def read(self) -> None:
        """Take in what other processes have stored.

        Raises DataError where the file was damaged, or replaced by one that lacks items; OSError where it cannot be
        read. Nothing is taken in then.
        """
        if self._file is not None:
            with self._locked(fcntl.LOCK_SH):
                self._take_in()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let no other process make a change meanwhile: what is read, checked and stored here is one change.

        Raises TimeoutError where others have not come to an end within PATIENCE_SECONDS, ConfigError without a folder.
        """
        self._require_folder()
        lock = os.open(self.path.with_name(LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def append(self, changes: Sequence[StoredItem]) -> None:
        """Store changes behind all that other processes have stored, all or none: they are on disk when this returns.

        Raises OSError if they cannot be stored, DataError as `read` does.
        """
        self._require_folder()
        with self._locked(fcntl.LOCK_EX) as file:
            self._take_in()
            data, digest = _line(changes, self._digest)
            try:
                self._cut_off()
                _write(file, data)
            except OSError:  # a full disk, say: remove the part that was written
                os.ftruncate(file, self._size)
                raise
            self._digest = digest
            self._size += len(data)
            self._num_lines += 1
            self.items = {**self.items, **_by_id(changes)}

    def close(self) -> None:
        """Close the file; what is stored stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _require_folder(self) -> None:
        if self._file is None:
            raise ConfigError("there is no folder for changes of items: start with state=FOLDER")

    @contextmanager
    def _locked(self, kind: int) -> Iterator[int]:
        """The file that has the name now, locked; from its beginning if another process has replaced the one before."""
        assert self._file is not None
        try:
            _lock(self._file, kind)
            while not os.path.samestat(os.fstat(self._file), self.path.stat()):
                replacing = os.open(self.path, os.O_RDWR | os.O_APPEND)
                os.close(self._file)
                self._file = replacing
                self._digest, self._size, self._num_lines = _FIRST, 0, 0
                _lock(self._file, kind)
            yield self._file
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _take_in(self) -> int:
        """Read the lines that were not read, and return how many items they have. The file is locked."""
        assert self._file is not None
        with open(self._file, "rb", closefd=False) as file:
            file.seek(self._size)
            data = file.read()
        *lines, unfinished = data.split(b"\n")
        digest, found, num_stored = self._digest, {}, 0
        for number, line in enumerate(lines, self._num_lines + 1):
            checksum, _, text = line.decode("ascii", "replace").partition(" ")
            expected = _checksum(digest, text)
            if checksum != expected:
                raise DataError(
                    f"{self.path}, line {number}: the checksum is {checksum[:40]!r} where it must be {expected!r}; the "
                    "file was damaged or edited. Restore it from a copy, or move it away to begin with the model's "
                    "items alone; it was not changed"
                )
            stored = json.loads(text)
            items = [StoredItem(**each) for each in (stored if isinstance(stored, list) else [stored])]
            found.update(_by_id(items))
            num_stored += len(items)
            digest = expected
        # Lines stay for good, and a file that replaces another has all its items.
        was_cut = os.fstat(self._file).st_size < self._size
        if was_cut or (self._size == 0 and not self.items.keys() <= found.keys()):
            raise DataError(
                f"{self.path} lacks changes that it had: it was cut off, or replaced by another file. Restart every "
                "process that serves from this folder"
            )
        self._digest = digest
        self._size += len(data) - len(unfinished)
        self._num_lines += len(lines)
        if found:
            self.items = {**self.items, **found}
        return num_stored

    def _cut_off(self) -> None:
        """Remove the line without an end that a kill left behind the lines read. It was never acknowledged."""
        assert self._file is not None
        if os.fstat(self._file).st_size > self._size:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)

    def _rewrite(self) -> None:
        """Replace the file, which is locked, by a new one with one line for each item; without room the old one stays.

        The new file is locked before it gets the name, so that nobody writes to it before the name is on the disk.
        """
        assert self._file is not None
        lines, digest = [], _FIRST
        for item in self.items.values():
            line, digest = _line([item], digest)
            lines.append(line)
        data = b"".join(lines)
        unfinished = aside(self.path)
        try:
            unfinished.unlink(missing_ok=True)
            new = os.open(unfinished, _FLAGS, 0o600)
            try:
                _lock(new, fcntl.LOCK_EX)
                os.fchmod(new, os.fstat(self._file).st_mode)
                _write(new, data)
                unfinished.replace(self.path)
            except OSError:
                os.close(new)
                unfinished.unlink()
                raise
        except OSError as error:
            log.warning("%s has many superseded lines, and cannot be rewritten: %s", self.path, error)
            return
        self.close()
        self._file, self._digest, self._size, self._num_lines = new, digest, len(data), len(lines)
        flush(self.path.parent)


def _by_id(items: Iterable[StoredItem]) -> dict[tuple[str, str], StoredItem]:
    return {(item.domain, item.item_id): item for item in items}


def _line(changes: Sequence[StoredItem], digest: str) -> tuple[bytes, str]:
    """The line of a change that follows one with the checksum `digest`, and its checksum."""
    text = json.dumps([asdict(change) for change in changes], ensure_ascii=True, separators=(",", ":"))
    digest = _checksum(digest, text)
    return f"{digest} {text}\n".encode(), digest


def _lock(file: int, kind: int) -> None:
    """Lock an open file. Raises TimeoutError where another has it locked for PATIENCE_SECONDS."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                why = f"it has kept the file locked for {PATIENCE_SECONDS:g} s"
                raise TimeoutError(errno.ETIMEDOUT, why) from None
            time.sleep(RETRY_SECONDS)


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
