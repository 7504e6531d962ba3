"""The click group: a first word that is no command means ``prune``, and every failure becomes one line and an exit code."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

INTERRUPTED = 130


class Program(click.Group):
    """``main`` never raises: it exits with the code documented in docs/errors.md."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._with_command(args))

    def _with_command(self, args: list[str]) -> list[str]:
        if not args or args[0] in self.commands or args[0] in ("-h", "--help", "--version"):
            return args
        near = difflib.get_close_matches(args[0], self.commands, 1, 0.7)
        if near and not Path(args[0]).exists():
            raise click.UsageError(f"no command and no file is called {args[0]!r}; did you mean 'onnxprune {near[0]}'?")
        return ["prune", *args]

    def _page(self, words: Sequence[str]) -> str:
        """The command whose help explains ``words``."""
        return " ".join(["onnxprune", *[word for word in words[:1] if word in self.commands]])

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            result = super().main(words, prog_name or "onnxprune", **extra)
        except Exception as error:
            sys.exit(_fail(error, words, self._page(words)))
        sys.exit(result if isinstance(result, int) else 0)


def _fail(error: Exception, words: Sequence[str], page: str) -> int:
    """Say what went wrong: a line on stderr, and an object on stdout under ``--json``."""
    from onnxprune.errors import OnnxPruneError

    kind, code, hint = type(error).__name__, 1, ""
    details: Any = None
    if isinstance(error, click.exceptions.Abort):
        kind, code, message = "Interrupted", INTERRUPTED, "interrupted; nothing was written half"
    elif isinstance(error, click.ClickException):
        code, message = error.exit_code, _sentence(error.format_message())
        hint = f"see {page} --help"
    elif isinstance(error, OnnxPruneError):
        code, message, details = error.exit_code, str(error), error.record
    elif isinstance(error, OSError):
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    elif isinstance(error, MemoryError):
        message = f"out of memory{f': {error}' if str(error) else ''}; try fewer --samples or a smaller --input-shape"
    else:
        message = f"{kind}: {error}"
        hint = "this is a bug in onnxprune; run again with -v for the traceback and report it"
    if _verbose(words) and code == 1:
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True)
    click.echo(click.style("error: ", fg="red", bold=True) + click.style(message, fg="red"), err=True)
    if hint:
        click.echo(hint, err=True)
    if "--json" in words:
        content = {"error": {"kind": kind, "message": message, "exit_code": code}}
        click.echo(json.dumps({**content, "record": details} if details else content))
    return code


def _sentence(text: str) -> str:
    """click's messages in the style of all others: no capital, no full stop."""
    text = text.strip().removesuffix(".")
    return text[:1].lower() + text[1:]


def _verbose(words: Sequence[str]) -> bool:
    return any(word == "--verbose" or (word.startswith("-v") and set(word[1:]) == {"v"}) for word in words)
