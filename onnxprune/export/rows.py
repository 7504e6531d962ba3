"""Texts of a user's file (.txt, .csv, .jsonl), with labels if a column of them is named."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.errors import InputError

DEFAULT_COLUMN = "text"


@dataclass(frozen=True)
class Row:
    """One text, or a pair that is encoded together. ``where`` is file and line; ``label`` as it is written."""

    texts: tuple[str, ...]
    label: str | None
    where: str


def read_rows(path: Path, columns: Sequence[str] = (), label_column: str | None = None) -> list[Row]:
    """Rows in the order of the file; those with an empty text are left out.

    Args:
        path: ``.txt`` has a text per line; ``.csv`` a line of column names first; ``.jsonl`` an object, or a string, per line.
        columns: one or two column names; default ``text``.

    Raises:
        InputError: the file cannot be read, a column is not there, or nothing is left.
    """
    if len(columns) > 2:
        raise InputError(f"--column is given {len(columns)} times; once for a text, twice for a pair of texts")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is not understood as texts; wanted {', '.join(_READERS)}, or a folder of images")
    if path.suffix.lower() == ".txt" and (columns or label_column):
        raise InputError(f"{path} has no columns; --column and --label-column are for .csv and .jsonl")
    wanted = tuple(columns) or (DEFAULT_COLUMN,)
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            found = [_row(cells, wanted, label_column, f"{path} line {line}") for line, cells in reader(stream)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    rows = [row for row in found if all(text.strip() for text in row.texts)]
    if not rows:
        raise InputError(f"{path} holds no texts")
    return rows


def _row(cells: Mapping[str, Any], columns: Sequence[str], label_column: str | None, where: str) -> Row:
    texts = []
    for name in columns:
        value = _cell(cells, name, where)
        if not isinstance(value, str):
            raise InputError(f"{where}: column {name!r} holds {type(value).__name__}; wanted a text")
        texts.append(value)
    label = None if label_column is None else str(_cell(cells, label_column, where)).strip()
    return Row(tuple(texts), label, where)


def _cell(cells: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in cells:
        near = difflib.get_close_matches(name, cells, 1)
        raise InputError(
            f"{where} has no column {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; there are {', '.join(map(repr, cells))}"
        )
    return cells[name]


def _lines(stream: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(stream, 1):
        yield number, {DEFAULT_COLUMN: line.rstrip("\r\n")}


def _csv(stream: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(stream, restval="", restkey="")
    for cells in reader:
        yield reader.line_num, cells


def _jsonl(stream: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if isinstance(content, str):
            content = {DEFAULT_COLUMN: content}
        if not isinstance(content, dict):
            raise ValueError(f"line {number} holds {type(content).__name__}; wanted an object or a string")
        yield number, content


_READERS: Mapping[str, Callable[[Iterable[str]], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".txt": _lines,
    ".csv": _csv,
    ".jsonl": _jsonl,
}
