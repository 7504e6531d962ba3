"""Decoders with a cache: heads leave its inputs and outputs too, and the pruned model decodes with it as it does without."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest

from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.caches import CACHES, CacheCut, cache_cuts, cache_pairs, cut_feeds
from onnxprune.graph.model import Model, load
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests.architectures import ARCHITECTURES, exports, feeds
from tests.architectures.entry import HEADS, HIDDEN, LAYERS, VOCABULARY
from tests.graph.net import DEPTH, Net
from tests.graph.net import HEADS as NET_HEADS
from tests.graph.pruning import Comparison, anatomy_of, corner_cases, random_kept

DECODERS = ("gpt2-cache", "llama-mha-cache", "llama-gqa-cache", "llama-mqa-cache")
EXPORTS = ("do18-sdpa", "ts17-eager")
STEPS = 32


@cache
def decoder(name: str, variant: str = "do18-sdpa") -> Anatomy:
    return anatomy_of(load(exports.path(name, variant)))


@pytest.mark.parametrize("variant", EXPORTS)
@pytest.mark.parametrize("name", DECODERS)
def test_slices_with_smaller_caches_compute_what_masks_say(name: str, variant: str) -> None:
    anatomy = decoder(name, variant)
    found = {kind: tuple(site.units for site in anatomy.sites if site.kind == kind) for kind in ("heads", "ffn")}
    assert found == ARCHITECTURES[name].sites
    compare = Comparison(anatomy, feeds(ARCHITECTURES[name]))
    rng = np.random.default_rng(0)
    for kept in (corner_cases(anatomy.sites)[0], *(random_kept(anatomy.sites, rng) for _ in range(5))):
        compare.check(kept)


@pytest.mark.parametrize("variant", EXPORTS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_the_cache_gives_what_the_whole_text_gives(name: str, variant: str) -> None:
    """Greedy, token by token with the cache of the step before, against one run over the whole text."""
    anatomy = decoder(name, variant)
    kept = {"layer.0.heads": np.array([1]), "layer.1.ffn": np.arange(0, anatomy.site("layer.1.ffn").units, 3)}
    model = slice_model(anatomy, kept)
    session = open_session(model)
    caches = empty_caches(model, batch=2)
    text = np.array([[5], [17]])
    stepwise = []
    for length in range(1, STEPS + 1):
        found = run(session, {"input_ids": text[:, -1:], "attention_mask": np.ones((2, length), np.int64), **caches})
        stepwise.append(found[0][:, 0])
        caches = dict(zip(caches, found[1:], strict=True))
        text = np.concatenate([text, stepwise[-1].argmax(-1)[:, None]], axis=1)
    whole = run(session, {"input_ids": text[:, :-1], "attention_mask": np.ones((2, STEPS), np.int64), **empty_caches(model, batch=2)})[0]
    np.testing.assert_allclose(np.stack(stepwise, axis=1), whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    assert len(np.unique(text)) > 3


def empty_caches(model: Model, batch: int) -> dict[str, np.ndarray]:
    """Caches of no token, of the sizes that the model declares."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.proto.graph.input}
    return {
        name: np.zeros((batch, shapes[name][1].dim_value, 0, shapes[name][3].dim_value), np.float32)
        for name in model.input_names
        if name.startswith("past_key_values")
    }


def test_a_sliced_model_declares_what_its_caches_hold() -> None:
    sliced = slice_model(decoder("gpt2-cache"), {"layer.0.heads": np.array([0, 3]), "layer.1.heads": np.zeros(0, np.int64)})
    graph = sliced.proto.graph
    sizes = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in (*graph.input, *graph.output) if "." in value.name}
    wanted = {0: 2, 1: 1}
    assert sizes == {
        f"{side}.{layer}.{word}": wanted[layer]
        for side in ("past_key_values", "present")
        for layer in range(LAYERS)
        for word in ("key", "value")
    }
    assert cache_cuts(sliced)["past_key_values.0.value"] == CacheCut("present.0.value", 1, HEADS, (0, 3))
    assert any(entry.key == CACHES for entry in sliced.proto.metadata_props)


def test_a_layer_without_heads_keeps_one_that_nobody_reads() -> None:
    anatomy = decoder("llama-gqa-cache")
    sliced = slice_model(anatomy, {"layer.0.heads": np.zeros(0, np.int64)})
    assert cache_cuts(sliced)["past_key_values.0.key"].kept == (0,)
    fed = cut_feeds(sliced, feeds(ARCHITECTURES["llama-gqa-cache"]))
    other = {name: array + 1 if name.startswith("past_key_values.0") else array for name, array in fed.items()}
    session = open_session(sliced)
    np.testing.assert_array_equal(run(session, fed, ["logits"])[0], run(session, other, ["logits"])[0])


def test_keys_and_values_that_all_heads_share_stay() -> None:
    """MQA: query heads go one by one."""
    sliced = slice_model(decoder("llama-mqa-cache"), {"layer.0.heads": np.array([2])})
    assert cache_cuts(sliced) == {}
    assert decoder("llama-mqa-cache").model.parameters - sliced.parameters == 2 * (HEADS - 1) * (HIDDEN // HEADS) * HIDDEN


def test_feeds_of_the_right_size_are_not_cut() -> None:
    sliced = slice_model(decoder("gpt2-cache"), {"layer.0.heads": np.array([1, 2, 3])})
    given = feeds(ARCHITECTURES["gpt2-cache"])
    once = cut_feeds(sliced, given)
    assert once["past_key_values.0.key"].shape[1] == 3
    assert cut_feeds(sliced, once)["past_key_values.0.key"] is once["past_key_values.0.key"]
    np.testing.assert_array_equal(once["past_key_values.0.key"], given["past_key_values.0.key"][:, 1:])
    assert given["input_ids"].max() < VOCABULARY


def cached(grow: str, opset: int = 18) -> onnx.ModelProto:
    """One attention whose keys and values come in and go out, by various ways."""
    net = Net(opset)
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    length = "seq" if grow == "fixed" else "past"
    past = [net.input(f"past.{word}", ["batch", NET_HEADS, length, DEPTH]) for word in ("key", "value")]
    match grow:
        case "concat":
            k, v = (str(net("Concat", cache, new, axis=2)) for cache, new in zip(past, (k, v), strict=True))
        case "fixed":
            k, v = (str(net("Add", cache, new)) for cache, new in zip(past, (k, v), strict=True))
        case "only in":
            k, v = (str(net("Concat", cache, new, axis=2)) for cache, new in zip(past, (k, v), strict=True))
    out = net.add("x", net.linear(net.attend(q, k, v)))
    outputs = () if grow == "only in" else (k, v)
    shape: list[int | str] = ["batch", NET_HEADS, "total", DEPTH]
    return net.done(out, *outputs, **dict.fromkeys(outputs, shape))


def test_heads_of_a_concatenated_cache_are_units() -> None:
    anatomy = anatomy_of(cached("concat"))
    assert [site.units for site in anatomy.sites] == [NET_HEADS]
    assert sorted(cache_pairs(anatomy.view)) == ["past.key", "past.value"]
    compare = Comparison(anatomy)
    for kept in corner_cases(anatomy.sites):
        compare.check(kept)


@pytest.mark.parametrize("grow", ["fixed", "only in"])
def test_other_inputs_along_the_heads_are_refused(grow: str) -> None:
    anatomy = anatomy_of(cached(grow))
    assert not anatomy.sites
    assert [refusal.code for refusal in anatomy.refusals] == ["OP101"]
    assert "graph" in anatomy.refusals[0].reason


def test_pairs_are_seen_in_the_file_as_exported() -> None:
    """Before any clean-up: TorchScript writes a Concat of one operand."""
    for variant in EXPORTS:
        pairs = cache_pairs(GraphView(load(exports.path("gpt2-cache", variant))))
        assert pairs == {
            f"past_key_values.{layer}.{word}": f"present.{layer}.{word}" for layer in range(LAYERS) for word in ("key", "value")
        }
