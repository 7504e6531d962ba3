"""Rows that nobody reads are not computed, and those that are read stay what they were."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.fuse_attention import fuse_attention
from onnxprune.graph.macs import count_macs
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import shapes_of, take_profile
from onnxprune.graph.rows import demanded_rows as narrowed
from onnxprune.runtime.session import open_session, run
from tests import zoo

LAST_BLOCK = 4
"""Products with weights of one row each: queries, output projection, and the two of the feed-forward layer."""


def demanded_rows(model: Model) -> tuple[Model, int]:
    return narrowed(model, take_profile(model))


def macs(model: Model, feeds: dict[str, np.ndarray]) -> float:
    return sum(count_macs(model, shapes_of(model, feeds)).values())


def outputs(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run(open_session(model), {name: feeds[name] for name in model.input_names})


def small(body: str, output: str = "float[B,4] y", constants: str = "", length: str = "S") -> Model:
    weights = "float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] g = {1,2,3,4}, int64 zero = {0}"
    return load(
        onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> g (float[B,{length},4] x) => ({output}) <{weights}{constants}> {{ {body} }}'
        )
    )


def same(before: Model, after: Model, sizes: tuple[tuple[int, int], ...] = ((2, 5), (3, 1))) -> None:
    for batch, length in sizes:
        feeds = {"x": np.random.default_rng(0).standard_normal((batch, length, 4)).astype(np.float32)}
        for expected, found in zip(outputs(before, feeds), outputs(after, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name.split("-")[0] in ("bert", "vit", "deit")])
def test_the_last_block_of_classifiers_computes_one_row(name: str) -> None:
    model, _ = canonicalise(load(zoo.path(name)), all_rows=True)
    narrow, count = demanded_rows(model)
    assert count == LAST_BLOCK
    for batch, length in ((3, 11), (1, 5)):
        feeds = zoo.feeds(name, batch, length)
        for expected, found in zip(outputs(model, feeds), outputs(narrow, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert macs(narrow, feeds) < 0.9 * macs(model, feeds)
    assert fuse_attention(narrow)[1] == fuse_attention(model)[1]


@pytest.mark.parametrize("name", ["minilm-sdpa-do18", "gpt2-sdpa-ts17"])
def test_models_that_return_every_row_stay(name: str) -> None:
    model, _ = canonicalise(load(zoo.path(name)), all_rows=True)
    assert demanded_rows(model) == (model, 0)


def test_a_selection_moves_through_rowwise_operators() -> None:
    model = small(
        "h = MatMul(x, w) n = LayerNormalization(h, g) m = MatMul(n, w) r = Add(m, x) y = Gather<axis = 1>(r, zero)",
    )
    narrow, count = demanded_rows(model)
    assert count == 2
    same(model, narrow)
    assert [node.op_type for node in narrow.proto.graph.node].count("Gather") == 2


def test_a_slice_of_two_rows_moves_too() -> None:
    constants = ", int64[1] start = {0}, int64[1] stop = {2}, int64[1] axis = {1}"
    model = small("h = MatMul(x, w) r = Relu(h) y = Slice(r, start, stop, axis)", "float[B,N,4] y", constants)
    narrow, count = demanded_rows(model)
    assert count == 1
    same(model, narrow, ((2, 5), (3, 3)))


def test_rows_of_a_constant_are_cut() -> None:
    weights = ", float[1,3,4] p = {" + ",".join(map(str, range(12))) + "}"
    body = "h = MatMul(x, w) a = Add(h, p) y = Gather<axis = 1>(a, zero)"
    model = small(body, constants=weights, length="3")
    narrow, count = demanded_rows(model)
    assert count == 1
    assert [1, 1, 4] in [list(tensor.dims) for tensor in narrow.proto.graph.initializer]
    same(model, narrow, ((2, 3),))


def test_a_tensor_that_is_an_output_is_computed_whole() -> None:
    model = small("h = MatMul(x, w) y = Gather<axis = 1>(h, zero)", "float[B,4] y, float[B,S,4] h")
    assert demanded_rows(model) == (model, 0)


def test_different_selections_of_one_tensor_leave_it_whole() -> None:
    constants = ", int64 one = {1}"
    model = small("h = MatMul(x, w) a = Gather<axis = 1>(h, zero) b = Gather<axis = 1>(h, one) y = Add(a, b)", constants=constants)
    assert demanded_rows(model) == (model, 0)


def test_a_mean_over_the_rows_stops_the_selection() -> None:
    axes = ", int64[1] rows = {1}"
    model = small(
        "h = MatMul(x, w) m = ReduceMean<axes = [1], keepdims = 1>(h) c = Sub(h, m) v = MatMul(c, w) y = Gather<axis = 1>(v, zero)",
        constants=axes,
    )
    narrow, count = demanded_rows(model)
    assert count == 1  # the product after the mean, not the one before it
    same(model, narrow)


def test_causal_attention_keeps_its_rows() -> None:
    body = (
        "<ir_version: 10, opset_import: ['': 23]> g (float[B,2,S,4] x) => (float[B,2,4] y) <int64 zero = {0}, "
        "float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> "
        "{ q = MatMul(x, w) a = Attention<is_causal = 1>(q, x, x) y = Gather<axis = 2>(a, zero) }"
    ).replace("'", '"')
    model = load(onnx.parser.parse_model(body))
    assert demanded_rows(model) == (model, 0)
