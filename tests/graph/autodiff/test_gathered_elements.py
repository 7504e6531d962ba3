"""Gradients where elements are gathered, in files too old for a scatter that adds up."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.graph.autodiff import GRADIENT, TARGET, WEIGHT, Tap, gradient_model
from onnxprune.graph.model import load
from onnxprune.runtime.session import open_session, run
from tests.graph.net import WIDTH, Net


@pytest.mark.parametrize("opset", [13, 15, 16, 18])
def test_repeated_elements_add_up_at_every_opset(opset: int) -> None:
    """y = x[index] * w: at mask m the loss is half the squared distance, and every use of an element counts."""
    net = Net(opset, batch=2, seq=3)
    index = np.array([0, 0, 2, 5, 5, 5, 1, 3, 11, 10, 4, 0])
    hidden = net("Tanh", "x")
    picked = net("GatherElements", hidden, net.constant(np.broadcast_to(index, (2, 3, WIDTH)).copy()), axis=2)
    model = load(net.done(net("Mul", picked, net.weight(WIDTH))))
    x = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
    (y,) = run(open_session(model), {"x": x})
    tap = Tap("t", hidden, 2, np.arange(WIDTH), WIDTH)
    gradient = gradient_model(model, [tap], model.output_names[0], "identity")
    feeds = {"x": x, TARGET: np.zeros_like(y), WEIGHT: np.ones((2, 3), np.float32)}
    (got,) = run(open_session(gradient), feeds, [GRADIENT + "t"])
    expected = np.stack([(y * y)[..., index == unit].sum(axis=(1, 2)) for unit in range(WIDTH)], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
