"""Files and folders that are written whole: under another name first, flushed to the disk, then renamed.

A kill or a power cut at any moment leaves what was there before, or all of what is new. What is unfinished has a name
that ends in `.incomplete`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INCOMPLETE = ".incomplete"


def aside(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(path.name + INCOMPLETE)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8 with the line ends it has, in place of the one that is there."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write a file to; it takes the place of `path` at the end, and is removed where an error comes first."""
    path = Path(path)
    unfinished = aside(path)
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path` at the end, and is removed where an error comes first.

    A folder that is there already is replaced; for a moment it stands beside the new one, never half of each.
    """
    path = Path(path)
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
    """Flush a folder with all that is in it, and give it its name; a folder of that name is replaced."""
    for found in sorted(unfinished.rglob("*"), reverse=True):
        flush(found)
    flush(unfinished)
    discarded = path.with_name(path.name + ".discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    if path.exists():
        path.replace(discarded)
    unfinished.replace(path)
    flush(path.parent)
    shutil.rmtree(discarded, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the operating system put a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
