"""Half precision: close to float32 on every kind of export, and exact where float16 would break."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxprune.errors import InputError
from onnxprune.graph.half import LARGEST, SMALLEST, to_float16
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import WIDTH, Net

TOLERANCE = 0.005
"""Largest difference of an output after three layers, as a share of the largest output. Ten roundings of 2^-11."""

ROUNDING = 2e-3
"""The same after one or two roundings."""


def converted(model: Model, **feeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First output in half precision and in float32."""
    half, count = to_float16(model)
    assert count > 0
    onnx.checker.check_model(half.to_proto())
    return run(open_session(half), feeds)[0], run(open_session(model), feeds)[0]


def distance(ours: np.ndarray, wanted: np.ndarray) -> float:
    assert ours.dtype == wanted.dtype == np.float32
    return float(np.abs(ours - wanted).max() / np.abs(wanted).max())


def declarations(model: Model) -> list[onnx.ValueInfoProto]:
    return [*model.proto.graph.input, *model.proto.graph.output]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_export_stays_close(name: str) -> None:
    model = load(zoo.path(name))
    # onnxruntime runs the rotary caches of opset 23 at batch 1 only.
    feeds = zoo.feeds(name, batch=1 if name.startswith("llama") and name.endswith("do23") else 3)
    ours, wanted = converted(model, **feeds)
    assert distance(ours, wanted) < TOLERANCE
    half, _ = to_float16(model)
    assert declarations(half) == declarations(model)
    assert {str(array.dtype) for array in half.weights.values()} <= {"float16", "int64"}
    assert half.proto.metadata_props == model.proto.metadata_props
    dense = {node.name: node.metadata_props for node in model.proto.graph.node}
    assert all(node.metadata_props == dense[node.name] for node in half.proto.graph.node if node.name in dense)


def rms_norm(net: Net, x: str) -> str:
    mean = net("ReduceMean", net("Pow", x, net.constant(np.float32(2))), net.ints(-1), keepdims=1)
    root = net("Sqrt", net("Add", mean, net.constant(np.float32(1e-12))))
    return str(net("Mul", net.weight(WIDTH), net("Mul", x, net("Reciprocal", root))))


def layer_norm(net: Net, x: str) -> str:
    centred = net("Sub", x, net("ReduceMean", x, net.ints(-1), keepdims=1))
    variance = net("ReduceMean", net("Mul", centred, centred), net.ints(-1), keepdims=1)
    return str(net("Div", centred, net("Pow", net("Add", variance, net.constant(np.float32(1e-12))), net.constant(np.float32(0.5)))))


def unit_vector(net: Net, x: str) -> str:
    length = net("Clip", net("ReduceL2", x, net.ints(-1), keepdims=1), net.constant(np.float32(1e-12)))
    return str(net("Div", x, net("Expand", length, net("Shape", x))))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm, unit_vector])
@pytest.mark.parametrize("scale", [2.0**-13, 1.0, 2.0**14])
@pytest.mark.parametrize("constants", ["initializers", "nodes"])
def test_spelled_out_norms_survive_large_small_and_constant_rows(norm: Callable[[Net, str], str], scale: float, constants: str) -> None:
    net = Net()
    model = Model.from_proto(net.done(norm(net, "x")))
    # Powers of two and zero are the same in float16.
    x = np.random.default_rng(0).choice([-1.0, -0.5, 0.5, 1.0], (2, 5, WIDTH)).astype(np.float32) * np.float32(scale)
    x[1, 2] = 0
    half, _ = to_float16(with_constant_nodes(model) if constants == "nodes" else model)
    # onnxruntime computes these in float32 on the CPU whatever the types say; the reference takes them at their word.
    with np.errstate(all="ignore"):
        ours = ReferenceEvaluator(half.to_proto()).run(None, {"x": x})[0]
    assert distance(np.asarray(ours), run(open_session(model), {"x": x})[0]) < ROUNDING


def with_constant_nodes(model: Model) -> Model:
    """Initializers written as Constant nodes."""
    proto = model.to_proto()
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in proto.graph.initializer]
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return Model.from_proto(proto)


def test_product_before_a_norm_of_onnxruntimes_own_operator() -> None:
    net = Net()
    grown = net.ms("FusedMatMul", "x", net.weight(WIDTH, WIDTH), alpha=3000.0)
    model = Model.from_proto(net.done(rms_norm(net, grown)))
    ours, wanted = converted(model, x=np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32))
    assert distance(ours, wanted) < ROUNDING


@pytest.mark.parametrize("constants", ["initializers", "nodes"])
def test_angles_of_far_positions_are_exact(constants: str) -> None:
    net = Net()
    positions = net("Cast", net.input("positions", ["batch", "seq", 1], TensorProto.INT64), to=TensorProto.FLOAT)
    frequencies = (10000.0 ** -np.linspace(0, 1, WIDTH)).astype(np.float32)
    if constants == "nodes":
        frequency = net("Constant", value=numpy_helper.from_array(frequencies))
    else:
        frequency = net.constant(frequencies)
    angle = net("Mul", positions, frequency)
    model = Model.from_proto(net.done(net("Add", "x", net("Add", net("Cos", angle), net("Sin", angle)))))
    x = np.zeros((1, 4, WIDTH), np.float32)
    ours, wanted = converted(model, x=x, positions=np.array([[[3], [2049], [8191], [131071]]]))
    assert distance(ours, wanted) < ROUNDING


def test_table_measured_for_positions_is_halved() -> None:
    """The length comes from the shape of the embedded tokens; that does not make the table part of the angle."""
    half, _ = to_float16(load(zoo.path("llama-sdpa-ts17")))
    assert half.weights["inner.model.embed_tokens.weight"].dtype == np.float16


@pytest.mark.parametrize("large", [False, True])
def test_weights_are_clipped_to_the_range(large: bool) -> None:
    values = np.array([1e6, -1e6, 65504, 65519.9, 1e-9, -1e-9, 0, np.inf, -np.inf, 1 + 2**-10, 1 + 2**-12, 6e-5], np.float32)
    expected = [LARGEST, -LARGEST, 65504, LARGEST, SMALLEST, -SMALLEST, 0, np.inf, -np.inf, 1 + 2**-10, 1, np.float16(6e-5)]
    net = Net()
    weight = net.constant(np.tile(values, (50 if large else 1, 1)))
    model = Model.from_proto(net.done(net("Add", "x", net("ReduceMax", weight, net.ints(0), keepdims=1))))
    half, _ = to_float16(model)
    found = half.initializer(weight)
    assert (weight in half.weights) == large
    assert found is not None
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[0], np.array(expected, np.float16))


def test_converter_never_holds_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.transformers import float16

    given: list[int] = []
    convert = float16.convert_float_to_float16

    def spy(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
        given.append(proto.ByteSize())
        return convert(proto, **options)

    monkeypatch.setattr(float16, "convert_float_to_float16", spy)
    net = Net()
    model = Model.from_proto(net.done(net("MatMul", net("MatMul", "x", net.weight(WIDTH, 5000)), net.weight(5000, WIDTH))))
    half, count = to_float16(model)
    assert count == 2
    assert given[0] < 2000
    assert half.weight_bytes == model.weight_bytes // 2 == 5000 * WIDTH * 2 * 2


def test_same_bytes_every_time_and_the_given_model_unchanged() -> None:
    model = load(zoo.path("llama-sdpa-do18"))
    before = model.to_proto().SerializeToString(deterministic=True)
    first, second = (to_float16(model)[0].to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_model_without_float_is_returned_as_it_is() -> None:
    node = helper.make_node("Add", ["a", "a"], ["b"])
    a, b = (helper.make_tensor_value_info(name, TensorProto.INT64, [3]) for name in "ab")
    model = Model.from_proto(helper.make_model(helper.make_graph([node], "g", [a], [b]), opset_imports=[helper.make_opsetid("", 18)]))
    assert to_float16(model) == (model, 0)


def test_half_precision_is_not_converted_again() -> None:
    model, _ = to_float16(load(zoo.path("bert-sdpa-do18")))
    with pytest.raises(InputError, match="half-precision weights already"):
        to_float16(model)


def test_weights_that_old_files_declare_as_inputs_keep_their_declaration() -> None:
    net = Net()
    weight = net.weight(WIDTH, 40)
    net.input(weight, [WIDTH, 40])
    model = Model.from_proto(net.done(net("MatMul", net("MatMul", "x", weight), net.weight(40, WIDTH))))
    half, _ = to_float16(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in half.proto.graph.input}
    assert kinds == {"x": TensorProto.FLOAT, weight: TensorProto.FLOAT16}
    ours, wanted = converted(model, x=np.ones((1, 2, WIDTH), np.float32))
    assert distance(ours, wanted) < ROUNDING


def test_weight_read_inside_a_branch_follows() -> None:
    net = Net()
    weight = net.weight(WIDTH, 40)
    flag = net.input("flag", [], TensorProto.BOOL)
    product = net("MatMul", "x", weight)
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    nodes = {
        "then_branch": helper.make_node("Einsum", [product, weight], ["inner"], equation="bsf,wf->bsw"),
        "else_branch": helper.make_node("Identity", ["x"], ["inner"]),
    }
    branches = {name: helper.make_graph([node], name, [], [inner]) for name, node in nodes.items()}
    model = Model.from_proto(net.done(net("If", flag, **branches)))
    x = np.random.default_rng(0).standard_normal((1, 3, WIDTH)).astype(np.float32)
    for value in (True, False):
        ours, wanted = converted(model, x=x, flag=np.array(value))
        assert distance(ours, wanted) < ROUNDING


def test_conversion_imports_no_framework() -> None:
    script = (
        "import sys, tests.graph.net as net, onnxprune.graph.half as half, onnxprune.graph.model as model\n"
        "n = net.Net(); m = model.Model.from_proto(n.done(n.linear('x'))); assert half.to_float16(m)[1] == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
