"""Checks of calibration arrays against the inputs a model declares. Each error names the key, what was found and what is wanted."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import helper

from onnxprune.calibration.data import IGNORED_LABEL
from onnxprune.errors import InputError
from onnxprune.graph.model import Model

log = logging.getLogger(__name__)

MINIMUM_ROWS = 8
"""Fewer rows than this say nothing about a model; refused."""
FEW_ROWS = 64
"""Fewer rows than this are used with a warning."""


@dataclass(frozen=True)
class InputSpec:
    """An input as the graph declares it. ``dims``: an int for a fixed size, a string for a symbol, None for unnamed; axis 0 is the rows."""

    name: str
    dtype: np.dtype
    dims: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if dim is None else str(dim) for dim in self.dims)}]"


def input_specs(model: Model) -> dict[str, InputSpec]:
    """Declared type and dimensions of every input that must be fed.

    Raises:
        InputError: an input has no sample axis, or inputs disagree about a fixed batch size.
    """
    specs = {}
    wanted = set(model.input_names)
    for value in model.proto.graph.input:
        if value.name not in wanted:
            continue
        tensor = value.type.tensor_type
        dims = tuple(dim.dim_value if dim.WhichOneof("value") == "dim_value" else dim.dim_param or None for dim in tensor.shape.dim)
        if not dims:
            raise InputError(f"input {value.name!r} of the model is a scalar, without a sample axis; make it a constant of the graph")
        specs[value.name] = InputSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), dims)
    return specs


def fixed_rows(specs: Mapping[str, InputSpec]) -> int:
    """The batch size the model insists on, 0 if it takes any.

    Raises:
        InputError: two inputs want different batch sizes.
    """
    sizes = {spec.name: spec.dims[0] for spec in specs.values() if isinstance(spec.dims[0], int)}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise InputError(f"the inputs of the model have different fixed sizes on axis 0 ({found}); re-export it with one batch axis")
    return int(next(iter(sizes.values()), 0))


def check_chunk(arrays: Mapping[str, object], specs: Mapping[str, InputSpec], where: str, first_row: int = 0) -> dict[str, np.ndarray]:
    """Arrays of one shard or batch, cast to what the model declares; single samples get their axis 0.

    Args:
        arrays: input name -> array-like ``[rows, ...]`` (or one sample without axis 0), and possibly ``labels``.
        where: where they came from, for messages.
        first_row: number of the first row within all calibration data, for messages.

    Raises:
        InputError: a key is missing, unknown or of the wrong type, rank, size or length, or holds NaN or infinity.
    """
    _check_keys(arrays, specs, where)
    given = {name: as_array(name, value, where) for name, value in arrays.items()}
    single = all(given[name].ndim == len(spec.dims) - 1 for name, spec in specs.items())
    if single:
        given = {name: array[None] for name, array in given.items()}
    parts = _summands(specs)
    checked = {name: _check_input(given[name], spec, where, first_row, parts) for name, spec in specs.items()}
    lengths = {name: len(array) for name, array in checked.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {rows}" for name, rows in lengths.items())
        raise InputError(f"{where}: inputs have different numbers of rows ({found})")
    if "labels" in given and "labels" not in specs:
        checked["labels"] = _check_label_array(given["labels"], next(iter(lengths.values())), where, first_row)
    return checked


def check_labels(labels: np.ndarray | None, classes: int) -> np.ndarray:
    """Class labels that fit a model with ``classes`` outputs, int64.

    Raises:
        InputError: there are none, they are not integers, or one is outside ``0..classes - 1`` (-100 is allowed and ignored).
    """
    if labels is None:
        raise InputError("the calibration data has no 'labels'; add an integer array of that name with one class per row")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are {labels.dtype}, but a classifier of {classes} classes needs integers 0..{classes - 1}")
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED_LABEL)
    if wrong.any():
        place = np.argwhere(wrong)[0]
        raise InputError(
            f"label {labels[tuple(place)]} of row {place[0]} is outside 0..{classes - 1}: the model has {classes} classes "
            f"({int(wrong.sum())} labels are wrong; use {IGNORED_LABEL} for positions to ignore)"
        )
    if (labels == IGNORED_LABEL).all():
        raise InputError(f"every label is {IGNORED_LABEL} (ignored); nothing can be scored")
    return labels.astype(np.int64, copy=False)


def check_rows(rows: int, origin: str) -> None:
    """Refuse too few rows, warn about few.

    Raises:
        InputError: fewer than :data:`MINIMUM_ROWS`.
    """
    if rows < MINIMUM_ROWS:
        raise InputError(f"{origin}: {rows} calibration row{'s' * (rows != 1)} found; at least {MINIMUM_ROWS} are needed")
    if rows < FEW_ROWS:
        log.warning("%s holds only %d calibration rows; %d or more give steadier decisions", origin, rows, FEW_ROWS)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name nearest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def as_array(name: str, value: object, where: str) -> np.ndarray:
    """``value`` as an array of numbers or booleans.

    Raises:
        InputError: it is ragged or holds objects or text.
    """
    try:
        array = np.asarray(value)
    except Exception as error:  # array protocols of foreign tensors raise what they like
        raise InputError(f"{where}: {name!r} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{where}: {name!r} holds {array.dtype} values; wanted a rectangular array of numbers")
    return array


def _check_keys(arrays: Mapping[str, object], specs: Mapping[str, InputSpec], where: str) -> None:
    known = [*specs, "labels"]
    unknown = [name for name in arrays if name not in known]
    missing = [name for name in specs if name not in arrays]
    if missing:
        hint = nearest(missing[0], unknown)
        raise InputError(f"{where} has no array {missing[0]!r}{hint}; found {_listed(arrays)}; the model's inputs are {_listed(specs)}")
    if unknown:
        raise InputError(
            f"{where} has an array {unknown[0]!r} that is no input of the model{nearest(unknown[0], known)}; "
            f"remove it; the model's inputs are {_listed(specs)}, and 'labels' is allowed beside them"
        )


def _summands(specs: Mapping[str, InputSpec]) -> frozenset[str]:
    """Dimensions that are part of a sum such as ``past + tokens``: a cache may be empty, the sum is not."""
    sums = (dim for spec in specs.values() for dim in spec.dims if isinstance(dim, str) and "+" in dim)
    return frozenset(part.strip() for dim in sums for part in dim.split("+"))


def _check_input(array: np.ndarray, spec: InputSpec, where: str, first_row: int, may_be_empty: frozenset[str]) -> np.ndarray:
    if array.ndim != len(spec.dims):
        raise InputError(f"{where}: {spec.name!r} has shape {list(array.shape)}; the model wants {spec} (axis 0 = samples)")
    for axis, (size, dim) in enumerate(zip(array.shape, spec.dims, strict=True)):
        if axis and isinstance(dim, int) and size != dim:
            raise InputError(f"{where}: {spec.name!r} has shape {list(array.shape)}, but the model fixes axis {axis} to {dim} ({spec})")
    empty = [dim for size, dim in zip(array.shape, spec.dims, strict=True) if not size]
    if empty and not (len(array) and spec.dtype.kind == "f" and may_be_empty.issuperset(empty)):
        raise InputError(f"{where}: {spec.name!r} is empty (shape {list(array.shape)})")
    return _cast(array, spec, where, first_row)


def _cast(array: np.ndarray, spec: InputSpec, where: str, first_row: int) -> np.ndarray:
    """Between int32 and int64, between float widths (a model's own rounding of its inputs), and between 0/1 integers and bool."""
    _check_finite(spec.name, array, where, first_row)
    if array.dtype == spec.dtype:
        return array
    have, want = array.dtype.kind, spec.dtype.kind
    if have in "iu" and want in "iu":
        limits = np.iinfo(spec.dtype)
        allowed = limits.min <= int(array.min()) and int(array.max()) <= limits.max
    elif have == "b" or want == "b":
        allowed = want in "biuf" and have in "biu" and bool(((array == 0) | (array == 1)).all())
    else:
        allowed = have == "f" and want == "f"
    if not allowed:
        raise InputError(f"{where}: {spec.name!r} is {array.dtype}, the model wants {spec.dtype}, and its values do not fit; convert it")
    log.info("%s: %r cast from %s to %s", where, spec.name, array.dtype, spec.dtype)
    with np.errstate(over="ignore"):  # an overflow is reported below, with its row
        cast = array.astype(spec.dtype)
    _check_finite(spec.name, cast, where, first_row)
    return cast


def _check_finite(name: str, array: np.ndarray, where: str, first_row: int) -> None:
    if array.dtype.kind != "f":
        return
    rows = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if not rows.all():
        first = int(np.argmin(rows))
        raise InputError(f"{where}: {name!r} holds NaN or infinity, first in row {first_row + first} ({int((~rows).sum())} rows in all)")


def _check_label_array(labels: np.ndarray, rows: int, where: str, first_row: int) -> np.ndarray:
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise InputError(f"{where}: 'labels' has shape {list(labels.shape)}; wanted [{rows}] or [{rows}, tokens], as many as input rows")
    _check_finite("labels", labels, where, first_row)
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64, copy=False)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
