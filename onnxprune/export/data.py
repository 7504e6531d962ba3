"""Calibration rows for the graph, from a user's texts or images."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from onnxprune.errors import InputError
from onnxprune.export.extra import require_pillow
from onnxprune.export.folder import ModelFolder
from onnxprune.export.rows import Row, read_rows
from onnxprune.export.signature import Signature
from onnxprune.export.tasks import Task
from onnxprune.graph.model import atomic_file

log = logging.getLogger(__name__)

T = TypeVar("T")

CLASSIFICATION = ("sequence-classification", "image-classification")
LABELS = "labels"


@dataclass(frozen=True)
class Source:
    """Where calibration rows come from. See :func:`onnxprune.export_model`."""

    path: Path
    columns: Sequence[str] = ()
    label_column: str | None = None
    samples: int = 2048
    max_length: int | None = None
    seed: int = 0


def collect(source: Source, folder: ModelFolder, task: Task, signature: Signature, config: Any) -> dict[str, np.ndarray]:
    """One array per graph input, axis 0 = samples, and int64 ``labels`` where the source has them.

    Raises:
        InputError: the source does not fit the network, or cannot be read.
    """
    if source.samples < 1:
        raise InputError(f"--samples {source.samples} is too small; at least 1")
    if not source.path.exists():
        raise InputError(f"--calib-from {source.path} does not exist")
    if source.path.is_dir():
        return _from_images(source, folder, task, signature, config)
    if not signature.is_text:
        raise InputError(f"--calib-from {source.path} is a file, but the network reads images; name a folder of images")
    if source.label_column and task.name not in CLASSIFICATION:
        raise InputError(f"--label-column gives a class per row, which --task {task.name} has not")
    from onnxprune.export.texts import encode

    rows = _chosen(read_rows(source.path, source.columns, source.label_column), source)
    arrays = encode(folder, signature, rows, source.max_length)
    if source.label_column:
        arrays[LABELS] = _labels(rows, config)
    return arrays


def save(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write an ``.npz`` atomically.

    Raises:
        InputError: the place cannot be written.
    """
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was left half-written") from error


def _from_images(source: Source, folder: ModelFolder, task: Task, signature: Signature, config: Any) -> dict[str, np.ndarray]:
    if signature.is_text:
        raise InputError(f"--calib-from {source.path} is a folder, but the network reads text; name a .txt, .csv or .jsonl file")
    if source.columns or source.label_column or source.max_length:
        raise InputError("--column, --label-column and --max-length are for texts; images take their class from the name of their folder")
    require_pillow()
    from onnxprune.export.images import encode, find_images

    images = _chosen(find_images(source.path), source)
    arrays = encode(folder, signature, images)
    if task.name in CLASSIFICATION and any(image.parent != source.path for image in images):
        numbers = [_class_number(image.parent.name, config) for image in images]
        if None in numbers:
            strange = images[numbers.index(None)].parent.name
            log.warning("no labels are written: the folder %r is no class of the model (%s)", strange, _classes(config))
        else:
            arrays[LABELS] = np.array(numbers, np.int64)
    return arrays


def _chosen(rows: Sequence[T], source: Source) -> list[T]:
    """A random choice in the old order: files are often sorted by class."""
    if len(rows) <= source.samples:
        return list(rows)
    picked = np.random.default_rng(source.seed).permutation(len(rows))[: source.samples]
    return [rows[index] for index in np.sort(picked)]


def _labels(rows: Sequence[Row], config: Any) -> np.ndarray:
    numbers = []
    for row in rows:
        text = row.label or ""
        number = _class_number(text, config)
        if number is None:
            near = difflib.get_close_matches(text, config.label2id, 1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{row.where}: the label {text!r} is no class of the model{guess} ({_classes(config)})")
        numbers.append(number)
    return np.array(numbers, np.int64)


def _class_number(text: str, config: Any) -> int | None:
    """A class by its name in the model's configuration (with ``_`` for ``/``, which no folder can be named), or by number."""
    known = {str(name): int(number) for name, number in config.label2id.items()}
    number = {**{name.replace("/", "_"): index for name, index in known.items()}, **known}.get(text)
    if number is None and text.isdecimal():
        number = int(text)
    return number if number is not None and 0 <= number < config.num_labels else None


def _classes(config: Any, most: int = 5) -> str:
    names = [str(name) for name in config.label2id]
    return f"0 to {config.num_labels - 1}, or {', '.join(names[:most])}{', ...' if len(names) > most else ''}"
