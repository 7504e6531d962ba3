"""Masks as inputs, and taps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import MASK, mask_feeds, masked_model, with_outputs
from onnxprune.graph.model import load
from onnxprune.graph.residual import residual_sum
from onnxprune.graph.slicing import slice_model
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of


@pytest.mark.parametrize("name", ["bert-sdpa-ts17", "llama-sdpa-do23", "gpt2-eager-do18"])
def test_masks_of_one_change_nothing_and_scale_what_they_stand_for(name: str) -> None:
    anatomy = anatomy_of(load(zoo.path(name)))
    feeds = {key: value for key, value in zoo.feeds(name, 2, 6).items() if key in anatomy.model.input_names}
    model = masked_model(anatomy)
    onnx.checker.check_model(model.to_proto())
    assert model.input_names == anatomy.model.input_names + tuple(MASK + site.name for site in anatomy.sites)
    session = open_session(model, optimize=False)
    dense = run(open_session(anatomy.model, optimize=False), feeds)[0]
    ones = mask_feeds(anatomy.sites, {})
    np.testing.assert_array_equal(run(session, {**feeds, **ones})[0], dense)
    for site in anatomy.sites:
        changed = {**ones, MASK + site.name: np.where(np.arange(site.units) == 1, 0.5, 1).astype(np.float32)}
        assert np.abs(run(session, {**feeds, **changed})[0] - dense).max() > 1e-4


def test_double_precision_masks() -> None:
    net = Net()
    proto = net.done(net.add("x", net.ffn("x")))
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    anatomy = anatomy_of(proto)
    kept = {"layer.0.ffn": np.arange(3)}
    x = np.random.default_rng(0).standard_normal((2, 3, WIDTH))
    masked = run(open_session(masked_model(anatomy)), {"x": x, **mask_feeds(anatomy.sites, kept, np.float64)})[0]
    np.testing.assert_allclose(run(open_session(slice_model(anatomy, kept)), {"x": x})[0], masked, rtol=1e-12)


def test_weights_listed_as_inputs_of_old_files() -> None:
    """IR version 3 lists every initializer as an input."""
    net = Net(9)
    proto = net.done(net.add("x", net.ffn("x")))
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    anatomy = anatomy_of(proto)
    assert anatomy.model.input_names == ("x",)
    kept = {"layer.0.ffn": np.array([1, 5])}
    x = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
    masked = run(open_session(masked_model(anatomy)), {"x": x, **mask_feeds(anatomy.sites, kept)})[0]
    sliced = slice_model(anatomy, kept)
    np.testing.assert_allclose(run(open_session(sliced), {"x": x})[0], masked, rtol=1e-5, atol=1e-6)
    assert {tuple(tensor.dims) for tensor in sliced.proto.graph.initializer} == {(WIDTH, 2), (2,), (2, WIDTH), (WIDTH,)}


def test_taps_are_extra_outputs_or_the_only_ones() -> None:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    out = net.add("x", net.linear(hidden, FFN, WIDTH))
    model = load(net.done(out))
    assert with_outputs(model, [hidden, out]).output_names == (out, hidden)
    assert with_outputs(model, [hidden], keep=False).output_names == (hidden,)
    assert model.output_names == (out,)
    value = run(open_session(with_outputs(model, [hidden])), {"x": np.ones((1, 2, WIDTH), np.float32)}, [hidden])[0]
    assert value.shape == (1, 2, FFN)


def test_residual_sums_keep_the_numbers_and_only_replace_what_feeds_a_norm() -> None:
    model = load(zoo.path("bert-sdpa-do18"))
    canonical, profile = canonicalise(model)
    rewritten, count = residual_sum(canonical)
    # Embeddings are added twice before the first norm; only the last addition feeds it.
    assert count == 2 * zoo.LAYERS + 1
    feeds = zoo.feeds("bert-sdpa-do18", 2, 7)
    np.testing.assert_allclose(run(open_session(rewritten), feeds)[0], run(open_session(canonical), feeds)[0], rtol=1e-4, atol=1e-5)
    again, none = residual_sum(rewritten)
    assert (again, none) == (rewritten, 0)
    assert [site.units for site in study(rewritten, profile).sites] == [site.units for site in study(canonical, profile).sites]
