"""The elimination against least squares solved again from scratch, and against every order that there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.importance.elimination import eliminate
from onnxprune.importance.local import obs

RIDGE = 1e-2


def problem(units: int, size: int, seed: int, outputs: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = units * size
    x = rng.standard_normal((3 * n, n)) @ rng.standard_normal((n, n))
    return x.T @ x, rng.standard_normal((n, outputs)), rng.permutation(np.repeat(np.arange(units), size))


def loss(gram: np.ndarray, weight: np.ndarray, keep: np.ndarray) -> float:
    """Of the damped least-squares problem with the rows outside of ``keep`` at zero."""
    damped = gram + np.eye(len(gram)) * RIDGE * np.trace(gram) / len(gram)
    solution = np.zeros_like(weight)
    if keep.any():
        solution[keep] = np.linalg.solve(damped[np.ix_(keep, keep)], damped[keep] @ weight)
    change = weight - solution
    return float(np.einsum("ij,ij->", change, damped @ change))


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
def test_increments_add_up_to_the_loss_of_the_problem_solved_again(units: int, size: int, seed: int) -> None:
    gram, weight, labels = problem(units, size, seed)
    found = eliminate(gram, weight, labels, units, RIDGE)
    assert sorted(found.order) == list(range(units))
    for kept in range(units + 1):
        stays = np.isin(labels, found.order[units - kept :])
        assert found.errors[kept] == pytest.approx(loss(gram, weight, stays), rel=1e-8, abs=1e-10 * found.errors[0])


def test_batches_add_up_exactly_too() -> None:
    gram, weight, labels = problem(200, 1, 0)
    found = eliminate(gram, weight, labels, 200, RIDGE)
    for kept in (0, 40, 100, 150, 190):
        stays = np.isin(labels, found.order[200 - kept :])
        assert found.errors[kept] == pytest.approx(loss(gram, weight, stays), rel=1e-10)


def test_every_step_takes_the_unit_that_costs_least() -> None:
    gram, weight, labels = problem(6, 2, 3)
    found = eliminate(gram, weight, labels, 6, RIDGE)
    gone: list[int] = []
    for unit in found.order:
        after = {other: loss(gram, weight, ~np.isin(labels, [*gone, other])) for other in set(range(6)) - set(gone)}
        assert unit == min(after, key=lambda other: after[other])
        gone.append(int(unit))


def test_the_first_increment_is_the_one_step_score() -> None:
    gram, weight, labels = problem(8, 3, 1)
    found = eliminate(gram, weight, labels, 8, RIDGE)
    assert found.increments[0] == pytest.approx(obs(weight, gram, labels, 8, RIDGE).min())


def test_a_unit_that_others_replace_goes_first() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 4))
    x = np.column_stack([x, x[:, 1]])
    found = eliminate(x.T @ x, 10 * np.eye(5), np.arange(5), 5)
    assert found.order[0] in (1, 4)
    assert found.increments[0] < 0.1 * found.increments[1]


def test_greedy_is_near_the_best_of_all_choices() -> None:
    worst = 0.0
    for seed in range(20):
        gram, weight, labels = problem(7, 1, seed)
        found = eliminate(gram, weight, labels, 7, RIDGE)
        for kept in (3, 5):
            best = min(loss(gram, weight, np.isin(labels, some)) for some in combinations(range(7), kept))
            worst = max(worst, found.errors[kept] / best)
    assert worst < 2.0


def test_saliency_keeps_the_order_and_the_sum() -> None:
    gram, weight, labels = problem(50, 2, 5)
    found = eliminate(gram, weight, labels, 50, RIDGE)
    assert (np.diff(found.saliency[found.order]) >= 0).all()
    assert found.saliency.sum() == pytest.approx(found.errors[0])


def test_a_metric_of_the_outputs_is_a_change_of_the_weight() -> None:
    """An output that nobody reads costs nothing."""
    gram, weight, labels = problem(5, 1, 2, outputs=2)
    blind = eliminate(gram, weight @ np.diag([1.0, 0.0]), labels, 5, RIDGE)
    alone = eliminate(gram, weight[:, :1], labels, 5, RIDGE)
    np.testing.assert_allclose(blind.increments, alone.increments)


@pytest.mark.parametrize("spread", [0.0, 1e-6])
def test_a_covariance_of_nothing_but_rounding_costs_nothing(spread: float) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal(24) + spread * rng.standard_normal((64, 24))).astype(np.float32)
    # As the statistics sum it up: a float32 product less the mean's own, which leaves something indefinite.
    mean = rows.mean(axis=0, dtype=np.float64)
    noise = (rows.T @ rows).astype(np.float64) / 64 - np.outer(mean, mean)
    assert np.linalg.eigvalsh(noise)[0] < -RIDGE * abs(np.trace(noise)) / 24
    weight = rng.standard_normal((24, 5))
    found = eliminate(noise, weight, np.arange(24), 24, RIDGE)
    assert sorted(found.order) == list(range(24))
    assert np.isfinite(found.increments).all()
    assert found.errors[0] < 1e-3 * np.einsum("ij,ij->", weight, (rows.T @ rows) @ weight) / 64
