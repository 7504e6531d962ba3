"""Smoothing moves range between factors of a product and changes nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from onnxprune.errors import InputError
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.integer import int8_products, to_int8
from onnxprune.graph.model import Model
from onnxprune.graph.smoothing import smooth
from onnxprune.graph.view import GraphView
from onnxprune.quantize.form import Int8Form
from onnxprune.quantize.ranges import Range
from onnxprune.runtime.session import open_session, run
from tests.graph.net import FFN, WIDTH, Net

EXACT = 1e-5
"""Largest difference relative to the largest output: float32 rounding of the factors."""

FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)}
FACTORS = np.geomspace(0.01, 30, WIDTH)


def normed(op: str = "LayerNormalization", bias: bool = True, shared: bool = False, transposed: bool = False) -> tuple[Model, str]:
    """Two products after a normalisation, and the residual (``shared``: around the normalised tensor); returns its name as well."""
    net = Net(opset=23 if op == "RMSNormalization" else 18)
    scale = net.weight(WIDTH, scale=1.0)
    norm = net(op, "x", scale, *([net.weight(WIDTH, scale=0.5)] if bias else []), axis=-1)
    if transposed:
        flat = net("Reshape", norm, net.ints(-1, WIDTH))
        first, second = (net("Gemm", flat, net.weight(FFN, WIDTH), net.weight(FFN), transB=1) for _ in range(2))
        product = net("Mul", first, net("Tanh", second))
        back = net("Reshape", net.linear(product, FFN, WIDTH), net.ints(-1, 5, WIDTH))
        return Model.from_proto(net.done(net.add(back, norm if shared else "x"))), flat
    product = net("Mul", net.linear(norm, WIDTH, FFN), net("Tanh", net.linear(norm, WIDTH, FFN)))
    return Model.from_proto(net.done(net.add(net.linear(product, FFN, WIDTH), norm if shared else "x"))), norm


def readers(model: Model, tensor: str) -> tuple[str, ...]:
    return tuple(node.name for node in int8_products(GraphView(model)) if node.inputs[0] == tensor)


def assert_same(smoothed: Model, model: Model) -> None:
    onnx.checker.check_model(smoothed.to_proto(), full_check=True)
    for optimize in (False, True):
        (got,), (want,) = run(open_session(smoothed, optimize=optimize), FEEDS), run(open_session(model, optimize=optimize), FEEDS)
        assert np.abs(got - want).max() <= EXACT * np.abs(want).max()


def ops(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.proto.graph.node)


@pytest.mark.parametrize(("op", "bias"), [("LayerNormalization", True), ("LayerNormalization", False), ("RMSNormalization", False)])
def test_a_normalisation_takes_the_division(op: str, bias: bool) -> None:
    model, norm = normed(op, bias)
    smoothed = smooth(model, {norm: FACTORS}, readers(model, norm))
    assert ops(smoothed) == ops(model)
    assert_same(smoothed, model)
    before, after = (run(open_session(with_outputs(each, [norm])), FEEDS, [norm])[0] for each in (model, smoothed))
    np.testing.assert_allclose(after, before / FACTORS, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("slot", [0, 1])
def test_the_last_step_of_a_normalisation_in_parts_takes_the_division(slot: int) -> None:
    net = Net()
    root = net("Sqrt", net("ReduceMean", net("Mul", "x", "x"), net.ints(-1)))
    operands = [net("Div", "x", root), net.weight(WIDTH, scale=1.0)]
    norm = net("Mul", *operands[::-1] if slot else operands)
    model = Model.from_proto(net.done(net.add(net.linear(norm), "x")))
    smoothed = smooth(model, {norm: FACTORS}, readers(model, norm))
    assert ops(smoothed) == ops(model)
    assert_same(smoothed, model)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tensor_with_other_readers_is_divided_in_front_of_the_products(transposed: bool) -> None:
    model, tensor = normed(shared=True, transposed=transposed)
    smoothed = smooth(model, {tensor: FACTORS}, readers(model, tensor))
    assert ops(smoothed) - ops(model) == {"Mul": 1}
    assert_same(smoothed, model)


def test_a_product_that_is_not_smoothed_keeps_the_tensor() -> None:
    model, norm = normed()
    first, second = readers(model, norm)
    smoothed = smooth(model, {norm: FACTORS}, [second])
    assert ops(smoothed) - ops(model) == {"Mul": 1}
    assert next(node for node in GraphView(smoothed).nodes if node.name == first).inputs[0] == norm
    assert_same(smoothed, model)


def test_a_graph_input_and_a_graph_output_are_divided_for_the_products_only() -> None:
    net = Net()
    net.nodes.append(onnx.helper.make_node("LayerNormalization", ["x", net.weight(WIDTH)], ["norm"], "norm"))
    model = Model.from_proto(net.done(net("Add", net("MatMul", "norm", net.weight(WIDTH, FFN)), net.linear("x", WIDTH, FFN)), "norm"))
    names = tuple(node.name for node in int8_products(GraphView(model)))
    smoothed = smooth(model, {"x": FACTORS, "norm": FACTORS[::-1]}, names)
    assert ops(smoothed) - ops(model) == {"Mul": 2}
    for got, want in zip(run(open_session(smoothed), FEEDS), run(open_session(model), FEEDS), strict=True):
        np.testing.assert_allclose(got, want, atol=EXACT * np.abs(want).max())


def test_shared_weights_are_scaled_for_the_smoothed_product_only() -> None:
    net = Net()
    scale, bias, weight = net.weight(WIDTH), net.weight(WIDTH), net.weight(WIDTH, WIDTH)
    first = net("LayerNormalization", net("MatMul", "x", weight), scale, bias)
    second = net("LayerNormalization", net.add(first, "x"), scale, bias)
    model = Model.from_proto(net.done(net("MatMul", second, weight)))
    names = tuple(node.name for node in int8_products(GraphView(model)))
    assert_same(smooth(model, {second: FACTORS}, names), model)


def test_nothing_to_smooth_changes_nothing() -> None:
    model, norm = normed()
    assert smooth(model, {}, readers(model, norm)) is model
    assert smooth(model, {norm: FACTORS}, ()) is model


@pytest.mark.parametrize(
    ("tensor", "factors", "match"),
    [
        ("nowhere", FACTORS, "'nowhere', which is not in the graph"),
        ("", np.ones(WIDTH + 1), "13 smoothing factors .* whose weights have 12 input rows"),
        ("", np.zeros(WIDTH), "not a list of positive numbers"),
        ("", np.full(WIDTH, np.nan), "not a list of positive numbers"),
        ("", np.full(WIDTH, 1e-42), "not a list of positive numbers"),
        ("", np.ones((WIDTH, 1)), "not a list of positive numbers"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tensor: str, factors: np.ndarray, match: str) -> None:
    model, norm = normed()
    with pytest.raises(InputError, match=match):
        smooth(model, {tensor or norm: factors}, readers(model, norm))


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("shared", [False, True])
def test_channels_of_very_different_size_survive_int8_only_when_smoothed(scheme: str, shared: bool) -> None:
    """Scale of the normalisation from 0.01 to 100, and weights that make all channels matter alike."""
    model, norm = normed(shared=shared)
    names, sizes = readers(model, norm), np.geomspace(0.01, 100, WIDTH)
    harsh = smooth(model, {norm: 1 / sizes}, names)
    tensor = next(node.inputs[0] for node in GraphView(harsh).nodes if node.name == names[0])
    values = run(open_session(with_outputs(harsh, [tensor])), FEEDS, [tensor])[0]
    (want,) = run(open_session(harsh), FEEDS)
    errors = []
    for factors in ({}, {tensor: sizes}):
        quantised = values / sizes if factors else values
        ranges = {tensor: Range(float(quantised.min()), float(quantised.max()))} if scheme == "static" else {}
        (got,) = run(open_session(to_int8(harsh, Int8Form(scheme, True, names, ranges, factors))), FEEDS)  # type: ignore[arg-type]
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert errors[1] < 0.02
    assert errors[0] > 3 * errors[1]
