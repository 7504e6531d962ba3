"""Gradients through fused attentions that keep a cache, against central differences of the masked model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxprune.graph.autodiff import GRADIENT, TARGET, WEIGHT, Tap, gradient_model
from onnxprune.graph.instrument import MASK, mask_feeds, masked_model
from onnxprune.graph.profile import past_symbols, synthetic_feeds
from onnxprune.runtime.session import open_session, run
from tests.graph.net import WIDTH, Net
from tests.graph.pruning import anatomy_of

HEADS, SHARED, DEPTH = 4, 2, 16
STEP = 1e-2


def decoder(form: str) -> onnx.ModelProto:
    """A feed-forward in front of an attention, so that its gradient has to pass queries, keys and values."""
    net = Net()
    hidden = net.add("x", net.ffn("x"))
    shared = HEADS if form == "multi-head" else SHARED
    parts = [net.linear(hidden, WIDTH, count * DEPTH) for count in (HEADS, shared, shared)]
    past = [net.input(f"past.{word}", ["batch", shared, "past", DEPTH]) for word in ("key", "value")]
    angles = [
        net.constant(function(np.arange(32)[:, None] / 2 ** np.arange(DEPTH // 2)).astype(np.float32)) for function in (np.cos, np.sin)
    ]
    if form == "multi-head":
        positions = net.constant(np.array([0]))
        parts[:2] = (net.ms("RotaryEmbedding", part, positions, *angles, num_heads=HEADS) for part in parts[:2])
        context, *presents = net.ms("MultiHeadAttention", *parts, "", "", "", *past, outputs=3, num_heads=HEADS, unidirectional=1)
    else:
        mask = net.input("attention_mask", ["batch", "past + seq"], TensorProto.INT64)
        last = net("Cast", net("Sub", net("ReduceSum", mask, net.ints(1), keepdims=0), net.ints(1)), to=TensorProto.INT32)
        total = net("Cast", net("Gather", net("Shape", mask), net.constant(np.array(1)), axis=0), to=TensorProto.INT32)
        sizes = {"num_heads": HEADS, "kv_num_heads": SHARED, "do_rotary": 1, "local_window_size": 4}
        context, *presents = net.ms("GroupQueryAttention", *parts, *past, last, total, *angles, outputs=3, **sizes)
    out = net.add(hidden, net.linear(context, HEADS * DEPTH, WIDTH))
    shape: list[int | str] = ["batch", shared, "total", DEPTH]
    return net.done(out, *presents, **dict.fromkeys(presents, shape))


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("form", ["multi-head", "group-query"])
def test_gradients_pass_an_attention_with_a_cache(form: str, empty: bool) -> None:
    anatomy = anatomy_of(decoder(form))
    assert [site.name for site in anatomy.sites] == ["layer.0.ffn", "layer.0.heads"]
    # Several tokens of several rows at once are more than GroupQueryAttention takes with a past.
    feeds = synthetic_feeds(anatomy.model, empty=past_symbols(anatomy.model)) if empty else synthetic_feeds(anatomy.model, (1, 3, 5))
    feeds = {name: np.ones_like(array) if name == "attention_mask" else array for name, array in feeds.items()}
    output, masked = anatomy.model.output_names[0], open_session(masked_model(anatomy), optimize=False)

    def result(site: str = "", unit: int = 0, step: float = 0.0) -> np.ndarray:
        masks = mask_feeds(anatomy.sites, {})
        if site:
            masks[MASK + site][unit] += step
        return np.asarray(run(masked, {**feeds, **masks})[0], np.float64)

    target = result() + np.random.default_rng(0).standard_normal(result().shape)
    taps = [
        Tap(site.name, site.consumers[0].tensor, site.consumers[0].axis, site.consumers[0].labels, site.units) for site in anatomy.sites
    ]
    made = gradient_model(anatomy.model, taps, output, "identity")
    weight = np.ones(target.shape[:-1], np.float32)
    found = run(
        open_session(made),
        {name: array for name, array in feeds.items() if name in made.input_names} | {TARGET: target.astype(np.float32), WEIGHT: weight},
    )
    for site, gradient in zip(anatomy.sites, found, strict=True):
        losses = [[0.5 * ((result(site.name, unit, step) - target) ** 2).sum() for step in (STEP, -STEP)] for unit in range(site.units)]
        expected = np.array([(up - down) / (2 * STEP) for up, down in losses])
        assert made.output_names[anatomy.sites.index(site)] == GRADIENT + site.name
        np.testing.assert_allclose(gradient.sum(axis=0), expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
