"""Progress and log lines on a terminal, and where there is none."""

from __future__ import annotations

import io
import time

import click
import pytest
from rich.console import Console

from onnxprune.cli import screen as module
from onnxprune.cli.screen import Screen


def started(quiet: bool = False, terminal: bool = False) -> tuple[Screen, io.StringIO]:
    """A screen inside a command, writing to memory."""
    stream = io.StringIO()
    with click.Context(click.Command("test")):
        screen = Screen(False, quiet=quiet)
    screen.console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    return screen, stream


def test_steps_that_take_long_get_a_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 17.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    screen, stream = started()
    with screen.progress() as progress:
        progress("quick step", 0, 2)
        progress("quick step", 2, 2)
        progress("slow step", 0, 2)
        progress("slow step", 2, 2)
    assert stream.getvalue() == "slow step: 7 s\n"


def test_bars_on_a_terminal_count_rounds() -> None:
    screen, stream = started(terminal=True)
    with screen.progress() as progress:
        assert isinstance(progress, module._Bars)
        assert [task.description for task in progress.bars.tasks] == ["reading the model"]
        for _ in range(2):
            for done in range(3):
                progress("re-fit", done + 1, 3)
        progress("benchmark", 0, 1)
        assert [(task.description, task.completed) for task in progress.bars.tasks] == [("re-fit 2", 3), ("benchmark", 0)]
    assert "benchmark" in stream.getvalue()


def test_quiet_shows_neither_progress_nor_tables() -> None:
    screen, stream = started(quiet=True, terminal=True)
    with screen.progress() as progress:
        progress("benchmark", 0, 1)
    screen.show("a table")
    screen.print("a product")
    assert stream.getvalue() == ""
