"""Files and folders that are written whole: nothing partial is ever visible, and what is there is on the disk first."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cprec.files import INCOMPLETE, aside, flush, publish, whole_file, whole_folder, write_whole


class Killed(BaseException):
    """Stands for anything that ends the work: an error, Ctrl-C, a kill."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, in order, by its name."""
    found: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        found.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        found.append(("rename", f"{self.name} to {target.name}"))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "№ 1\r\n2\n")
    write_whole(str(tmp_path / "b.bin"), b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == "№ 1\r\n2\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.txt", "b.bin"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_whole(tmp_path / "a", "new")
    assert calls == [("flush", "a.incomplete"), ("rename", "a.incomplete to a"), ("flush", tmp_path.name)]


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "a").mkdir()
    with whole_folder(tmp_path / "a") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("new")
    flushed = [("flush", name) for name in ("file", "part", "a.incomplete")]
    renamed = [("rename", "a to a.discarded"), ("rename", "a.incomplete to a")]
    assert calls == [*flushed, *renamed, ("flush", tmp_path.name)]
    assert names(tmp_path) == ["a", "a/part", "a/part/file"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_that_is_interrupted_was_never_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a"
    if before is not None:
        path.write_text(before)
    with pytest.raises(Killed), whole_file(path) as unfinished:
        unfinished.write_text("half of it")
        assert (path.read_text() if path.exists() else None) == before
        raise Killed
    assert names(tmp_path) == ([] if before is None else ["a"])
    assert before is None or path.read_text() == before


def test_a_folder_that_is_interrupted_was_never_there(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as folder:
        (folder / "old").touch()
    with pytest.raises(Killed), whole_folder(tmp_path / "a") as folder:
        (folder / "new").touch()
        assert names(tmp_path / "a") == ["old"]
        raise Killed
    assert names(tmp_path) == ["a", "a/old"]


def test_what_a_kill_left_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.incomplete").mkdir()
    (tmp_path / "a.incomplete" / "half").touch()
    (tmp_path / "b.incomplete").write_text("half")
    with whole_folder(tmp_path / "a") as folder:
        assert names(folder) == []
    with whole_file(tmp_path / "b") as unfinished:
        assert not unfinished.exists()
        unfinished.touch()
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("write", [lambda path: write_whole(path, "new"), lambda path: whole_folder(path).__enter__()])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    (tmp_path / "a").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_an_old_folder_comes_back_where_the_new_one_cannot_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(INCOMPLETE):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError), whole_folder(tmp_path / "a") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["a", "a/old"]


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "a"
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "a").symlink_to(real)
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink() and real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640

    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "b").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk") == ["b"]


def test_a_folder_that_was_filled_by_hand_is_published(tmp_path: Path) -> None:
    unfinished = aside(tmp_path / "a")
    unfinished.mkdir()
    (unfinished / "link").symlink_to("gone")
    publish(unfinished, tmp_path / "a")
    assert names(tmp_path) == ["a", "a/link"]
    shutil.rmtree(tmp_path / "a")


def test_a_file_system_that_cannot_flush_folders_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    flush(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "a")


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    with pytest.raises(IsADirectoryError, match="is a folder, and a file was to be written"):
        write_whole(folder, "new")
    with pytest.raises(IsADirectoryError), whole_file(folder):
        raise AssertionError("nothing is written before the refusal")
    assert (folder / "report.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_file_that_may_not_be_read_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("old")
    path.chmod(0o200)
    write_whole(path, "new")
    assert path.stat().st_mode & 0o777 == 0o200
    path.chmod(0o600)
    assert path.read_text() == "new"
