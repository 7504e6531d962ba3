"""One request as a user makes it: what latency is measured on and multiply-adds are counted for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of, synthetic_feeds

_EXAMPLE_ROWS = 8
_MADE_UP_SIZES = (64, 16, 7)


def examples(data: CalibrationData) -> dict[str, np.ndarray]:
    """A few real rows, for models that do not run on made-up inputs; more than one batch size must fit in."""
    return {name: array[:_EXAMPLE_ROWS] for name, array in data.inputs.items()}


def made_up(model: Model) -> CalibrationData:
    """A made-up row of the largest common size the model takes: not every model has 64 positions."""
    for size in _MADE_UP_SIZES:
        feeds = synthetic_feeds(model, (1, *(size,) * 7))
        try:
            shapes_of(model, feeds)
        except InputError:
            continue
        return CalibrationData(feeds, None, "made up")
    raise InputError("the model does not run on made-up inputs; give data with --calib")


def request_feeds(model: Model, data: CalibrationData, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The first row of ``data``, repeated or cut to the shapes asked for.

    A size given for one input holds for every input that names the same symbolic dimension.

    Raises:
        InputError: a shape names no input, has another rank, or contradicts a fixed dimension.
    """
    rows = data.fixed_rows or 1
    feeds = {name: np.ascontiguousarray(np.resize(array[:rows], (rows, *array.shape[1:]))) for name, array in data.inputs.items()}
    if not shapes:
        return feeds
    sizes: dict[str, int] = {}
    dims = _dims(model)
    for name, shape in shapes.items():
        if name not in feeds:
            raise InputError(f"--input-shape names {name!r}; the inputs are {', '.join(feeds)}")
        if len(shape) != feeds[name].ndim:
            raise InputError(f"--input-shape {name} has {len(shape)} dimensions; the input has {feeds[name].ndim}")
        for axis, size in enumerate(shape):
            fixed = dims[name][axis]
            if isinstance(fixed, int) and fixed != size:
                raise InputError(f"--input-shape {name} asks for {size} along axis {axis}; the model fixes it at {fixed}")
            if isinstance(fixed, str):
                sizes[fixed] = size
    wanted: dict[str, tuple[int, ...]] = {
        name: tuple(sizes.get(str(dim), int(array.shape[axis])) for axis, dim in enumerate(dims[name])) for name, array in feeds.items()
    }
    wanted.update(shapes)
    return {name: _fit(array, wanted[name]) for name, array in feeds.items()}


def _dims(model: Model) -> dict[str, list[int | str | None]]:
    """Declared dimensions of every input: a size, a symbol, or None."""
    result: dict[str, list[int | str | None]] = {}
    for value in model.proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        result[value.name] = [dim.dim_value if dim.WhichOneof("value") == "dim_value" else dim.dim_param or None for dim in dims]
    return result


def _fit(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat or cut along every axis; a cache of no tokens grows by zeros."""
    if not array.size:
        return np.zeros(shape, array.dtype)
    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
    return np.ascontiguousarray(array)
