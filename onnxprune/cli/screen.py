"""What a person sees: progress, tables and log lines on stderr; results on stdout."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from onnxprune.errors import OnnxPruneError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

_WIDTH = 100
"""Columns where the stream is not a terminal."""
_SLOW_SECONDS = 2.0
"""Steps that take less get no line in a log."""


class Screen:
    """One command's output. Products (``print``) go to stdout unless that carries JSON; everything beside them (``show``) to stderr."""

    def __init__(self, as_json: bool, verbose: int = 0, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.console = _console(sys.stderr)
        self._product = self.console if as_json else _console(sys.stdout)
        _take_log(self.console, logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])

    def print(self, *parts: RenderableType) -> None:
        """The product of a command that only informs."""
        if not self.quiet:
            _spaced(self._product, parts)

    def show(self, *parts: RenderableType) -> None:
        """What is good to know beside a file that was written."""
        if not self.quiet:
            _spaced(self.console, parts)

    def result(self, content: Any) -> None:
        """The result for programs, under ``--json``."""
        if self.as_json:
            from onnxprune.record import plain

            sys.stdout.write(json.dumps(content, indent=1, default=plain) + "\n")

    @contextmanager
    def showing_record(self, tables: Callable[..., Sequence[RenderableType]], *extra: Any) -> Iterator[None]:
        """Show the tables of a run that ends in an error but got far enough to have some."""
        try:
            yield
        except OnnxPruneError as error:
            if error.record:
                self.show(*tables(error.record, *extra))
            raise

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A callback for the library: bars on a terminal, a line per slow step elsewhere, nothing when quiet."""
        if self.quiet:
            yield lambda what, done, total: None
        elif not self.console.is_terminal:
            yield _StepLines(self.console)
        else:
            with _bars(self.console) as bars:
                yield _Bars(bars)


def command_line() -> list[str]:
    """This command as it was typed, for the report."""
    return ["onnxprune", *sys.argv[1:]]


def _take_log(console: Console, level: int) -> None:
    """Send the package's log to the console for as long as this command runs."""
    package = logging.getLogger("onnxprune")
    before = package.handlers, package.propagate, package.level
    package.handlers, package.propagate = [_LogLines(console)], False
    package.setLevel(level)

    def give_back() -> None:
        package.handlers, package.propagate = before[0], before[1]
        package.setLevel(before[2])

    click.get_current_context().call_on_close(give_back)


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=False, width=None if stream.isatty() else _WIDTH)


def _spaced(console: Console, parts: Sequence[RenderableType]) -> None:
    for part in parts:
        console.print(part)
        console.print()


class _LogLines(logging.Handler):
    """Log records as short lines that do not tear the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self.console.print(Text(f"{record.levelname.lower()}: {record.getMessage()}", style=style), soft_wrap=True)


class _StepLines:
    """For logs: one line when a step that took a while is done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = self.started.setdefault(what, now)
        if done >= total:
            seconds = now - start
            del self.started[what]
            if seconds >= _SLOW_SECONDS:
                self.console.print(f"{what}: {seconds:.0f} s", style="dim")


def _bars(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


class _Bars:
    """One bar per kind of step; a step that comes again (the next round) starts its bar anew."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.waiting: TaskID | None = bars.add_task("reading the model", total=None)
        self.times: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.waiting is not None:
            self.bars.remove_task(self.waiting)
            self.waiting = None
        task = self.tasks.get(what)
        if task is None:
            task = self.tasks[what] = self.bars.add_task(what, total=total)
            self.times[what] = 1
        elif self.bars.tasks[self.bars.task_ids.index(task)].finished:
            self.times[what] += 1
            self.bars.reset(task, total=total, description=f"{what} {self.times[what]}")
        self.bars.update(task, completed=done, total=total)
