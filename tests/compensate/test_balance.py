"""Balanced bases: the product stays, and the first directions carry as much of it as any can."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.compensate.balance import balanced

DIM = 6


def factors(seed: int, rank: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((400, rank)) @ rng.standard_normal((rank, DIM)) * 1.3 ** -np.arange(DIM)
    return left, rng.standard_normal((300, DIM)) @ rng.standard_normal((DIM, DIM))


def lost(left: np.ndarray, right: np.ndarray, kept: np.ndarray) -> float:
    """Squared error of all pairs x'y when x' P y is left, P = kept."""
    return float(np.square(left @ (np.eye(DIM) - kept) @ right.T).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_first_directions_lose_as_little_as_the_best_low_rank_product(seed: int) -> None:
    left, right = factors(seed)
    basis = balanced(left.T @ left, right.T @ right)
    inverse = np.linalg.inv(basis)
    singular = np.linalg.svd(left @ right.T, compute_uv=False)
    for rank in range(1, DIM):
        assert lost(left, right, basis[:, :rank] @ inverse[:rank]) == pytest.approx(np.square(singular[rank:DIM]).sum(), rel=1e-2)


def test_both_sides_have_equal_diagonal_moments_in_falling_order() -> None:
    left, right = factors(5)
    basis = balanced(left.T @ left, right.T @ right)
    one, other = left @ basis, right @ np.linalg.inv(basis).T
    moments = [part.T @ part for part in (one, other)]
    assert np.allclose(moments[0], moments[1], rtol=1e-2, atol=1e-3 * moments[0].max())
    diagonal = np.diag(moments[0])
    assert np.allclose(moments[0], np.diag(diagonal), atol=1e-3 * diagonal.max())
    assert (np.diff(diagonal) <= 0).all()


def test_directions_without_data_can_be_turned_as_well() -> None:
    left, right = factors(2, rank=2)
    basis = balanced(left.T @ left, right.T @ right)
    assert np.isfinite(np.linalg.inv(basis)).all()
    assert lost(left, right, basis[:, :2] @ np.linalg.inv(basis)[:2]) < 1e-3 * np.square(left @ right.T).sum()
    assert np.isfinite(balanced(np.zeros((3, 3)), np.eye(3))).all()
