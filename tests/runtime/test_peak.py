"""Peak memory of a fresh process."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.runtime import peak
from onnxprune.runtime.peak import peak_memory_bytes
from onnxprune.runtime.session import RuntimeOptions
from tests.calibration.models import build

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def saved(folder: Path, megabytes: int) -> Path:
    """A Gather from a table of that size."""
    table = np.ones((megabytes * 1024, 256), np.float32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    model = build(nodes, [("ids", TensorProto.INT64, ["n"])], {"y": TensorProto.FLOAT}, {"table": table})
    np.savez(folder / "feeds.npz", ids=np.array([0, 5]))
    return model.save(folder / f"{megabytes}.onnx")


def test_a_larger_model_takes_more_memory(tmp_path: Path) -> None:
    small, large = (peak_memory_bytes(saved(tmp_path, size), tmp_path / "feeds.npz", RuntimeOptions()) for size in (1, 96))
    assert small is not None
    assert large is not None
    assert large - small > 80 * 2**20


def test_a_model_that_does_not_run_gives_none_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with caplog.at_level(logging.WARNING):
        assert peak_memory_bytes(tmp_path / "no.onnx", tmp_path / "feeds.npz", RuntimeOptions()) is None
    assert "could not be measured" in caplog.text


def test_other_systems_give_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak, "_STATUS", tmp_path / "nothing")
    assert peak_memory_bytes(tmp_path / "m.onnx", tmp_path / "f.npz", RuntimeOptions()) is None
