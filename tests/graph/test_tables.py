"""Embedding tables in int8: which ones, how near their rows stay, and what else of the graph changes (nothing)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph import tables
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.integer import int8_products, to_int8
from onnxprune.graph.model import Model, load
from onnxprune.graph.tables import int8_tables, tables_to_int8
from onnxprune.graph.view import GraphView
from onnxprune.quantize.form import Int8Form
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import WIDTH, Net

TOLERANCE = 0.05
"""Relative L2 error of an output. The worst export comes to a third of it; a wrong scale makes an error of about one."""

ZOO_BYTES = 4096
"""Below the tables of words and positions of the exports, above those of segments."""

TABLES = {"bert": 2, "minilm": 2, "vit": 0, "deit": 0, "gpt2": 2, "llama": 1}
"""Tables that nobody else reads. Dynamo's GPT-2 keeps its table tied to the head, TorchScript's is transposed into a weight of its own."""

ROWS = 2000


def table(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Rows of very different magnitude, one of them zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, width)) * 10.0 ** rng.uniform(-6, 3, (rows, 1))
    values[7] = 0
    return values.astype(np.float32)


def lookup(values: np.ndarray, dtype: int = TensorProto.INT64, opset: int = 18, declared: bool = False, **attributes: int) -> Model:
    """Nothing but ``y = values[ids]``."""
    inputs = [helper.make_tensor_value_info("ids", dtype, ["batch", "seq"])]
    if declared:
        inputs.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, values.shape))
    node = helper.make_node("Gather", ["table", "ids"], ["y"], name="words", doc_string="kept", **attributes)
    node.metadata_props.add(key="from", value="a test")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", *values.shape[1:]])
    graph = helper.make_graph([node], "lookup", inputs, [output], [numpy_helper.from_array(values, "table")])
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


def rows_of(model: Model, ids: np.ndarray) -> np.ndarray:
    return run(open_session(model), {"ids": ids})[0]


def names(model: Model) -> tuple[str, ...]:
    return tuple(node.name for node in int8_tables(GraphView(model)))


def data(model: Model) -> bytes:
    return model.to_proto().SerializeToString(deterministic=True)


@pytest.mark.parametrize("opset", [7, 11, 18, 23])
@pytest.mark.parametrize(("onnx_type", "dtype"), [(TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32)])
def test_rows_are_those_of_numpy_and_within_half_a_step(opset: int, onnx_type: int, dtype: type) -> None:
    values = table()
    ids = np.random.default_rng(1).integers(-ROWS, ROWS, (3, 500)).astype(dtype)
    ids[0, :3] = 7, 0, -1
    found = rows_of(tables_to_int8(lookup(values, onnx_type, opset), ["words"]), ids)
    step = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scale = np.where(step > 0, step, np.float32(1))
    np.testing.assert_array_equal(found, (np.rint(values / scale) * scale)[ids])
    assert (np.abs(found - values[ids]) <= step[ids] * 0.50001).all()
    assert np.abs(found - values[ids]).max(axis=(0, 1)).all(), "nothing was rounded"


def test_rows_on_the_grid_and_rows_of_zeros_are_exact() -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(-127, 128, (ROWS, WIDTH))
    steps[:, 3] = rng.choice([-127, 127], ROWS)
    values = (steps * 2.0 ** rng.integers(-20, 20, (ROWS, 1))).astype(np.float32)
    values[11] = 0
    model = tables_to_int8(lookup(values), ["words"])
    np.testing.assert_array_equal(rows_of(model, np.arange(ROWS)[None])[0], values)
    integers, scales = (array for _, array in sorted(model.weights.items(), key=lambda item: item[1].itemsize))
    assert (integers.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (ROWS, 1))
    assert scales[11] == 1


def test_rows_too_small_for_a_scale_become_zero() -> None:
    values = np.full((2, 4), 1e-44, np.float32)
    np.testing.assert_array_equal(rows_of(tables_to_int8(lookup(values), ["words"]), np.array([[0, 1]])), np.zeros((1, 2, 4)))


def test_a_large_table_is_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tables_to_int8(lookup(table()), ["words"])
    monkeypatch.setattr(tables, "_CHUNK_BYTES", 7 * WIDTH * 4)
    assert data(tables_to_int8(lookup(table()), ["words"])) == data(whole)


def test_the_file_shrinks_to_a_quarter_and_a_scale_a_row() -> None:
    model = lookup(table(width=384))
    smaller = tables_to_int8(model, names(model))
    assert names(model) == ("words",)
    assert smaller.weight_bytes == ROWS * (384 + 4)
    assert len(data(smaller)) < len(data(model)) * (1 / 4 + 1 / 384) + 1000


def test_what_is_around_the_table_stays_and_the_input_is_not_modified() -> None:
    model = lookup(table(), axis=-2)
    before = data(model)
    smaller = tables_to_int8(model, ["words"])
    assert data(model) == before
    assert data(smaller) == data(tables_to_int8(model, ["words"])), "not the same bytes every time"
    onnx.checker.check_model(smaller.to_proto(), full_check=True)
    nodes = {node.name: node for node in smaller.proto.graph.node}
    assert len(nodes) == 4
    assert nodes["words"].op_type == "Gather"
    assert (nodes["words"].doc_string, nodes["words"].metadata_props[0].value) == ("kept", "a test")
    assert next(node.op_type for node in nodes.values() if "y" in node.output) == "Mul"
    assert smaller.output_names == ("y",)
    assert smaller.input_names == ("ids",)


def test_a_table_that_old_files_declare_as_input_is_no_longer_one() -> None:
    model = tables_to_int8(lookup(table(), declared=True), ["words"])
    assert [value.name for value in model.proto.graph.input] == ["ids"]
    assert "table" not in model.initializer_names
    np.testing.assert_allclose(rows_of(model, np.array([[5]]))[0, 0], table()[5], atol=np.abs(table()[5]).max() / 250)


def ids_of(net: Net) -> str:
    return net.input("ids", ["batch", "seq"], TensorProto.INT64)


def feeds(rows: int, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((batch, 5, WIDTH)).astype(np.float32), "ids": rng.integers(0, rows, (batch, 5))}


def check_near(smaller: Model, model: Model, inputs: dict[str, np.ndarray], tolerance: float = 0.01) -> None:
    for got, want in zip(run(open_session(smaller), inputs), run(open_session(model), inputs), strict=True):
        assert got.shape == want.shape
        assert 0 < np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


def test_lookups_that_share_a_table_share_its_integers() -> None:
    net = Net()
    words, ids = net.weight(ROWS, WIDTH), ids_of(net)
    other = net("Sub", net.constant(np.int64(ROWS - 1)), ids)
    model = Model.from_proto(net.done(net("Sum", "x", net("Gather", words, ids), net("Gather", words, other))))
    assert len(names(model)) == 2
    smaller = tables_to_int8(model, names(model))
    assert sorted(array.dtype.name for array in smaller.weights.values()) == ["float32", "int8"]
    check_near(smaller, model, feeds(ROWS))


def others(net: Net, words: str, ids: str) -> dict[str, str]:
    """Readers of a table besides a lookup of rows by ``ids``, each the name of its result."""
    return {
        "head": net("MatMul", "x", net("Transpose", words, perm=[1, 0])),
        "gemm": net("Gemm", net("Reshape", "x", net.ints(-1, WIDTH)), words, transB=1),
        "sum": net("ReduceSum", words),
        "columns": net("Gather", words, net("Clip", ids, net.constant(np.int64(0)), net.constant(np.int64(WIDTH - 1))), axis=1),
        "constant": net("Gather", words, net.ints(1, 2)),
    }


@pytest.mark.parametrize("kind", ["head", "gemm", "sum", "columns", "constant"])
def test_a_table_that_somebody_else_reads_is_left_out(kind: str) -> None:
    net = Net()
    words, ids = net.weight(ROWS, WIDTH), ids_of(net)
    results = others(net, words, ids)
    net.nodes = [node for node in net.nodes if node.output[0] == results[kind] or node.op_type in ("Transpose", "Reshape", "Clip")]
    found = net("Gather", words, ids)
    shapes: dict[str, list[int | str]] = {results[kind]: []}
    model = Model.from_proto(net.done(net.add("x", found), results[kind], **shapes))
    assert int8_tables(GraphView(model)) == ()
    # Named all the same, the other reader keeps the numbers that it had.
    smaller = tables_to_int8(model, [GraphView(model).producer[found].name])
    assert words in smaller.initializer_names
    got, want = (run(open_session(each), feeds(ROWS)) for each in (smaller, model))
    assert 0 < np.abs(got[0] - want[0]).max() < 0.01
    np.testing.assert_array_equal(got[1], want[1])


def test_a_table_that_the_graph_gives_out_or_a_body_reads_is_left_out() -> None:
    net = Net()
    words, ids = net.weight(ROWS, WIDTH), ids_of(net)
    net.add("x", net("Gather", words, ids))
    given = Model.from_proto(net.done(net.nodes[-1].output[0], words, **{words: [ROWS, WIDTH]}))
    assert int8_tables(GraphView(given)) == ()
    body = helper.make_graph(
        [helper.make_node("ReduceSum", [words], ["inner"], keepdims=0)], "body", [], [helper.make_empty_tensor_value_info("inner")]
    )
    total = net("If", net.constant(np.array(True)), then_branch=body, else_branch=body)
    model = Model.from_proto(net.done(net.add(net.nodes[1].output[0], total)))
    assert int8_tables(GraphView(model)) == ()


def test_small_tables_and_other_lookups_are_left_out() -> None:
    assert names(lookup(np.ones((1024, 16), np.float32))) == ()
    assert names(lookup(np.ones((1025, 16), np.float32))) == ("words",)
    assert names(lookup(np.ones((1025, 16), np.float32), axis=-2)) == ("words",)
    for model in unfit():
        assert names(model) == ()


def unfit() -> Sequence[Model]:
    """Lookups of another kind in large tables: by columns, in float64, in three dimensions, of rows that are known."""
    ones = np.ones((1025, 16), np.float32)
    known = lookup(ones).copy_proto()
    known.graph.input.pop()
    known.graph.initializer.append(numpy_helper.from_array(np.array([[3, 4]]), "ids"))
    wide = lookup(ones.astype(np.float64))
    wide.proto.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return lookup(ones, axis=1), wide, lookup(ones[None]), lookup(ones).with_proto(known)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(InputError, match="node 'gone', whose table is to be int8, is not in the graph"):
        tables_to_int8(lookup(table()), ["gone"])
    reasons = ("it picks columns", "its table is float64", "no constant matrix", "its indices are constant")
    for model, reason in zip(unfit(), reasons, strict=True):
        for attempt in (lambda m: tables_to_int8(m, ["words"]), lambda m: to_int8(m, Int8Form("dynamic", True, (), tables=("words",)))):
            with pytest.raises(InputError, match=rf"Gather\(words\) cannot read an int8 table: .*{reason}"):
                attempt(model)
    smaller = tables_to_int8(lookup(table()), ["words"])
    product = next(node.name for node in smaller.proto.graph.node if node.op_type == "Mul")
    with pytest.raises(InputError, match="it is no Gather"):
        tables_to_int8(smaller, [product])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_tables_are_refused(bad: float) -> None:
    values = table()
    values[5, 2] = bad
    with pytest.raises(InputError, match="embedding table 'table' holds an infinite or NaN value"):
        tables_to_int8(lookup(values), ["words"])


def test_a_model_without_tables_is_returned_as_it_is() -> None:
    model = lookup(table())
    assert tables_to_int8(model, ()) is model


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_export_finds_its_tables_and_stays_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SMALLEST_BYTES", ZOO_BYTES)
    model = load(zoo.path(name))
    # onnxruntime runs the rotary caches of opset 23 at batch 1 only.
    inputs = zoo.feeds(name, batch=1 if name.startswith("llama") and name.endswith("do23") else 3)
    tied = name.startswith("gpt2") and not name.endswith("ts17")
    architecture = name.split("-")[0]
    assert len(names(model)) == TABLES[architecture] - tied
    if TABLES[architecture]:
        smaller = tables_to_int8(model, names(model))
        onnx.checker.check_model(smaller.to_proto(), full_check=True)
        kinds = Counter(array.dtype.name for array in smaller.weights.values())
        assert kinds["int8"] == len(names(model))
        assert smaller.weight_bytes < model.weight_bytes
        check_near(smaller, model, inputs, TOLERANCE)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_a_form_makes_both_products_and_tables_integers(scheme: str) -> None:
    net = Net()
    words, ids = net.weight(ROWS, WIDTH), ids_of(net)
    embedded = net("Gather", words, ids)
    model = Model.from_proto(net.done(net.linear(embedded)))
    view = GraphView(model)
    product = int8_products(view)[0]
    ranges = {product.inputs[0]: (-0.2, 0.2)} if scheme == "static" else {}
    form = Int8Form(scheme, True, (product.name,), ranges, {}, names(model))  # type: ignore[arg-type]
    smaller, without = to_int8(model, form), to_int8(model, form.without([product.name]))
    ops = Counter(node.op for node in GraphView(smaller).nodes)
    assert ops["DynamicQuantizeLinear" if scheme == "dynamic" else "QuantizeLinear"] == 1
    assert ops["Gather"] == 2
    assert [array.dtype for array in without.weights.values() if len(array) == ROWS] == [np.int8, np.float32]
    assert words not in smaller.initializer_names | without.initializer_names
    onnx.checker.check_model(smaller.to_proto(), full_check=True)
    check_near(without, model, feeds(ROWS))
    check_near(smaller, model, feeds(ROWS), 0.1)
    with pytest.raises(InputError, match="node 'gone', whose table"):
        to_int8(model, Int8Form("dynamic", True, (), tables=("gone",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-sdpa-do18", "gpt2-eager-ts17", "llama-sdpa-do23"])
def test_canonical_exports_have_products_and_tables_in_integers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SMALLEST_BYTES", ZOO_BYTES)
    model = study(*canonicalise(load(zoo.path(name)))).model
    products = tuple(node.name for node in int8_products(GraphView(model)))
    smaller = to_int8(model, Int8Form("dynamic", True, products, tables=names(model)))
    assert len(names(model)) == TABLES[name.split("-")[0]]
    inputs = {key: zoo.feeds(name)[key] for key in model.input_names}
    check_near(smaller, model, inputs, 0.1)
