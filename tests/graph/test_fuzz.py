"""Whatever the grammar writes: the tracer never fails, a slice is valid and equals its mask, and so is a slice of a slice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, event, given, reject, settings
from hypothesis import strategies as st

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.model import load
from onnxprune.runtime.session import open_session
from tests.graph.grammar import Block, transformers
from tests.graph.net import DEPTH, FFN, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of

EXAMPLES = settings().max_examples // 4
"""A model is slow beside what a profile counts with."""
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""Nothing is shrunk: a graph of some sixty nodes takes minutes."""


def silent(anatomy: Anatomy, blocks: list[Block]) -> list[Block]:
    """Blocks that look prunable and are neither in a site nor refused."""
    sites = {node.name for site in anatomy.sites for node in site.group.nodes}
    spoken = sites | {refusal.site for refusal in anatomy.refusals}
    return [block for block in blocks if not block.quiet and not (block.nodes & spoken)]


@settings(max_examples=EXAMPLES, phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(transformers(), st.integers(0, 2**16))
def test_any_slice_of_any_slice_equals_its_mask(written: tuple[onnx.ModelProto, list[Block]], seed: int) -> None:
    proto, blocks = written
    onnx.checker.check_model(proto)
    try:
        open_session(load(proto), optimize=False)
    except InputError:
        reject()  # shape inference of the Attention operator does not know that a width may be unknown
    rng = np.random.default_rng(seed)
    anatomy = anatomy_of(proto)
    assert silent(anatomy, blocks) == []
    for cut in range(3):
        kept = {site.name: np.flatnonzero(rng.random(site.units) < rng.choice([0.0, 0.5, 0.8, 1.0])) for site in anatomy.sites}
        kept = {name: units for name, units in kept.items() if len(units) >= anatomy.site(name).least}
        sliced = Comparison(anatomy).check(kept)
        event(f"cut {cut}: {'something' if kept else 'nothing'}")
        left = Counter(site.kind for site in anatomy.sites if len(kept.get(site.name, range(site.units))) > 1)
        anatomy = anatomy_of(sliced)
        assert left <= Counter(site.kind for site in anatomy.sites)  # units may become finer, a site never gets lost


# --- what the grammar has found ----------------------------------------------------------------------------------------------------


def test_a_branch_is_emptied_whose_norm_squares_by_a_product() -> None:
    """Several nodes read the result of the branch, none of them as a norm: x * x, and x / root."""
    net = Net()
    y = net.ffn("x")
    root = net("Sqrt", net("Add", net("ReduceMean", net("Mul", y, y), net.ints(-1)), net.constant(np.float32(1))))
    anatomy = anatomy_of(net.done(net.add("x", net("Mul", net("Div", y, root), net.weight(WIDTH)))))
    assert len(anatomy.sites) == 1
    Comparison(anatomy).check({"layer.0.ffn": np.zeros(0, np.int64)})


def test_a_producer_of_which_no_unit_is_left_leaves_the_concatenation() -> None:
    """Its Reshape would read the length 0 as "copy"."""
    net = Net()
    other = net("MatMul", net("Reshape", "x", net.ints(-1, WIDTH)), net.weight(WIDTH, 2))
    shape = net("Concat", net("Slice", net("Shape", "x"), net.ints(0), net.ints(2), net.ints(0)), net.ints(2), axis=0)
    joined = net("Concat", net.linear("x", WIDTH, 3), net("Reshape", other, shape), axis=-1)
    anatomy = anatomy_of(net.done(net.add("x", net.linear(net("Tanh", joined), 5, WIDTH))))
    for kept in ([0, 2], [3], [1, 3, 4]):
        Comparison(anatomy).check({"layer.0.ffn": np.array(kept)})


def test_a_body_between_the_matrices_is_named_whatever_its_condition_is() -> None:
    net = Net()
    hidden = net("Tanh", net.linear("x", WIDTH, FFN))
    flag = net("Greater", net("ReduceSum", "x", keepdims=0), net.constant(np.float32(0)))
    bodies = [
        onnx.helper.make_graph(
            [onnx.helper.make_node(op, [hidden], [op])], op, [], [onnx.helper.make_tensor_value_info(op, onnx.TensorProto.FLOAT, None)]
        )
        for op in ("Relu", "Neg")
    ]
    picked = net("If", flag, then_branch=bodies[0], else_branch=bodies[1])
    anatomy = anatomy_of(net.done(net.add("x", net.linear(net("Sigmoid", picked), FFN, WIDTH))))
    assert [(refusal.code, "operator If" in refusal.reason) for refusal in anatomy.refusals] == [("OP201", True)]


@pytest.mark.parametrize("residual", [True, False])
def test_two_products_of_the_same_neurons_are_no_residual_stream_to_each_other(residual: bool) -> None:
    net = Net()
    hidden = net("Tanh", net.linear("x", WIDTH, FFN))
    both = net.add(net.linear(hidden, FFN, WIDTH), net.linear(hidden, FFN, WIDTH))
    anatomy = anatomy_of(net.done(net.add("x", both) if residual else both))
    if residual:
        assert [site.least for site in anatomy.sites] == [1]
        Comparison(anatomy).check({"layer.0.ffn": np.array([4])})
    else:
        assert [refusal.code for refusal in anatomy.refusals] == ["OP202"]


def test_a_shape_measured_upstream_does_not_hide_a_feed_forward() -> None:
    """The target of the Reshape is read from behind a norm."""
    net = Net()
    normed = net("Div", "x", net("ReduceMean", net("Abs", "x"), net.ints(-1)))
    target = net("Concat", net("Slice", net("Shape", normed), net.ints(0), net.ints(2), net.ints(0)), net.ints(FFN), axis=0)
    hidden = net("Reshape", net("MatMul", net("Reshape", normed, net.ints(-1, WIDTH)), net.weight(WIDTH, FFN)), target)
    hidden = net("Reshape", net("CumSum", net("Relu", hidden), net.constant(np.int64(2))), target)
    anatomy = anatomy_of(net.done(net.add("x", net.linear(hidden, FFN, WIDTH))))
    assert [(refusal.code, "CumSum" in refusal.reason) for refusal in anatomy.refusals] == [("OP201", True)]


@pytest.mark.parametrize(("start", "end", "step"), [(0, 2**40, 2), (1, 8, 3), (-1, -(2**40), -1), (7, 2, -2)])
def test_positions_of_a_pruned_axis_are_taken_with_gaps_and_backwards(start: int, end: int, step: int) -> None:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    taken = len(range(FFN)[start : max(end, -FFN - 1) if end > -(2**39) else None : step])
    hidden = net("Slice", hidden, net.ints(start), net.ints(end), net.ints(2), net.ints(step))
    anatomy = anatomy_of(net.done(net.add("x", net.linear(hidden, taken, WIDTH))))
    assert [site.units for site in anatomy.sites] == [taken]
    for kept in ([0], [1, 2], [taken - 1]):
        Comparison(anatomy).check({"layer.0.ffn": np.array(kept)})


@pytest.mark.parametrize("step", [1, 2])
def test_rows_and_neurons_are_taken_by_one_slice(step: int) -> None:
    """The bound of the rows is only known when the model runs."""
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    rows = net("Slice", net("Shape", hidden), net.ints(1), net.ints(2), net.ints(0))
    bounds = net.ints(0, 2), net("Concat", rows, net.ints(8), axis=0), net.ints(1, 2), net.ints(1, step)
    hidden = net("Slice", hidden, *bounds)
    anatomy = anatomy_of(net.done(net.add("x", net.linear(hidden, 6 // step, WIDTH))))
    assert [site.units for site in anatomy.sites] == [6 // step]
    Comparison(anatomy).check({"layer.0.ffn": np.array([0, 2])})


def test_a_branch_that_could_not_be_replaced_by_a_constant_keeps_a_unit() -> None:
    net = Net()
    normed = net("LayerNormalization", net.ffn("x"), net.weight(WIDTH), axis=-1)
    turned = net("Mul", net("Transpose", normed, perm=[0, 2, 1]), net.weight(WIDTH, 1))
    turned = net("Transpose", turned, perm=[0, 2, 1])
    (site,) = anatomy_of(net.done(net.add("x", turned))).sites
    assert site.least == 1


def test_neurons_that_hang_together_with_refused_heads_are_named_beside_them() -> None:
    """One head, whose queries are the input of a feed-forward as well."""
    net = Net()
    q, k, v = (net.linear("x", WIDTH, 2) for _ in range(3))
    context = net.ms("MultiHeadAttention", q, k, v, num_heads=1)
    ffn, attention = (net("MatMul", tensor, net.weight(2, WIDTH)) for tensor in (net("Tanh", q), context))
    anatomy = anatomy_of(net.done(net("Sum", "x", ffn, attention)))
    assert anatomy.sites == ()
    sites = {name.rsplit(".", 1)[0] for name in (ffn, attention)}
    assert {(refusal.code, refusal.site) for refusal in anatomy.refusals} == {("OP103", site) for site in sites}


def test_neurons_that_are_dimensions_inside_heads_are_refused() -> None:
    net = Net()
    q, k, v = (net.linear("x", WIDTH, DEPTH) for _ in range(3))
    scores = net("MatMul", net.heads(q, 1), net("Transpose", net.heads(k, 1), perm=[0, 1, 3, 2]))
    context = net("Transpose", net("MatMul", net("Softmax", scores, axis=3), net.heads(v, 1)), perm=[0, 2, 1, 3])
    branches = net.linear(net("Tanh", v), DEPTH, WIDTH), net.linear(net("Reshape", context, net.ints(0, 0, DEPTH)), DEPTH, WIDTH)
    anatomy = anatomy_of(net.done(net("Sum", "x", *branches)))
    assert anatomy.sites == ()
    assert {refusal.code: "inside heads" in refusal.reason for refusal in anatomy.refusals} == {"OP201": True, "OP103": False}


def test_copies_of_one_neuron_are_refused() -> None:
    net = Net()
    one = net("Unsqueeze", net("Tanh", net.linear("x", WIDTH, 1)), net.ints(2))
    copies = net("Reshape", net("Expand", one, net.ints(1, 1, 4, 1)), net.ints(0, 0, 4))
    anatomy = anatomy_of(net.done(net.add("x", net.linear(copies, 4, WIDTH))))
    assert anatomy.sites == ()
    assert [(refusal.code, "copies of one neuron" in refusal.reason) for refusal in anatomy.refusals] == [("OP201", True)]


def test_neurons_that_reshapes_tie_all_together_are_refused() -> None:
    net = Net()
    hidden = net("Tanh", net.linear("x", WIDTH, 6))
    for _ in range(2):
        turned = net("Transpose", net("Reshape", hidden, net.ints(0, 0, 2, 3)), perm=[0, 1, 3, 2])
        scaled = net("Mul", net("Reshape", turned, net.ints(0, 0, 2, 3)), net.weight(2, 1))
        hidden = net("Reshape", scaled, net.ints(0, 0, 6))
    anatomy = anatomy_of(net.done(net.add("x", net.linear(hidden, 6, WIDTH))))
    assert anatomy.sites == ()
    assert [(refusal.code, "go together" in refusal.reason) for refusal in anatomy.refusals] == [("OP201", True)]


def test_neurons_of_parts_that_are_one_wide_stay_together() -> None:
    """An axis of size one looks as if it were broadcast."""
    net = Net()
    one, two = (net("Sigmoid", net.linear("x", WIDTH, width)) for width in (1, 2))
    joined = net("Concat", net("Mul", one, one), one, two, axis=-1)
    anatomy = anatomy_of(net.done(net.add("x", net.linear(joined, 4, WIDTH))))
    assert [site.units for site in anatomy.sites] == [3]
    for kept in ([0], [1], [2], [0, 2], [1, 2]):
        Comparison(anatomy).check({"layer.0.ffn": np.array(kept)})
