"""Sites inside heads: what is masked there is what is cut, a turn changes nothing, and what cannot be turned is refused by name."""

from __future__ import annotations

import zlib
from collections import Counter
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.depth import depths_of, with_depths
from onnxprune.graph.model import load
from onnxprune.graph.profile import synthetic_feeds
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.turning import turned
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import DEPTH, HEADS, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases, random_kept
from tests.graph.test_shared_layers import model as layers_of

NAMES = ["bert-eager-ts17", "minilm-sdpa-do18", "vit-sdpa-do23", "gpt2-sdpa-ts17", "gpt2-eager-do23", "llama-sdpa-do18", "llama-eager-do23"]


@cache
def known(name: str) -> Anatomy:
    return with_depths(anatomy_of(load(zoo.path(name))))


def codes(net: onnx.ModelProto) -> list[str]:
    return [refusal.code for refusal in with_depths(anatomy_of(net)).refusals]


def random_bases(anatomy: Anatomy, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        depth.site.name: (np.eye(depth.site.units) + 0.2 * rng.standard_normal((depth.bases, depth.site.units, depth.site.units))).astype(
            "f4"
        )
        for depth in depths_of(anatomy)
    }


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_attention_has_a_site_for_each_of_its_products(name: str) -> None:
    anatomy = known(name)
    architecture = name.split("-")[0]
    depth = zoo.HIDDEN[architecture] // zoo.HEADS[architecture]
    found = Counter((site.kind, site.units) for site in anatomy.sites if site.kind in ("qk", "vo"))
    if architecture == "llama":
        assert found == {("vo", depth): zoo.LAYERS}
        assert [refusal.code for refusal in anatomy.refusals] == ["OP105"] * zoo.LAYERS
    else:
        assert found == {("qk", depth): zoo.LAYERS, ("vo", depth): zoo.LAYERS}
    assert [site.order for site in anatomy.sites] == list(range(len(anatomy.sites)))


@pytest.mark.parametrize("name", NAMES)
def test_slices_compute_what_masks_say_beside_heads_and_neurons(name: str) -> None:
    anatomy = known(name)
    compare = Comparison(anatomy, zoo.feeds(name, batch=2, seq=5))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for number, kept in enumerate([*corner_cases(anatomy.sites)[-3:], *(random_kept(anatomy.sites, rng) for _ in range(4))]):
        compare.check(kept, optimize=number == 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_changes_nothing_and_the_turned_model_is_cut_alike(name: str) -> None:
    anatomy = known(name)
    other = turned(anatomy, random_bases(anatomy))
    feeds = zoo.feeds(name, batch=2, seq=5)
    before, after = (run(open_session(model), {key: feeds[key] for key in model.input_names})[0] for model in (anatomy.model, other.model))
    assert np.abs(before - after).max() <= 1e-4 * np.abs(before).max()
    assert [(site.name, site.units) for site in other.sites] == [(site.name, site.units) for site in anatomy.sites]
    kept = {site.name: np.arange(site.units // 2) for site in other.sites if site.kind in ("qk", "vo")}
    cut = Comparison(other, feeds).check(kept)
    plain = slice_model(anatomy, kept)
    feeds = {key: feeds[key] for key in cut.input_names}
    assert not np.allclose(run(open_session(cut), feeds)[0], run(open_session(plain), feeds)[0], rtol=1e-3)


def test_a_basis_of_another_model_is_refused() -> None:
    anatomy = known(NAMES[0])
    for name, basis in (("layer.0.qk", np.eye(3)[None]), ("layer.9.qk", np.eye(16)[None])):
        with pytest.raises(InputError, match="made for another file"):
            turned(anatomy, {name: basis})
    with pytest.raises(InputError, match=r"the basis of layer\.0\.vo has no inverse"):
        turned(anatomy, {"layer.0.vo": np.zeros((4, 16, 16))})


def packed(net: Net) -> str:
    """[B, S, 3 H D] cut into queries, keys and values, of which the bias comes before and the keys are scaled."""
    parts = net("Split", net.linear("x", WIDTH, 3 * WIDTH), outputs=3, axis=2, num_outputs=3)
    q, k, v = (net.heads(part) for part in parts)
    return net.linear(net.attend(q, net("Mul", k, net.constant(np.float32(0.5))), v))


def late_bias(net: Net) -> str:
    """Biases that are added when heads are apart already."""
    q, k, v = (net("Add", net.heads(net.linear("x", bias=False)), net.weight(HEADS, 1, DEPTH)) for _ in range(3))
    return net.linear(net.attend(q, k, v))


@pytest.mark.parametrize("spelling", [packed, late_bias])
def test_spellings_are_turned_and_cut(spelling: object) -> None:
    net = Net()
    anatomy = with_depths(anatomy_of(net.done(net.add("x", spelling(net)))))  # type: ignore[operator]
    assert [(site.kind, site.units) for site in anatomy.sites] == [("qk", DEPTH), ("heads", HEADS), ("vo", DEPTH)]
    other = turned(anatomy, random_bases(anatomy))
    feeds = synthetic_feeds(anatomy.model)
    before, after = (run(open_session(model), feeds)[0] for model in (anatomy.model, other.model))
    assert np.abs(before - after).max() <= 1e-4 * np.abs(before).max()
    compare = Comparison(other)
    for kept in corner_cases(other.sites):
        compare.check(kept)


def test_one_bias_for_all_heads_cannot_be_turned() -> None:
    net = Net()
    q, k, v = (net("Add", net.heads(net.linear("x", bias=False)), net.weight(DEPTH)) for _ in range(3))
    assert codes(net.done(net.add("x", net.linear(net.attend(q, k, v))))) == ["OP107", "OP107"]


def test_norms_of_queries_leave_the_values() -> None:
    net = Net(opset=17)
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    q, k = (net("LayerNormalization", part, net.weight(DEPTH)) for part in (q, k))
    anatomy = with_depths(anatomy_of(net.done(net.add("x", net.linear(net.attend(q, k, v))))))
    assert [site.kind for site in anatomy.sites] == ["heads", "vo"]
    assert [refusal.code for refusal in anatomy.refusals] == ["OP106"]


def test_a_gate_on_the_heads_stops_the_values() -> None:
    net = Net()
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    gated = net("Mul", net.attend(q, k, v), net("Sigmoid", net.linear("x")))
    anatomy = with_depths(anatomy_of(net.done(net.add("x", net.linear(gated)))))
    assert "qk" in {site.kind for site in anatomy.sites}
    (refusal,) = [refusal for refusal in anatomy.refusals if refusal.code == "OP107"]
    assert refusal.reason.startswith("values: ")


def test_fused_operators_are_refused() -> None:
    net = Net()
    q, k, v = (net.linear("x") for _ in range(3))
    assert codes(net.done(net.add("x", net.linear(net.ms("MultiHeadAttention", q, k, v, num_heads=HEADS))))) == ["OP108", "OP108"]


def test_layers_with_the_same_weights_are_refused() -> None:
    assert set(codes(layers_of(Net(), shared=True))) == {"OP109"}
    assert codes(layers_of(Net(), shared=False)) == []


def test_a_cache_of_keys_keeps_its_depth() -> None:
    net = Net()
    past = net.input("past", ["batch", HEADS, "old", DEPTH])
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    keys = net("Concat", past, k, axis=2)
    model = net.done(net.add("x", net.linear(net.attend(q, k, v))))
    model.graph.output.append(helper.make_tensor_value_info(keys, onnx.TensorProto.FLOAT, ["batch", HEADS, "all", DEPTH]))
    assert "OP107" in codes(model)
