"""What is to be known of activations before they become integers: one pass over the data, a few kilobytes per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.calibration.stream import stream
from onnxprune.errors import InputError
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.quantize.ranges import Histogram
from onnxprune.runtime.session import RuntimeOptions

ROWS = 4
"""Rows per run if the caller names none: few, as all tensors asked for lie in memory at once."""


@dataclass
class Activation:
    """One tensor ``[..., n]`` over all rows that count.

    Attributes:
        histogram: of all values.
        count: positions seen; each is a vector of n channels.
        low, high: float32 ``[n]``, least and largest value of each channel.
        squares: float64 ``[n]``, the sum of x^2 over positions.
    """

    histogram: Histogram
    count: int = 0
    low: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def power(self) -> np.ndarray:
        """Mean of x^2 of each channel, float64 ``[n]``; zeros before the first position."""
        return self.squares / max(self.count, 1)

    def add(self, positions: np.ndarray) -> None:
        """Take in vectors, floating point ``[positions, n]``.

        Raises:
            InputError: a value is not finite, or n is another one than before.
        """
        if not len(positions):
            return
        if self.count and positions.shape[1] != len(self.low):
            raise InputError(
                f"tensor {self.histogram.name!r} has {positions.shape[1]} channels on some calibration rows and {len(self.low)} on others; "
                "only tensors of a fixed last axis can be quantised"
            )
        self.histogram.add(positions)
        low, high = positions.min(axis=0), positions.max(axis=0)
        squares = np.einsum("ij,ij->j", positions, positions, dtype=np.float64)
        if self.count:
            low, high, squares = np.minimum(low, self.low), np.maximum(high, self.high), squares + self.squares
        self.low, self.high, self.squares = low, high, squares
        self.count += len(positions)


def summarise(
    model: Model,
    tensors: Iterable[str],
    data: CalibrationData,
    options: RuntimeOptions | None = None,
    *,
    rows: int = ROWS,
    leave_infinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Activation]:
    """Summaries of activation tensors over all rows of ``data``, by name.

    Rows that only fill up a batch are left out, and so is padding where the leading axes of a tensor are the rows and tokens of the
    attention mask, be they apart or as one. Memory is that of one batch, whatever the number of rows.

    Args:
        tensors: names of float tensors of the graph, or of its inputs, whose last axis are channels.
        rows: rows per run at the start, as in :func:`~onnxprune.calibration.stream.stream`.
        leave_infinite: leave tensors out of the result that are infinite or NaN on a row that counts.

    Raises:
        InputError: a tensor is not in the graph, no float tensor, or not finite on the data; or as :func:`stream`.
        RuntimeUnavailable: the provider did not start.
    """
    names = list(dict.fromkeys(tensors))
    summaries = {name: Activation(Histogram(name)) for name in names}
    computed = {name for node in model.proto.graph.node for name in node.output if name}
    for name in names:
        if name not in computed and name not in model.input_names:
            raise InputError(f"tensor {name!r} is not in the graph; take the names of activations of this model")
    fetched = [name for name in names if name in computed]
    observed = with_outputs(model, fetched, keep=False) if fetched else model
    for batch, values in stream(observed, data, fetched or None, options=options, rows=rows, progress=progress):
        for name in list(summaries):
            array = values[name] if name in computed else batch.feeds[name]
            if not np.issubdtype(array.dtype, np.floating) or not array.ndim:
                raise InputError(f"tensor {name!r} is {array.dtype}{list(array.shape)}; only float vectors have a range to calibrate")
            positions = _positions(array, batch)
            if leave_infinite and not np.isfinite(positions).all():
                del summaries[name]
            else:
                summaries[name].add(positions)
    return summaries


def _positions(array: np.ndarray, batch: Batch) -> np.ndarray:
    """The vectors ``[positions, n]`` that count."""
    flat = array.reshape(-1, array.shape[-1])
    keep = _counted(array.shape[:-1], batch)
    return flat if keep.all() else flat[keep.reshape(-1)]


def _counted(leading: tuple[int, ...], batch: Batch) -> np.ndarray:
    """Which positions count, bool of the shape ``leading``; all of them where neither rows nor tokens come first."""
    keep = np.ones(leading, bool)
    mask = batch.token_mask
    if mask is not None and leading[: mask.ndim] == mask.shape:
        keep &= mask.reshape(mask.shape + (1,) * (len(leading) - mask.ndim))
    elif mask is not None and leading[:1] == (mask.size,):
        keep[~mask.reshape(-1)] = False
    elif leading and leading[0] % len(batch) == 0:
        keep[~np.repeat(batch.valid, leading[0] // len(batch))] = False
    return keep
