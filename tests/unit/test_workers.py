from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cprec.errors import CheckpointError, CPRecError, DataError
from cprec.workers import num_workers, run_parts

PIPE_TIMEOUT_SECONDS = 60
"""After this a worker that should have ended counts as alive; no test waits for it otherwise."""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of part functions that workers find too; returns its name with a colon."""

    def write(code: str) -> str:
        (tmp_path / "part_functions.py").write_text(code)
        return "part_functions:"

    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "part_functions", raising=False)
    return write


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_parts(functions: Callable[[str], str], tmp_path: Path, workers: int) -> None:
    module = functions("def squared(folder, part):\n    return [folder.name, part * part]\n")
    found = run_parts(f"{module}squared", tmp_path, [3, 0, 4, 1], workers, "x")
    assert found == [[tmp_path.name, number] for number in (9, 0, 16, 1)]
    assert run_parts(f"{module}squared", tmp_path, [], workers, "x") == []


def test_what_others_print_is_no_result(functions: Callable[[str], str], tmp_path: Path) -> None:
    module = functions(
        "import os\ndef noisy(folder, part):\n    print('no result')\n    os.write(1, b'nor this')\n    return part\n"
    )
    assert run_parts(f"{module}noisy", tmp_path, range(4), 2, "x") == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_part_keeps_its_type(functions: Callable[[str], str], tmp_path: Path, workers: int) -> None:
    module = functions(
        "from cprec.errors import CheckpointError\n"
        "def fails(folder, part):\n"
        "    if part == 3:\n        raise CheckpointError(f'part {part} of {folder.name}')\n"
        "    return part\n"
    )
    with pytest.raises(CheckpointError, match=f"^part 3 of {tmp_path.name}$"):
        run_parts(f"{module}fails", tmp_path, range(5), workers, "x")


def test_a_process_that_dies_is_an_error(functions: Callable[[str], str], tmp_path: Path) -> None:
    module = functions("import os\ndef dies(folder, part):\n    os._exit(7)\n")
    with pytest.raises(CPRecError, match="a worker process ended with exit code 7 while counting"):
        run_parts(f"{module}dies", tmp_path, range(5), 2, "counting")


WAITING = """
import os, signal
from cprec.errors import DataError

def waits(folder, part):
    os.write(os.open(folder / "alive", os.O_WRONLY), b"x")  # open until this process ends
    signal.pause()

def fails_while_another_waits(folder, part):
    if part == 1:
        alive = os.open(folder / "alive", os.O_WRONLY)
        os.open(folder / "started", os.O_WRONLY)
        signal.pause()
    os.open(folder / "started", os.O_RDONLY)  # both ends open at once
    raise DataError("part 0 cannot be read")
"""


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[int]:
    """A named pipe, open for reading."""
    os.mkfifo(tmp_path / "alive")
    opened = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    yield opened
    os.close(opened)


def wait_for(pipe: int) -> bytes:
    """The next byte of a pipe, or nothing at its end."""
    assert select.select([pipe], [], [], PIPE_TIMEOUT_SECONDS)[0], "a process still holds the pipe open"
    return os.read(pipe, 1)


def test_an_error_of_a_part_stops_the_others(functions: Callable[[str], str], tmp_path: Path, pipe: int) -> None:
    module = functions(WAITING)
    os.mkfifo(tmp_path / "started")
    with pytest.raises(DataError, match="part 0 cannot be read"):
        run_parts(f"{module}fails_while_another_waits", tmp_path, range(2), 2, "x")
    assert wait_for(pipe) == b"", "no one can write any longer"


def test_workers_end_with_their_parent_however_it_ends(
    functions: Callable[[str], str], tmp_path: Path, pipe: int
) -> None:
    module = functions(WAITING)
    code = f"""
from pathlib import Path
from cprec.workers import run_parts
run_parts("{module}waits", Path({str(tmp_path)!r}), range(2), 2, "x")
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        assert [wait_for(pipe), wait_for(pipe)] == [b"x", b"x"], "both workers wait"
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(pipe) == b"", "no one can write any longer"


def test_as_many_processes_as_asked_for_or_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers(5) == 5
    monkeypatch.setattr("cprec.workers.num_cores", lambda: 3)
    assert num_workers(None) == 3
