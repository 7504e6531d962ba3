"""The basis inside a head in which few directions carry a product of two factors.

For x in R^d with second moment L and y with second moment R, E (x'y - x'P y)^2 over independent pairs is least for a projection P of rank r
that keeps the r largest singular values of sqrt(L)' sqrt(R): an SVD of the product whitened by its data (weighted low-rank approximation,
as in SVD-LLM, Wang et al. 2024; balanced truncation, Moore 1981). In the basis below P drops coordinates.
"""

from __future__ import annotations

import numpy as np

DAMPING = 1e-5
"""Share of the mean moment added along every direction, so that directions without any data can be turned as well."""


def balanced(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Basis B, float64 [d, d]: x' = x B and y' = y inv(B)' have equal, diagonal moments, the largest first, and x' y' = x y.

    Args:
        left: second moment of one factor, [d, d].
        right: second moment of the other.
    """
    one, other = _root(left), _root(right)
    u, strength, _ = np.linalg.svd(one.T @ other)
    return np.asarray(np.linalg.solve(one.T, u * np.sqrt(strength)))


def _root(moment: np.ndarray) -> np.ndarray:
    """F of F F' = moment, damped."""
    moment = (moment + moment.T) / 2
    values, vectors = np.linalg.eigh(moment)
    mean = max(float(values.mean()), 1e-30)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0) + DAMPING * mean))
