"""Layers with the same weights are one place to prune: the file shrinks with them, and never holds a copy for each layer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.graph.slicing import slice_model
from tests.graph.net import DEPTH, FFN, HEADS, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases


def model(net: Net, shared: bool) -> onnx.ModelProto:
    def weights() -> list[str]:
        return [*(net.weight(WIDTH, WIDTH) for _ in range(4)), net.weight(WIDTH, FFN), net.weight(FFN), net.weight(FFN, WIDTH)]

    first = weights()
    x = "x"
    for layer in (first, first if shared else weights()):
        q, k, v, out, up, bias, down = layer
        context = net.attend(*(net.heads(net("MatMul", x, weight)) for weight in (q, k, v)))
        x = net.add(x, net("MatMul", context, out))
        x = net.add(x, net("MatMul", net("Tanh", net.add(net("MatMul", x, up), bias)), down))
    return net.done(x)


def test_layers_with_the_same_weights_are_one_site_of_each_kind() -> None:
    anatomy = anatomy_of(model(Net(), shared=True))
    assert [(site.name, site.units, len(site.consumers)) for site in anatomy.sites] == [
        ("layer.0.heads", HEADS, 2),
        ("layer.0.ffn", FFN, 2),
    ]
    compare = Comparison(anatomy)
    for kept in corner_cases(anatomy.sites):
        compare.check(kept)


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_unit_weighs_is_what_leaves_the_file(shared: bool) -> None:
    anatomy = anatomy_of(model(Net(), shared))
    assert [site.parameters_per_unit for site in anatomy.sites[:2]] == [4 * WIDTH * DEPTH, 2 * WIDTH + 1]
    for site in anatomy.sites:
        smaller = slice_model(anatomy, {site.name: np.arange(1, site.units)})
        assert anatomy.model.parameters - smaller.parameters == site.parameters_per_unit


def test_layers_with_weights_of_their_own_are_sites_of_their_own() -> None:
    assert [len(site.consumers) for site in anatomy_of(model(Net(), shared=False)).sites] == [1] * 4
