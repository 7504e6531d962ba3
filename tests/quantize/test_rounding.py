"""Int8 weights: rounding that minds the inputs is never worse, and better where inputs go together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.errors import InputError
from onnxprune.quantize.rounding import (
    BLOCK_ROWS,
    output_error,
    round_columns,
    round_to_nearest,
    scales,
    search_smoothing,
)


def weights_of(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def inputs_of(rows: int, width: int, rank: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, width))
    return np.asarray(shared + noise * rng.standard_normal((rows, width)))


def dequantised(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.asarray(integers * scale.astype(np.float64))


def test_scales_put_the_largest_weight_on_the_last_level() -> None:
    weights = weights_of(6, 4)
    channel, tensor = scales(weights, per_channel=True), scales(weights, per_channel=False)
    assert (channel.shape, tensor.shape, channel.dtype.name, tensor.dtype.name) == ((4,), (), "float32", "float32")
    np.testing.assert_allclose(channel, np.abs(weights).max(axis=0) / 127, rtol=1e-6)
    np.testing.assert_allclose(tensor, np.abs(weights).max() / 127, rtol=1e-6)
    assert (np.abs(round_to_nearest(weights, channel).astype(int)).max(axis=0) == 127).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_shrunk_scales_lose_less_of_weights_with_tails(per_channel: bool) -> None:
    weights = np.random.default_rng(0).standard_t(3, (400, 5)).astype(np.float32)
    full, shrunk = scales(weights, per_channel), scales(weights, per_channel, shrink=True)
    lost = [np.square(weights - dequantised(round_to_nearest(weights, scale), scale)).sum(axis=0) for scale in (full, shrunk)]
    assert (shrunk <= full).all()
    assert lost[1].sum() < lost[0].sum()
    if per_channel:
        assert (lost[1] <= lost[0]).all()


@given(st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_nearest_is_within_half_a_step_and_symmetric(inputs: int, outputs: int, per_channel: bool, seed: int) -> None:
    weights = weights_of(inputs, outputs, seed)
    scale = scales(weights, per_channel)
    integers = round_to_nearest(weights, scale)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= 127
    assert (np.abs(weights - dequantised(integers, scale)) <= 0.50001 * scale).all()
    np.testing.assert_array_equal(round_to_nearest(-weights, scale), -integers)


@pytest.mark.parametrize("shrink", [True, False])
def test_columns_of_zeros_have_scale_one_and_stay_zero(shrink: bool) -> None:
    weights = weights_of(6, 3)
    weights[:, 1] = 0
    scale = scales(weights, per_channel=True, shrink=shrink)
    assert scale[1] == 1
    x = inputs_of(30, 6, 2, 0.1)
    assert not round_columns(weights, x.T @ x, scale)[:, 1].any()
    assert scales(0 * weights, per_channel=False, shrink=shrink) == 1


def test_weights_too_small_for_a_float32_scale_count_as_zero() -> None:
    weights = np.full((2, 1), 1e-42, np.float32)
    assert scales(weights, per_channel=True) == 1
    assert not round_to_nearest(weights, scales(weights, per_channel=True)).any()


@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 60), st.integers(1, 8), st.sampled_from([0.0, 0.01, 1.0]), st.integers(0, 10_000)
)
@settings(max_examples=80, deadline=None)
def test_no_column_is_worse_than_plain_rounding(inputs: int, outputs: int, rows: int, rank: int, noise: float, seed: int) -> None:
    weights, x = weights_of(inputs, outputs, seed), inputs_of(rows, inputs, rank, noise, seed)
    gram = x.T @ x
    scale = scales(weights, per_channel=bool(seed % 2))
    rounded, nearest = (dequantised(q, scale) for q in (round_columns(weights, gram, scale), round_to_nearest(weights, scale)))
    assert (output_error(weights, rounded, gram) <= output_error(weights, nearest, gram)).all()


def test_the_output_error_is_that_of_the_products() -> None:
    weights, x = weights_of(20, 3), inputs_of(50, 20, 4, 0.3)
    scale = scales(weights, per_channel=True)
    rounded = dequantised(round_columns(weights, x.T @ x, scale), scale)
    np.testing.assert_allclose(output_error(weights, rounded, x.T @ x), np.square(x @ (weights - rounded)).sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("inputs", [24, 2 * BLOCK_ROWS + 37])
def test_correlated_inputs_lose_at_least_a_fifth_less(per_channel: bool, inputs: int) -> None:
    weights = weights_of(inputs, 16)
    x, fresh = np.split(inputs_of(8 * inputs, inputs, inputs // 8, 0.3), 2)
    scale = scales(weights, per_channel)
    rounded, nearest = (dequantised(q, scale) for q in (round_columns(weights, x.T @ x, scale), round_to_nearest(weights, scale)))
    for rows in (x, fresh):
        gram = rows.T @ rows
        assert output_error(weights, rounded, gram).sum() < 0.8 * output_error(weights, nearest, gram).sum()
    assert np.abs(rounded).max() <= 127 * scale.max() * 1.000001


@given(st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(inputs: int, seed: int) -> None:
    weights = weights_of(inputs, 4, seed)
    power = np.random.default_rng(seed).uniform(0, 3, inputs) * (np.arange(inputs) % 5 > 0)
    scale = scales(weights, per_channel=True)
    np.testing.assert_array_equal(round_columns(weights, np.diag(power), scale), round_to_nearest(weights, scale))


def one_by_one(weights: np.ndarray, gram: np.ndarray, scale: np.ndarray, damping: float) -> np.ndarray:
    """Rounding with exact re-solving: after each row, all later ones are re-fitted to the damped problem from scratch."""
    order = np.argsort(-np.diagonal(gram), kind="stable")
    damped = gram + damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    target, rounded = weights.astype(np.float64), np.zeros_like(weights, dtype=np.float64)
    for step, row in enumerate(order):
        done, later = order[:step], order[step:]
        owed = damped[np.ix_(later, done)] @ (target[done] - rounded[done] * scale)
        current = target[later] + np.linalg.solve(damped[np.ix_(later, later)], owed)
        rounded[row] = np.clip(np.rint(current[0] / scale), -127, 127)
    return rounded


def test_rounding_is_that_of_re_solving_after_each_row() -> None:
    inputs = BLOCK_ROWS + 20
    weights, x = weights_of(inputs, 5), inputs_of(3 * inputs, inputs, 12, 0.4)
    gram, scale = x.T @ x, scales(weights_of(inputs, 5), per_channel=True)
    np.testing.assert_array_equal(round_columns(weights, gram, scale, damping=0.02), one_by_one(weights, gram, scale, 0.02))


def test_columns_do_not_depend_on_each_other_and_input_order_does_not_matter() -> None:
    weights, x = weights_of(30, 6), inputs_of(90, 30, 5, 0.3)
    gram, scale = x.T @ x, scales(weights_of(30, 6), per_channel=True)
    rounded = round_columns(weights, gram, scale)
    np.testing.assert_array_equal(round_columns(weights[:, 2:4], gram, scale[2:4]), rounded[:, 2:4])
    order = np.random.default_rng(1).permutation(30)
    np.testing.assert_array_equal(round_columns(weights[order], gram[np.ix_(order, order)], scale), rounded[order])


def test_singular_grams_without_damping_and_dead_inputs() -> None:
    weights, x = weights_of(20, 4), inputs_of(5, 20, 3, 0.0)
    x[:, 4] = 0
    scale = scales(weights, per_channel=True)
    rounded = round_columns(weights, x.T @ x, scale, damping=0.0)
    np.testing.assert_array_equal(rounded[4], round_to_nearest(weights, scale)[4])
    np.testing.assert_array_equal(round_columns(weights, np.zeros((20, 20)), scale), round_to_nearest(weights, scale))


def test_what_cannot_be_rounded_is_refused() -> None:
    weights, gram = weights_of(3, 2), np.eye(3)
    scale = scales(weights, per_channel=True)
    broken = weights.copy()
    broken[2, 1] = np.nan
    with pytest.raises(InputError, match=r"NaN value at \[2, 1\]"):
        scales(broken, per_channel=True)
    with pytest.raises(InputError, match=r"shape \[3, 2, 1\].*matrix"):
        scales(weights[..., None], per_channel=True)
    with pytest.raises(InputError, match=r"scales of shape \[3\] for weights \[3, 2\]"):
        round_to_nearest(weights, np.ones(3, np.float32))
    with pytest.raises(InputError, match="scale is zero"):
        round_to_nearest(weights, 0 * scale)
    with pytest.raises(InputError, match=r"Gram matrix of shape \[2, 2\] for weights of 3 inputs"):
        round_columns(weights, gram[:2, :2], scale)
    with pytest.raises(InputError, match="not finite, or negative"):
        round_columns(weights, np.diag([1, -1, 1]), scale)
    with pytest.raises(InputError, match="strongly negative directions"):
        round_columns(weights, np.full((3, 3), -50.0) + 51 * np.eye(3), scale)


def int8_output(x: np.ndarray, weights: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The layer with uint8 inputs, one range for all channels, and int8 weights per channel."""
    smooth, folded = x / factors, weights * factors[:, None]
    low, high = min(smooth.min(), 0), max(smooth.max(), 0)
    step = (high - low) / 255
    zero_point = np.rint(-low / step)
    inputs = (np.clip(np.rint(smooth / step) + zero_point, 0, 255) - zero_point) * step
    scale = scales(folded, per_channel=True)
    return np.asarray(inputs @ dequantised(round_to_nearest(folded, scale), scale))


def test_the_search_predicts_the_measured_error_and_smooths_away_outlier_channels() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 32))
    x[:, 5] *= 60
    weights = weights_of(32, 24)
    found = search_smoothing(weights, x.min(axis=0), x.max(axis=0), np.square(x).mean(axis=0), per_channel=True)
    most = np.abs(x).max(axis=0)
    assert found.limit == pytest.approx(np.sort(most)[-2])
    np.testing.assert_allclose(found.factors, np.where(np.arange(32) == 5, most[5] / found.limit, 1))
    exact = x @ weights
    measured = [float(np.square(int8_output(x, weights, f) - exact).sum(axis=1).mean()) for f in (np.ones(32), found.factors)]
    assert measured[0] == pytest.approx(found.error_before, rel=0.2)
    assert measured[1] == pytest.approx(found.error, rel=0.2)
    assert measured[1] < 0.25 * measured[0]


@given(st.integers(1, 10), st.integers(0, 1000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_search_never_predicts_a_loss(inputs: int, seed: int, per_channel: bool) -> None:
    x = inputs_of(20, inputs, 3, 0.5, seed) * np.random.default_rng(seed).integers(0, 9, inputs)
    found = search_smoothing(weights_of(inputs, 3, seed), x.min(axis=0), x.max(axis=0), np.square(x).mean(axis=0), per_channel)
    assert found.error <= found.error_before
    assert (found.limit is None) == (found.error == found.error_before)
