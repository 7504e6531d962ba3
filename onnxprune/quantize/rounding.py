"""Symmetric int8 weights: scales, rounding that minds the inputs, smoothing and bias correction.

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

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Smoothing exponents tried."""

_SHRINKS = np.linspace(1.0, 0.6, 41)
_SMOOTHING_LIMIT = 1e3


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


def smoothing(act_absmax: np.ndarray, weight_absmax: np.ndarray, alpha: float) -> np.ndarray:
    """Factors s, float64 [n_in], that move range from activations to weights: quantise ``x / s`` and ``s[:, None] * W``.

    s = a^alpha / w^(1 - alpha), SmoothQuant's equation 4 (Xiao et al., arXiv 2211.10438), kept within a factor of 1000 either way so that
    the folded weights stay in float32's comfort; 1 for a channel without activations or without weights.

    Args:
        act_absmax: largest magnitude [n_in] of each input channel.
        weight_absmax: largest magnitude [n_in] of each row of the weights, over all matrices that read the same input.
        alpha: from 0 (weights of equal range) to 1 (activations of equal range).

    Raises:
        InputError: the lengths differ, a magnitude is negative or not finite, or alpha lies outside [0, 1].
    """
    activations, weights = np.asarray(act_absmax, np.float64), np.asarray(weight_absmax, np.float64)
    if activations.ndim != 1 or activations.shape != weights.shape:
        raise InputError(f"magnitudes of shapes {list(activations.shape)} and {list(weights.shape)}; give one of each per input channel")
    if not (np.isfinite(activations) & np.isfinite(weights) & (activations >= 0) & (weights >= 0)).all():
        raise InputError("a largest magnitude for smoothing is negative, infinite or NaN; mend the data or leave this layer unquantised")
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothing exponent {alpha} is outside [0, 1]; 0.5 suits most models")
    live = (activations > 0) & (weights > 0)
    raw = np.where(live, activations, 1.0) ** alpha / np.where(live, weights, 1.0) ** (1 - alpha)
    return np.clip(raw, 1 / _SMOOTHING_LIMIT, _SMOOTHING_LIMIT)


@dataclass(frozen=True)
class Smoothing:
    """Chosen exponent (None: no smoothing is best), factors [n_in] and predicted squared error of a row of outputs, before and after."""

    alpha: float | None
    factors: np.ndarray
    error_before: float
    error: float


def search_smoothing(weights: np.ndarray, low: np.ndarray, high: np.ndarray, power: np.ndarray, per_channel: bool) -> Smoothing:
    """The exponent in :data:`ALPHAS`, or none at all, with the least predicted output error.

    Predicted for rounding errors that are independent of each other: of uint8 activations over the joint range of all channels,
    scale^2 / 12 times the squared weights; of int8 weights, the squared error of each row times its input's mean square.

    Args:
        weights: [n_in, n_out]; matrices that read the same input, side by side.
        low, high: least and largest value [n_in] of each input channel.
        power: mean square [n_in] of each input channel: the Gram diagonal over the rows.
        per_channel: how the weights will be scaled.

    Raises:
        InputError: as :func:`smoothing` and :func:`scales`.
    """
    matrix = _matrix(weights)
    low, high, power = (np.asarray(values, np.float64) for values in (low, high, power))
    if not low.shape == high.shape == power.shape == matrix.shape[:1]:
        raise InputError(
            f"input statistics of shapes {list(low.shape)}, {list(high.shape)} and {list(power.shape)} for weights {list(matrix.shape)}; "
            "give one value per input channel"
        )
    activation_most = np.maximum(np.abs(low), np.abs(high))
    weight_most = np.abs(matrix).max(axis=1, initial=0.0)
    tried: list[tuple[float, float | None, np.ndarray]] = []
    for alpha in (None, *ALPHAS):
        factors = np.ones(len(matrix)) if alpha is None else smoothing(activation_most, weight_most, alpha)
        tried.append((_predicted_error(matrix, low / factors, high / factors, power, factors, per_channel), alpha, factors))
    error, alpha, factors = min(tried, key=lambda entry: entry[0])
    return Smoothing(alpha, factors, tried[0][0], error)


def _predicted_error(
    matrix: np.ndarray, low: np.ndarray, high: np.ndarray, power: np.ndarray, factors: np.ndarray, per_channel: bool
) -> float:
    folded = matrix * factors[:, None]
    step = (max(float(high.max(initial=0.0)), 0.0) - min(float(low.min(initial=0.0)), 0.0)) / 255
    scale = scales(folded, per_channel).astype(np.float64)
    lost = np.square(folded - _nearest(folded, scale) * scale).sum(axis=1)
    return float(step**2 / 12 * np.square(folded).sum() + (power / factors**2) @ lost)


def bias_correction(weights: np.ndarray, approximation: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """What to add to the bias, float64 [n_out], so that the mean output stays: ``mean @ (W - W^)`` (Nagel et al., arXiv 1906.04721, 4.2).

    Args:
        approximation: the quantised weights [n_in, n_out] times their scale.
        mean: of the inputs [n_in].

    Raises:
        InputError: shapes do not fit.
    """
    if np.shape(weights) != np.shape(approximation) or np.shape(mean) != np.shape(weights)[:1]:
        raise InputError(
            f"bias correction of weights {list(np.shape(weights))} against {list(np.shape(approximation))} with a mean input of shape "
            f"{list(np.shape(mean))}; both weights must be [n_in, n_out] and the mean [n_in]"
        )
    return np.asarray(np.asarray(mean, np.float64) @ (np.asarray(weights, np.float64) - approximation))


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
