"""Importance without gradients: from the weights that read a unit and the second moments of what they read."""

from __future__ import annotations

import numpy as np
from scipy import linalg


def magnitude(weight: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    """Squared norm of the rows of the consuming matrix [positions, out] that belong to a unit."""
    return _by_unit(np.square(weight, dtype=np.float64).sum(axis=1), labels, units)


def wanda(weight: np.ndarray, gram: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    """Sum of |weight| times the norm of what it reads, over the rows of a unit (Wanda, Sun et al., ICLR 2024, for whole units)."""
    return _by_unit(np.abs(weight).sum(axis=1, dtype=np.float64) * np.sqrt(gram.diagonal()), labels, units)


def variance(weight: np.ndarray, covariance: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    """Variance of what a unit's rows read times their squared norm: what a bias cannot make up for (FLAP, An et al., AAAI 2024)."""
    return _by_unit(np.square(weight, dtype=np.float64).sum(axis=1) * covariance.diagonal(), labels, units)


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


def in_proportion(scores: np.ndarray, price: float) -> np.ndarray:
    """Scores that mean something inside their site only, scaled to a mean of ``price``: sites are then worth what they cost."""
    mean = float(scores.mean()) if len(scores) else 0.0
    return scores * (price / mean) if mean else np.full(len(scores), price)


def _by_unit(values: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    inside = labels >= 0
    return np.bincount(labels[inside], weights=values[inside], minlength=units)
