"""Sessions fail loudly and share weights."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import numpy_helper

from onnxprune.errors import InputError, RuntimeUnavailable
from onnxprune.graph.model import load
from onnxprune.runtime import session as session_module
from onnxprune.runtime.session import RuntimeOptions, open_session, require_onnxruntime, run
from tests.calibration.models import image_model, text_model


def test_a_provider_this_build_does_not_have_is_refused() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"NoSuchProvider is not in this onnxruntime build \(it has .*CPUExecutionProvider"):
        open_session(image_model(), RuntimeOptions("NoSuchProvider"))


def test_a_provider_that_falls_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = require_onnxruntime()

    def fallen_back(payload, settings, providers):  # type: ignore[no-untyped-def]
        return real.InferenceSession(payload, settings, providers=["CPUExecutionProvider"])

    fake = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=real.SessionOptions,
        OrtValue=real.OrtValue,
        InferenceSession=fallen_back,
    )
    monkeypatch.setattr(session_module, "require_onnxruntime", lambda: fake)
    with pytest.raises(RuntimeUnavailable, match="CUDAExecutionProvider was asked for but did not start"):
        open_session(image_model(), RuntimeOptions("cuda"))


def test_two_distributions_are_a_conflict_with_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module.importlib.metadata, "distribution", lambda name: name)
    with pytest.raises(RuntimeUnavailable, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        require_onnxruntime()


def test_a_missing_and_a_damaged_installation_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailable, match=r"not installed; run: pip install 'onnxprune\[cpu\]'"):
        require_onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    with pytest.raises(RuntimeUnavailable, match="damaged"):
        require_onnxruntime()


def test_large_initializers_that_nothing_reads_do_no_harm() -> None:
    model = image_model()
    proto = model.to_proto()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(100_000, np.float32), "unread"))
    unread = load(proto)
    assert "unread" in unread.weights
    assert [value.name for value in open_session(unread).get_outputs()] == list(model.output_names)


def test_a_model_onnxruntime_rejects_is_an_input_error() -> None:
    model = image_model()
    model.proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(InputError, match="onnxruntime cannot load the model"):
        open_session(model)


def test_a_failing_run_names_the_shapes_fed() -> None:
    with pytest.raises(InputError, match=r"inputs pixels float32\[2, 4\]"):
        run(open_session(image_model()), {"pixels": np.zeros((2, 4), np.float32)})


def test_skeletons_take_their_weights_from_the_caller_with_or_without_optimization() -> None:
    model = text_model()
    big = {"table": np.arange(2000, dtype=np.float32).reshape(500, 4)}
    proto = model.copy_proto()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(big["table"], "table"))
    large = model.with_proto(proto)
    assert set(large.weights) == {"table"}
    feeds = {"input_ids": np.array([[7]]), "attention_mask": np.array([[1]])}
    for optimize in (True, False):
        found = run(open_session(large.proto, weights={"table": big["table"] * 2}, optimize=optimize), feeds)[0]
        np.testing.assert_array_equal(found, [[56, 58, 60, 62]])
