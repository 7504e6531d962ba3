"""The int8 form of real exports and of small graphs: what computes in integers, what does not, and how near the outputs stay."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.integer import int8_products, to_int8
from onnxprune.graph.model import Model, load
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.view import GraphView, Node
from onnxprune.quantize.form import SCHEMES, Int8Form
from onnxprune.quantize.ranges import Range, uint8_parameters
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net

TOLERANCE = 0.1
"""Relative L2 error of an output. The worst of the exports comes to half of it, as sharp random attention amplifies rounding; a wrong
scale, zero point or orientation makes an error of about one. That single products are exact is tested apart."""

PRODUCTS = {"bert": (4, 2), "minilm": (4, 2), "vit": (4, 2), "deit": (4, 2), "gpt2": (2, 2), "llama": (4, 3)}
"""Products of an attention block and of an FFN, as exported."""

Feeds = dict[str, np.ndarray]


def form_of(model: Model, scheme: str, per_channel: bool, feeds: Iterable[Feeds] = (), only: Iterable[str] | None = None) -> Int8Form:
    """All products (or ``only`` these) in integers; static ranges cover what the feeds give."""
    products = [node for node in int8_products(GraphView(model)) if only is None or node.name in set(only)]
    names = tuple(node.name for node in products)
    return (
        Int8Form("static", per_channel, names, ranges_of(model, products, feeds))
        if scheme == "static"
        else Int8Form("dynamic", per_channel, names)
    )


def ranges_of(model: Model, products: list[Node], feeds: Iterable[Feeds]) -> dict[str, Range]:
    tensors = sorted({node.inputs[0] for node in products})
    session = open_session(with_outputs(model, tensors))
    found: dict[str, Range] = {}
    for feed in feeds:
        for name, values in zip(tensors, run(session, feed, tensors), strict=True):
            low, high = found.get(name, Range(0.0, 0.0))
            found[name] = Range(min(low, float(values.min())), max(high, float(values.max())))
    return found


def errors(quantised: Model, model: Model, feeds: Iterable[Feeds]) -> list[float]:
    """Relative L2 error of every output on every feed."""
    integer, exact = open_session(quantised), open_session(model)
    found = []
    for feed in feeds:
        for got, want in zip(run(integer, feed), run(exact, feed), strict=True):
            assert got.shape == want.shape
            found.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    return found


def check_integer(quantised: Model, model: Model, form: Int8Form) -> None:
    """Exactly the products of the form compute in integers, once for each tensor they read."""
    view = GraphView(quantised)
    nodes = {node.name: node for node in view.nodes}
    activations = {node.inputs[0] for node in GraphView(model).nodes if node.name in form.products}
    ops = Counter(node.op for node in view.nodes)
    for name in form.products:
        node = nodes[name]
        if form.scheme == "dynamic":
            assert node.op == "MatMulInteger"
            assert view.producer[node.inputs[0]].op == "DynamicQuantizeLinear"
            weight, zero_point = quantised.initializer(node.inputs[1]), quantised.initializer(node.inputs[3])
        else:
            assert node.op == "MatMul"
            assert view.producer[view.producer[node.inputs[0]].inputs[0]].op == "QuantizeLinear"
            assert view.producer[node.inputs[1]].op == "DequantizeLinear"
            weight, zero_point = (quantised.initializer(view.producer[node.inputs[1]].inputs[slot]) for slot in (0, 2))
        assert weight is not None
        assert zero_point is not None
        assert weight.dtype == np.int8
        assert not zero_point.any()
        assert zero_point.shape == (weight.shape[1:] if form.per_channel else ())
        assert weight.min() >= -127
    assert len({node.inputs[0] for node in nodes.values() if node.op in ("DynamicQuantizeLinear", "QuantizeLinear")}) == len(activations)
    if form.scheme == "dynamic":
        assert ops["DynamicQuantizeLinear"] == len(activations)
        assert ops["MatMulInteger"] == len(form.products)
        assert not ops["QuantizeLinear"] + ops["DequantizeLinear"]
    else:
        assert ops["QuantizeLinear"] == len(activations)
        assert ops["DequantizeLinear"] == len(activations) + len(form.products)
        assert not ops["DynamicQuantizeLinear"] + ops["MatMulInteger"]


def uneven(anatomy: Anatomy) -> Model:
    """A layer without heads, another without FFN, and different numbers in between."""
    counts = {"layer.0.heads": 0.0, "layer.0.ffn": 0.3, "layer.1.heads": 0.5, "layer.1.ffn": 0.0, "layer.2.ffn": 0.7}
    return slice_model(anatomy, {s.name: np.arange(round(counts[s.name] * s.units)) for s in anatomy.sites if s.name in counts})


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_export_pruned_or_not_computes_in_integers(name: str) -> None:
    anatomy = study(*canonicalise(load(zoo.path(name))))
    for model, gone in ((anatomy.model, 0), (uneven(anatomy), sum(PRODUCTS[name.split("-")[0]]))):
        feeds = [{key: zoo.feeds(name, *shape)[key] for key in model.input_names} for shape in ((3, 11, 0), (1, 11, 1), (2, 7, 2))]
        assert len(int8_products(GraphView(model))) >= sum(PRODUCTS[name.split("-")[0]]) * zoo.LAYERS - gone
        for scheme, per_channel in (("dynamic", True), ("dynamic", False), ("static", True)):
            form = form_of(model, scheme, per_channel, feeds)
            quantised = to_int8(model, form)
            onnx.checker.check_model(quantised.to_proto(), full_check=True)
            check_integer(quantised, model, form)
            assert max(errors(quantised, model, feeds[1:])) < TOLERANCE, (scheme, per_channel)


def small(opset: int = 18) -> Model:
    """FFN and a residual that reads the same activation as a product, with large weights outside the skeleton."""
    net = Net(opset)
    x = net.linear("x")
    for _ in range(2):
        x = net.add(x, net.ffn(x, "Tanh" if opset < 20 else "Relu", width=64))
    return Model.from_proto(net.done(x))


def small_feeds(rows: int = 2) -> Feeds:
    return {"x": np.random.default_rng(rows).standard_normal((rows, 5, WIDTH)).astype(np.float32)}


FORMS = [(scheme, per_channel) for scheme in SCHEMES for per_channel in (True, False)]


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
def test_the_same_form_gives_the_same_bytes(scheme: str, per_channel: bool) -> None:
    form = form_of(small(), scheme, per_channel, [small_feeds()])
    first, second = (to_int8(small(), form).to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
def test_only_the_products_named_are_quantised(scheme: str, per_channel: bool) -> None:
    """The residual sum, and a product that reads the same tensor but is not named, keep the float activation."""
    model = small()
    first = int8_products(GraphView(model))[1]
    form = form_of(model, scheme, per_channel, [small_feeds()], [first.name])
    quantised = to_int8(model, form)
    check_integer(quantised, model, form)
    float_readers = [node for node, _ in GraphView(quantised).consumers[first.inputs[0]]]
    assert Counter(node.op for node in float_readers) == {"Add": 1, "DynamicQuantizeLinear" if scheme == "dynamic" else "QuantizeLinear": 1}
    assert max(errors(quantised, model, [small_feeds()])) < TOLERANCE


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
def test_weights_on_the_grid_become_exactly_their_integers(scheme: str, per_channel: bool) -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (64, 48)).astype(np.int8)
    integers[0] = 127
    scale = (rng.random(48 if per_channel else 1) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
    for op, transposed in (("MatMul", False), ("Gemm", False), ("Gemm", True)):
        weights = (integers * scale.astype(np.float64)).astype(np.float32)
        model = gemm(op, weights.T if transposed else weights, transB=int(transposed))
        quantised = to_int8(model, form_of(model, scheme, per_channel, [{"x": np.ones((3, 64), np.float32)}]))
        found = [array for array in quantised.weights.values() if array.dtype == np.int8]
        assert len(found) == 1
        np.testing.assert_array_equal(found[0], integers)


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
def test_a_product_computes_what_its_integers_stand_for(scheme: str, per_channel: bool) -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-63, 64, (64, 48))
    # Pairs of products of these stay within 16 bits, so that processors which saturate there agree.
    integers[:2] = [[127], [0]]
    scale = np.linspace(0.001, 0.01, 48 if per_channel else 1, dtype=np.float32)
    x = rng.uniform(-0.7, 1.9, (9, 64)).astype(np.float32)
    model = gemm("MatMul", (integers * scale).astype(np.float32))
    (got,) = run(open_session(to_int8(model, form_of(model, scheme, per_channel, [{"x": x}]))), {"x": x})
    step, zero = uint8_parameters(float(x.min()), float(x.max()))
    levels = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    want = (levels.astype(np.int64) @ integers) * (np.float64(step) * scale)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def gemm(op: str, weights: np.ndarray, **attributes: float) -> Model:
    """``x [rows, n_in]`` times a matrix, and a bias if it is a Gemm."""
    inputs = ["x", "w", "b"] if op == "Gemm" else ["x", "w"]
    attributes = attributes if op == "Gemm" else {}
    outputs = weights.shape[0 if attributes.get("transB") else 1]
    bias = np.linspace(-1, 1, outputs, dtype=np.float32)
    node = helper.make_node(op, inputs, ["y"], "product", **attributes)
    node.metadata_props.add(key="scope", value="classifier")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weights.size // outputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in zip(inputs[1:], (weights, bias), strict=False)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    proto.metadata_props.add(key="author", value="nobody")
    return Model.from_proto(proto)


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_keeps_its_bias_in_float_and_its_metadata(scheme: str, per_channel: bool, transposed: int) -> None:
    weights = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    model = gemm("Gemm", weights, transB=transposed)
    feeds = {"x": np.random.default_rng(1).standard_normal((6, 40)).astype(np.float32)}
    quantised = to_int8(model, form_of(model, scheme, per_channel, [feeds]))
    assert max(errors(quantised, model, [feeds])) < TOLERANCE
    assert {"x": [0.0]}.keys() == set(quantised.input_names)
    bias = quantised.initializer("b")
    assert bias is not None
    assert bias.dtype == np.float32
    product = next(node for node in quantised.proto.graph.node if node.name == "product")
    assert {entry.key: entry.value for entry in product.metadata_props} == {"scope": "classifier"}
    assert {entry.key: entry.value for entry in quantised.proto.metadata_props} == {"author": "nobody"}


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
def test_every_product_runs_in_an_integer_kernel(scheme: str, per_channel: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """What onnxruntime makes of a Gemm, and of products with and without a bias behind them."""
    import onnxruntime

    for model, feeds in (
        (gemm("Gemm", np.eye(40, dtype=np.float32), transB=1), {"x": np.ones((3, 40), np.float32)}),
        (small(), small_feeds()),
    ):
        form = form_of(model, scheme, per_channel, [feeds])
        settings = onnxruntime.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        payload = to_int8(model, form).to_proto().SerializeToString()
        onnxruntime.InferenceSession(payload, settings, providers=["CPUExecutionProvider"])
        ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        assert ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"] == len(form.products)
        assert not ops["MatMul"] + ops["Gemm"]


@pytest.mark.parametrize("low", [-3.0, -1e-3, 0.0])
def test_static_ranges_are_used_to_the_last_bit(low: float) -> None:
    model = gemm("MatMul", np.eye(40, dtype=np.float32))
    quantised = to_int8(model, Int8Form("static", True, ("product",), {"x": Range(low, 0.7)}))
    node = next(node for node in GraphView(quantised).nodes if node.op == "QuantizeLinear")
    scale, zero_point = uint8_parameters(low, 0.7)
    assert [quantised.initializer(name) for name in node.inputs[1:]] == [scale, zero_point]


@pytest.mark.parametrize(("scheme", "per_channel"), FORMS)
def test_a_weight_with_two_inputs_is_quantised_once(scheme: str, per_channel: bool) -> None:
    net = Net()
    weight = net.weight(WIDTH, WIDTH)
    model = Model.from_proto(net.done(net("MatMul", net("Relu", net("MatMul", "x", weight)), weight)))
    quantised = to_int8(model, form_of(model, scheme, per_channel, [small_feeds()]))
    assert sum(tensor.data_type == TensorProto.INT8 for tensor in quantised.proto.graph.initializer) == 2, "values and zero points"
    assert weight not in quantised.initializer_names
    onnx.checker.check_model(quantised.to_proto(), full_check=True)
    assert max(errors(quantised, model, [small_feeds()])) < TOLERANCE


def test_a_float_weight_somebody_else_reads_stays() -> None:
    net = Net()
    weight = net.weight(WIDTH, WIDTH)
    model = Model.from_proto(net.done(net("MatMul", net.add("x", net("ReduceSum", weight)), weight)))
    quantised = to_int8(model, form_of(model, "dynamic", True))
    assert weight in quantised.initializer_names
    assert max(errors(quantised, model, [small_feeds()])) < TOLERANCE


def test_names_in_use_are_not_taken() -> None:
    """A tensor and a node called what the quantizer would call its own."""
    net = Net()
    product = net("MatMul", "x", net.weight(WIDTH, WIDTH))
    other = net("Relu", product)
    model = Model.from_proto(net.done(net.add(other, "x")))
    for node in model.proto.graph.node:
        for field in (node.input, node.output):
            field[:] = ["x_scale" if name == other else name for name in field]
        node.name = "x_QuantizeLinear" if node.op_type == "Relu" else node.name
    quantised = to_int8(model, form_of(model, "dynamic", True))
    onnx.checker.check_model(quantised.to_proto(), full_check=True)
    names = [node.name for node in quantised.proto.graph.node]
    assert len(set(names)) == len(names)
    assert max(errors(quantised, model, [small_feeds()])) < TOLERANCE


def test_operators_of_onnxruntime_do_not_stop_it() -> None:
    net = Net()
    hidden = net.ms("FastGelu", net.linear("x", WIDTH, FFN))
    model = Model.from_proto(net.done(net.linear(hidden, FFN, WIDTH)))
    for scheme in SCHEMES:
        form = form_of(model, scheme, True, [small_feeds()])
        quantised = to_int8(model, form)
        check_integer(quantised, model, form)
        assert max(errors(quantised, model, [small_feeds()])) < TOLERANCE


def test_products_that_cannot_compute_in_integers_are_left_out() -> None:
    net = Net()
    matrix, cube = net.weight(WIDTH, WIDTH), net.weight(2, WIDTH, WIDTH)
    flat = net("Reshape", "x", net.ints(-1, WIDTH))
    good = net("Gemm", flat, matrix)
    bad = [
        net("Gemm", flat, matrix, alpha=2.0),
        net("Gemm", flat, matrix, net.weight(WIDTH), beta=0.5),
        net("Gemm", net("Transpose", flat, perm=[1, 0]), matrix, transA=1),
        net("MatMul", flat, net("Transpose", flat, perm=[1, 0])),
        net("MatMul", net("Unsqueeze", flat, net.ints(0)), cube),
        net("MatMul", matrix, net("Transpose", flat, perm=[1, 0])),
        net("MatMul", flat, net("Abs", matrix)),
    ]
    model = Model.from_proto(net.done(good, *bad))
    view = GraphView(model)
    assert [node.outputs[0] for node in int8_products(view)] == [good]
    for output in bad:
        with pytest.raises(InputError, match=f"{view.producer[output].name}.* cannot compute in integers"):
            to_int8(model, Int8Form("dynamic", True, (view.producer[output].name,)))


@pytest.mark.parametrize("opset", [10, 12])
def test_an_old_opset_is_raised_as_far_as_the_form_needs(opset: int) -> None:
    model = small(opset)
    for scheme, per_channel in FORMS:
        needed = 11 if scheme == "dynamic" else 13 if per_channel else 10
        form = form_of(model, scheme, per_channel, [small_feeds()])
        quantised = to_int8(model, form)
        assert quantised.opset() == max(opset, needed)
        check_integer(quantised, model, form)
        assert max(errors(quantised, model, [small_feeds()])) < TOLERANCE


def test_an_opset_that_cannot_be_raised_is_refused_with_what_is_needed() -> None:
    net = Net(opset=8)
    norm = net("BatchNormalization", net.linear("x"), *(net.weight(5) for _ in range(4)), spatial=0)
    model = Model.from_proto(net.done(norm))
    with pytest.raises(InputError, match=r"opset 8, this int8 form needs 13.*spatial must have value 1"):
        to_int8(model, Int8Form("static", True, ("MatMul.0",), {"x": Range(-1, 1)}))


def test_forms_that_do_not_fit_are_refused() -> None:
    model = small()
    product = int8_products(GraphView(model))[0]
    good = form_of(model, "static", True, [small_feeds()])
    with pytest.raises(InputError, match="'gone' of the int8 form is not in the graph"):
        to_int8(model, Int8Form("dynamic", True, ("gone",)))
    with pytest.raises(InputError, match=f"no range for tensor '{product.inputs[0]}'"):
        to_int8(model, dataclasses.replace(good, ranges={}))
    for bound in (np.inf, np.nan):
        with pytest.raises(InputError, match=f"tensor '{product.inputs[0]}'.* no range that uint8 can cover"):
            to_int8(model, dataclasses.replace(good, ranges={**good.ranges, product.inputs[0]: Range(0.0, bound)}))


@pytest.mark.parametrize(("dtype", "match"), [(np.float16, "half-precision"), (np.int8, "already quantized")])
def test_other_precisions_are_refused(dtype: type, match: str) -> None:
    model = gemm("MatMul", np.eye(40, dtype=np.float32))
    proto = model.to_proto()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(40, dtype=dtype), "w"))
    with pytest.raises(InputError, match=match):
        to_int8(Model.from_proto(proto), Int8Form("dynamic", True, ("product",)))


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = np.eye(40, dtype=np.float32)
    weights[3, 4] = np.nan
    with pytest.raises(InputError, match=r"product.* infinite or NaN"):
        to_int8(gemm("MatMul", weights), Int8Form("dynamic", True, ("product",)))


def test_the_input_is_not_modified_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    before, handlers = model.to_proto().SerializeToString(deterministic=True), list(logging.getLogger().handlers)
    with caplog.at_level(logging.DEBUG):
        to_int8(model, form_of(model, "dynamic", True))
        to_int8(model, form_of(model, "static", True, [small_feeds()]))
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert [record for record in caplog.records if record.name == "root"] == []
    assert logging.getLogger().handlers == handlers
