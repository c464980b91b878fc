"""Files and folders that are written whole: first under another name, flushed to the disk, then renamed.

A kill or a power cut at any moment leaves either the old content or all of the new. Unfinished files and folders have
a name that ends in `.incomplete`; the next attempt removes them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INCOMPLETE = ".incomplete"


def aside(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(path.name + INCOMPLETE)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file in place of any of that name. Text is written as UTF-8, with the line ends that it has."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; at the end that file replaces `path`, or is removed if there was an error.

    The replaced file's permissions are kept. Where `path` is a symbolic link, the file that it points to is replaced.
    Raises IsADirectoryError, before anything is written, where `path` is a folder.
    """
    path = Path(os.path.realpath(path))
    _refuse_folder(path)
    unfinished = aside(path)
    unfinished.unlink(missing_ok=True)
    try:
        yield unfinished
        publish(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill; at the end it replaces `path`, or is removed if there was an error.

    Where `path` is a symbolic link, the folder that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    unfinished = aside(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def publish(unfinished: Path, path: Path) -> None:
    """Flush a file, or a folder with all that is in it, and give it its name. A file replaces a file, whose permissions
    it gets, in one step; a folder replaces a folder.

    An old folder is first renamed to `PATH.discarded` and removed at the end, so that a kill in between leaves no
    folder of that name, but never a mixture of the two. Raises IsADirectoryError for a file with the name of a folder.
    """
    if unfinished.is_dir():
        for found in sorted(unfinished.rglob("*"), reverse=True):
            if not found.is_symlink():
                flush(found)
    flush(unfinished)
    if unfinished.is_dir() and path.is_dir():
        _replace_folder(unfinished, path)
        return
    if unfinished.is_file():
        _refuse_folder(path)
        with suppress(FileNotFoundError):
            shutil.copymode(path, unfinished)  # only now: it may forbid reading
    unfinished.replace(path)
    flush(path.parent)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file was to be written", str(path))


def _replace_folder(unfinished: Path, path: Path) -> None:
    discarded = path.with_name(path.name + ".discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    path.replace(discarded)
    try:
        unfinished.replace(path)
    except OSError:
        discarded.replace(path)
        raise
    flush(path.parent)
    if discarded.is_symlink():
        discarded.unlink()
    else:
        shutil.rmtree(discarded, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the operating system write a file to the disk or, for a folder, the names in it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # one that may be written into but not listed
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot flush a folder
        if not (path.is_dir() and error.errno in (errno.EBADF, errno.EINVAL)):
            raise
    finally:
        os.close(handle)
