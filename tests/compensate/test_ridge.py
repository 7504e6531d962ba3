"""The least-squares core against numpy, in one piece and in shards."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.compensate.ridge import BLOCK_ROWS, HeldRows, NormalEquations


def problem(rows: int = 200, inputs: int = 7, outputs: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs)) + rng.standard_normal(inputs)
    return x, x @ rng.standard_normal((inputs, outputs)) + 2.0 + rng.standard_normal((rows, outputs))


def sums_of(x: np.ndarray, error: np.ndarray, weight: np.ndarray | None = None) -> NormalEquations:
    sums = NormalEquations(x.shape[1], error.shape[1])
    sums.add(x, error, weight)
    sums.flush()
    return sums


def augmented(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, np.ones((len(x), 1))])


def test_without_ridge_it_is_ordinary_least_squares_with_an_intercept() -> None:
    x, error = problem()
    fit = sums_of(x, error).solve(0.0)
    expected = np.linalg.lstsq(augmented(x), error, rcond=None)[0]
    np.testing.assert_allclose(fit.weights, expected[:-1], rtol=1e-6)
    np.testing.assert_allclose(fit.bias, expected[-1], rtol=1e-6)


def test_ridge_is_relative_to_the_mean_diagonal_and_leaves_the_intercept_alone() -> None:
    x, error = problem()
    ridge = 0.3
    strength = ridge * np.trace(x.T @ x) / x.shape[1]
    rows = np.vstack([augmented(x), np.hstack([np.sqrt(strength) * np.eye(x.shape[1]), np.zeros((x.shape[1], 1))])])
    expected = np.linalg.lstsq(rows, np.vstack([error, np.zeros((x.shape[1], error.shape[1]))]), rcond=None)[0]
    fit = sums_of(x, error).solve(ridge)
    np.testing.assert_allclose(np.vstack([fit.weights, fit.bias]), expected, rtol=1e-6)
    scaled = sums_of(10 * x, error).solve(ridge)
    np.testing.assert_allclose(10 * scaled.weights, fit.weights, rtol=1e-6)


def test_errors_are_those_of_direct_evaluation() -> None:
    x, error = problem()
    fit = sums_of(x, error).solve(1e-2)
    change = np.vstack([fit.weights, fit.bias])
    assert fit.fitted_error == pytest.approx(np.sum((error - augmented(x) @ change) ** 2) / np.sum(error**2))
    held_x, held_error = problem(seed=1)
    direct = np.sum((held_error - augmented(held_x) @ change) ** 2) / np.sum(held_error**2)
    assert sums_of(held_x, held_error).error(change) == pytest.approx(direct)
    assert sums_of(x, error).error(np.zeros_like(change)) == pytest.approx(1.0)


def test_batches_and_shards_add_up_to_one_shot() -> None:
    x, error = problem(rows=3 * BLOCK_ROWS // 2)
    whole = sums_of(x, error)
    left, right = NormalEquations(7, 3), NormalEquations(7, 3)
    for start in range(0, len(x), 100):
        (left if start < 1000 else right).add(x[start : start + 100], error[start : start + 100])
    left += right
    for name in ("gram", "cross", "energy", "rows"):
        np.testing.assert_allclose(getattr(left, name), getattr(whole, name), rtol=1e-10)
    assert whole.rows == len(x)


def test_row_weights_count_rows_several_times() -> None:
    x, error = problem(rows=50)
    count = np.random.default_rng(0).integers(0, 4, 50)
    weighted = sums_of(x, error, count.astype(float))
    repeated = sums_of(np.repeat(x, count, axis=0), np.repeat(error, count, axis=0))
    for name in ("gram", "cross", "energy"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-9)
    assert weighted.rows == 50  # evidence, whatever it weighs


def test_without_an_intercept_the_bias_stays_and_the_weights_are_the_least_squares_of_their_own() -> None:
    x, error = problem(rows=400)
    fit = sums_of(x, error).solve(1e-9, intercept=False)
    expected = np.linalg.lstsq(x.astype(np.float64), error, rcond=None)[0]
    np.testing.assert_allclose(fit.weights, expected, rtol=1e-4, atol=1e-6)
    assert not fit.bias.any()
    assert fit.fitted_error == pytest.approx(np.sum((error - x @ expected) ** 2) / np.sum(error**2), rel=1e-4)


def test_held_rows_judge_a_fit_as_a_direct_evaluation_does() -> None:
    x, error = problem(rows=300)
    fit = sums_of(x[:200], error[:200]).solve(1e-2)
    held = HeldRows()
    held.add(x[200:250], error[200:250])
    held.add(x[250:], error[250:], np.full(50, 3.0))
    left = np.sum((error - x @ fit.weights - fit.bias) ** 2, axis=1)
    before = np.sum(error**2, axis=1)
    wanted = (left[200:250].sum() + 3 * left[250:].sum()) / (before[200:250].sum() + 3 * before[250:].sum())
    assert held.error(fit) == pytest.approx(wanted, rel=1e-4)
    assert HeldRows().error(fit) is None


def test_float32_activations_are_summed_in_float64() -> None:
    x, error = (array.astype(np.float32) for array in problem(rows=2 * BLOCK_ROWS))
    sums = sums_of(x, error)
    assert sums.gram.dtype == sums.cross.dtype == np.float64
    np.testing.assert_allclose(sums.gram[:7, :7], x.astype(np.float64).T @ x.astype(np.float64), rtol=1e-4)


def test_a_singular_system_is_solved_by_the_ridge_and_nothing_is_fitted_to_silence() -> None:
    x, error = problem(inputs=4)
    doubled = np.hstack([x, x])
    fit = sums_of(doubled, error).solve(1e-2)
    assert np.isfinite(fit.weights).all()
    np.testing.assert_allclose(fit.weights[:4], fit.weights[4:], rtol=1e-5)
    assert fit.fitted_error < 1
    silent = sums_of(x, np.zeros_like(error))
    assert silent.solve(1e-2).fitted_error == 1.0


def test_the_fit_never_raises_the_error_on_its_own_rows() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        x, error = rng.standard_normal((12, 9)), rng.standard_normal((12, 2))
        assert sums_of(x, error).solve(10 ** rng.uniform(-4, 1)).fitted_error <= 1.0
