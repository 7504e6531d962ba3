"""Diagonal Fisher, and the rearrangement against brute force over all choices."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from onnxprune.importance.fisher import diagonal, rearrange


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
