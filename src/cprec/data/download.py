"""Downloads files: resumed where they broke off, checked before they get their name, and known again by their SHA-256.

FOLDER/downloads.json     file -> url, bytes, SHA-256 on first sight, date
FOLDER/NAME.part          the bytes that have come so far; it becomes NAME when it is complete and not damaged
FOLDER/NAME.part.tag      the version of the file that the part belongs to, where the server names it
"""

from __future__ import annotations

import errno
import gzip
import json
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from cprec.errors import DataError
from cprec.files import flush, write_whole
from cprec.progress import say, track
from cprec.provenance import file_sha256

RECORD = "downloads.json"
TRIES = 5
"""Tries without progress before a download is given up."""
DAMAGED_TRIES = 2
"""Times a file may come to its end and be damaged."""
TIMEOUT_SECONDS = 60.0
_BLOCK = 1 << 18
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
"""Status codes of errors that may pass: another try may succeed."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of this machine's disk: another try fails as well."""
_CHECKED = (".gz", ".zip")
"""Suffixes of files that hold checksums of their content, so that a broken one is noticed."""


def download_files(
    urls: Sequence[str], folder: Path, licence: str, *, wait: Callable[[float], None] = time.sleep
) -> list[Path]:
    """Fetch files into a folder, unless they are there; zip archives are unpacked into it. Returns their paths.

    An interrupted download goes on where it broke off. The SHA-256 of each file, unpacked ones too, is recorded when the
    file is first complete; a file that is there already, or comes again, must have it. `licence` is shown before
    anything is fetched; `wait` is called with seconds between tries.

    Raises DataError where a server does not give the file, gives less or more than it announced, a damaged file, or
    another one than was recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {licence}")
    paths = []
    for url in urls:
        path = folder / PurePosixPath(unquote(urlsplit(url).path)).name
        if path.exists():
            verify_files(folder, [path])
        else:
            part = path.with_name(f"{path.name}.part")
            _fetch(url, part, wait)
            _tag(part).unlink(missing_ok=True)
            _accept(url, part, path, folder)
        if path.suffix == ".zip":
            _unpack(url, path, folder)
        paths.append(path)
    return paths


def verify_files(folder: Path, paths: Iterable[Path]) -> None:
    """Raise DataError for a file that is not what `downloads.json` recorded; files that it does not name may be any."""
    record = _read_record(folder)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if name in record and (sha256 := file_sha256(path)) != record[name]["sha256"]:
            raise DataError(
                f"{path} is not the file first seen on {record[name]['date']}: its SHA-256 was "
                f"{record[name]['sha256']} and is {sha256}. Delete it to fetch it again; if it was changed on purpose, "
                f"delete {name!r} from {folder / RECORD}"
            )


# ---- the record ------------------------------------------------------------------------------------------------------


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_record = isinstance(record, dict) and all({"sha256", "date"} <= set(about) for about in record.values())
    except (ValueError, TypeError):
        is_record = False
    if not is_record:
        raise DataError(f"{path} is no record of downloads: delete it, and the files beside it are taken as first seen")
    return dict(record)


def _accept(url: str, part: Path, path: Path, folder: Path) -> None:
    """Give a whole file its name, once its SHA-256 is recorded or is the one recorded before."""
    record = _read_record(folder)
    name = path.relative_to(folder).as_posix()
    sha256, known = file_sha256(part), record.get(name)
    if known is None:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        record[name] = {"url": url, "bytes": part.stat().st_size, "sha256": sha256, "date": date}
        write_whole(folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    elif known["sha256"] != sha256:
        aside = path.with_name(f"{path.name}.unexpected")
        part.replace(aside)
        raise DataError(
            f"{url} gave a file whose SHA-256 ({sha256}) is not the one first seen on {known['date']} "
            f"({known['sha256']}): it is kept as {aside}. If the data set was published anew, delete {name!r} from "
            f"{folder / RECORD}"
        )
    flush(part)
    part.replace(path)
    flush(path.parent)


# ---- one file --------------------------------------------------------------------------------------------------------


class _BrokenOff(Exception):
    """Less or more came than the server announced; the next try may bring the whole file."""


def _fetch(url: str, part: Path, wait: Callable[[float], None]) -> None:
    """Fetch a whole file, with up to `TRIES` tries in a row that bring nothing new."""
    most, failures, num_damaged = _size(part), 0, 0
    while True:
        try:
            _fetch_rest(url, part)
            damage = _damage(part)
            if damage is None:
                return
            part.unlink()
            most, num_damaged, reason = 0, num_damaged + 1, f"what came is {damage}"
            if num_damaged == DAMAGED_TRIES:
                raise DataError(f"{url}: {reason}, {num_damaged} times; nothing of it is kept. Is the address right?")
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code not in _TRANSIENT_STATUS:
                raise DataError(f"{url}: {reason}; is the address right?") from None
        except (OSError, HTTPException, _BrokenOff) as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise DataError(f"{part} cannot be written: {error.strerror}") from None
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        failures = 1 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        if failures >= TRIES:
            raise DataError(
                f"{url}: {reason}, {failures} times without progress; {_size(part):,} bytes are kept in {part}, and "
                "the same command goes on from there"
            )
        wait(min(30.0, 2.0 ** (failures - 1)))


def _fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes to the part; raises where they do not all come."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "cprec"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if _tag(part).exists():  # the server then sends all of the file where it has another version by now
            request.add_header("If-Range", _tag(part).read_text(encoding="utf-8"))
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if total != str(have):
            part.unlink()
            raise _BrokenOff(f"{have:,} bytes were there, but the file has {total or 'fewer'}") from None
        return  # nothing follows: the part is whole
    with answer:
        if answer.status != 206:  # the server sends the file from its start
            have = 0
        expected = _expected(answer, have, part)
        if not have:
            _remember_version(answer, part)
        name = part.name.removesuffix(".part")
        with open(part, "ab" if have else "wb") as file, track(expected, name, "bytes", completed=have) as progress:
            while block := answer.read(_BLOCK):
                file.write(block)
                progress.advance(len(block))
    size = _size(part)
    if expected is not None and size != expected:
        if size > expected:
            part.unlink()
        raise _BrokenOff(f"it broke off after {size:,} of {expected:,} bytes")


def _expected(answer: Any, have: int, part: Path) -> int | None:
    """The size of the whole file that the server announces; None where it announces none and the file has checksums."""
    length = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        where, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        start = where.partition("-")[0]
        if start != str(have):
            part.unlink()
            raise _BrokenOff(f"the server went on at byte {start or '?'} in place of {have}")
        if total.isdecimal():
            return int(total)
    if length.isdecimal():
        return have + int(length)
    if not answer.chunked and not part.name.removesuffix(".part").endswith(_CHECKED):
        raise DataError(
            f"{answer.url}: the server does not say how long the file is, and nothing else tells whether it came "
            f"whole: fetch it by hand and put it into {part.parent}"
        )
    return None


def _remember_version(answer: Any, part: Path) -> None:
    version = answer.headers.get("ETag", "")
    if not version or version.startswith("W/"):  # a weak one does not promise the same bytes
        version = answer.headers.get("Last-Modified", "")
    if version:
        _tag(part).write_text(version, encoding="utf-8")
    else:
        _tag(part).unlink(missing_ok=True)


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _damage(part: Path) -> str | None:
    """What is wrong with a compressed file or an archive; None where it is whole, or its kind has no checksums."""
    name = part.name.removesuffix(".part")
    if not _size(part):
        return "empty"
    with open(part, "rb") as file:
        is_page = file.read(64).lstrip().startswith(b"<")
    try:
        if name.endswith(".gz"):
            with gzip.open(part) as stream, track(None, f"checking {name}", "bytes") as progress:
                while block := stream.read(_BLOCK):
                    progress.advance(len(block))
        elif name.endswith(".zip"):
            with zipfile.ZipFile(part) as archive:
                if (bad := archive.testzip()) is not None:
                    return f"a zip archive whose {bad} is damaged"
        return None
    except _DAMAGED as error:
        return (
            "a web page" if is_page else f"no whole {'gzip file' if name.endswith('.gz') else 'zip archive'} ({error})"
        )


# RuntimeError is an encrypted member, NotImplementedError a compression that is not known.
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError, RuntimeError)


# ---- archives --------------------------------------------------------------------------------------------------------


def _unpack(url: str, path: Path, folder: Path) -> None:
    """The files of a zip archive that are not there yet; each appears whole or not at all, and inside the folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            targets = [(entry, (folder / entry.filename).resolve()) for entry in archive.infolist()]
            for entry, target in targets:
                if not target.is_relative_to(folder.resolve()):
                    raise DataError(f"{path} holds {entry.filename!r}, which would be written outside {folder}")
            for entry, target in targets:
                if entry.is_dir() or target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                with (
                    archive.open(entry) as source,
                    open(part, "wb") as file,
                    track(entry.file_size, f"unpacking {entry.filename}", "bytes") as progress,
                ):
                    while block := source.read(_BLOCK):
                        file.write(block)
                        progress.advance(len(block))
                _accept(f"{url}#{entry.filename}", part, target, folder.resolve())
    except _DAMAGED as error:
        raise DataError(f"{path} is no whole zip archive ({error}): delete it to fetch it again") from None
