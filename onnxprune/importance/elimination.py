"""Structured optimal brain surgeon: the order in which the units of one matrix go, and what each costs, from one factorisation.

A matrix W [n, out] reads rows x [1, n]; with H = x'x the loss of a change D is trace(D' H D). When the rows Q of a unit go and the others
move to make up for it as well as they can, the loss grows by trace(W_Q' [(H^-1)_QQ]^-1 W_Q), and W and H^-1 follow in closed form (ZipLM,
Kurtic et al., NeurIPS 2023; optimal brain surgeon, Hassibi and Stork 1992). Greedy, one unit after the other, these increments add up to
the loss of the matrix solved again for what is left.

H^-1 is large, so it is brought up to date for a batch of units at a time. Inside a batch the greedy order is exact among the cheapest
units, of which there are several times as many as the batch takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize

_BATCHES = 32
"""A batch takes this part of the units that are left."""

_POOL = 3
"""The batch is chosen from this many times as many units."""

_CROWDED = 0.85
"""When fewer of the places than this are still taken, the others are cleared away."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """``order`` [units]: the units in the order in which they go; ``increments`` [units]: how much the loss grows with each."""

    order: np.ndarray
    increments: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Loss with k units kept, float64 [units + 1]."""
        return np.concatenate([np.cumsum(self.increments)[::-1], [0.0]])

    @property
    def saliency(self) -> np.ndarray:
        """A score per unit, float64 [units], that orders units as they go and adds up to the loss of all.

        Increments of the greedy order may fall; the isotonic regression of them does not, and has the same sum.
        """
        scores = np.empty(len(self.order))
        scores[self.order] = optimize.isotonic_regression(self.increments).x
        return scores


def eliminate(gram: np.ndarray, weight: np.ndarray, labels: np.ndarray, units: int, ridge: float = 1e-2) -> Elimination:
    """Take the units of a matrix away one by one, always the one whose loss is least after the best update of the others.

    Args:
        gram: x'x of what the matrix reads, float64 [n, n].
        weight: [n, out]; to weigh errors of the outputs by a metric M, give ``weight @ sqrt(M)``.
        labels: unit of every position, int64 [n]; every unit has equally many.
        ridge: added to the diagonal of ``gram``, relative to its mean: asks the other rows to stay near where they are.

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is singular and ``ridge`` is 0.
    """
    positions = np.argsort(labels, kind="stable")
    size = len(positions) // units
    table = np.asarray(weight, np.float64)[positions]
    inverse = _inverse(gram[np.ix_(positions, positions)], ridge)
    left, alive = np.arange(units), np.ones(units, bool)
    order: list[int] = []
    increments: list[float] = []
    while alive.any():
        count = max(int(alive.sum()) // _BATCHES, 1)
        losses = np.where(alive, _losses(table, _own(inverse, size)), np.inf)
        pool = np.sort(np.argsort(losses, kind="stable")[: min(_POOL * count, int(alive.sum()))])
        places = _places(pool, size)
        taken, lost = _greedy(table[places], _columns(inverse, places)[places], size, count)
        gone = pool[taken]
        order += left[gone].tolist()
        increments += lost
        _remove(table, inverse, _places(gone, size))
        alive[gone] = False
        if alive.sum() < _CROWDED * len(alive):
            places = _places(np.flatnonzero(alive), size)
            table, inverse = table[places], np.asfortranarray(inverse[np.ix_(places, places)])
            left, alive = left[alive], alive[alive]
    return Elimination(np.array(order, np.int64), np.array(increments))


def _inverse(gram: np.ndarray, ridge: float) -> np.ndarray:
    """The inverse of the damped matrix, by columns; of a symmetric matrix the lower triangle is enough.

    Of the covariance of what hardly varies only rounding is left, which may be indefinite: it is damped until it is not.
    """
    base = max(float(np.abs(gram.diagonal()).mean()), 1e-30)
    strength = ridge * base
    while True:
        damped = np.array(gram, np.float64, order="F")
        damped[np.diag_indices_from(damped)] += strength
        try:
            factor, _ = linalg.cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
        except linalg.LinAlgError:
            # A ridge of this size leaves nothing of the matrix, or none is wanted.
            if not ridge or strength > len(gram) * base / ridge:
                raise
            strength *= 10
            continue
        inverse, failed = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
        if failed:
            raise np.linalg.LinAlgError("the Gram matrix is singular")
        return np.asarray(inverse)


def _places(units: np.ndarray, size: int) -> np.ndarray:
    """Positions of units, each of which has ``size`` neighbouring ones."""
    return np.asarray(np.add.outer(units * size, np.arange(size)).reshape(-1))


def _own(inverse: np.ndarray, size: int) -> np.ndarray:
    """The blocks [units, size, size] of each unit with itself."""
    if size == 1:
        return inverse.diagonal().reshape(-1, 1, 1)
    units = range(0, len(inverse), size)
    lower = np.stack([inverse[place : place + size, place : place + size] for place in units])
    return np.asarray(np.tril(lower) + np.tril(lower, -1).transpose(0, 2, 1))


def _columns(inverse: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Columns [n, places] of a symmetric matrix of which only the lower triangle is there."""
    below = np.arange(len(inverse))[:, None] >= places
    return np.where(below, inverse[:, places], inverse[places].T)


def _losses(table: np.ndarray, own: np.ndarray) -> np.ndarray:
    rows = table.reshape(*own.shape[:2], -1)
    solved = rows / own if own.shape[1] == 1 else np.linalg.solve(own, rows)
    return np.asarray(np.einsum("uio,uio->u", rows, solved))


def _greedy(table: np.ndarray, inverse: np.ndarray, size: int, count: int) -> tuple[list[int], list[float]]:
    """The first ``count`` units to go among these alone, and what each costs."""
    taken: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        scores = _losses(table, _own(inverse, size))
        scores[taken] = np.inf
        unit = int(np.argmin(scores))
        taken.append(unit)
        losses.append(float(scores[unit]))
        mine = slice(unit * size, (unit + 1) * size)
        column = inverse[:, mine].copy()
        table -= column @ np.linalg.solve(column[mine], table[mine])
        inverse -= column @ np.linalg.solve(column[mine], column.T)
        # Nothing more happens to a unit that is gone.
        inverse[mine, mine] = np.eye(size)
    return taken, losses


def _remove(table: np.ndarray, inverse: np.ndarray, lost: np.ndarray) -> None:
    """Move what is left of both by the best update, in place; of the inverse the lower triangle."""
    column = _columns(inverse, lost)
    factor = np.linalg.cholesky(column[lost])
    scaled = linalg.solve_triangular(factor, column.T, lower=True, check_finite=False)
    table -= scaled.T @ linalg.solve_triangular(factor, table[lost], lower=True, check_finite=False)
    linalg.blas.dsyrk(-1.0, scaled.T, beta=1.0, c=inverse, lower=1, overwrite_c=1)
    # Nothing more happens to what is gone.
    table[lost] = 0.0
    inverse[lost, lost] = 1.0
