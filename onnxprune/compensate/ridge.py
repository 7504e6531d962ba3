"""Least-squares re-fit of the map that reads a pruned axis: the core that every compensation uses.

With X the kept activations [rows, n], W the weights in place [n, out] and E = (what the output should be) - (X W + b), both from the same
rows, we look for the change D of the augmented weights that minimises |[X 1] D - E|^2 + r |D|^2, r relative to the mean diagonal of X'X:
ridge towards the old weights, with the intercept left unpenalised. K-prune (Park et al., ICLR 2024) solves the same problem without the
ridge, Kwon et al. (NeurIPS 2022) one scale per unit of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg


@dataclass(frozen=True)
class Fit:
    """Change of the weights and of the bias, with squared errors relative to the unchanged map (1.0 = no gain) on the rows fitted."""

    weights: np.ndarray
    bias: np.ndarray
    fitted_error: float


BLOCK_ROWS = 2048
"""Rows are multiplied in blocks of this many: one float32 product a block, summed in float64."""


class NormalEquations:
    """The sums that a re-fit needs: [X 1]'[X 1], [X 1]'E and |E|^2 in float64. They add up over batches and over shards."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.gram = np.zeros((inputs + 1, inputs + 1))
        self.cross = np.zeros((inputs + 1, outputs))
        self.energy = 0.0
        self.rows = 0

    def add(self, x: np.ndarray, error: np.ndarray, weight: np.ndarray | None = None) -> None:
        """Add rows: ``x`` [rows, inputs] and ``error`` [rows, outputs], optionally weighted per row."""
        ones = np.ones(len(x), x.dtype)
        if weight is not None:
            ones = np.sqrt(weight).astype(x.dtype)
            x, error = x * ones[:, None], error * ones[:, None]
        self._waiting.append((x, error, ones))
        if sum(len(block[0]) for block in self._waiting) >= BLOCK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Bring the sums up to date with every row added."""
        if not self._waiting:
            return
        x, error, ones = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        n = x.shape[1]
        self.gram[:n, :n] += x.T @ x
        sums = ones @ x
        self.gram[:n, n] += sums
        self.gram[n, :n] += sums
        self.gram[n, n] += float(ones @ ones)
        self.cross[:n] += x.T @ error
        self.cross[n] += ones @ error
        self.energy += float(np.einsum("ij,ij->", error, error, dtype=np.float64))
        self.rows += len(x)

    def __iadd__(self, other: NormalEquations) -> NormalEquations:
        self.flush()
        other.flush()
        self.gram += other.gram
        self.cross += other.cross
        self.energy += other.energy
        self.rows += other.rows
        return self

    def solve(self, ridge: float, intercept: bool = True) -> Fit:
        """The ridge solution; ``ridge`` is relative to the mean diagonal of X'X. Without ``intercept`` the bias stays as it is.

        Raises:
            numpy.linalg.LinAlgError: the system stays singular even when damped a thousand times more.
        """
        n = len(self.gram) - 1
        strength = ridge * max(float(np.trace(self.gram[:n, :n])) / max(n, 1), 1e-30)
        size = n + 1 if intercept else n
        cross = self.cross[:size]
        for _ in range(4):
            damped = self.gram[:size, :size].copy()
            damped[np.arange(n), np.arange(n)] += strength
            if intercept:
                damped[n, n] *= 1 + 1e-9
            try:
                solution = linalg.cho_solve(linalg.cho_factor(damped, lower=True, overwrite_a=True, check_finite=False), cross)
            except linalg.LinAlgError:
                strength *= 10
                continue
            weights, bias = solution[:n], solution[n] if intercept else np.zeros(cross.shape[1])
            return Fit(weights, bias, self._solved_error(solution, weights, strength))
        raise np.linalg.LinAlgError("the Gram matrix is not positive definite, even with strong damping")

    def _solved_error(self, solution: np.ndarray, weights: np.ndarray, strength: float) -> float:
        """Relative squared error of a ridge solution, from X'X D = X'E - strength D: no product with the Gram matrix is needed."""
        if self.energy <= 0:
            return 1.0
        explained = float(np.einsum("ij,ij->", solution, self.cross[: len(solution)]))
        return (self.energy - explained - strength * float(np.einsum("ij,ij->", weights, weights))) / self.energy

    def error(self, change: np.ndarray) -> float:
        """Squared error after an augmented change [inputs + 1, outputs], relative to no change."""
        if self.energy <= 0:
            return 1.0
        quadratic = float(np.einsum("ij,ij->", change, self.gram @ change))
        return (self.energy - 2 * float(np.einsum("ij,ij->", change, self.cross)) + quadratic) / self.energy


class HeldRows:
    """A few rows kept out of a fit, to judge it."""

    def __init__(self) -> None:
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def add(self, x: np.ndarray, error: np.ndarray, weight: np.ndarray | None = None) -> None:
        """Keep rows as for :meth:`NormalEquations.add`."""
        self._rows.append((x, error, weight))

    def error(self, fit: Fit, importance: np.ndarray | None = None) -> float | None:
        """Squared error after ``fit``, relative to no change; None if no row, or no error, was kept.

        Args:
            importance: weight [outputs] of each output's squared error; None weighs all alike.
        """
        before = after = 0.0
        weights, bias = fit.weights.astype(np.float32), fit.bias.astype(np.float32)
        for x, error, weight in self._rows:
            rows = np.ones(len(x)) if weight is None else weight
            left = error - x @ weights - bias
            columns = np.ones(error.shape[1]) if importance is None else np.broadcast_to(importance, error.shape[1])
            before += float(rows @ np.square(error, dtype=np.float64) @ columns)
            after += float(rows @ np.square(left, dtype=np.float64) @ columns)
        return after / before if before > 0 else None
