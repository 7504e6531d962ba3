"""Weights that the graph makes of constants are folded, unless the file would grow or they are integers."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.computed_weights import fold_computed_weights
from onnxprune.graph.model import load
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases


def weight_norm(net: Net, direction: str, outputs: int) -> str:
    """Columns of a direction as long as ``g`` says."""
    length = net("ReduceL2", direction, net.ints(0), keepdims=1)
    return str(net("Mul", net("Div", direction, length), net.weight(1, outputs, scale=1.0)))


def test_neurons_of_weight_normalised_matrices_are_found_and_cut() -> None:
    net = Net()
    hidden = net("Relu", net("MatMul", "x", weight_norm(net, net.weight(WIDTH, 40), 40)))
    y = net("MatMul", hidden, weight_norm(net, net.weight(40, WIDTH), WIDTH))
    anatomy = anatomy_of(net.done(net.add("x", y)))
    assert {site.name: site.units for site in anatomy.sites} == {"layer.0.ffn": 40}
    compare = Comparison(anatomy)
    for kept in corner_cases(anatomy.sites):
        compare.check(kept)


def test_a_weight_that_others_read_too_is_not_copied() -> None:
    net = Net()
    direction = net.weight(WIDTH, 40)
    tied = net("MatMul", net("Relu", net("MatMul", "x", direction)), net("Transpose", weight_norm(net, direction, 40), perm=[1, 0]))
    model = load(net.done(net.add("x", tied)))
    assert fold_computed_weights(model) is model


def test_integers_stay_and_are_refused() -> None:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    whole = net.constant(net.rng.integers(-127, 127, (FFN, WIDTH)).astype(np.int8))
    weight = net("DequantizeLinear", whole, net.constant(np.float32(0.01)))
    anatomy = anatomy_of(net.done(net.add("x", net("MatMul", hidden, weight))))
    assert anatomy.sites == ()
    assert [refusal.code for refusal in anatomy.refusals] == ["OP204"]
