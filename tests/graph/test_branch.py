"""The linear way from a product to the residual sum: its scales and its bias are what a re-fit divides by and writes to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import numpy_helper

from onnxprune.graph.branch import follow_branch
from onnxprune.graph.model import load
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests.graph.net import FFN, HEADS, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases

Way = Callable[[Net, str], str]


def scaled_after_bias(net: Net, product: str) -> str:
    return str(net("Mul", net.add(product, net.weight(WIDTH)), net.weight(WIDTH)))


def scaled_before_bias(net: Net, product: str) -> str:
    return net.add(net.weight(1, 1, WIDTH), net("Mul", net.weight(WIDTH), product))


def divided(net: Net, product: str) -> str:
    return str(net("Div", net.add(product, net.weight(WIDTH)), net.constant(np.float32(3))))


def gemm(net: Net, product: str) -> str:
    """The product is a Gemm with alpha, then turned back to three axes."""
    node = net.nodes[-1]
    flat = net("Reshape", "x", net.ints(-1, WIDTH))
    made = net("Gemm", flat, node.input[1], net.weight(WIDTH), alpha=0.5)
    shape = net("Concat", net("Slice", net("Shape", "x"), net.ints(0), net.ints(2)), net.ints(WIDTH), axis=0)
    return str(net("Reshape", made, shape))


@pytest.mark.parametrize("way", [scaled_after_bias, scaled_before_bias, divided, gemm])
def test_changes_of_weight_and_bias_arrive_as_the_branch_says(way: Way) -> None:
    """Adding D to the weights and d * bias_gain to the bias moves the sum by (x D + d) * gain."""
    net = Net()
    branch_end = way(net, str(net("MatMul", "x", net.weight(WIDTH, WIDTH))))
    model = load(net.done(net.add("x", branch_end)))
    view = GraphView(model)
    node = next(node for node in reversed(view.nodes) if node.op in ("Gemm", "MatMul"))
    branch = follow_branch(view, node, WIDTH)
    assert branch is not None
    assert branch.bias is not None
    assert branch.total == model.output_names[0]
    rng = np.random.default_rng(0)
    change, shift = (rng.standard_normal(shape).astype(np.float32) for shape in ((WIDTH, WIDTH), (WIDTH,)))
    bias_node, slot = branch.bias
    edited = {tensor.name: model.initializer(tensor.name) for tensor in model.proto.graph.initializer}
    weight_name, bias_name = node.inputs[1], view.nodes[bias_node].inputs[slot]
    edited[weight_name] = edited[weight_name] + change
    edited[bias_name] = edited[bias_name] + (shift * branch.bias_gain).reshape(edited[bias_name].shape).astype(np.float32)
    proto = model.to_proto()
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in edited.items())
    x = rng.standard_normal((2, 3, WIDTH)).astype(np.float32)
    moved = run(open_session(proto), {"x": x})[0] - run(open_session(model), {"x": x})[0]
    np.testing.assert_allclose(moved, (x @ change + shift) * branch.gain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", ["Relu", "Softmax"])
def test_a_way_that_is_not_linear_along_the_width_is_no_branch(op: str) -> None:
    net = Net()
    product = net("MatMul", "x", net.weight(WIDTH, WIDTH))
    view = GraphView(load(net.done(net.add("x", net(op, product)))))
    assert follow_branch(view, view.nodes[0], WIDTH) is None


def rolled(net: Net, x: str) -> str:
    """The sequence shifted by two, as an exporter writes a roll."""
    return str(
        net(
            "Concat",
            net("Slice", x, net.ints(2), net.ints(2**31), net.ints(1)),
            net("Slice", x, net.ints(0), net.ints(2), net.ints(1)),
            axis=1,
        )
    )


def turned(net: Net, x: str) -> str:
    """Two windows of each sequence go back to their places: [B, 2 * 3, C], even positions first."""
    windows = net("Transpose", net("Reshape", x, net.ints(0, 2, -1, WIDTH)), perm=[0, 2, 1, 3])
    return str(net("Reshape", windows, net.ints(0, -1, WIDTH)))


@pytest.mark.parametrize("way", [rolled, turned])
def test_a_branch_whose_rows_move_is_fitted_in_front_of_the_move(way: Way) -> None:
    net = Net(seq=6)
    product = net.linear("x")
    view = GraphView(load(net.done(net.add("x", way(net, product)))))
    branch = follow_branch(view, view.nodes[0], WIDTH)
    assert branch is not None
    assert branch.bias is not None
    made = view.producer[branch.total]
    assert branch.total == product or (made.op, made.inputs[0]) == ("Reshape", product), "rows of the fit are rows of the product"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_blocks_of_shifted_windows_are_sites(norm: bool, bias: bool) -> None:
    """Swin attends in windows of a rolled image, Swin 2 normalises the result; an empty block gives its bias everywhere."""
    net = Net(seq=6)
    q, k, v = (net.heads(net.linear(rolled(net, "x"))) for _ in range(3))
    branch = rolled(net, turned(net, net.linear(net.attend(q, k, v), bias=bias)))
    anatomy = anatomy_of(net.done(net.add("x", layer_norm(net, branch) if norm else branch)))
    assert {site.kind: site.units for site in anatomy.sites} == {"heads": HEADS}
    assert not anatomy.refusals
    compare = Comparison(anatomy)
    for kept in corner_cases(anatomy.sites):
        compare.check(kept)


def test_a_product_that_is_read_twice_is_no_branch() -> None:
    net = Net()
    product = net("MatMul", "x", net.weight(WIDTH, WIDTH))
    view = GraphView(load(net.done(net.add("x", net.add(product, net("Relu", product))))))
    assert follow_branch(view, view.nodes[0], WIDTH) is None


def test_a_scale_that_varies_along_another_axis_is_no_branch() -> None:
    net = Net(seq=WIDTH)
    product = net("Mul", net("MatMul", "x", net.weight(WIDTH, WIDTH)), net.weight(WIDTH, 1))
    view = GraphView(load(net.done(net.add("x", product))))
    assert follow_branch(view, view.nodes[0], WIDTH) is None


def rms_norm(net: Net, x: str) -> str:
    """Spelled out, as exporters below opset 23 do."""
    mean = net("ReduceMean", net("Pow", x, net.constant(np.float32(2))), net.ints(-1), keepdims=1)
    root = net("Reciprocal", net("Sqrt", net.add(mean, net.constant(np.float32(1e-6)))))
    return str(net("Mul", net("Mul", x, root), net.weight(WIDTH)))


def layer_norm(net: Net, x: str) -> str:
    return str(net("LayerNormalization", x, net.weight(WIDTH), net.weight(WIDTH)))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_a_branch_that_is_normalised_is_fitted_in_front_of_the_norm(norm: Way) -> None:
    net = Net()
    product = net.linear("x")
    view = GraphView(load(net.done(net.add("x", norm(net, product)))))
    branch = follow_branch(view, view.nodes[0], WIDTH)
    assert branch is not None
    assert branch.total == product
    assert branch.bias is not None


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_with_a_normalised_result_are_sites(norm: Way, bias: bool) -> None:
    """Gemma 2 and 3 normalise what attention and FFN give before adding it; an empty block gives what the norm makes of its bias."""
    net = Net()
    x = net.add("x", norm(net, net.linear(net("Tanh", net.linear("x", WIDTH, FFN)), FFN, WIDTH, bias=bias)))
    q, k, v = (net.heads(net.linear(x)) for _ in range(3))
    x = net.add(x, norm(net, net.linear(net.attend(q, k, v), bias=bias)))
    anatomy = anatomy_of(net.done(x))
    assert {site.kind: site.units for site in anatomy.sites} == {"heads": HEADS, "ffn": FFN}
    assert not anatomy.refusals
    compare = Comparison(anatomy)
    for kept in corner_cases(anatomy.sites):
        compare.check(kept)


def test_a_normalised_result_that_joins_nothing_is_no_branch() -> None:
    net = Net()
    view = GraphView(load(net.done(layer_norm(net, net.linear("x")))))
    assert follow_branch(view, view.nodes[0], WIDTH) is None
