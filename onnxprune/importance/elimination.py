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
    positions = np.argsort(labels, kind="stable").reshape(units, -1)
    flat = positions.reshape(-1)
    rows = np.asarray(weight, np.float64)[flat].reshape(*positions.shape, -1)
    inverse = _inverse(gram[np.ix_(flat, flat)], ridge).reshape(*positions.shape, *positions.shape)
    left = np.arange(units)
    order: list[int] = []
    increments: list[float] = []
    while len(left):
        count = max(len(left) // _BATCHES, 1)
        pool = np.sort(np.argsort(_losses(rows, inverse), kind="stable")[: _POOL * count])
        taken, losses = _greedy(rows[pool], inverse[pool][:, :, pool], count)
        gone = pool[taken]
        order += left[gone].tolist()
        increments += losses
        rows, inverse = _without(rows, inverse, gone)
        left = np.delete(left, gone)
    return Elimination(np.array(order, np.int64), np.array(increments))


def _inverse(gram: np.ndarray, ridge: float) -> np.ndarray:
    damped = np.array(gram, np.float64)
    damped[np.diag_indices_from(damped)] += ridge * max(float(np.trace(gram)) / len(gram), 1e-30)
    factor = linalg.cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(linalg.cho_solve(factor, np.eye(len(gram)), overwrite_b=True, check_finite=False))


def _own(inverse: np.ndarray) -> np.ndarray:
    """The blocks [units, size, size] of each unit with itself, of [units, size, units, size]."""
    every = np.arange(len(inverse))
    return np.asarray(inverse[every, :, every, :])


def _losses(rows: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    if rows.shape[1] == 1:
        solved = rows / _own(inverse)
    else:
        solved = np.linalg.solve(_own(inverse), rows)
    return np.asarray(np.einsum("uio,uio->u", rows, solved))


def _greedy(rows: np.ndarray, inverse: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The first ``count`` units to go among these alone, and what each costs."""
    rows, inverse = rows.copy(), np.ascontiguousarray(inverse)
    taken: list[int] = []
    losses: list[float] = []
    units, size = inverse.shape[:2]
    table, matrix = rows.reshape(units * size, -1), inverse.reshape(units * size, units * size)
    for _ in range(count):
        scores = _losses(rows, inverse)
        scores[taken] = np.inf
        unit = int(np.argmin(scores))
        taken.append(unit)
        losses.append(float(scores[unit]))
        mine = slice(unit * size, (unit + 1) * size)
        column = matrix[:, mine].copy()
        table -= column @ np.linalg.solve(column[mine], table[mine])
        matrix -= column @ np.linalg.solve(column[mine], column.T)
        # Nothing more happens to a unit that is gone.
        matrix[mine, mine] = np.eye(size)
    return taken, losses


def _without(rows: np.ndarray, inverse: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the matrix and of the inverse, both moved by the best update."""
    units, size = inverse.shape[:2]
    stay = np.delete(np.arange(units), gone)
    if not len(stay):
        return rows[stay], inverse[stay][:, :, stay]
    flat = inverse.reshape(units * size, units * size)
    kept, lost = (np.add.outer(which * size, np.arange(size)).reshape(-1) for which in (stay, gone))
    column = flat[np.ix_(kept, lost)]
    factor = linalg.cho_factor(flat[np.ix_(lost, lost)], lower=True, check_finite=False)
    moved = rows.reshape(units * size, -1)
    new_rows = moved[kept] - column @ linalg.cho_solve(factor, moved[lost], check_finite=False)
    new = flat[np.ix_(kept, kept)]
    new -= column @ linalg.cho_solve(factor, column.T, check_finite=False)
    return new_rows.reshape(len(stay), size, -1), new.reshape(len(stay), size, len(stay), size)
