"""Composite operators spelled out: against ONNX's own node tests and against onnxruntime's fused kernels."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph.lowering import COVERED, CannotLower, lower
from onnxprune.graph.model import Model
from onnxprune.runtime.session import open_session, run

MICROSOFT = "com.microsoft"
BATCH, SEQ, HEADS, SIZE = 2, 5, 3, 4
HIDDEN = HEADS * SIZE
RNG = np.random.default_rng(3)


def _refused_by_design(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Forms that node tests cover and lowering does not: debug output, external caches, windows, bfloat16."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    windows = any(attributes.get(f"{side}_window_size", -1) >= 0 for side in ("left", "right"))
    half = model.graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    return (len(node.output) > 3 and node.output[3] != "") or (len(node.input) > 6 and node.input[6] != "") or windows or half


@pytest.fixture(scope="module")
def node_tests() -> list[Any]:
    """ONNX's node tests of the operators lowered here. A test case is registered when its module is first imported."""
    for name in ("attention", "rotaryembedding"):
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    collected: list[Any] = importlib.import_module("onnx.backend.test.case.node").collect_testcases("RotaryEmbedding")
    return collected


@pytest.mark.parametrize(("op", "at_least"), [("Attention", 50), ("RotaryEmbedding", 8)])
def test_onnx_node_tests_pass_or_are_refused_by_design(op: str, at_least: int, node_tests: list[Any]) -> None:
    cases = {case.name: case for case in node_tests if not case.name.endswith("_expanded")}
    cases = {name: case for name, case in cases.items() if [node.op_type for node in case.model.graph.node] == [op]}
    passed = 0
    for name, case in cases.items():
        model = Model.from_proto(case.model)
        if _refused_by_design(case.model.graph.node[0], case.model):
            with pytest.raises(CannotLower):
                lower(model)
            continue
        lowered = lower(model)
        assert not any(node.op_type == op for node in lowered.proto.graph.node), name
        session = open_session(lowered)
        for inputs, expected in case.data_sets:
            results = run(session, dict(zip([value.name for value in case.model.graph.input], inputs, strict=True)))
            for ours, wanted in zip(results, expected, strict=True):
                tolerance = 1e-5 if wanted.dtype == np.float32 else 5e-3
                np.testing.assert_allclose(ours.astype(np.float64), wanted.astype(np.float64), atol=tolerance, rtol=tolerance, err_msg=name)
        passed += 1
    assert passed >= at_least


def _floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


Feeds = dict[str, np.ndarray]
Tensors = tuple[dict[str, Any], Feeds]
"""(inputs of a node in order, None = omitted; those among them that are initializers)."""


def _model(op: str, feeds: dict[str, Any], constants: Feeds, outputs: int, opset: int, attributes: Any, domain: str = MICROSOFT) -> Model:
    names = [name if value is not None else "" for name, value in feeds.items()]
    while names and not names[-1]:
        names.pop()
    produced = [f"y{index}" if index in (0, outputs - 1) or "Attention" in op else "" for index in range(outputs)]
    dynamic = {name: value for name, value in feeds.items() if value is not None and name not in constants}
    graph = helper.make_graph(
        [helper.make_node(op, names, produced, name="fused", domain=domain, **attributes)],
        "fused",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in dynamic.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in produced if name],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return Model.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))


def _attention(mask: np.ndarray | None = None, extra: np.ndarray | None = None) -> Tensors:
    constants = {"weight": _floats(HIDDEN, 3 * HIDDEN), "bias": _floats(3 * HIDDEN)}
    feeds = {"x": _floats(BATCH, SEQ, HIDDEN), **constants, "mask": mask, "past": None, "extra": extra}
    return feeds, constants


def _multi_head(mask: np.ndarray | None = None, extra: np.ndarray | None = None, bias: bool = True) -> Tensors:
    constants = {"bias": _floats(3 * HIDDEN)} if bias else {}
    operands = {name: _floats(BATCH, SEQ, HIDDEN) for name in ("q", "k", "v")}
    return {**operands, "bias": constants.get("bias"), "mask": mask, "extra": extra}, constants


def _multi_head_cached(past: int) -> Tensors:
    feeds, _ = _multi_head(bias=False)
    return {**feeds, **{name: _floats(BATCH, HEADS, past, SIZE) for name in ("past_key", "past_value")}}, {}


QUERIES, SHARED, DEPTH = 4, 2, 32
"""Heads of a GroupQueryAttention, whose angles must be a multiple of eight."""


def _group_query(tokens: int, past: int, packed: bool = False, half: int = 0, bias: bool = False, lengths: tuple[int, ...] = ()) -> Tensors:
    own = (QUERIES + 2 * SHARED if packed else QUERIES) * DEPTH
    feeds: dict[str, Any] = {"q": _floats(BATCH, tokens, own)}
    feeds |= {name: None if packed else _floats(BATCH, tokens, SHARED * DEPTH) for name in ("k", "v")}
    feeds |= {name: _floats(BATCH, SHARED, past, DEPTH) for name in ("past_key", "past_value")}
    feeds["last"] = np.array(lengths or [past + tokens] * BATCH, np.int32) - 1
    feeds["total"] = np.array(past + tokens, np.int32)
    angles = {name: _floats(16, half) for name in ("cos", "sin")} if half else {}
    feeds |= {"cos": angles.get("cos"), "sin": angles.get("sin"), "positions": None}
    feeds["extra"] = _floats(BATCH, QUERIES, tokens, past + tokens) if bias else None
    return feeds, angles


GROUPS = {"num_heads": QUERIES, "kv_num_heads": SHARED}


def _turning(rank: int, positions: np.ndarray, half: int = SIZE // 2) -> Tensors:
    angles = {name: _floats(16, half) for name in ("cos", "sin")}
    x = _floats(BATCH, SEQ, HIDDEN) if rank == 3 else _floats(BATCH, HEADS, SEQ, SIZE)
    return {"x": x, "positions": positions, **angles}, angles


def _norm(*names: str) -> Tensors:
    constants = {name: _floats(HIDDEN) for name in names}
    return {"x": _floats(BATCH, SEQ, HIDDEN), "skip": _floats(BATCH, SEQ, HIDDEN), **constants}, constants


PADDING = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int32)
BIAS = _floats(BATCH, HEADS, SEQ, SEQ)
LOWER = np.tril(np.ones((BATCH, SEQ, SEQ), np.int32))

FUSED = [
    pytest.param("Attention", _attention(), 1, {"num_heads": HEADS}, id="attention"),
    pytest.param("Attention", _attention(PADDING), 1, {"num_heads": HEADS, "scale": 0.3}, id="attention-mask"),
    pytest.param("Attention", _attention(np.array([3, 5], np.int32)), 1, {"num_heads": HEADS}, id="attention-lengths"),
    pytest.param("Attention", _attention(LOWER), 1, {"num_heads": HEADS}, id="attention-3d-mask"),
    pytest.param("Attention", _attention(None, BIAS), 1, {"num_heads": HEADS, "unidirectional": 1}, id="attention-causal-bias"),
    pytest.param("Attention", _attention(PADDING), 1, {"num_heads": HEADS, "mask_filter_value": -3.0}, id="attention-filter-value"),
    pytest.param("MultiHeadAttention", _multi_head(), 1, {"num_heads": HEADS}, id="mha"),
    pytest.param("MultiHeadAttention", _multi_head(PADDING, BIAS, False), 1, {"num_heads": HEADS, "scale": 0.2}, id="mha-mask-bias"),
    pytest.param("MultiHeadAttention", _multi_head(), 1, {"num_heads": HEADS, "unidirectional": 1}, id="mha-causal"),
    pytest.param("MultiHeadAttention", _multi_head_cached(3), 3, {"num_heads": HEADS}, id="mha-cache"),
    pytest.param("MultiHeadAttention", _multi_head_cached(0), 3, {"num_heads": HEADS, "unidirectional": 1}, id="mha-cache-empty"),
    pytest.param("GroupQueryAttention", _group_query(5, 0), 3, GROUPS, id="gqa"),
    pytest.param("GroupQueryAttention", _group_query(1, 6), 3, {**GROUPS, "local_window_size": 3}, id="gqa-cache-window"),
    pytest.param("GroupQueryAttention", _group_query(1, 6, packed=True, half=16), 3, {**GROUPS, "do_rotary": 1}, id="gqa-packed-rotary"),
    pytest.param(
        "GroupQueryAttention",
        _group_query(5, 0, half=8, bias=True),
        3,
        {**GROUPS, "do_rotary": 1, "rotary_interleaved": 1, "softcap": 3.0, "scale": 0.2},
        id="gqa-part-interleaved-bias",
    ),
    pytest.param("RotaryEmbedding", _turning(3, np.array([[1, 4, 0, 2, 9]] * BATCH)), 1, {}, id="rotary-flat"),
    pytest.param("RotaryEmbedding", _turning(4, np.array([2])), 1, {"interleaved": 1}, id="rotary-from"),
    pytest.param("SkipLayerNormalization", _norm("scale", "shift"), 1, {"epsilon": 1e-5}, id="skip-norm"),
    pytest.param("SkipLayerNormalization", _norm("scale", "shift", "bias"), 4, {"epsilon": 0.1}, id="skip-norm-bias-sum"),
    pytest.param("SkipLayerNormalization", _norm("scale"), 1, {}, id="skip-norm-no-shift"),
    pytest.param("SkipSimplifiedLayerNormalization", _norm("scale"), 4, {"epsilon": 0.1}, id="skip-rms-sum"),
    pytest.param("SkipSimplifiedLayerNormalization", _norm("scale", "bias"), 1, {"epsilon": 1e-6}, id="skip-rms-bias"),
    pytest.param("BiasGelu", ({"x": _floats(2, 3, 4), "b": _floats(4)}, {}), 1, {}, id="bias-gelu"),
    pytest.param("Gelu", ({"x": _floats(2, 3, 4)}, {}), 1, {}, id="gelu"),
    pytest.param("FastGelu", ({"x": _floats(2, 3, 4)}, {}), 1, {}, id="fast-gelu"),
    pytest.param("FastGelu", ({"x": _floats(2, 3, 4), "b": _floats(4)}, {}), 1, {}, id="fast-gelu-bias"),
    pytest.param("QuickGelu", ({"x": _floats(2, 3, 4)}, {}), 1, {"alpha": 1.5}, id="quick-gelu"),
]


@pytest.mark.parametrize("opset", [12, 17, 23])
@pytest.mark.parametrize(("op", "tensors", "outputs", "attributes"), FUSED)
def test_lowered_operator_equals_the_fused_kernel(op: str, tensors: Any, outputs: int, attributes: dict[str, Any], opset: int) -> None:
    feeds, constants = tensors
    model = _model(op, feeds, constants, outputs, opset, attributes)
    inputs = {name: value for name, value in feeds.items() if name in model.input_names}
    lowered = lower(model)
    assert not any(node.domain == MICROSOFT for node in lowered.proto.graph.node)
    assert lowered.output_names == model.output_names
    for ours, expected in zip(run(open_session(lowered), inputs), run(open_session(model), inputs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_rows_with_less_past_than_others_attend_to_what_they_have() -> None:
    feeds, constants = _group_query(1, 6, half=16, lengths=(7, 5))
    model = _model("GroupQueryAttention", feeds, constants, 3, 17, {**GROUPS, "do_rotary": 1})
    inputs = {name: value for name, value in feeds.items() if name in model.input_names}
    ours, expected = (run(open_session(made), inputs)[0] for made in (lower(model), model))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_simplified_norm_of_onnxruntime_equals_its_kernel() -> None:
    feeds = {"x": _floats(BATCH, SEQ, HIDDEN), "scale": _floats(HIDDEN)}
    model = _model("SimplifiedLayerNormalization", feeds, {"scale": feeds["scale"]}, 1, 17, {"axis": -1, "epsilon": 0.1}, domain="")
    (ours,), (expected,) = (run(open_session(made), {"x": feeds["x"]}) for made in (lower(model), model))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_model_without_composites_is_returned_as_it_is() -> None:
    feeds, constants = _norm("scale")
    model = _model("SkipLayerNormalization", feeds, constants, 1, 17, {})
    assert lower(model, {(MICROSOFT, "Gelu")}) is model
    lowered = lower(model)
    assert lower(lowered) is lowered


def test_unknown_operator_to_lower_is_an_error() -> None:
    feeds, constants = _norm("scale")
    with pytest.raises(InputError, match="covered are"):
        lower(_model("SkipLayerNormalization", feeds, constants, 1, 17, {}), {("", "Conv")})


@pytest.mark.parametrize(
    ("op", "tensors", "attributes", "reason"),
    [
        ("Attention", _attention(), {"num_heads": HEADS, "do_rotary": 1}, "'do_rotary'"),
        ("Attention", _attention(), {"num_heads": HEADS, "past_present_share_buffer": 1}, "share_buffer"),
        ("GroupQueryAttention", _group_query(5, 0), {**GROUPS, "smooth_softmax": 1}, "smooth_softmax"),
        ("QuickGelu", ({"x": _floats(2, 3), "z": _floats(2, 3)}, {}), {}, "input 1"),
    ],
)
def test_form_that_is_not_covered_names_what_stands_in_the_way(op: str, tensors: Any, attributes: dict[str, Any], reason: str) -> None:
    feeds, constants = tensors
    with pytest.raises(CannotLower, match=reason):
        lower(_model(op, feeds, constants, 1, 17, attributes))


def test_every_covered_operator_is_tested() -> None:
    tested = {(MICROSOFT, parameters.values[0]) for parameters in FUSED}
    assert COVERED - tested == {("", "Attention"), ("", "RotaryEmbedding"), ("", "SimplifiedLayerNormalization")}
