"""Diagonal Fisher, and the rearrangement against brute force over all choices."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from onnxprune.importance.fisher import diagonal, eliminated, first_order, rearrange, second_order, worst_class


def block_fisher(gradients: np.ndarray, removed: np.ndarray) -> float:
    return float(np.sum(gradients[:, removed].sum(axis=1) ** 2))


def correlated(rng: np.random.Generator, samples: int, units: int) -> np.ndarray:
    return rng.standard_normal((samples, units)) @ rng.standard_normal((units, units))


def test_diagonal_is_the_mean_square_of_samples() -> None:
    gradients = np.array([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]], np.float32)
    np.testing.assert_allclose(diagonal(gradients), [5.0, 4.0, 0.0])
    large = np.full((2, 1), 1e30, np.float32)  # its square does not fit float32
    assert np.isfinite(diagonal(large)).all()


def test_rearranging_never_raises_the_block_fisher_and_keeps_the_count() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        units = int(rng.integers(2, 30))
        gradients = correlated(rng, 16, units)
        removed = rng.choice(units, int(rng.integers(0, units + 1)), replace=False)
        result = rearrange(gradients, removed)
        assert len(set(result.tolist())) == len(removed)
        assert result.tolist() == sorted(result.tolist())
        assert set(result.tolist()) <= set(range(units))
        assert block_fisher(gradients, result) <= block_fisher(gradients, removed) * (1 + 1e-9) + 1e-12


def test_finds_the_best_four_of_eight_heads_more_often_than_not() -> None:
    exact, excess = 0, []
    for seed in range(200):
        gradients = correlated(np.random.default_rng(seed), 32, 8)
        start = np.argsort(np.sum(gradients**2, axis=0))[:4]
        found = block_fisher(gradients, rearrange(gradients, start))
        best = min(block_fisher(gradients, np.array(choice)) for choice in combinations(range(8), 4))
        exact += found <= best * (1 + 1e-9)
        excess.append(found / best - 1)
    assert exact >= 100
    assert np.mean(excess) <= 0.5


def test_units_that_cancel_are_removed_together() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(32)
    gradients = np.stack([base, 0.5 * rng.standard_normal(32), -base, 2 * rng.standard_normal(32)], axis=1)
    assert rearrange(gradients, np.array([0, 1])).tolist() == [0, 2]


def test_the_input_is_left_as_it_was() -> None:
    gradients = correlated(np.random.default_rng(0), 8, 6)
    before = gradients.copy()
    removed = np.array([4, 1])
    rearrange(gradients, removed)
    assert np.array_equal(gradients, before)
    assert removed.tolist() == [4, 1]


def test_taylor_terms_are_sizes_of_single_samples_that_do_not_cancel() -> None:
    gradients = np.array([[0.5, -2.0], [-0.5, 4.0]], np.float32)
    np.testing.assert_allclose(first_order(gradients), [0.5, 3.0])
    np.testing.assert_allclose(second_order(gradients), [(0.375 + 0.625) / 2, (4.0 + 4.0) / 2])


def test_elimination_of_masks_that_do_not_interact_is_the_diagonal_fisher() -> None:
    gradients = np.kron(np.diag([1.0, 2.0, 3.0, 4.0]), np.array([[1.0], [-1.0]]))
    alone = diagonal(gradients)
    np.testing.assert_allclose(eliminated(gradients), alone + 0.01 * alone.mean(), err_msg="all that is added is the ridge")


def test_elimination_knows_that_of_two_equal_masks_one_is_enough() -> None:
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal((2, 400))
    scores = eliminated(np.stack([shared, shared, own], axis=1))
    assert min(scores[:2]) < 0.05
    assert max(scores[:2]) > 1.5, "the last of the two takes what both did with it"
    assert scores[2] == pytest.approx(1.0, rel=0.2)


def test_a_unit_that_one_class_needs_is_worth_what_that_class_says() -> None:
    classes = np.repeat([0, 1], [900, 100])
    gradients = np.ones((1000, 2))
    gradients[:, 1] = np.where(classes == 1, 2.0, 0.1)
    assert diagonal(gradients)[1] < diagonal(gradients)[0]
    scores = worst_class(gradients, classes)
    assert scores[0] == pytest.approx(1.0)
    assert scores[1] == pytest.approx(4.0, rel=0.1)


def test_a_class_of_one_sample_does_not_decide_alone() -> None:
    classes = np.array([0] * 99 + [1])
    gradients = np.ones((100, 1))
    gradients[-1] = 10.0
    assert worst_class(gradients, classes)[0] < 15.0
