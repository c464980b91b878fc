"""Downloads files: resumed where they broke off, and known again by their SHA-256.

FOLDER/downloads.json     file -> url, bytes, SHA-256 on first sight, date
FOLDER/NAME.part          what has come so far; it becomes NAME when it is complete
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from cprec.errors import DataError
from cprec.progress import say, track
from cprec.provenance import file_sha256

RECORD = "downloads.json"
TRIES = 5
TIMEOUT_SECONDS = 60.0
_BLOCK = 1 << 18
_AGAIN = (408, 429, 500, 502, 503, 504)
"""Status codes that may go away."""


def download_files(
    urls: Sequence[str], folder: Path, licence: str, *, wait: Callable[[float], None] = time.sleep
) -> list[Path]:
    """Fetch files into a folder, unless they are there; zip archives are unpacked into it. Returns their paths.

    What an interrupted call left is gone on with. The SHA-256 of each file is recorded when it is first complete; a
    file that is there already, or comes again, must have it. `licence` is shown before anything is fetched; `wait` is
    called with seconds between tries.

    Raises DataError where a server does not give the file, gives less or more than it announced, or another file than
    the one recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {licence}")
    record = _read_record(folder)
    paths = []
    for url in urls:
        name = unquote(PurePosixPath(urlsplit(url).path).name)
        path = folder / name
        if not path.exists():
            _fetch(url, path, wait)
        sha256 = file_sha256(path)
        known = record.get(name)
        if known and known["sha256"] != sha256:
            aside = path.with_name(f"{name}.unexpected")
            path.rename(aside)
            raise DataError(
                f"{url} gave a file whose SHA-256 ({sha256}) is not the one first seen on {known['date']} "
                f"({known['sha256']}): it is kept as {aside}. If the data set was published anew, delete {name} from "
                f"{folder / RECORD}"
            )
        if not known:
            date = datetime.now(UTC).strftime("%Y-%m-%d")
            record[name] = {"url": url, "bytes": path.stat().st_size, "sha256": sha256, "date": date}
            _write_record(folder, record)
        if path.suffix == ".zip":
            _unpack(path, folder)
        paths.append(path)
    return paths


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}): delete it, and the files beside it are taken as first seen"
        ) from None
    return record


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    aside = folder / f"{RECORD}.tmp"
    aside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(folder / RECORD)


def _fetch(url: str, path: Path, wait: Callable[[float], None]) -> None:
    """Bring a file, in as many tries as it takes up to `TRIES` without progress."""
    part = path.with_name(f"{path.name}.part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code not in _AGAIN:
                raise DataError(
                    f"{url}: the server answers {error.code} {error.reason}; is the address right?"
                ) from None
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, HTTPException, _BrokenOff) as error:
            reason = str(error) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        failures = 1 if after > before else failures + 1
        if failures >= TRIES:
            raise DataError(
                f"{url}: {reason}, {failures} times without progress; {after:,} bytes are kept in {part}, and the same "
                "command goes on from there"
            ) from None
        wait(min(30.0, 2.0 ** (failures - 1)))
    part.rename(path)


class _BrokenOff(Exception):
    """Fewer bytes came than were announced."""


def _fetch_rest(url: str, part: Path) -> None:
    """Append what is missing to the part; raises where it does not come whole."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cprec"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing follows: the part is whole, or longer than the file
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return
            part.unlink()
            raise _BrokenOff(f"{have:,} bytes were there, but the file has {total or 'fewer'}") from None
        raise
    with answer:
        if have and answer.status != 206:  # the server starts over, so do we
            have = 0
        length = answer.headers.get("Content-Length")
        expected = have + int(length) if length else None
        started = answer.headers.get("Content-Range", f"bytes {have}-").removeprefix("bytes ").partition("-")[0]
        if have and started != str(have):
            part.unlink()
            raise _BrokenOff(f"the server went on at byte {started} in place of {have}")
        with (
            open(part, "ab" if have else "wb") as file,
            track(expected, part.stem, "bytes", completed=have) as progress,
        ):
            while block := answer.read(_BLOCK):
                file.write(block)
                progress.advance(len(block))
    size = part.stat().st_size
    if expected is not None and size < expected:
        raise _BrokenOff(f"it broke off after {size:,} of {expected:,} bytes")


def _unpack(path: Path, folder: Path) -> None:
    """The files of a zip archive that are not there yet; each appears whole or not at all."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                target = (folder / entry.filename).resolve()
                if not target.is_relative_to(folder.resolve()):
                    raise DataError(f"{path} holds {entry.filename!r}, which would be written outside {folder}")
                if entry.is_dir() or target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = target.with_name(f"{target.name}.part")
                with archive.open(entry) as source, open(aside, "wb") as file:
                    shutil.copyfileobj(source, file)
                aside.rename(target)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no zip archive ({error}): delete it to fetch it again") from None
