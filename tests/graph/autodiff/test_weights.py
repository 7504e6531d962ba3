"""Gradients of weights against torch autograd, on exports of real layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onnxprune.errors import InputError
from onnxprune.graph.autodiff.gradient import GRADIENT, TARGET, WEIGHT, Link
from onnxprune.graph.autodiff.weights import parameters_of, weight_gradient_model
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import open_session, run


class Block(nn.Module):
    """Attention and a feed-forward network, each before its norm, and a classifier on the first token."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(20, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        x = self.second(x + self.down(nn.functional.gelu(self.up(x))))
        return self.classifier(x[:, 0])


class Patches(nn.Module):
    """Patches by a convolution, a feed-forward network after its norm, and the mean as an embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        return (x + self.down(nn.functional.silu(self.up(self.norm(x))))).mean(1)


def exported(net: nn.Module, x: torch.Tensor, path: Path, dynamo: bool) -> Model:
    torch.manual_seed(0)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.5)
    options: dict[str, Any] = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(
        net.eval(), (x,), str(path), input_names=["x"], output_names=["y"], opset_version=18, dynamo=dynamo, verbose=False, **options
    )
    return load(path)


def of_torch(net: nn.Module, model: Model) -> dict[str, tuple[nn.Parameter, bool]]:
    """Parameter of torch by initializer, and whether the file holds it transposed: they are recognised by their values."""
    found = {}
    for name in (item.name for item in parameters_of(model)):
        value = initializer(model, name)
        for weight in net.parameters():
            array = weight.detach().numpy()
            if array.shape == value.shape and np.array_equal(array, value):
                found[name] = weight, False
            elif array.ndim == 2 and array.T.shape == value.shape and np.array_equal(array.T, value):
                found[name] = weight, True
    return found


def initializer(model: Model, name: str) -> np.ndarray:
    value = model.initializer(name)
    assert value is not None
    return value


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("link", ["softmax", "identity"])
def test_gradients_of_weights_are_those_of_torch(link: Link, dynamo: bool, tmp_path: Path) -> None:
    net: nn.Module
    if link == "softmax":
        net, x, unnamed = Block(), torch.randint(0, 20, (5, 6)), {"words.weight"}
    else:
        net, x, unnamed = Patches(), torch.randn(5, 3, 8, 8), {"patches.weight"}
    model = exported(net, x, tmp_path / "m.onnx", dynamo)
    known = of_torch(net, model)
    reached = {id(weight) for weight, _ in known.values()}
    assert {name for name, weight in net.named_parameters() if id(weight) not in reached} == unnamed

    y = net(x)
    target = torch.softmax(torch.randn_like(y), -1)
    share = torch.rand(len(x))
    if link == "softmax":
        loss = -(target * torch.log_softmax(y, -1)).sum(-1)
    else:
        loss = 0.5 * ((y - target) ** 2).sum(-1)
    (share * loss).sum().backward()  # type: ignore[no-untyped-call]

    session = open_session(weight_gradient_model(model, list(known), model.output_names[0], link))
    feeds = {model.input_names[0]: x.numpy(), TARGET: target.numpy(), WEIGHT: share.numpy()}
    feeds |= {name: initializer(model, name) for name in known}
    gradients = run(session, feeds, [GRADIENT + name for name in known])
    for (name, (weight, flipped)), found in zip(known.items(), gradients, strict=True):
        assert weight.grad is not None
        expected = weight.grad.numpy().T if flipped else weight.grad.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(expected).max()), err_msg=name)


def test_a_hint_pulls_what_lies_before_it_towards_its_target(tmp_path: Path) -> None:
    net, ids = Block(), torch.randint(0, 20, (5, 6))
    model = exported(net, ids, tmp_path / "m.onnx", True)
    known = of_torch(net, model)
    seen: list[torch.Tensor] = []
    net.first.register_forward_hook(lambda module, given, made: seen.append(made))
    y = net(ids)
    target, there = torch.softmax(torch.randn_like(y), -1), torch.randn_like(seen[0])
    share, weight = torch.rand(5), torch.rand(5, 6)
    loss = (share * -(target * torch.log_softmax(y, -1)).sum(-1)).sum() + 0.5 * (weight * ((seen[0] - there) ** 2).sum(-1)).sum()
    loss.backward()  # type: ignore[no-untyped-call]

    node = next(node for node in model.proto.graph.node if node.op_type == "LayerNormalization")
    (hint,) = node.output[:1]
    session = open_session(weight_gradient_model(model, list(known), model.output_names[0], "softmax", [hint]))
    feeds = {model.input_names[0]: ids.numpy(), TARGET: target.numpy(), WEIGHT: share.numpy()}
    feeds |= {f"{TARGET}.{hint}": there.numpy(), f"{WEIGHT}.{hint}": weight.numpy()}
    feeds |= {name: initializer(model, name) for name in known}
    for (name, (parameter, flipped)), found in zip(known.items(), run(session, feeds, [GRADIENT + name for name in known]), strict=True):
        assert parameter.grad is not None
        expected = parameter.grad.numpy().T if flipped else parameter.grad.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(expected).max()), err_msg=name)


def test_trained_weights_of_a_convolution_are_refused(tmp_path: Path) -> None:
    model = exported(Patches(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", False)
    weight = next(node.input[1] for node in model.proto.graph.node if node.op_type == "Conv")
    with pytest.raises(InputError, match="its weights depend on a mask or are trained"):
        weight_gradient_model(model, [weight], model.output_names[0], "identity")
