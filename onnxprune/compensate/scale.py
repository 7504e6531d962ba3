"""One scale per kept unit instead of new weights: the mask tuning of Kwon et al. (NeurIPS 2022), from the same sums as the re-fit."""

from __future__ import annotations

import numpy as np

from onnxprune.compensate.ridge import Fit, NormalEquations


def solve_scales(sums: NormalEquations, weight: np.ndarray, labels: np.ndarray, ridge: float) -> Fit:
    """Least-squares scales s_u of the units, ridge towards 1; weights become diag(s) W, the bias stays.

    The design of unit u is its share X_u W_u of the output, so the normal matrix is (W W') o (X'X) summed over blocks: the tall design
    is never formed.

    Args:
        sums: X'X and X'E of the kept positions.
        weight: [positions, out], rows in the order of ``sums``.
        labels: [positions], unit of every position.
    """
    n = len(sums.gram) - 1
    units = int(labels.max()) + 1
    member = np.zeros((units, n))
    member[labels, np.arange(n)] = 1
    w = weight.astype(np.float64)
    normal = member @ ((w @ w.T) * sums.gram[:n, :n]) @ member.T
    right = member @ np.einsum("ij,ij->i", w, sums.cross[:n])
    normal[np.diag_indices(units)] += ridge * float(np.trace(normal)) / units
    change = np.linalg.solve(normal, right)
    weights = w * change[labels][:, None]
    bias = np.zeros(weight.shape[1])
    return Fit(weights, bias, sums.error(np.vstack([weights, bias[None]])))
