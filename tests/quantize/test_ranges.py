"""Histograms that merge to the bit, ranges judged by what quantisation really loses, parameters as onnxruntime computes them."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from onnxprune.errors import InputError
from onnxprune.quantize.ranges import BINS, Histogram, Method, Range, expected_error, range_of, uint8_parameters

METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")
FLOATS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))
MODEST = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def histogram(*batches: np.ndarray) -> Histogram:
    made = Histogram("x")
    for batch in batches:
        made.add(batch)
    return made


def assert_same(left: Histogram, right: Histogram) -> None:
    for name in ("low", "high", "count", "zeros", "exponent", "first"):
        assert getattr(left, name) == getattr(right, name), name
    np.testing.assert_array_equal(left.bins, right.bins)


def quantised(x: np.ndarray, low: float, high: float) -> np.ndarray:
    scale, zero_point = uint8_parameters(low, high)
    levels = np.clip(np.rint(x / scale) + float(zero_point), 0, 255)
    return np.asarray((levels - float(zero_point)) * scale)


@cache
def samples(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(50_000).astype(np.float32)
    if kind == "heavy":
        x = rng.standard_t(2.5, 50_000).astype(np.float32)
    elif kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "negative":
        x = -np.abs(x)
    elif kind == "gelu":
        x = (x / (1 + np.exp(-1.702 * x))).astype(np.float32)
    elif kind == "outlier":
        x[7] = 40.0
    elif kind == "shifted":
        x = x + 20
    return x


KINDS = ("normal", "heavy", "relu", "negative", "gelu", "outlier", "shifted")


@given(st.lists(FLOATS, min_size=2, max_size=5), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_parts_add_up_to_the_whole_whatever_their_order_and_size(batches: list[np.ndarray], cut: int) -> None:
    whole = histogram(np.concatenate(batches))
    assert_same(histogram(*batches), whole)
    left, right = histogram(*batches[:cut]), histogram(*batches[cut:])
    backwards = histogram(*batches[cut:])
    left += right
    assert_same(left, whole)
    backwards += histogram(*batches[:cut])
    assert_same(backwards, whole)


@given(FLOATS)
@settings(max_examples=150, deadline=None)
def test_every_value_is_counted_in_the_bin_that_holds_it(x: np.ndarray) -> None:
    made = histogram(x)
    assert made.bins.sum() == made.count == len(x)
    edges = made.edges
    exact = x.astype(np.float64)
    expected = [int(np.count_nonzero((exact >= edges[place]) & (exact < edges[place + 1]))) for place in np.flatnonzero(made.bins)]
    np.testing.assert_array_equal(made.bins[made.bins > 0], expected)


def test_a_merge_leaves_the_other_part_as_it_was() -> None:
    part, before = histogram(floats(1, 2)), histogram(floats(1, 2))
    total = histogram(floats(-100))
    total += part
    total += total
    assert_same(part, before)
    assert total.count == 6
    assert_same(total, histogram(floats(-100, 1, 2, 1, 2, -100)))


def test_memory_does_not_grow_with_the_data_and_most_bins_stay_in_use() -> None:
    rng = np.random.default_rng(0)
    made = Histogram("x")
    for power in range(0, 40, 2):
        made.add((rng.uniform(1, 3, (64, 32)) * 2.0**power).astype(np.float32))
        assert made.bins.shape == (BINS,)
        assert (made.high - made.low) / made.width + 2 >= BINS // 2
    assert made.bins.sum() == made.count == 20 * 64 * 32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_float_types_are_counted(dtype: type) -> None:
    assert_same(histogram(np.array([[-1.5, 0.0], [2.25, 7.0]], dtype)), histogram(np.array([-1.5, 0, 2.25, 7], np.float32)))


@given(MODEST)
@settings(deadline=None)
def test_minmax_is_exact_and_every_range_includes_zero(x: np.ndarray) -> None:
    made = histogram(x)
    assert range_of(made, "minmax") == (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
    for method in METHODS:
        low, high = range_of(made, method)
        assert min(float(x.min()), 0.0) <= low <= 0.0 <= high <= max(float(x.max()), 0.0)


@given(MODEST, st.data())
def test_rows_of_padding_leave_no_trace(x: np.ndarray, data: st.DataObject) -> None:
    valid = data.draw(hnp.arrays(bool, len(x)))
    values = np.stack([x, 2 * x], axis=1)
    masked = Histogram("x")
    masked.add(np.where(valid[:, None], values, np.float32(np.nan)), valid)
    assert_same(masked, histogram(values[valid]))


def test_a_mask_over_rows_and_tokens() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    valid = np.array([[True, True, False], [True, False, False]])
    masked = Histogram("x")
    masked.add(values, valid)
    assert_same(masked, histogram(floats(0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15)))
    with pytest.raises(InputError, match=r"mask of tensor 'x' has shape \[3, 2\].*\[2, 3, 4\]"):
        masked.add(values, valid.T)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_no_range_covers_is_refused_and_nothing_counted(bad: float) -> None:
    made, before = histogram(floats(1, 2)), histogram(floats(1, 2))
    with pytest.raises(InputError, match=r"'x' holds infinite or NaN.*scale activations at run time"):
        made.add(floats(5, bad, 3))
    assert_same(made, before)


def test_a_tensor_never_seen_is_refused() -> None:
    made = Histogram("hidden")
    made.add(np.ones((2, 3), np.float32), np.zeros(2, bool))
    with pytest.raises(InputError, match="'hidden' was never seen"):
        range_of(made, "minmax")


def test_wrong_arguments_are_named() -> None:
    made = histogram(floats(1, 2))
    with pytest.raises(InputError, match=r"'best'.*minmax, percentile, entropy or mse"):
        range_of(made, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"0\.999 percent"):
        range_of(made, "percentile", percent=0.999)
    with pytest.raises(InputError, match="1 levels"):
        range_of(made, "mse", levels=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.99, 100.0])
def test_percentiles_are_numpys_within_a_bin(kind: str, percent: float) -> None:
    x = samples(kind)
    made = histogram(*np.split(x, 5))
    tail = (100 - percent) / 2
    expected = np.percentile(x.astype(np.float64), [tail, 100 - tail], method="inverted_cdf")
    low, high = range_of(made, "percentile", percent=percent)
    assert low == pytest.approx(min(expected[0], 0), abs=made.width)
    assert high == pytest.approx(max(expected[1], 0), abs=made.width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [16, 256])
def test_the_expected_error_is_the_measured_one(kind: str, levels: int) -> None:
    x = samples(kind).astype(np.float64)
    made = histogram(samples(kind))
    for share in (1.0, 0.5, 0.1):
        low, high = min(made.low, 0) * share, max(made.high, 0) * share
        scale = (high - low) / (levels - 1)
        zero_point = np.rint(-low / scale)
        measured = np.mean((x - (np.clip(np.rint(x / scale) + zero_point, 0, levels - 1) - zero_point) * scale) ** 2)
        assert expected_error(made, low, high, levels) == pytest.approx(measured, rel=0.05)


@given(FLOATS)
@settings(max_examples=40, deadline=None)
def test_the_mse_range_never_expects_more_than_minmax(x: np.ndarray) -> None:
    made = histogram(x)
    assert expected_error(made, *range_of(made, "mse")) <= expected_error(made, *range_of(made, "minmax"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mse_range_loses_least_on_the_samples_themselves(kind: str) -> None:
    x = samples(kind)
    made = histogram(x)
    measured = {method: float(np.mean((x - quantised(x, *range_of(made, method))) ** 2)) for method in METHODS}
    assert measured["mse"] <= 1.02 * min(measured.values())
    grid = [quantised(x, min(made.low, 0) * a, max(made.high, 0) * b) for a in (1, 0.8, 0.6, 0.4, 0.2) for b in (1, 0.8, 0.6, 0.4, 0.2)]
    assert measured["mse"] <= 1.02 * min(float(np.mean((x - each) ** 2)) for each in grid)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("base", ["normal", "relu", "shifted"])
def test_a_single_outlier_is_clipped_by_entropy_always_and_by_mse_where_it_pays(base: str, sign: int) -> None:
    x = sign * samples(base)
    largest = float(np.abs(x).max())
    few, many = histogram(x), histogram(x)
    for _ in range(6):
        many += many
    few.add(floats(12 * sign * largest))
    many.add(floats(12 * sign * largest))

    def reached(made: Histogram, method: Method) -> float:
        low, high = range_of(made, method)
        return high if sign == 1 else -low

    assert reached(few, "minmax") == pytest.approx(12 * largest)
    assert 0.5 * largest < reached(few, "entropy") < 4 * largest
    # One value in N that far out costs its square over N if clipped, and the square over 12 * 255^2 if not: the same at N = 780 300.
    assert reached(few, "mse") > 10 * largest
    assert 0.5 * largest < reached(many, "mse") < 4 * largest


def test_entropy_covers_all_of_a_distribution_without_tails() -> None:
    made = histogram(np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32))
    low, high = range_of(made, "entropy")
    assert low < -0.98
    assert high > 0.98


def test_exact_zeros_do_not_count_as_lost() -> None:
    x = samples("normal")
    padded = histogram(x, np.zeros(9 * len(x), np.float32))
    assert range_of(padded, "mse") == range_of(histogram(x), "mse")
    assert range_of(padded, "entropy") == range_of(histogram(x), "entropy")
    assert expected_error(padded, -3, 3) == pytest.approx(expected_error(histogram(x), -3, 3) / 10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [3.7, -0.001, 1e30, -12345.678])
def test_a_constant_is_represented(method: Method, constant: float) -> None:
    x = np.full((4, 5), constant, np.float32)
    low, high = range_of(histogram(x, x), method)
    assert Range(low, high) == (min(float(x[0, 0]), 0.0), max(float(x[0, 0]), 0.0))
    np.testing.assert_allclose(quantised(x, low, high), x, rtol=3e-7)


@pytest.mark.parametrize("method", METHODS)
def test_all_zeros_have_scale_one(method: Method) -> None:
    made = histogram(np.zeros((4, 5), np.float32))
    assert range_of(made, method) == (0.0, 0.0)
    assert uint8_parameters(*range_of(made, method)) == (np.float32(1), np.uint8(0))


@cache
def dynamic_quantizer() -> ort.InferenceSession:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero_point"])
    outputs = [
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("zero_point", TensorProto.UINT8, []),
    ]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@given(MODEST, st.sampled_from(["as drawn", "positive", "negative", "zero"]))
@settings(max_examples=200, deadline=None)
def test_parameters_are_those_of_dynamic_quantize_linear(x: np.ndarray, sign: str) -> None:
    x = {"as drawn": x, "positive": np.abs(x), "negative": -np.abs(x), "zero": 0 * x}[sign]
    # Below this, 1 / 255 of a range is subnormal, where onnxruntime's own result depends on the processor's mode.
    x = np.where(np.abs(x) < 1e-30, np.float32(0), x)
    scale, zero_point = dynamic_quantizer().run(None, {"x": x})
    found = uint8_parameters(*range_of(histogram(x), "minmax"))
    assert found == (scale, zero_point)
    assert (type(found[0]), type(found[1])) == (np.float32, np.uint8)


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (-3e38, 3e38), (0.0, 1e300)])
def test_parameters_of_no_range_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="no range that uint8 can cover"):
        uint8_parameters(low, high)
