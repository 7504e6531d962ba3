"""Read calibration data from wherever it is: npz files, shards, readers, iterables, arrays, a user's function, or explicit ``random``."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from onnxprune.calibration.checks import InputSpec, check_chunk, check_rows, fixed_rows, input_specs, nearest
from onnxprune.calibration.data import IGNORED_LABEL, Batch, CalibrationData
from onnxprune.calibration.npz import read_npz
from onnxprune.errors import InputError
from onnxprune.graph.caches import cache_pairs
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView

__all__ = ["Batch", "CalibrationData", "load_calibration"]

log = logging.getLogger(__name__)

RANDOM_ROWS = 64
RANDOM_SIZE = 64
"""Size of a dynamic dimension of random data for which no shape was given."""


@runtime_checkable
class DataReader(Protocol):
    """onnxruntime's ``CalibrationDataReader``: feed dicts, one per call, then None."""

    def get_next(self) -> Mapping[str, Any] | None: ...


CalibrationSource = str | os.PathLike[str] | Mapping[str, Any] | DataReader | Iterable[Mapping[str, Any]] | CalibrationData
Chunks = Iterator[tuple[str, Mapping[str, Any]]]


def load_calibration(
    source: CalibrationSource,
    model: Model,
    *,
    samples: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> CalibrationData:
    """Load calibration data and check it against the inputs of ``model``.

    Args:
        source: path of an ``.npz`` (keys are input names, axis 0 = samples, optional ``labels``); a directory of such shards; a dict of
            arrays; an object with ``get_next()``; an iterable of feed dicts (batches, or single samples without axis 0);
            ``"file.py:function"``, whose function returns any of these; or ``"random"`` for made-up data. Caches of earlier tokens that are
            left out are empty.
        samples: number of rows to use. From one file or dict a random choice by ``seed``; from a stream the first ones.
        input_shapes: with ``"random"``, shapes by input name (axis 0 = batch, ignored) for dynamic dimensions.

    Raises:
        InputError: the source cannot be read, or an array does not fit the model.
    """
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}: at least one calibration row is needed")
    if isinstance(source, CalibrationData):
        return source if samples is None or samples >= len(source) else source.take(_choose(len(source), samples, seed))
    specs = input_specs(model)
    if isinstance(source, str) and source == "random":
        chunks, origin, whole = _random(specs, samples or RANDOM_ROWS, seed, input_shapes or {}), "random", False
    else:
        chunks, origin, whole = _open(source)
    caches = frozenset(cache_pairs(GraphView(model)))
    collected: list[dict[str, np.ndarray]] = []
    rows = 0
    for where, arrays in chunks:
        chunk = check_chunk({**_empty_caches(arrays, specs, caches), **arrays}, specs, where, rows)
        collected.append(chunk)
        rows += len(chunk[next(iter(specs))])
        if samples is not None and rows >= samples and not whole:
            break
    check_rows(rows if samples is None else min(rows, samples), origin)
    if samples is not None and rows < samples:
        log.info("%s holds %d calibration rows, fewer than the %d asked for", origin, rows, samples)
    data = _assemble(collected, specs, origin)
    if samples is None or rows <= samples:
        return data
    return data.take(_choose(rows, samples, seed) if whole else slice(0, samples))


def _choose(rows: int, samples: int, seed: int) -> np.ndarray:
    """Row numbers of a random choice, in their old order."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:samples])


def _open(source: Any) -> tuple[Chunks, str, bool]:
    """(chunks with their names, origin, whether rows may be chosen from all over the source)."""
    if isinstance(source, str) and ".py:" in source:
        return _open(_call_user_function(source))
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return _shards(path), str(path), False
        return iter([(str(path), _read_file(path))]), str(path), True
    if isinstance(source, Mapping):
        return iter([("calibration arrays", source)]), "arrays", True
    if isinstance(source, DataReader):
        return _numbered(iter(source.get_next, None), "batch"), type(source).__name__, False
    if isinstance(source, Iterable):
        return _numbered(iter(source), "item"), type(source).__name__, False
    raise InputError(
        f"calibration data of type {type(source).__name__} is not understood; give a path, a dict of arrays, an iterable of feed dicts "
        "or an object with get_next()"
    )


def _numbered(items: Iterator[Any], word: str) -> Chunks:
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise InputError(f"calibration {word} {number} is {type(item).__name__}; wanted a dict of input name -> array")
        yield f"calibration {word} {number}", item


def _shards(folder: Path) -> Chunks:
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"no .npz files in {folder}; a directory of calibration shards holds one or more of them")
    for file in files:
        yield str(file), _read_file(file)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"calibration data not found: {path}{_nearest_file(path)}")
    return read_npz(path)


def _nearest_file(path: Path) -> str:
    return nearest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else ""


def _call_user_function(text: str) -> Any:
    """Run ``function`` of ``file.py:function`` without arguments. This runs the user's own code, at the user's word."""
    file, _, function = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"calibration script not found: {path}{_nearest_file(path)}")
    spec = importlib.util.spec_from_file_location(f"onnxprune_calibration_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # anything the user's file does wrong
        raise InputError(f"calibration script {path} failed: {type(error).__name__}: {error}") from error
    target = getattr(module, function, None)
    if not callable(target):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(f"{path} has no function {function!r}{nearest(function, names)}; it defines {', '.join(names) or 'none'}")
    try:
        return target()
    except (Exception, SystemExit) as error:  # anything the user's function does wrong
        raise InputError(f"{text} failed: {type(error).__name__}: {error}") from error


def _empty_caches(arrays: Mapping[str, Any], specs: Mapping[str, InputSpec], caches: frozenset[str]) -> dict[str, np.ndarray]:
    """Keys and values of no earlier token, for caches that the data leaves out: every row starts a text."""
    if all(name in arrays for name in caches):
        return {}
    given = {name: np.shape(arrays[name]) for name in specs if name in arrays}
    single = all(len(shape) == len(specs[name].dims) - 1 for name, shape in given.items())
    rows = [] if single else [max((shape[0] for shape in given.values() if shape), default=0)]
    return {
        name: np.zeros((*rows, *(dim if isinstance(dim, int) else 0 for dim in specs[name].dims[1:])), specs[name].dtype)
        for name in specs
        if name in caches and name not in arrays and any(not isinstance(dim, int) for dim in specs[name].dims[1:])
    }


def _random(specs: Mapping[str, InputSpec], rows: int, seed: int, shapes: Mapping[str, Sequence[int]]) -> Chunks:
    """Standard normal floats, integers 0 and 1 (rows of any embedding), attention masks of ones."""
    sizes = _symbol_sizes(specs, shapes)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in specs.items():
        shape = (rows, *(dim if isinstance(dim, int) else sizes[name, axis] for axis, dim in enumerate(spec.dims[1:], 1)))
        if "mask" in name or spec.dtype.kind == "b":
            arrays[name] = np.ones(shape, spec.dtype)
        elif "position" in name and spec.dtype.kind in "iu":
            arrays[name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(spec.dtype)
        elif spec.dtype.kind in "iu":
            arrays[name] = rng.integers(0, 2, shape).astype(spec.dtype)
        else:
            arrays[name] = rng.standard_normal(shape).astype(spec.dtype)
    yield "random data", arrays


def _symbol_sizes(specs: Mapping[str, InputSpec], shapes: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], int]:
    """(input, axis) -> size of every dynamic dimension but the batch; equal symbols get equal sizes."""
    for name, shape in shapes.items():
        if name not in specs:
            raise InputError(f"--input-shape names {name!r}, which is no input of the model{nearest(name, specs)}")
        if len(shape) != len(specs[name].dims):
            raise InputError(f"--input-shape {name}:{'x'.join(map(str, shape))} has {len(shape)} dimensions; the model wants {specs[name]}")
    known = {dim: int(shape[axis]) for name, shape in shapes.items() for axis, dim in enumerate(specs[name].dims) if isinstance(dim, str)}
    sizes, guessed = {}, []
    for name, spec in specs.items():
        for axis, dim in enumerate(spec.dims[1:], 1):
            if isinstance(dim, int):
                continue
            if name in shapes:
                sizes[name, axis] = int(shapes[name][axis])
            elif dim in known:
                sizes[name, axis] = known[dim]
            elif dim is not None and "+" in dim:  # such as "past + tokens"
                sizes[name, axis] = sum(known.get(part.strip(), RANDOM_SIZE) for part in dim.split("+"))
            else:
                sizes[name, axis] = RANDOM_SIZE
                guessed.append(f"{name} axis {axis}")
    if guessed:
        log.warning("random data: size %d assumed for %s; set it with --input-shape", RANDOM_SIZE, ", ".join(guessed))
    return sizes


def _assemble(chunks: list[dict[str, np.ndarray]], specs: Mapping[str, InputSpec], origin: str) -> CalibrationData:
    labelled = [("labels" in chunk) for chunk in chunks]
    if any(labelled) and not all(labelled):
        raise InputError(f"{origin}: part {labelled.index(False)} has no 'labels', others have; give labels for all rows or for none")
    inputs = {name: _join(name, [chunk[name] for chunk in chunks], 0, specs) for name in specs}
    labels = _join("labels", [chunk["labels"] for chunk in chunks], IGNORED_LABEL, specs) if all(labelled) else None
    mask_name = _mask_input(inputs)
    mask = None if mask_name is None else inputs[mask_name] != 0
    if mask is not None and not mask.any(axis=1).all():
        raise InputError(f"{origin}: {mask_name!r} hides every token of row {int(np.argmin(mask.any(axis=1)))}; remove empty samples")
    axes = {} if mask_name is None else _sequence_axes(mask_name, inputs, specs)
    return CalibrationData(inputs, labels, origin, mask, axes, fixed_rows(specs))


def _join(name: str, arrays: list[np.ndarray], fill: int, specs: Mapping[str, InputSpec]) -> np.ndarray:
    """Parts one below the other; shorter sequences are padded on the right to the longest."""
    if len(arrays) == 1:
        return arrays[0]
    if len({array.ndim for array in arrays}) > 1:
        raise InputError(f"{name!r} has different ranks in different parts: {sorted({array.ndim for array in arrays})}")
    target = np.max([array.shape[1:] for array in arrays], axis=0, initial=0).astype(int) if arrays[0].ndim > 1 else np.zeros(0, int)
    if any(array.shape[1:] != tuple(target) for array in arrays) and not any("mask" in known for known in specs):
        log.warning("%r has different lengths in different parts and the model has no mask: padded with %d to %s", name, fill, list(target))
    padded = []
    for array in arrays:
        widths = [(0, 0), *((0, int(size) - have) for size, have in zip(target, array.shape[1:], strict=True))]
        padded.append(np.pad(array, widths, constant_values=fill) if any(after for _, after in widths) else array)
    return np.concatenate(padded)


def _mask_input(inputs: Mapping[str, np.ndarray]) -> str | None:
    """The input that tells tokens from padding: named like a mask, two dimensions, only zeros and ones."""
    candidates = sorted((name for name in inputs if "mask" in name.lower()), key=lambda name: "attention_mask" not in name.lower())
    return next((name for name in candidates if inputs[name].ndim == 2 and bool(((inputs[name] == 0) | (inputs[name] == 1)).all())), None)


def _sequence_axes(mask: str, inputs: Mapping[str, np.ndarray], specs: Mapping[str, InputSpec]) -> dict[str, int]:
    """Axes that share the mask's symbolic length. Empty when the length is fixed, or when an axis of that size might be one of them."""
    symbol, length = specs[mask].dims[1], inputs[mask].shape[1]
    if not isinstance(symbol, str):
        return {}
    axes = {}
    for name, spec in specs.items():
        for axis, dim in enumerate(spec.dims[1:], 1):
            if dim == symbol and name not in axes:
                axes[name] = axis
            elif not isinstance(dim, int) and inputs[name].shape[axis] == length:
                return {}
    return axes if len(axes) > 1 else {}
