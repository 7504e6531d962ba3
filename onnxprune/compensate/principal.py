"""Principal directions of a residual stream, scaled so that a norm of the narrow stream is the norm of the wide one.

SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024) keeps the directions that hold most of the energy of the stream on data.
"""

from __future__ import annotations

import numpy as np


def principal_basis(moment: np.ndarray, width: int, *, centred: bool) -> np.ndarray:
    """Scaled basis of the directions that hold most of a stream.

    Args:
        moment: second moment of its rows, ``[D, D]``.
        width: d, from 2 to D.
        centred: norms remove the mean of rows, so that only directions without one count.

    Returns:
        B, float32 ``[D, d]``: ``sqrt(d / D)`` times orthonormal columns; if ``centred``, the sum of each of its rows is zero.
    """
    whole = len(moment)
    start = _helmert(whole) if centred else np.eye(whole)
    _, vectors = np.linalg.eigh(start.T @ moment.astype(np.float64) @ start)
    directions = (start @ vectors)[:, ::-1]
    picked = directions[:, : width - 1] @ _helmert(width).T if centred else directions[:, :width]
    return np.asarray(np.sqrt(width / whole) * picked, dtype=np.float32)


def left_out(moment: np.ndarray, basis: np.ndarray, *, centred: bool) -> float:
    """Share of the energy of a stream with this ``moment``, ``[D, D]``, that its scaled ``basis``, ``[D, d]``, does not hold."""
    start = _helmert(len(moment)) if centred else np.eye(len(moment))
    whole = float(np.trace(start.T @ moment @ start))
    columns = basis.astype(np.float64) * np.sqrt(basis.shape[0] / basis.shape[1])
    return max(0.0, 1 - float(np.trace(columns.T @ moment @ columns)) / max(whole, 1e-30))


def _helmert(size: int) -> np.ndarray:
    """Orthonormal columns ``[size, size - 1]`` that all sum to zero (Helmert, 1876)."""
    result = np.triu(np.ones((size, size - 1)))
    places = np.arange(size - 1)
    result[places + 1, places] = -(places + 1.0)
    return np.asarray(result / np.sqrt((places + 1.0) * (places + 2.0)))
