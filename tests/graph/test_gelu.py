"""GELU in the spelling that a default session fuses."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.gelu import fusable_gelu
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import Net

REWRITTEN = {name for name in zoo.NAMES if name.endswith("do18") and name.split("-")[0] not in ("gpt2", "llama")}
"""The exports whose GELU a default session does not see; the others have the tanh form, one operator, or no GELU."""


def optimised(model: Model, path: Path) -> Counter[str]:
    """Operators after the graph optimizations of a default session."""
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(path)
    settings.log_severity_level = 4
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_no_export_keeps_a_gelu_that_the_session_does_not_fuse(name: str, tmp_path: Path) -> None:
    plain, _ = canonicalise(load(zoo.path(name)))
    model, number = fusable_gelu(plain)
    assert number == (zoo.LAYERS if name in REWRITTEN else 0)
    assert optimised(model, tmp_path / "model.onnx")["Erf"] == 0
    assert optimised(plain, tmp_path / "plain.onnx")["Erf"] == number


@pytest.mark.parametrize("name", sorted(REWRITTEN))
def test_numbers_stay(name: str) -> None:
    plain, _ = canonicalise(load(zoo.path(name)))
    model, _ = fusable_gelu(plain)
    onnx.checker.check_model(model.to_proto())
    for inputs in (zoo.feeds(name, 3, 11), zoo.feeds(name, 1, 5)):
        want = run(open_session(plain, optimize=False), inputs)[0]
        for optimize in (False, True):
            got = run(open_session(model, optimize=optimize), inputs)[0]
            assert np.isfinite(got).all()
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("half", "one", "root"), [(0.4, 1.0, math.sqrt(2)), (0.5, 1.1, math.sqrt(2)), (0.5, 1.0, 1.5)])
def test_other_constants_are_left_alone(half: float, one: float, root: float) -> None:
    assert fusable_gelu(_gelu("x", half, one, root))[1] == 0


def test_a_gate_by_another_tensor_is_left_alone() -> None:
    assert fusable_gelu(_gelu("other", 0.5, 1.0, math.sqrt(2)))[1] == 0


def _gelu(gate: str, half: float, one: float, root: float) -> Model:
    net = Net()
    net.input("other", ["batch", "seq", 12])
    grown = net("Add", net("Erf", net("Div", "x", net.constant(np.float32(root)))), net.constant(np.float32(one)))
    return load(net.done(net("Mul", gate, net("Mul", net.constant(np.float32(half)), grown))))


def test_the_graph_that_other_constants_differ_from_is_rewritten() -> None:
    assert fusable_gelu(_gelu("x", 0.5, 1.0, math.sqrt(2)))[1] == 1
