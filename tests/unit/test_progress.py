"""Progress in plain lines, as a bar, and not at all."""

from __future__ import annotations

import io
import sys

import pytest

from cprec import progress
from cprec.progress import say, track


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPREC_PROGRESS", "plain")


@pytest.mark.usefixtures("plain")
def test_lines_come_every_ten_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with track(total=1000, description="training", unit="steps", clock=clock) as work:
        for _ in range(10):
            clock.now += 4
            work.advance(100, loss=2.345678, epoch=1)
    out, err = capsys.readouterr()
    assert out == "", "results go there, progress does not"
    assert err.splitlines() == [
        "training: 300/1,000 steps (30 %), 25.0 steps/s, 0:28 left, loss=2.346 epoch=1",
        "training: 600/1,000 steps (60 %), 25.0 steps/s, 0:16 left, loss=2.346 epoch=1",
        "training: 900/1,000 steps (90 %), 25.0 steps/s, 0:04 left, loss=2.346 epoch=1",
        "training: 1,000/1,000 steps in 0:40, 25.0 steps/s, loss=2.346 epoch=1",
    ]


@pytest.mark.usefixtures("plain")
def test_what_was_done_before_a_resume_does_not_count_in_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with track(total=100, description="training", unit="steps", completed=80, clock=clock) as work:
        clock.now += 20
        work.advance(10)
        clock.now += 20
        work.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "training: 90/100 steps (90 %), 0.5 steps/s, 0:20 left",
        "training: 100/100 steps in 0:40, 0.5 steps/s",
    ]


@pytest.mark.usefixtures("plain")
def test_an_unknown_total_a_slow_unit_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with track(total=None, description="reading", unit="rows", clock=clock) as work:
        clock.now += 2
        work.advance(5_000)
    with pytest.raises(ValueError), track(total=4, description="models", unit="models", clock=clock) as work:
        clock.now += 3_700
        work.advance()
        raise ValueError
    assert capsys.readouterr().err.splitlines() == [
        "reading: 5,000 rows in 0:02, 2,500 rows/s",
        "models: 1/4 models (25 %), 3,700 s each, 3:05:00 left",
        "models: stopped at 1/4 models in 1:01:40, 3,700 s each",
    ]


def test_quiet_under_pytest_and_in_all_processes_but_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with track(total=2, description="training") as work:
        work.advance(2)
    monkeypatch.setenv("CPREC_PROGRESS", "plain")
    monkeypatch.setenv("RANK", "1")
    with track(total=2, description="training") as work:
        work.advance(2)
    say("hello")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    say("hello [not markup]")
    assert capsys.readouterr().err == "hello [not markup]\n"


def test_a_bar_in_a_terminal_with_messages_above_and_a_bar_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    clock = Clock()
    with track(total=200, description="training", unit="steps", clock=clock) as work:
        clock.now += 10
        work.advance(100, loss=1.5)
        say("a checkpoint [is] written")
        with track(total=None, description="validation", unit="rows", clock=clock) as inner:
            inner.advance(7)
        work.advance(100)
    assert progress._display is None
    text = screen.getvalue()
    for part in ("training", "200/200 steps", "20.0 steps/s", "0:00 left", "loss=1.5", "validation", "7 rows"):
        assert part in text, part
    assert "a checkpoint [is] written" in text
