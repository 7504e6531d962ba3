"""Symmetric int8 weights: scales, rounding that minds the inputs, and smoothing.

Weights are [n_in, n_out] as in ``x @ W``. Integers lie in [-127, 127], so that the sign can be turned, and stand for integer times scale.
The error of a layer is |X (W - W^)|^2 = tr(E' G E) with the Gram matrix G = X'X [n_in, n_in] of its inputs, whose rows may be weighted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from onnxprune.errors import InputError

LARGEST = 127
"""Largest magnitude of an int8 weight."""

BLOCK_ROWS = 128
"""Input rows rounded before what they owe is spread over all later ones in one product."""

OUTLIERS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of outlier channels that smoothing is tried for, at most a quarter of all."""

_SHRINKS = np.linspace(1.0, 0.6, 41)


def scales(weights: np.ndarray, per_channel: bool, shrink: bool = False) -> np.ndarray:
    """Scales, float32, of shape [n_out] per channel or [] for the whole matrix; 1 where all weights are zero.

    Args:
        shrink: take the scale of least squared weight error among 41 from the one that clips nothing down to 0.6 of it.

    Raises:
        InputError: the weights are not a matrix of finite numbers.
    """
    matrix = _matrix(weights)
    axis = 0 if per_channel else None
    largest = np.abs(matrix).max(axis=axis, initial=0.0)
    # A scale that float32 cannot hold with full precision stands for weights that are zero for all purposes.
    full = np.where(largest / LARGEST >= np.finfo(np.float32).tiny, largest / LARGEST, 1.0)
    best = full.astype(np.float32)
    if not shrink:
        return best
    least = _squared(matrix, best, axis)
    for share in _SHRINKS[1:]:
        candidate = (full * share).astype(np.float32)
        error = _squared(matrix, candidate, axis)
        best, least = np.where(error < least, candidate, best), np.minimum(error, least)
    return best


def _squared(matrix: np.ndarray, scale: np.ndarray, axis: int | None) -> np.ndarray:
    exact = scale.astype(np.float64)
    return np.asarray(np.square(matrix - _nearest(matrix, exact) * exact).sum(axis=axis))


def round_to_nearest(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The nearest integers, int8 [n_in, n_out]; ``scale`` is of shape [n_out] or [].

    Raises:
        InputError: the weights are not a matrix of finite numbers, or a scale is not positive or of another shape.
    """
    matrix, scale = _matrix(weights), _scale(scale, weights)
    return _nearest(matrix, scale).astype(np.int8)


def _nearest(matrix: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(matrix / scale), -LARGEST, LARGEST))


def round_columns(weights: np.ndarray, gram: np.ndarray, scale: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """Integers, int8 [n_in, n_out], with less output error than the nearest ones: what a row loses, later rows make up for.

    Input rows are rounded one by one, those of the largest Gram diagonal first, and the error of each moves the rows not yet rounded to
    where the output changes least: GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1) in its order by activation. A column whose output
    error came out larger than that of plain rounding keeps plain rounding, so that no column is ever worse.

    Args:
        gram: [n_in, n_in], of the inputs as the quantised model will see them.
        scale: as from :func:`scales`.
        damping: added to the diagonal, relative to its mean.

    Raises:
        InputError: as :func:`round_to_nearest`; or ``gram`` is of another shape, not finite, or no Gram matrix.
    """
    matrix, scale = _matrix(weights), _scale(scale, weights)
    gram = _gram(gram, len(matrix))
    nearest = _nearest(matrix, scale)
    order = np.argsort(-np.diagonal(gram), kind="stable")
    if not np.diagonal(gram).any():
        return nearest.astype(np.int8)
    factor = _inverse_factor(gram[np.ix_(order, order)], damping)
    rounded = np.empty_like(matrix)
    rounded[order] = _round_in_order(matrix[order], factor, scale)
    worse = output_error(matrix, rounded * scale, gram) >= output_error(matrix, nearest * scale, gram)
    return np.where(worse, nearest, rounded).astype(np.int8)


def output_error(weights: np.ndarray, approximation: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Squared output error of each column, float64 [n_out]: the diagonal of E' G E; its sum is |X (W - W^)|^2."""
    error = np.asarray(weights, np.float64) - approximation
    return np.asarray(np.einsum("ij,ij->j", error, gram @ error))


def _inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with U'U the inverse of the damped Gram matrix.

    Its own inverse is the factor R of R R', which is the Cholesky factor of the matrix in reversed order: no inverse is formed on the way.
    """
    strength = damping * float(np.trace(gram)) / len(gram)
    least = 1e-8 * float(np.trace(gram)) / len(gram)
    for _ in range(4):
        damped = gram.copy()
        damped[np.diag_indices_from(damped)] += strength
        try:
            lower = linalg.cholesky(damped[::-1, ::-1], lower=True, check_finite=False)
        except linalg.LinAlgError:
            strength = 10 * max(strength, least)
            continue
        inverse, _ = linalg.lapack.dtrtri(lower[::-1, ::-1], lower=0)
        return np.asarray(inverse)
    raise InputError("the Gram matrix has strongly negative directions; give the sum of x'x over the rows of the layer's input")


def _round_in_order(matrix: np.ndarray, factor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Round rows from first to last; each moves the later ones. Within a block at once, beyond it in one product."""
    left = matrix.copy()
    rounded = np.empty_like(matrix)
    for start in range(0, len(left), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(left))
        owed = np.empty((stop - start, left.shape[1]))
        for row in range(start, stop):
            rounded[row] = _nearest(left[row], scale)
            owed[row - start] = (left[row] - rounded[row] * scale) / factor[row, row]
            left[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], owed[row - start])
        left[stop:] -= factor[start:stop, stop:].T @ owed
    return rounded


@dataclass(frozen=True)
class Smoothing:
    """Largest magnitude left (None: no smoothing is best), factors [n_in], and predicted squared error of a row of outputs."""

    limit: float | None
    factors: np.ndarray
    error_before: float
    error: float


def search_smoothing(weights: np.ndarray, low: np.ndarray, high: np.ndarray, power: np.ndarray, per_channel: bool) -> Smoothing:
    """Factors s [n_in] that bring outlier channels down to a common magnitude: quantise ``x / s`` and ``s[:, None] * W``.

    s = max(1, a / t) for channel magnitudes a and a limit t: only outliers move into the weights. The power law of SmoothQuant (Xiao et
    al., arXiv 2211.10438, equation 4) rescales all channels, which spreads the rows of every column of W: on the output matrices of a text
    encoder it left 0.5 to 9 times the divergence of no smoothing, where the limit left 0.1 to 0.3.

    Of limits at the 1st, 2nd, 4th, ... largest magnitude, and none at all, the one with the least predicted output error is taken.
    Predicted for rounding errors that are independent of each other: of uint8 activations over the joint range of all channels,
    scale^2 / 12 times the squared weights; of int8 weights, the squared error of each row times its input's mean square.

    Args:
        weights: [n_in, n_out]; matrices that read the same input, side by side.
        low, high: least and largest value [n_in] of each input channel.
        power: mean square [n_in] of each input channel: the Gram diagonal over the rows.
        per_channel: how the weights will be scaled.

    Raises:
        InputError: lengths differ, or a value is not finite.
    """
    matrix = _matrix(weights)
    low, high, power = (np.asarray(values, np.float64) for values in (low, high, power))
    if not low.shape == high.shape == power.shape == matrix.shape[:1]:
        raise InputError(
            f"input statistics of shapes {list(low.shape)}, {list(high.shape)} and {list(power.shape)} for weights {list(matrix.shape)}; "
            "give one value per input channel"
        )
    most = np.maximum(np.abs(low), np.abs(high))
    if not np.isfinite(most).all():
        raise InputError("the range of an input channel is infinite or NaN; mend the data or leave this layer unquantised")
    descending = np.sort(most)[::-1]
    ranks = [rank for rank in OUTLIERS if rank <= len(most) // 4 and descending[rank] > 0]
    tried: list[tuple[float, float | None, np.ndarray]] = []
    for limit in (None, *(float(descending[rank]) for rank in ranks)):
        factors = np.ones(len(matrix)) if limit is None else np.maximum(1.0, most / limit)
        tried.append((_predicted_error(matrix, low / factors, high / factors, power, factors, per_channel), limit, factors))
    error, limit, factors = min(tried, key=lambda entry: entry[0])
    return Smoothing(limit, factors, tried[0][0], error)


def _predicted_error(
    matrix: np.ndarray, low: np.ndarray, high: np.ndarray, power: np.ndarray, factors: np.ndarray, per_channel: bool
) -> float:
    folded = matrix * factors[:, None]
    step = (max(float(high.max(initial=0.0)), 0.0) - min(float(low.min(initial=0.0)), 0.0)) / 255
    scale = scales(folded, per_channel).astype(np.float64)
    lost = np.square(folded - _nearest(folded, scale) * scale).sum(axis=1)
    return float(step**2 / 12 * np.square(folded).sum() + (power / factors**2) @ lost)


def _matrix(weights: np.ndarray) -> np.ndarray:
    if weights.ndim != 2:
        raise InputError(f"weights of shape {list(weights.shape)} cannot be rounded by column; give a matrix [n_in, n_out]")
    matrix = weights.astype(np.float64)
    if not np.isfinite(matrix).all():
        bad = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(f"the weights hold an infinite or NaN value at {bad.tolist()}; no int8 stands for it, mend the model")
    return matrix


def _scale(scale: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Checked, as float64: products with float32 scales must not round once more."""
    array = np.asarray(scale, np.float64)
    if array.shape not in ((), weights.shape[1:]):
        raise InputError(f"scales of shape {list(array.shape)} for weights {list(weights.shape)}; give one, or one per output column")
    if not (np.isfinite(array) & (array > 0)).all():
        raise InputError("a weight scale is zero, negative or not finite; take scales(), which gives 1 to a column of zeros")
    return array


def _gram(gram: np.ndarray, inputs: int) -> np.ndarray:
    if gram.shape != (inputs, inputs):
        raise InputError(f"a Gram matrix of shape {list(gram.shape)} for weights of {inputs} inputs; give X'X of this layer's input")
    array = np.asarray(gram, np.float64)
    if not np.isfinite(array).all() or (np.diagonal(array) < 0).any():
        raise InputError("the Gram matrix is not finite, or negative on its diagonal; give the sum of x'x over the rows of the input")
    return array
