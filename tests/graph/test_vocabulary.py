"""Word tables: which ones are found, which are refused and why, and that the cut graph computes the same for the ids that stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto

from onnxprune.errors import InputError
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.graph.vocabulary import Vocabulary, cut_vocabulary, nearest_rows, other_reader, without_map, word_tables
from onnxprune.runtime.session import open_session, run
from tests.graph.net import WIDTH, Net

ROWS = 700


def words(net: Net, name: str = "input_ids", dtype: int = TensorProto.INT64) -> str:
    return net.input(name, ["batch", "seq"], dtype)


def graph(build: Callable[[Net], str], **shapes: list[int | str]) -> Model:
    """A model whose only inputs are those that ``build`` declares."""
    net = Net()
    net.inputs.clear()
    output = build(net)
    return load(net.done(output, **({output: shapes["output"]} if shapes else {})))


def lookup(net: Net) -> str:
    return str(net("Gather", net.weight(ROWS, WIDTH), words(net)))


def two_tables(net: Net) -> str:
    ids = net("Cast", net("Unsqueeze", net("Squeeze", words(net, dtype=TensorProto.INT32)), net.ints(0)), to=TensorProto.INT64)
    shaped = net("Reshape", ids, net.ints(-1, 6))
    return net.add(net("Gather", net.weight(ROWS, WIDTH), shaped), net("Gather", net.weight(ROWS, WIDTH), shaped))


def shared_table(net: Net) -> str:
    table = net.weight(ROWS, WIDTH)
    return net.add(net("Gather", table, words(net)), net("Gather", table, words(net, "decoder_input_ids")))


def with_positions(net: Net) -> str:
    ids = words(net)
    counted = net("CumSum", net("Cast", net("Not", net("Equal", ids, net.ints(1))), to=TensorProto.INT64), net.ints(1))
    places = net("Gather", net.weight(ROWS + 100, WIDTH), counted)
    fed = net("Gather", net.weight(ROWS + 50, WIDTH), net.input("position_ids", ["batch", "seq"], TensorProto.INT64))
    segments = net("Gather", net.weight(2, WIDTH), net.input("token_type_ids", ["batch", "seq"], TensorProto.INT64))
    return net.add(net.add(net.add(net("Gather", net.weight(ROWS, WIDTH), ids), places), fed), segments)


def shifted(net: Net) -> str:
    ids = words(net)
    moved = net(
        "Concat",
        net("Slice", ids, net.ints(1), net.ints(99), net.ints(1)),
        net("Slice", ids, net.ints(0), net.ints(1), net.ints(1)),
        axis=1,
    )
    return str(net("Gather", net.weight(ROWS, WIDTH), moved))


def tied(net: Net) -> str:
    table = net.weight(ROWS, WIDTH)
    return str(net("MatMul", net("Gather", table, words(net)), net("Transpose", table, perm=[1, 0])))


def untied(net: Net) -> str:
    return str(net("MatMul", lookup(net), net.weight(WIDTH, ROWS)))


def two_sizes(net: Net) -> str:
    ids = words(net)
    return net.add(net("Gather", net.weight(ROWS, WIDTH), ids), net("Gather", net.weight(ROWS + 1, WIDTH), ids))


def found_in(model: Model) -> tuple[list[tuple[tuple[str, ...], int, int]], list[str]]:
    groups, refusals = word_tables(GraphView(model))
    return [(group.inputs, len(group.tables), group.rows) for group in groups], [refusal.code for refusal in refusals]


@pytest.mark.parametrize(
    ("build", "groups", "codes"),
    [
        (lookup, [(("input_ids",), 1, ROWS)], []),
        (two_tables, [(("input_ids",), 2, ROWS)], []),
        (shared_table, [(("decoder_input_ids", "input_ids"), 1, ROWS)], []),
        (with_positions, [(("input_ids",), 1, ROWS)], []),
        (untied, [(("input_ids",), 1, ROWS)], ["OP504"]),
        (shifted, [], ["OP501"]),
        (two_sizes, [], ["OP502"]),
        (tied, [], ["OP503"]),
    ],
)
def test_tables_of_words_are_found_and_others_refused_or_left(
    build: Callable[[Net], str], groups: list[tuple[tuple[str, ...], int, int]], codes: list[str]
) -> None:
    assert found_in(graph(build)) == (groups, codes)


def chosen(model: Model, kept: np.ndarray, seed: int = 0) -> Vocabulary:
    """A vocabulary that keeps ``kept``; other ids read rows drawn from them."""
    group = word_tables(GraphView(model))[0][0]
    reads = np.random.default_rng(seed).choice(kept, ROWS).astype(np.int32)
    reads[kept] = kept
    return Vocabulary(group.inputs, group.lookups, reads)


@pytest.mark.parametrize("build", [lookup, two_tables, shared_table, untied])
def test_ids_that_stay_give_the_same_bits_and_others_those_of_their_stand_in(build: Callable[[Net], str]) -> None:
    model = graph(build, output=["batch", "seq", "any"])
    rng = np.random.default_rng(1)
    words_ = chosen(model, np.sort(rng.permutation(ROWS)[:90]))
    cut = cut_vocabulary(model, [words_])
    ids = {name: rng.integers(0, ROWS, (1, 6)) for name in words_.inputs}
    dtype = np.int32 if build is two_tables else np.int64
    seen = {name: words_.reads[array].astype(dtype) for name, array in ids.items()}
    expected = run(open_session(model), seen)[0]
    session = open_session(cut)
    np.testing.assert_array_equal(run(session, seen)[0], expected)
    np.testing.assert_array_equal(run(session, {name: array.astype(dtype) for name, array in ids.items()})[0], expected)
    bare = open_session(without_map(cut))
    np.testing.assert_array_equal(run(bare, words_.mapped({name: array.astype(dtype) for name, array in ids.items()}))[0], expected)
    assert {len(array) for name in word_names(cut) if (array := cut.initializer(name)) is not None} == {90}


def word_names(model: Model) -> set[str]:
    return {node.inputs[0] for node in GraphView(model).nodes if node.op == "Gather" and not node.name.startswith("vocabulary.map")}


def test_ids_that_count_from_the_end_still_do() -> None:
    model = graph(lookup)
    words_ = chosen(model, np.array([3, ROWS - 2]))
    ids = np.array([[-2, 3]])
    np.testing.assert_array_equal(
        run(open_session(cut_vocabulary(model, [words_])), {"input_ids": ids})[0], run(open_session(model), {"input_ids": ids})[0]
    )


def test_a_decision_for_another_model_is_refused() -> None:
    model = graph(lookup)
    with pytest.raises(InputError, match="made for another model"):
        cut_vocabulary(model, [Vocabulary(("input_ids",), ("no such node",), np.zeros(ROWS, np.int32))])
    group = word_tables(GraphView(model))[0][0]
    with pytest.raises(InputError, match=f"no table of {ROWS - 1} rows"):
        cut_vocabulary(model, [Vocabulary(group.inputs, group.lookups, np.zeros(ROWS - 1, np.int32))])


@pytest.mark.parametrize(("build", "op"), [(lookup, None), (two_tables, None), (with_positions, "Equal")])
def test_whoever_else_reads_ids_is_named(build: Callable[[Net], str], op: str | None) -> None:
    view = GraphView(graph(build))
    reader = other_reader(view, word_tables(view)[0][0])
    assert (reader.op if reader else None) == op


def test_a_row_is_read_in_place_of_rows_of_its_direction() -> None:
    directions = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    table = np.concatenate([directions, 5 * directions])
    np.testing.assert_array_equal(nearest_rows(table, np.arange(4)), [0, 1, 2, 3, 0, 1, 2, 3])
