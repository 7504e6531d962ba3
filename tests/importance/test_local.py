"""Scores from weights and second moments against what they stand for, computed the long way."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.importance import local
from onnxprune.importance.registry import CRITERIA

LABELS = [np.arange(6), np.repeat(np.arange(3), 2), np.array([2, 0, 1, 1, 0, 2])]


def case(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, len(labels))) @ rng.standard_normal((len(labels), len(labels)))
    return x, rng.standard_normal((len(labels), 4)), int(labels.max()) + 1


@pytest.mark.parametrize("labels", LABELS)
def test_magnitude_is_the_squared_norm_of_a_units_rows(labels: np.ndarray) -> None:
    _, weight, units = case(labels)
    expected = [np.sum(weight[labels == unit] ** 2) for unit in range(units)]
    np.testing.assert_allclose(local.magnitude(weight, labels, units), expected)


def test_positions_outside_the_group_count_for_nobody() -> None:
    weight = np.ones((4, 2))
    np.testing.assert_allclose(local.magnitude(weight, np.array([-1, 0, 1, 1]), 2), [2.0, 4.0])


@pytest.mark.parametrize("labels", LABELS)
def test_wanda_sums_weights_times_the_norms_of_what_they_read(labels: np.ndarray) -> None:
    x, weight, units = case(labels)
    each = np.abs(weight) * np.sqrt(np.mean(x**2, axis=0))[:, None]
    expected = [each[labels == unit].sum() for unit in range(units)]
    np.testing.assert_allclose(local.wanda(weight, x.T @ x / len(x), labels, units), expected)


def test_variance_is_what_is_lost_when_a_bias_makes_up_for_the_mean() -> None:
    x, weight, units = case(np.arange(6))
    x += 5.0
    lost = (x - x.mean(axis=0))[:, :, None] * weight  # [samples, units, outputs]
    expected = np.square(lost).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(local.variance(weight, np.cov(x.T, bias=True), np.arange(6), units), expected)


def test_in_proportion_keeps_the_order_and_makes_a_site_worth_its_price() -> None:
    scores = np.array([1.0, 0.0, 5.0])
    np.testing.assert_allclose(local.in_proportion(scores, 8.0), [4.0, 0.0, 20.0])
    np.testing.assert_allclose(local.in_proportion(np.zeros(2), 8.0), [8.0, 8.0])
    assert local.in_proportion(np.zeros(0), 8.0).size == 0


@pytest.mark.parametrize("labels", LABELS)
def test_energy_is_what_the_output_loses_without_the_unit(labels: np.ndarray) -> None:
    x, weight, units = case(labels)
    expected = [np.sum((x[:, labels == unit] @ weight[labels == unit]) ** 2) for unit in range(units)]
    np.testing.assert_allclose(local.energy(weight, x.T @ x, labels, units), expected)


@pytest.mark.parametrize("labels", LABELS)
def test_obs_is_the_loss_after_the_other_rows_are_solved_again(labels: np.ndarray) -> None:
    x, weight, units = case(labels)
    target = x @ weight
    expected = []
    for unit in range(units):
        rest = x[:, labels != unit]
        solution = np.linalg.lstsq(rest, target, rcond=None)[0]
        expected.append(np.sum((target - rest @ solution) ** 2))
    np.testing.assert_allclose(local.obs(weight, x.T @ x, labels, units, ridge=0.0), expected, rtol=1e-8)


@pytest.mark.parametrize("labels", LABELS)
def test_obs_with_ridge_is_the_damped_loss(labels: np.ndarray) -> None:
    """The damping asks the other rows to stay near their old values, so their loss lies between the best update's and no update's."""
    x, weight, units = case(labels)
    gram = x.T @ x
    free = local.obs(weight, gram, labels, units, ridge=0.0)
    damped = local.obs(weight, gram, labels, units, ridge=1e-2)
    assert (damped > free).all()
    extended = np.vstack([x, np.sqrt(1e-2 * np.trace(gram) / len(gram)) * np.eye(len(gram))])
    np.testing.assert_allclose(damped, local.obs(weight, extended.T @ extended, labels, units, ridge=0.0), rtol=1e-8)


def test_a_unit_that_others_can_replace_costs_nothing_to_obs_but_has_energy() -> None:
    x, weight, _ = case(np.arange(6))
    x = np.hstack([x, x[:, :2] @ np.array([[1.0], [2.0]])])
    weight = np.vstack([weight, np.full((1, 4), 3.0)])
    gram = x.T @ x
    scores = local.obs(weight, gram, np.arange(7), 7, ridge=1e-9)
    assert scores[6] < 1e-5 * local.energy(weight, gram, np.arange(7), 7)[6]


def test_criteria_name_their_source_and_what_they_need() -> None:
    gradients = {"fisher", "block-fisher", "cap", "taylor", "taylor2"}
    inside = {"magnitude", "wanda", "variance"}
    assert set(CRITERIA) == gradients | inside | {"kfac", "classwise", "leave-one-out", "energy", "obs"}
    assert {name for name, criterion in CRITERIA.items() if not criterion.comparable} == inside
    assert all(name == criterion.name and criterion.source and criterion.summary for name, criterion in CRITERIA.items())
    assert {name for name, criterion in CRITERIA.items() if criterion.needs == "gradients"} == gradients
