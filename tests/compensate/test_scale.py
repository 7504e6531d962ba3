"""Scales per unit against least squares on the tall design that is never formed."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.compensate.ridge import NormalEquations
from onnxprune.compensate.scale import solve_scales


def setup(units: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, NormalEquations]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, units * width))
    weight = rng.standard_normal((units * width, 5))
    labels = np.repeat(np.arange(units), width)
    truth = 1 + 0.5 * rng.standard_normal(units)
    error = x @ (weight * (truth - 1)[labels][:, None]) + 0.1 * rng.standard_normal((60, 5))
    sums = NormalEquations(units * width, 5)
    sums.add(x, error)
    sums.flush()
    return x, weight, labels, error, sums


def tall_design(x: np.ndarray, weight: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Column u: what unit u contributes to every output of every row."""
    return np.stack([(x[:, labels == unit] @ weight[labels == unit]).reshape(-1) for unit in range(labels.max() + 1)], axis=1)


@pytest.mark.parametrize(("units", "width"), [(6, 1), (4, 3), (1, 4)])
def test_scales_are_the_least_squares_solution(units: int, width: int) -> None:
    x, weight, labels, error, sums = setup(units, width)
    expected = np.linalg.lstsq(tall_design(x, weight, labels), error.reshape(-1), rcond=None)[0]
    fit = solve_scales(sums, weight, labels, ridge=0.0)
    np.testing.assert_allclose(fit.weights, weight * expected[labels][:, None], rtol=1e-6, atol=1e-9)
    assert not fit.bias.any()
    direct = np.sum((error - x @ fit.weights) ** 2) / np.sum(error**2)
    assert fit.fitted_error == pytest.approx(direct)


def test_ridge_pulls_the_scales_towards_one() -> None:
    x, weight, labels, error, sums = setup(4, 3)
    design = tall_design(x, weight, labels)
    strength = 0.5 * np.trace(design.T @ design) / 4
    expected = np.linalg.solve(design.T @ design + strength * np.eye(4), design.T @ error.reshape(-1))
    np.testing.assert_allclose(solve_scales(sums, weight, labels, ridge=0.5).weights, weight * expected[labels][:, None], rtol=1e-6)
    sizes = [np.abs(solve_scales(sums, weight, labels, ridge).weights).sum() for ridge in (0.0, 0.1, 1.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_labels_in_any_order() -> None:
    x, weight, labels, error, _ = setup(4, 3)
    order = np.random.default_rng(1).permutation(12)
    shuffled = NormalEquations(12, 5)
    shuffled.add(x[:, order], error)
    shuffled.flush()
    plain = setup(4, 3)[-1]
    fit = solve_scales(plain, weight, labels, 1e-2)
    np.testing.assert_allclose(solve_scales(shuffled, weight[order], labels[order], 1e-2).weights, fit.weights[order], rtol=1e-6)
