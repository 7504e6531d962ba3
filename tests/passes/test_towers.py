"""Two towers with an input and a batch of their own: one output that compares them, or one output each."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.errors import InputError, NothingPrunable
from tests.graph.net import WIDTH, Net

TEXTS, IMAGES = ("layer.0.ffn", "layer.1.heads"), ("layer.1.ffn", "layer.2.heads")
"""Names of the sites; layers are numbered in the order in which the graph is written."""
RNG = np.random.default_rng(0)


def model(compared: bool) -> onnx.ModelProto:
    """Texts ``x`` and images ``pixels``; towers of one feed-forward and one attention."""
    net = Net(batch="texts")
    towers = []
    for source in ("x", net.input("pixels", ["images", "patches", WIDTH])):
        hidden = net.add(source, net.ffn(source))
        towers.append(str(net("ReduceMean", net.add(hidden, net.attention(hidden)), net.ints(1), keepdims=0)))
    if compared:
        similarity = net("MatMul", towers[1], net("Transpose", towers[0], perm=[1, 0]))
        return net.done(similarity, **{similarity: ["images", "texts"]})
    return net.done(*towers, **{towers[0]: ["texts", WIDTH], towers[1]: ["images", WIDTH]})


def pairs(texts: int = 64, images: int = 64) -> dict[str, np.ndarray]:
    shapes = {"x": (texts, 5, WIDTH), "pixels": (images, 9, WIDTH)}
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def pruned(proto: onnx.ModelProto, data: dict[str, np.ndarray], **options: Any) -> onnxprune.PruneResult:
    options = {"passes": "heads,ffn", "target_params": "70%", "rounds": 2, "finishing": False, "bench_seconds": 0} | options
    return onnxprune.prune(proto, calib=data, **options)


@pytest.mark.parametrize("importance", ["kfac", "fisher"])
def test_gradients_of_both_towers_are_told_apart_by_the_batch_of_each(importance: str) -> None:
    result = pruned(model(compared=True), pairs(), importance=importance)
    assert result.fidelity is not None
    assert result.fidelity.passed
    assert sorted(result.plan.kept) == sorted([*TEXTS, *IMAGES])
    assert all(len(result.plan.kept[name]) > 1 for name in (TEXTS[0], IMAGES[0]))


def test_another_number_of_images_than_texts_is_refused() -> None:
    with pytest.raises(InputError, match=r"different numbers of rows \(x: 64, pixels: 48\)"):
        pruned(model(compared=True), pairs(images=48))


def test_a_tower_that_leads_to_another_output_stays_whole() -> None:
    proto = model(compared=False)
    result = pruned(proto, pairs(), output_name=proto.graph.output[1].name, target_params="80%")
    assert sorted(result.plan.kept) == list(IMAGES)
    told = {refusal.site: refusal.code for refusal in result.plan.refusals}
    assert told == dict(zip(TEXTS, ("OP206", "OP110"), strict=True))


def test_an_output_that_no_site_leads_to_leaves_nothing_to_prune() -> None:
    proto = model(compared=False)
    with pytest.raises(NothingPrunable, match="nothing to prune leads to output"):
        pruned(proto, pairs(), output_name=proto.graph.output[1].name, keep=IMAGES)
