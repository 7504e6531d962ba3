"""Importance without gradients: from the weights that read a unit and the second moments of what they read."""

from __future__ import annotations

import numpy as np
from scipy import linalg


def magnitude(weight: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    """Squared norm of the rows of the consuming matrix [positions, out] that belong to a unit."""
    return _by_unit(np.square(weight, dtype=np.float64).sum(axis=1), labels, units)


def energy(weight: np.ndarray, gram: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    """Squared norm of what a unit alone adds to the output: trace(W_u' (X'X)_uu W_u). ``gram`` is [positions, positions]."""
    result = np.zeros(units)
    for unit in range(units):
        rows = np.flatnonzero(labels == unit)
        block = weight[rows].astype(np.float64)
        result[unit] = float(np.einsum("ij,ij->", block, gram[np.ix_(rows, rows)] @ block))
    return result


def obs(weight: np.ndarray, gram: np.ndarray, labels: np.ndarray, units: int, ridge: float = 1e-2) -> np.ndarray:
    """One-step optimal brain surgeon: the least-squares loss after the best update of the remaining rows,
    trace(W_u' [(H^-1)_uu]^-1 W_u) with H = X'X damped by ``ridge`` times its mean diagonal (ZipLM, NeurIPS 2023)."""
    damped = gram + np.eye(len(gram)) * ridge * max(float(np.trace(gram)) / len(gram), 1e-30)
    inverse = linalg.inv(damped, check_finite=False)
    result = np.zeros(units)
    for unit in range(units):
        rows = np.flatnonzero(labels == unit)
        block = weight[rows].astype(np.float64)
        result[unit] = float(np.einsum("ij,ij->", block, linalg.solve(inverse[np.ix_(rows, rows)], block, assume_a="pos")))
    return result


def _by_unit(values: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    inside = labels >= 0
    return np.bincount(labels[inside], weights=values[inside], minlength=units)
