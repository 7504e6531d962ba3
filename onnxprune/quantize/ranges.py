"""Ranges of activations for asymmetric uint8, from one pass over the data and memory that does not grow with it.

Every bin of a :class:`Histogram` is ``[j w, (j + 1) w)`` for a whole number j and a width w that is a power of two. A wider range doubles
w, which joins bins 2j and 2j + 1, and so do all parts of the data whatever their order: counts of parts add up exactly to those of the
whole. Scaling by a power of two and rounding down are exact in floating point, which is why no value changes its bin.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from onnxprune.errors import InputError

BINS = 2048
"""Bins of a histogram; between half of them and all of them lie in the range of the data."""

Method = Literal["minmax", "percentile", "entropy", "mse"]

_MANTISSA = 23
"""Bins are not finer than the largest value over two to this power: their numbers stay exact in float32."""

_LEAST_EXPONENT = -140
_ENTROPY_CANDIDATES = 128
_STEPS = 28
_STEP = 2**-0.25


class Range(NamedTuple):
    """What uint8 has to cover; always ``low <= 0 <= high``, so that zero is represented exactly."""

    low: float
    high: float


class Histogram:
    """Least and largest value and counts per bin of one tensor, gathered batch by batch.

    Attributes:
        name: the tensor, for error messages.
        low, high: exact bounds of the values seen; 0 before the first one.
        count, zeros: values seen, and how many of them are exactly zero, which quantisation leaves as they are.
        exponent: the width of a bin is two to this power.
        first: the number j of the first bin; :attr:`bins` [2048] int64 counts the values in bins j, j + 1, ...
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0
        self.count = self.zeros = 0
        self.exponent = _LEAST_EXPONENT
        self.first = 0
        self.bins = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Count the ``values`` (floating point, any shape) of a batch.

        Args:
            valid: bool, shaped as the leading axes of ``values`` (``[rows]`` or ``[rows, tokens]``); False leaves a row out, as padding.

        Raises:
            InputError: a counted value is infinite or not a number, or ``valid`` has another shape. Nothing was counted then.
        """
        if valid is not None and valid.shape != values.shape[: valid.ndim]:
            raise InputError(
                f"the mask of tensor {self.name!r} has shape {list(valid.shape)}, its values {list(values.shape)}; "
                "give one flag for each position of the leading axes"
            )
        if valid is not None and not valid.all():
            values = values[valid]
        if not values.size:
            return
        flat = values.reshape(-1)
        if flat.dtype not in (np.float32, np.float64):
            flat = flat.astype(np.float32)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"tensor {self.name!r} holds infinite or NaN values on the calibration data, so no range covers it; "
                "mend the data or the model if it should be finite, or scale activations at run time (--int8 dynamic)"
            )
        self._cover(low, high)
        self.bins += np.bincount(_bins_of(flat, self.exponent, self.first), minlength=BINS)
        self.count += flat.size
        self.zeros += flat.size - int(np.count_nonzero(flat))

    def __iadd__(self, other: Histogram) -> Histogram:
        """Add the counts of another part of the data; the result is that of one pass over both."""
        if other.count:
            bins = other.bins.copy()
            self._cover(other.low, other.high)
            _add_shifted(self.bins, bins, other.first, self.first, self.exponent - other.exponent)
            self.count += other.count
            self.zeros += other.zeros
        return self

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> np.ndarray:
        """The bounds of all bins, float64 [2049]."""
        return np.arange(self.first, self.first + BINS + 1) * self.width

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins, if need be, until they hold values from ``low`` to ``high``."""
        if self.count:
            low, high = min(low, self.low), max(high, self.high)
            if (low, high) == (self.low, self.high):
                return
        exponent = _exponent(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        bins = np.zeros(BINS, np.int64)
        if self.count:
            _add_shifted(bins, self.bins, self.first, first, exponent - self.exponent)
        self.low, self.high, self.exponent, self.first, self.bins = low, high, exponent, first, bins


def _exponent(low: float, high: float) -> int:
    """The least exponent at which the bins reach from ``low`` to ``high``: it depends on these two alone and grows with them."""
    exponent = max(math.frexp(max(abs(low), abs(high)))[1] - _MANTISSA, _LEAST_EXPONENT)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


def _bins_of(flat: np.ndarray, exponent: int, first: int) -> np.ndarray:
    """Place [n] of each value in the bins."""
    # Multiplied by less than one, a tiny negative float32 could vanish and end in the bin above zero.
    fits = flat.dtype == np.float32 and -120 < exponent <= 0
    scaled = flat * np.float32(math.ldexp(1.0, -exponent)) if fits else np.ldexp(flat.astype(np.float64), -exponent)
    np.floor(scaled, out=scaled)
    scaled -= scaled.dtype.type(first)
    return scaled.astype(np.intp)


def _add_shifted(target: np.ndarray, bins: np.ndarray, first: int, target_first: int, doublings: int) -> None:
    """Add the counts of narrower bins to those that they lie in."""
    used = np.flatnonzero(bins)
    np.add.at(target, ((used + first) >> doublings) - target_first, bins[used])


def uint8_parameters(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of a range, in the float32 arithmetic of ONNX DynamicQuantizeLinear; a range of nothing has scale 1.

    The range is widened to include zero. ``(0, c)`` and ``(c, 0)`` put a constant c on the last level.

    Raises:
        InputError: a bound is not finite, they are in the wrong order, or their distance exceeds float32.
    """
    with np.errstate(over="ignore"):
        least, most = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
        span = np.float32(most - least)
    if not low <= high or not np.isfinite(span):
        raise InputError(f"{low} to {high} is no range that uint8 can cover; give finite float32 bounds, the lower one first")
    scale = np.float32(span / np.float32(255))
    if scale == 0:
        scale = np.float32(1)
    zero_point = np.rint(np.clip(np.float32(0) - least / scale, np.float32(0), np.float32(255)))
    return scale, np.uint8(zero_point)


def range_of(histogram: Histogram, method: Method, levels: int = 256, percent: float = 99.999) -> Range:
    """The range that uint8 should cover; what lies outside is clipped to its ends.

    ``minmax`` covers everything. ``percentile`` covers the middle ``percent`` of all values, with as much cut on either side. ``entropy``
    clips magnitudes at the threshold whose quantised distribution loses least information about the clipped one (Kullback-Leibler, as
    in Migacz, "8-bit inference with TensorRT", GTC 2017), and keeps at least as many bins as levels. ``mse`` makes the
    :func:`expected_error` least, over both ends.

    A constant tensor keeps its constant under every method (``(0, c)`` or ``(c, 0)``), and an all-zero one has the range (0, 0).

    Args:
        levels: number of integers to quantise to.
        percent: for ``percentile`` alone.

    Raises:
        InputError: no value was seen, or an argument is out of its bounds.
    """
    if not histogram.count:
        raise InputError(f"tensor {histogram.name!r} was never seen, or only as padding; calibrate with data that reaches it")
    if levels < 2:
        raise InputError(f"{levels} levels asked for tensor {histogram.name!r}; at least 2 are needed")
    everything = Range(min(histogram.low, 0.0), max(histogram.high, 0.0))
    if method == "minmax":
        return everything
    if method == "percentile":
        if not 50 <= percent <= 100:
            raise InputError(f"a percentile range of {percent} percent was asked for; give one from 50 to 100")
        tail = (1 - percent / 100) / 2
        return Range(min(_quantile(histogram, tail), 0.0), max(_quantile(histogram, 1 - tail), 0.0))
    if method not in ("entropy", "mse"):
        raise InputError(f"unknown range method {method!r}; take minmax, percentile, entropy or mse")
    if histogram.low == histogram.high or histogram.zeros == histogram.count:
        return everything
    return _entropy_range(histogram, everything, levels) if method == "entropy" else _mse_range(histogram, everything, levels)


def _quantile(histogram: Histogram, share: float) -> float:
    """The value below which this share lies, within the width of a bin."""
    below = np.cumsum(histogram.bins)
    # The tolerance keeps a share such as 1 - 1e-5 of 1e5 values from asking for a fraction of one value more.
    wanted = min(max(share * histogram.count - 1e-6, 0.5), float(histogram.count))
    place = int(np.searchsorted(below, wanted))
    inside = 1 - (float(below[place]) - wanted) / float(histogram.bins[place])
    return min(max((histogram.first + place + inside) * histogram.width, histogram.low), histogram.high)


def _without_zeros(histogram: Histogram) -> np.ndarray:
    """Counts [2048] of the values that quantisation can change."""
    bins = histogram.bins.copy()
    if histogram.zeros:
        bins[-histogram.first] -= histogram.zeros
    return bins


def expected_error(histogram: Histogram, low: float, high: float, levels: int = 256) -> float:
    """Mean squared error of a value quantised to the range, rounding and clipping, with values spread evenly inside a bin."""
    span = np.array([max(high, 0.0) - min(low, 0.0)])
    return float(_errors(histogram, np.array([min(low, 0.0)]), span, levels)[0])


def _errors(histogram: Histogram, low: np.ndarray, span: np.ndarray, levels: int) -> np.ndarray:
    """:func:`expected_error` of candidates [n]; the zero point is rounded, as it will be.

    The squared error integrates in closed form: in units of the scale, to n / 12 + r^3 / 3 up to the point n + r that rounds, or clips, to
    level n. Differences at the edges of the bins are exact for an even density.
    """
    bins = _without_zeros(histogram)
    used = np.flatnonzero(bins)
    if not used.size:
        return np.zeros(len(low))
    # Runs of empty bins have no edge in between that matters.
    needed = np.union1d(used, used + 1)
    starts = np.searchsorted(needed, used)
    edges = histogram.edges[needed]
    scale = np.where(span > 0, span, 1.0) / (levels - 1)
    zero_point = np.clip(np.rint(-low / scale), 0, levels - 1)
    place = edges / scale[:, None] + zero_point[:, None]
    level = np.clip(np.rint(place), 0, levels - 1)
    integral = level / 12 + (place - level) ** 3 / 3
    inside = np.maximum(integral[:, starts + 1] - integral[:, starts], 0.0)
    return np.asarray(inside @ bins[used].astype(np.float64) * scale**3 / (histogram.width * histogram.count))


def _mse_range(histogram: Histogram, everything: Range, levels: int) -> Range:
    """Least expected error over a geometric grid of both ends, then over a four times finer one around the best."""
    coarse = _STEP ** np.arange(_STEPS + 1)
    best = _best_of_grid(histogram, everything, coarse, coarse, levels)
    fine = _STEP ** (np.arange(-3, 4) / 4)
    low, high = (np.minimum(share * fine, 1.0) for share in best)
    found = _best_of_grid(histogram, everything, low, high, levels)
    return Range(everything.low * found[0], everything.high * found[1])


def _best_of_grid(histogram: Histogram, everything: Range, lows: np.ndarray, highs: np.ndarray, levels: int) -> tuple[float, float]:
    """The shares of both ends with the least error; the first, that is the widest, of equals."""
    lows, highs = (shares if end else shares[:1] for shares, end in zip((lows, highs), everything, strict=True))
    best, least = (float(lows[0]), float(highs[0])), math.inf
    for share in lows:
        low = np.full(len(highs), everything.low * share)
        errors = _errors(histogram, low, everything.high * highs - low, levels)
        place = int(errors.argmin())
        if errors[place] < least:
            best, least = (float(share), float(highs[place])), float(errors[place])
    return best


def _entropy_range(histogram: Histogram, everything: Range, levels: int) -> Range:
    """The common threshold on both signs with the least divergence."""
    # Zero belongs to the range, so bins between it and the data are levels to spend.
    exponent = _exponent(*everything)
    zero = -math.floor(math.ldexp(everything.low, -exponent))
    bins = np.zeros(BINS, np.int64)
    _add_shifted(bins, _without_zeros(histogram), histogram.first, -zero, exponent - histogram.exponent)
    used = np.flatnonzero(bins)
    begin, end = min(int(used[0]), zero), max(int(used[-1]) + 1, zero)
    reach = np.arange(1, max(end - zero, zero - begin) + 1)
    starts, stops = np.maximum(zero - reach, begin), np.minimum(zero + reach, end)
    enough = np.flatnonzero(stops - starts >= levels)
    if not enough.size:
        return everything
    chosen = np.unique(np.linspace(enough[0], len(reach) - 1, _ENTROPY_CANDIDATES).round().astype(int))
    divergence = _divergences(bins, starts[chosen], stops[chosen], levels)
    # Of equals the widest, as nothing is gained by clipping.
    place = chosen[len(chosen) - 1 - int(divergence[::-1].argmin())]
    low, high = (math.ldexp(float(side[place] - zero), exponent) for side in (starts, stops))
    return Range(max(low, everything.low), min(high, everything.high))


def _divergences(bins: np.ndarray, starts: np.ndarray, stops: np.ndarray, levels: int) -> np.ndarray:
    """KL divergence [n], in nats, of the clipped counts from their form with ``levels`` levels, for each candidate's bins."""
    place = np.arange(BINS)
    inside = (place >= starts[:, None]) & (place < stops[:, None])
    rows = np.arange(len(starts))
    held = np.where(inside, bins, 0).astype(np.float64)
    below = np.concatenate([[0], np.cumsum(bins)])
    clipped = held.copy()
    clipped[rows, starts] += below[starts]
    clipped[rows, stops - 1] += below[-1] - below[stops]

    # A level spreads its count over those of its bins that hold anything.
    level = np.clip((place - starts[:, None]) * levels // (stops - starts)[:, None], 0, levels - 1) + rows[:, None] * levels
    size = len(starts) * levels
    counts = np.bincount(level.ravel(), held.ravel(), size)
    shared = np.bincount(level.ravel(), (clipped > 0).ravel(), size)
    spread = np.where(clipped > 0, (counts / np.maximum(shared, 1))[level], 0.0)
    # Half a value stands for a level that is empty but for what was clipped to it.
    spread = np.where(clipped > 0, np.maximum(spread, 0.5), 0.0)
    ratio = np.divide(clipped, spread, out=np.ones_like(clipped), where=clipped > 0)
    return np.asarray((clipped * np.log(ratio)).sum(axis=1) / below[-1] + np.log(spread.sum(axis=1) / below[-1]))
