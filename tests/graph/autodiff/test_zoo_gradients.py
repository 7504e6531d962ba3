"""Mask gradients of real exports against torch autograd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.graph.autodiff import GRADIENT, TARGET, WEIGHT, Link, Tap, gradient_model
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session
from tests import zoo

torch = pytest.importorskip("torch")

_HEAD_MODULE = re.compile(r"attention\.output\.dense$|attention\.o_proj$|attn\.c_proj$|self_attn\.o_proj$")
_FFN_MODULE = re.compile(r"layer\.\d+\.output\.dense$|mlp\.fc2$|mlp\.c_proj$|mlp\.down_proj$")


def _sites(name: str) -> dict[str, tuple[Any, int]]:
    """Tap name -> (torch module in front of which the mask acts, number of units)."""
    architecture = name.split("-")[0]
    found = {}
    for path, module in zoo.torch_model(name).named_modules():
        for pattern, kind, units in ((_HEAD_MODULE, "heads", zoo.HEADS[architecture]), (_FFN_MODULE, "ffn", zoo.FFN[architecture])):
            if pattern.search(path):
                found[f"{kind}.{path}"] = (module, units)
    assert len(found) == 2 * zoo.LAYERS, sorted(found)
    return found


def _taps(name: str, model: Model) -> list[Tap]:
    view = GraphView(model)
    taps = []
    for site, (module, units) in _sites(name).items():
        weight = module.weight.detach().numpy()
        weight = weight if type(module).__name__ == "Conv1D" else weight.T
        labels = np.arange(len(weight)) // (len(weight) // units)
        taps.append(Tap(site, _operand(view, weight), -1, labels, units))
    return taps


def _operand(view: GraphView, weight: np.ndarray) -> str:
    """The tensor that is multiplied by this [in, out] weight."""
    for node in view.nodes:
        if node.op in ("MatMul", "Gemm") and len(node.inputs) > 1:
            value = _value(view, node.inputs[1])
            if value is None:
                continue
            value = value.T if node.attrs.get("transB") else value
            if value.shape == weight.shape and np.array_equal(value, weight):
                return node.inputs[0]
    raise AssertionError("no product with this weight in the graph")


def _value(view: GraphView, name: str) -> np.ndarray | None:
    producer = view.producer.get(name)
    if producer is not None and producer.op == "Transpose":
        inner = _value(view, producer.inputs[0])
        return None if inner is None else inner.T
    if producer is not None and producer.op == "Identity":
        return _value(view, producer.inputs[0])
    return view.value(name)


def _reference(name: str, feeds: dict[str, np.ndarray], target: np.ndarray, weight: np.ndarray, link: Link) -> dict[str, np.ndarray]:
    batch = len(target)
    masks, handles = {}, []
    for site, (module, units) in _sites(name).items():
        mask = masks[site] = torch.ones(batch, units, requires_grad=True)

        def multiply(module: Any, inputs: tuple[Any, ...], mask: Any = mask) -> tuple[Any, ...]:
            (x,) = inputs
            spread = mask.repeat_interleave(x.shape[-1] // mask.shape[1], dim=1)
            return (x * spread.reshape(batch, *[1] * (x.ndim - 2), -1),)

        handles.append(module.register_forward_pre_hook(multiply))
    try:
        output = zoo.forward(name, feeds)
        wanted, kept = torch.from_numpy(target), torch.from_numpy(weight)
        if link == "softmax":
            loss = -(kept * (wanted * torch.log_softmax(output, -1)).sum(-1)).sum()
        else:
            loss = 0.5 * (kept * ((output - wanted) ** 2).sum(-1)).sum()
        gradients = torch.autograd.grad(loss, list(masks.values()))
    finally:
        for handle in handles:
            handle.remove()
    return {site: gradient.numpy() for site, gradient in zip(masks, gradients, strict=True)}


def _target(name: str, shape: tuple[int, ...], link: Link, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if link == "identity":
        target = rng.standard_normal(shape).astype(np.float32)
    else:
        target = np.eye(shape[-1], dtype=np.float32)[rng.integers(0, shape[-1], shape[:-1])]
    return target, rng.integers(1, 3, shape[:-1]).astype(np.float32)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_mask_gradients_equal_autograd_at_two_sizes(name: str) -> None:
    _check(name, load(zoo.path(name)))


@pytest.mark.parametrize("name", ["bert-eager-ts17", "minilm-sdpa-do18", "vit-sdpa-ts17"])
def test_mask_gradients_survive_the_fusions_of_onnxruntime(name: str, tmp_path: Path) -> None:
    """Attention, SkipLayerNormalization and BiasGelu of com.microsoft take part."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    architecture = name.split("-")[0]
    kind = "vit" if architecture == "vit" else "bert"
    heads, hidden = zoo.HEADS[architecture], zoo.HIDDEN[architecture]
    fused = optimizer.optimize_model(str(zoo.path(name)), model_type=kind, num_heads=heads, hidden_size=hidden, opt_level=0)
    fused.save_model_to_file(str(tmp_path / "fused.onnx"))
    assert {node.op_type for node in fused.model.graph.node if node.domain} >= {"SkipLayerNormalization", "BiasGelu"}
    _check(name, load(tmp_path / "fused.onnx"))


def _check(name: str, original: Model, profile: Profile | None = None) -> None:
    link: Link = "identity" if name.startswith("minilm") else "softmax"
    taps = _taps(name, original)
    model = gradient_model(original, taps, zoo.OUTPUTS[name.split("-")[0]], link, profile)
    session = open_session(model)
    assert model.output_names == tuple(GRADIENT + tap.name for tap in taps)
    for batch, seq, seed in ((3, 11, 0), (2, 6, 1)):
        feeds = zoo.feeds(name, batch, seq, seed)
        shape = tuple(zoo.forward(name, feeds).shape)
        target, weight = _target(name, shape, link, seed)
        inputs = {key: value for key, value in feeds.items() if key in model.input_names} | {TARGET: target, WEIGHT: weight}
        results = session.run(None, inputs)
        for (site, expected), ours in zip(_reference(name, feeds, target, weight, link).items(), results, strict=True):
            assert ours.shape == expected.shape
            error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
            assert error <= 1e-5, f"{site} at batch {batch}, sequence {seq}"


def _profile_at(model: Model, batch: int, seq: int) -> Profile:
    """Shapes and integers of the first run when every input is fixed to one size."""
    proto = model.copy_proto()
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (batch, seq), strict=True):
            dim.dim_value = size
    return take_profile(model.with_proto(proto))


@pytest.mark.parametrize("second", [(3, 9), (2, 9)])
def test_profile_of_one_sequence_length_bakes_no_dynamic_size_into_the_graph(second: tuple[int, int]) -> None:
    """A profile may have seen one sequence length only, or one size altogether; the gradient of pooling pads to the sequence."""
    name = "bert-eager-do18"
    original = load(zoo.path(name))
    runs = [_profile_at(original, *size) for size in ((2, 9), second)]
    profile = Profile((runs[0].shapes[0], runs[1].shapes[0]), (runs[0].integers[0], runs[1].integers[0]))
    _check(name, original, profile)


def test_gradient_graph_shares_weights_and_leaves_the_model_alone() -> None:
    name = "bert-sdpa-do18"
    model = load(zoo.path(name))
    before = model.proto.SerializeToString(deterministic=True)
    made = gradient_model(model, _taps(name, model), "logits", "softmax")
    assert model.proto.SerializeToString(deterministic=True) == before
    shared = set(made.weights) & set(model.weights)
    assert shared
    assert all(made.weights[key] is model.weights[key] for key in shared)
    onnx.checker.check_model(made.to_proto())
