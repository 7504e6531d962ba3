"""Every derivative rule against central differences in float64, at several opsets and at sizes other than the profiled ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnxprune.errors import InputError
from onnxprune.graph.autodiff import GRADIENT, TARGET, WEIGHT, MissingGradient, Tap, Tape, differentiate, gradient_model
from onnxprune.graph.autodiff.reverse import erf_gelus
from onnxprune.graph.autodiff.rules import RULES
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run

OPSETS = (11, 13, 17, 18, 23, 25)
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One operator. Inputs named x, z, ... are float64 of the shapes given; "n" is the dynamic size."""

    label: str
    op: str
    shapes: dict[str, tuple[Any, ...]]
    attributes: dict[str, Any] | Callable[[int], dict[str, Any]]
    extra: Callable[[int], Sequence[np.ndarray | str | None]]
    since: int
    until: int
    low: float
    high: float
    outputs: int


def case(
    label: str,
    op: str | None = None,
    x: tuple[Any, ...] = ("n", 4),
    *,
    more: dict[str, tuple[Any, ...]] | None = None,
    extra: Callable[[int], Sequence[np.ndarray | str | None]] = lambda opset: (),
    since: int = 11,
    until: int = 99,
    low: float = -2.0,
    high: float = 2.0,
    outputs: int = 1,
    attributes: Callable[[int], dict[str, Any]] | None = None,
    **fixed: Any,
) -> Case:
    return Case(label, op or label, {"x": x, **(more or {})}, attributes or fixed, extra, since, until, low, high, outputs)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def axes(attribute_until: int, *values: int, **rest: Any) -> dict[str, Any]:
    """Arguments of a case whose axes are an attribute before an opset and an input from it on."""
    return {
        "attributes": lambda opset: rest if opset >= attribute_until else {"axes": list(values), **rest},
        "extra": lambda opset: [ints(*values)] if opset >= attribute_until else [],
    }


RNG = np.random.default_rng(7)
W = RNG.standard_normal((4, 5))
SCALE, SHIFT = RNG.uniform(0.5, 1.5, 4), RNG.standard_normal(4)

CASES = [
    *(case(op) for op in ("Identity", "Neg", "Abs", "Exp", "Sin", "Cos", "Erf", "Tanh", "Sigmoid", "Softplus", "Relu", "LeakyRelu")),
    *(case(op, low=0.3) for op in ("Sqrt", "Log", "Reciprocal")),
    case("Elu", alpha=0.7),
    case("HardSigmoid", low=-4, high=4, alpha=0.25),
    case("HardSwish", low=-5, high=5, since=17),
    case("Mish", since=18),
    case("Swish", since=25, alpha=1.3),
    case("gelu", "Gelu", since=23),
    case("gelu-tanh", "Gelu", since=23, approximate="tanh"),
    case("cast", "Cast", to=TensorProto.DOUBLE),
    case("dropout", "Dropout"),
    case("add-broadcast-row", "Add", more={"z": (4,)}),
    case("add-broadcast-ones", "Add", ("n", 3, 4), more={"z": ("n", 1, 4)}),
    case("add-dynamic-both", "Add", ("n", 4), more={"z": ("n", 1)}),
    case("sub", "Sub", ("n", 4), more={"z": (2, 1, 4)}),
    case("mul", "Mul", more={"z": (4,)}),
    case("square", "Mul", extra=lambda opset: ["x"]),
    case("div", "Div", more={"z": (4,)}, low=0.4),
    case("sum", "Sum", more={"z": (4,), "u": ("n", 1)}),
    case("mean", "Mean", more={"z": (4,), "u": ("n", 1)}),
    case("pow-2", "Pow", extra=lambda opset: [np.array(2.0)], since=13),
    case("pow-3", "Pow", extra=lambda opset: [np.array(3.0)], since=13),
    case("pow-half", "Pow", extra=lambda opset: [np.array(0.5)], low=0.3, since=13),
    case("pow-row", "Pow", more={"z": (4,)}, low=0.3, since=13),
    case("where", "Where", extra=lambda opset: [], more={"z": (4,)}),
    case("clip", "Clip", extra=lambda opset: [np.array(-0.7), np.array(0.9)]),
    case("max", "Max", more={"z": (4,)}),
    case("min", "Min", more={"z": ("n", 1)}),
    case("matmul-weight", "MatMul", ("n", 3, 4), extra=lambda opset: [W]),
    case("matmul-batched", "MatMul", ("n", 2, 3, 4), more={"z": ("n", 2, 4, 3)}),
    case("matmul-shared-right", "MatMul", ("n", 3, 4), more={"z": (4, 5)}),
    case("matmul-broadcast", "MatMul", ("n", 2, 3, 4), more={"z": (1, 4, 3)}),
    case("matmul-column", "MatMul", ("n", 4), more={"z": (4,)}),
    case("matmul-row", "MatMul", (4,), more={"z": (4, 5)}),
    case("matmul-deep-column", "MatMul", ("n", 3, 4), extra=lambda opset: [SCALE]),
    case("gemm", "Gemm", ("n", 4), more={"z": (4, 5), "u": (5,)}, alpha=0.7, beta=1.3),
    case("gemm-tb", "Gemm", ("n", 4), more={"z": (5, 4), "u": (1,)}, transB=1),
    case("gemm-ta", "Gemm", (4, "n"), more={"z": (4, 5)}, transA=1, alpha=0.5),
    case("gemm-ta-tb", "Gemm", (4, "n"), more={"z": (5, 4)}, transA=1, transB=1),
    case("einsum-scores", "Einsum", ("n", 3, 2, 4), more={"z": ("n", 5, 2, 4)}, since=13, equation="bqhd,bkhd->bhqk"),
    case("einsum-lone-sum", "Einsum", ("n", 3), more={"z": (3, 2)}, since=13, equation="ij,jk->k"),
    case("einsum-one", "Einsum", ("n", 3), since=13, equation="ij->j"),
    case("reshape", "Reshape", ("n", 6), extra=lambda opset: [ints(0, 2, 3)]),
    case("flatten", "Flatten", ("n", 2, 3), axis=1),
    case("squeeze", "Squeeze", ("n", 1, 3), **axes(13, 1)),
    case("unsqueeze", "Unsqueeze", ("n", 3), **axes(13, 1)),
    case("transpose", "Transpose", ("n", 2, 3), perm=[2, 0, 1]),
    case("transpose-default", "Transpose", ("n", 2, 3)),
    case("expand", "Expand", ("n", 1, 3), extra=lambda opset: [ints(2, 1, 4, 1)]),
    case("tile", "Tile", ("n", 3), extra=lambda opset: [ints(2, 3)]),
    case("concat", "Concat", ("n", 2), more={"z": ("n", 3)}, axis=1),
    case("concat-dynamic", "Concat", ("n", 2), more={"z": ("n", 2), "u": (3, 2)}, axis=0),
    case("split", "Split", ("n", 6), outputs=3, attributes=lambda opset: {"axis": 1} | ({"num_outputs": 3} if opset >= 18 else {})),
    case("split-sizes", "Split", ("n", 6), outputs=2, since=13, extra=lambda opset: [ints(2, 4)], axis=-1),
    case("pad", "Pad", ("n", 3), extra=lambda opset: [ints(1, 0, 2, 1)]),
    case("trilu", "Trilu", ("n", 4, 4), since=17, upper=0),
    case("slice", "Slice", ("n", 6), extra=lambda opset: [ints(1, -4), ints(9, 5), ints(0, 1)]),
    case("slice-from-end", "Slice", ("n", 6), extra=lambda opset: [ints(-1), ints(99), ints(0)]),
    case("slice-far-start", "Slice", ("n", 6), extra=lambda opset: [ints(-50), ints(2), ints(0)]),
    case("slice-steps", "Slice", ("n", 6), extra=lambda opset: [ints(1), ints(6), ints(1), ints(2)]),
    case("slice-reverse", "Slice", ("n", 6), extra=lambda opset: [ints(-1), ints(-99), ints(0), ints(-1)]),
    case("gather-one", "Gather", ("n", 3, 2), extra=lambda opset: [np.array(1)], axis=1),
    case("gather-last", "Gather", ("n", 3, 2), extra=lambda opset: [ints(-1)], axis=0),
    case("gather-repeats", "Gather", ("n", 3, 2), extra=lambda opset: [np.array([[0, 2], [2, -1]])], axis=1),
    case("gather-elements", "GatherElements", (3, 4), since=17, extra=lambda opset: [np.array([[0, 0, 2, 1], [1, 0, 2, -1]])], axis=0),
    case("gather-nd", "GatherND", ("n", 3, 2), since=17, extra=lambda opset: [np.array([[0, 1], [0, 1], [0, 2]])]),
    case("reduce-sum", "ReduceSum", ("n", 3, 2), **axes(13, 0, 2, keepdims=0)),
    case("reduce-sum-all", "ReduceSum", ("n", 3)),
    case("reduce-mean", "ReduceMean", ("n", 3, 2), **axes(18, -1)),
    case("reduce-mean-dynamic", "ReduceMean", ("n", 3, 2), **axes(18, 0, 1, keepdims=0)),
    case("reduce-max", "ReduceMax", ("n", 3, 2), **axes(18, 1)),
    case("reduce-min", "ReduceMin", ("n", 3, 2), **axes(18, 2, keepdims=0)),
    case("reduce-l2", "ReduceL2", ("n", 3, 2), **axes(18, 1, keepdims=0)),
    case("reduce-sum-square", "ReduceSumSquare", ("n", 3, 2), **axes(18, 1)),
    case("softmax", "Softmax", ("n", 3, 4), axis=-1),
    case("softmax-middle", "Softmax", ("n", 3, 4), since=13, axis=1),
    case("softmax-flattening", "Softmax", ("n", 3, 4), until=11, axis=1),
    case("log-softmax", "LogSoftmax", ("n", 3, 4), axis=-1),
    case("layer-norm", "LayerNormalization", ("n", 3, 4), since=17, extra=lambda opset: [SCALE, SHIFT]),
    case("layer-norm-wide", "LayerNormalization", ("n", 2, 2), since=17, extra=lambda opset: [SCALE.reshape(2, 2)], axis=1, epsilon=0.1),
    case("rms-norm", "RMSNormalization", ("n", 3, 4), since=23, extra=lambda opset: [SCALE], epsilon=0.01),
    case("rms-norm-wide", "RMSNormalization", ("n", 2, 2), since=23, extra=lambda opset: [SCALE.reshape(2, 2)], axis=-2),
    case("lp-norm", "LpNormalization", ("n", 3, 4), axis=1, p=2),
]


def _model(tested: Case, opset: int) -> Model:
    constants, names = {}, list(tested.shapes)
    if tested.op == "Where":
        names.insert(0, "condition")
        constants["condition"] = np.array([True, False, True, False])
    for position, value in enumerate(tested.extra(opset)):
        if isinstance(value, np.ndarray):
            constants[f"c{position}"] = value
            value = f"c{position}"
        names.append(value or "")
    outputs = [f"y{index}" for index in range(tested.outputs)]
    attributes = tested.attributes(opset) if callable(tested.attributes) else tested.attributes
    return _wrap([helper.make_node(tested.op, names, outputs, name="tested", **attributes)], tested.shapes, constants, outputs, opset)


def _wrap(
    nodes: list[onnx.NodeProto],
    shapes: dict[str, tuple[Any, ...]],
    constants: Feeds,
    outputs: Sequence[str],
    opset: int,
    dtype: int = TensorProto.DOUBLE,
) -> Model:
    graph = helper.make_graph(
        nodes,
        "tested",
        [helper.make_tensor_value_info(name, dtype, list(shape)) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def _feeds(shapes: dict[str, tuple[Any, ...]], n: int, low: float, high: float, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(low, high, [n if size == "n" else size for size in shape]) for name, shape in shapes.items()}


class Erf(OpRun):
    """ONNX's own evaluator rounds it to float32."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class LayerNormalization(OpRun):
    """ONNX's own evaluator saves and applies its statistics in float32."""

    def _run(self, x: np.ndarray, scale: np.ndarray, shift: Any = 0.0, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
        along = tuple(range(axis % x.ndim, x.ndim))
        mean = x.mean(along, keepdims=True)
        inverse = 1 / np.sqrt(x.var(along, keepdims=True) + epsilon)
        return ((x - mean) * inverse * scale + shift, mean, inverse)[: len(self.onnx_node.output)]


class Gelu(OpRun):
    """ONNX's own evaluator rounds its constants to float32."""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),)


def _evaluator(model: Model) -> ReferenceEvaluator:
    return ReferenceEvaluator(model.to_proto(), new_ops=[Erf, Gelu, LayerNormalization])


def _runner(model: Model) -> Callable[[Feeds], list[np.ndarray]]:
    """onnxruntime; ONNX's reference evaluator where it has no float64 kernel."""
    try:
        session = open_session(model)
    except InputError as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        evaluator = _evaluator(model)
        return lambda feeds: list(evaluator.run(None, feeds))
    return lambda feeds: run(session, feeds)


def _profile(model: Model, runs: Sequence[Feeds]) -> Profile:
    """What take_profile sees, for graphs that onnxruntime cannot run in float64."""
    names = [name for node in model.proto.graph.node for name in node.output if name]
    proto = model.copy_proto()
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    evaluator = _evaluator(model.with_proto(proto))
    seen = [dict(zip(names, evaluator.run(None, feeds), strict=True)) | feeds for feeds in runs]
    shapes = [{name: np.shape(value) for name, value in tensors.items()} for tensors in seen]
    return Profile((shapes[0], shapes[1]), ({}, {}))


def _vjp(model: Model, runs: Sequence[Feeds]) -> Model:
    """Outputs: the adjoint of every graph input; inputs gain one adjoint ``d<y>`` per output."""
    wrt, outputs = model.input_names, model.output_names
    tape = Tape(model, _profile(model, runs))
    adjoints = differentiate(tape, {name: f"d{name}" for name in outputs}, wrt)
    graph = tape.proto.graph
    graph.node.extend(tape.nodes)
    graph.input.extend(helper.make_tensor_value_info(f"d{name}", TensorProto.DOUBLE, None) for name in outputs)
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(adjoints[name], TensorProto.DOUBLE, None) for name in wrt)
    return tape.model.with_proto(tape.proto)


def _check(model: Model, shapes: dict[str, tuple[Any, ...]], sizes: Sequence[int], low: float, high: float) -> None:
    forward = _runner(model)
    backward = _runner(_vjp(model, [_feeds(shapes, n, low, high, n) for n in (3, 5)]))
    for n in sizes:
        feeds = _feeds(shapes, n, low, high, 10 + n)
        rng = np.random.default_rng(n)
        seeds = [rng.standard_normal(np.shape(y)) for y in forward(feeds)]
        ours = backward(feeds | {f"d{name}": seed for name, seed in zip(model.output_names, seeds, strict=True)})
        for name, gradient in zip(model.input_names, ours, strict=True):
            expected = _central_difference(forward, feeds, name, seeds)
            np.testing.assert_allclose(gradient, expected, rtol=2e-6, atol=2e-7, err_msg=f"{name} at n={n}")


def _central_difference(function: Callable[[Feeds], Any], feeds: Feeds, name: str, seeds: list[np.ndarray]) -> np.ndarray:
    step = 1e-5
    result = np.zeros_like(feeds[name])
    for index in np.ndindex(result.shape):
        values = []
        for sign in (1, -1):
            moved = feeds[name].copy()
            moved[index] += sign * step
            values.append(sum(float((seed * y).sum()) for seed, y in zip(seeds, function(feeds | {name: moved}), strict=True)))
        result[index] = (values[0] - values[1]) / (2 * step)
    return result


@pytest.mark.parametrize(
    ("tested", "opset"),
    [
        pytest.param(tested, opset, id=f"{tested.label}-{opset}")
        for tested in CASES
        for opset in OPSETS
        if tested.since <= opset <= tested.until
    ],
)
def test_rule_equals_central_differences(tested: Case, opset: int) -> None:
    dynamic = any("n" in shape for shape in tested.shapes.values())
    _check(_model(tested, opset), tested.shapes, (4, 1) if dynamic and "nd" not in tested.label else (4,), tested.low, tested.high)


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_what_is_scattered_and_what_it_overwrites(reduction: str) -> None:
    """torch writes assignments to slices so, and caches of fixed length."""
    shapes: dict[str, tuple[Any, ...]] = {"x": (4, "n"), "z": (2, "n")}
    nodes = [helper.make_node("ScatterND", ["x", "places", "z"], ["y"], reduction=reduction)]
    _check(_wrap(nodes, shapes, {"places": np.array([[2], [0]])}, ["y"], 18), shapes, (3,), -1, 1)


def test_what_is_scattered_along_an_axis() -> None:
    shapes: dict[str, tuple[Any, ...]] = {"x": (4, "n"), "z": (2, "n")}
    nodes = [helper.make_node("Expand", ["column", "width"], ["places"]), helper.make_node("ScatterElements", ["x", "places", "z"], ["y"])]
    nodes = [helper.make_node("Shape", ["x"], ["width"], start=1), *nodes]
    _check(_wrap(nodes, shapes, {"column": np.array([[2], [0]])}, ["y"], 18), shapes, (3,), -1, 1)


def test_the_largest_values_go_back_to_their_places() -> None:
    nodes = [helper.make_node("TopK", ["x", "two"], ["y", "places"], axis=1)]
    _check(_wrap(nodes, {"x": ("n", 5)}, {"two": ints(2)}, ["y"], 18), {"x": ("n", 5)}, (3,), -1, 1)


TESTED_WITH_CONVOLUTIONS = set(
    "Conv ConvTranspose MaxPool AveragePool GlobalMaxPool GlobalAveragePool "
    "BatchNormalization InstanceNormalization Resize Upsample SpaceToDepth DepthToSpace".split()
)


def test_every_rule_has_a_case() -> None:
    assert {op for _, op in RULES} - {tested.op for tested in CASES} - TESTED_WITH_CONVOLUTIONS == {
        "CastLike",
        "ScatterElements",
        "ScatterND",
        "TopK",
    }


@pytest.mark.parametrize("form", ["half-last", "half-on-input", "half-on-erf", "mul-scale"])
def test_erf_gelu_is_recognised_and_right_in_every_spelling(form: str) -> None:
    half, one = np.array(0.5), np.array(1.0)
    constants = {"half": half, "one": one, "root": np.array(math.sqrt(2)), "inverse": np.array(math.sqrt(0.5))}
    scale = helper.make_node("Mul", ["inverse", "x"], ["u"]) if form == "mul-scale" else helper.make_node("Div", ["x", "root"], ["u"])
    nodes = [scale, helper.make_node("Erf", ["u"], ["e"]), helper.make_node("Add", ["e", "one"], ["a"])]
    match form:
        case "half-on-input":
            nodes += [helper.make_node("Mul", ["x", "half"], ["h"]), helper.make_node("Mul", ["h", "a"], ["y"])]
        case "half-on-erf":
            nodes += [helper.make_node("Mul", ["a", "half"], ["h"]), helper.make_node("Mul", ["x", "h"], ["y"])]
        case _:
            nodes += [helper.make_node("Mul", ["x", "a"], ["h"]), helper.make_node("Mul", ["h", "half"], ["y"])]
    model = _wrap(nodes, {"x": ("n", 4)}, constants, ["y"], 17)
    assert len(erf_gelus(GraphView(model))) == 1
    _check(model, {"x": ("n", 4)}, (2, 1), -3, 3)


def test_erf_with_other_constants_is_not_taken_for_gelu() -> None:
    constants = {"half": np.array(0.5), "one": np.array(1.0), "root": np.array(1.5)}
    nodes = [
        helper.make_node("Div", ["x", "root"], ["u"]),
        helper.make_node("Erf", ["u"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["a"]),
        helper.make_node("Mul", ["x", "a"], ["h"]),
        helper.make_node("Mul", ["h", "half"], ["y"]),
    ]
    model = _wrap(nodes, {"x": ("n", 4)}, constants, ["y"], 17)
    assert not erf_gelus(GraphView(model))
    _check(model, {"x": ("n", 4)}, (2,), -3, 3)


def test_inner_tensor_of_a_gelu_may_have_other_readers() -> None:
    constants = {"half": np.array(0.5), "one": np.array(1.0), "root": np.array(math.sqrt(2))}
    nodes = [
        helper.make_node("Div", ["x", "root"], ["u"]),
        helper.make_node("Erf", ["u"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["a"]),
        helper.make_node("Mul", ["x", "a"], ["h"]),
        helper.make_node("Mul", ["h", "half"], ["g"]),
        helper.make_node("Mul", ["g", "u"], ["y"]),
    ]
    _check(_wrap(nodes, {"x": ("n", 4)}, constants, ["y"], 17), {"x": ("n", 4)}, (2,), -3, 3)


@pytest.mark.parametrize("tapped", ["x", "u", "e", "a", "h", "g"])
def test_tap_inside_a_gelu_sees_what_passes_there(tapped: str) -> None:
    """Seed d: the adjoints of x, x/sqrt 2, erf, 1 + erf, the product and the result, times their values."""
    constants = {"half": np.float32(0.5), "one": np.float32(1.0), "root": np.float32(math.sqrt(2))}
    nodes = [
        helper.make_node("Div", ["x", "root"], ["u"]),
        helper.make_node("Erf", ["u"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["a"]),
        helper.make_node("Mul", ["x", "a"], ["h"]),
        helper.make_node("Mul", ["h", "half"], ["g"]),
        helper.make_node("Identity", ["g"], ["y"]),
    ]
    model = _tapped(nodes, {name: np.array(value) for name, value in constants.items()})
    made = gradient_model(model, [Tap("t", tapped, 1, np.arange(3), 3)], "y", "identity")
    x = np.array([[-1.0, 0.5, 2.0]])
    u = x / math.sqrt(2)
    e = np.vectorize(math.erf)(u)
    d = x * (1 + e) / 2
    du = d * x / 2 * 2 / math.sqrt(math.pi) * np.exp(-u * u)
    expected = {"x": d * d + du * u, "u": du * u, "e": d * x / 2 * e, "a": d * x / 2 * (1 + e), "h": d * d, "g": d * d}[tapped]
    feeds = {"x": x.astype(np.float32), TARGET: np.zeros((1, 3), np.float32), WEIGHT: np.ones(1, np.float32)}
    (gradient,) = run(open_session(made), feeds)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_fully_masked_softmax_rows_get_zero_gradient() -> None:
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["bad"]),
        helper.make_node("Where", ["bad", "zero", "p"], ["y"]),
    ]
    mask = np.zeros((2, 3), np.float64)
    mask[1] = -np.inf
    shapes: dict[str, tuple[Any, ...]] = {"x": (2, 3)}
    model = _wrap(nodes, shapes, {"mask": mask, "zero": np.array(0.0)}, ["y"], 17)
    backward = _vjp(model, [_feeds(shapes, 1, -1, 1, seed) for seed in (0, 1)])
    (gradient,) = _runner(backward)(_feeds(shapes, 1, -1, 1, 2) | {"dy": np.arange(6.0).reshape(2, 3)})
    assert (gradient[1] == 0).all()
    assert np.abs(gradient[0]).min() > 0


def test_missing_rule_names_operator_and_node() -> None:
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"], name="running_total")]
    model = _wrap(nodes, {"x": ("n", 4)}, {"axis": np.array(1)}, ["y"], 17)
    with pytest.raises(MissingGradient, match=r"CumSum \(node 'running_total'\)"):
        _vjp(model, [_feeds({"x": ("n", 4)}, n, -1, 1, n) for n in (3, 5)])


def test_unsupported_form_names_the_reason() -> None:
    model = _wrap([helper.make_node("Pad", ["x", "p"], ["y"], mode="reflect")], {"x": ("n", 4)}, {"p": ints(0, 1, 0, 1)}, ["y"], 17)
    with pytest.raises(MissingGradient, match="mode 'constant'"):
        _vjp(model, [_feeds({"x": ("n", 4)}, n, -1, 1, n) for n in (3, 5)])


def _tapped(nodes: list[onnx.NodeProto], constants: Feeds) -> Model:
    return _wrap(nodes, {"x": ("n", 3)}, constants, ["y"], 17, TensorProto.FLOAT)


def test_operators_off_the_path_need_no_rule() -> None:
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    model = _tapped(nodes, {"axis": np.array(1), "w": RNG.standard_normal((3, 2)).astype(np.float32)})
    made = gradient_model(model, [Tap("t", "a", 1, np.array([0, 1, 1]), 2)], "y", "identity")
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    target, weight = np.zeros((4, 2), np.float32), np.array([1, 1, 2, 0], np.float32)
    (gradient,) = run(open_session(made), {"x": x, TARGET: target, WEIGHT: weight})
    activation, w = x.cumsum(1), np.asarray(model.initializer("w"))
    expected = activation * (weight[:, None] * (activation @ w) @ w.T)
    np.testing.assert_allclose(gradient, expected @ np.array([[1, 0], [0, 1], [0, 1]]), rtol=1e-5, atol=1e-6)


def test_unlabelled_positions_count_for_no_unit_and_dead_taps_are_zero() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["dead"]), helper.make_node("Neg", ["a"], ["y"])]
    taps = [Tap("half", "a", -1, np.array([-1, 0, 0]), 1), Tap("dead", "dead", -1, np.arange(3), 3)]
    made = gradient_model(_tapped(nodes, {}), taps, "y", "identity")
    x = np.array([[3.0, 1.0, 2.0]], np.float32)
    half, dead = run(open_session(made), {"x": x, TARGET: np.zeros((1, 3), np.float32), WEIGHT: np.ones(1, np.float32)})
    assert made.output_names == (GRADIENT + "half", GRADIENT + "dead")
    np.testing.assert_allclose(half, [[1.0 + 4.0]])
    np.testing.assert_array_equal(dead, np.zeros((1, 3)))


@pytest.mark.parametrize("start", [0, 1, -2, -9])
def test_slice_with_bounds_known_only_at_run_time(start: int) -> None:
    """The bounds are data, so neither the graph nor its profile fixes them."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Slice", ["a", "start", "end", "axis"], ["s"]),
        helper.make_node("Neg", ["s"], ["y"]),
    ]
    model = _tapped(nodes, {"end": ints(3), "axis": ints(1)})
    proto = model.copy_proto()
    proto.graph.input.append(helper.make_tensor_value_info("start", TensorProto.INT64, [1]))
    made = gradient_model(model.with_proto(proto), [Tap("t", "a", 1, np.arange(3), 3)], "y", "identity")
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    kept = np.zeros((2, 3), np.float32)
    kept[:, start:] = x[:, start:]
    target = np.zeros(x[:, start:].shape, np.float32)
    (gradient,) = run(open_session(made), {"x": x, "start": ints(start), TARGET: target, WEIGHT: np.ones(2, np.float32)})
    np.testing.assert_allclose(gradient, kept**2)


def test_half_precision_graph_returns_single_precision_gradients() -> None:
    constants = {"w": W.astype(np.float16), "scale": SCALE.astype(np.float16), "shift": SHIFT.astype(np.float16)}
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "scale", "shift"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["y"]),
    ]
    half = _wrap(nodes, {"x": ("n", 4)}, constants, ["y"], 17, TensorProto.FLOAT16)
    single = _wrap(nodes, {"x": ("n", 4)}, {k: v.astype(np.float32) for k, v in constants.items()}, ["y"], 17, TensorProto.FLOAT)
    x, target = RNG.standard_normal((3, 4)), np.eye(5, dtype=np.float32)[:3]
    gradients = []
    for model, dtype in ((half, np.float16), (single, np.float32)):
        made = gradient_model(model, [Tap("t", "a", 1, np.arange(4), 4)], "y", "softmax")
        gradients += run(open_session(made), {"x": x.astype(dtype), TARGET: target, WEIGHT: np.ones(3, np.float32)})
    assert gradients[0].dtype == np.float32
    np.testing.assert_allclose(gradients[0], gradients[1], atol=0.03)


def test_unknown_tap_and_wrong_labels_are_input_errors() -> None:
    model = _tapped([helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])], {})
    with pytest.raises(InputError, match="no tensor 'nope'"):
        gradient_model(model, [Tap("t", "nope", 1, np.arange(3), 3)], "y", "identity")
    with pytest.raises(InputError, match="4 labels"):
        gradient_model(model, [Tap("t", "a", 1, np.arange(4), 4)], "y", "identity")
