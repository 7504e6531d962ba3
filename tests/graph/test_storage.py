"""Weights in files: mapped once, given back after use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.graph import storage
from onnxprune.graph.model import Model, load
from onnxprune.graph.storage import Scratch, map_file, release, stored, view_of
from onnxprune.graph.surgery import Surgeon

STATUS = Path("/proc/self/status")


def mapped_bytes() -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))


def wide_model(count: int, size: int) -> Model:
    """A chain of additions with ``count`` different weights [size]."""
    nodes = [helper.make_node("Add", [f"x{index}", f"w{index}"], [f"x{index + 1}"], name=f"add{index}") for index in range(count)]
    weights = [onnx.numpy_helper.from_array(np.full(size, index, np.float32), f"w{index}") for index in range(count)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name in ("x0", f"x{count}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux")
def test_released_arrays_leave_memory_and_keep_their_values(tmp_path: Path) -> None:
    size = 32 << 20
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(size))
    array = view_of(map_file(file), np.dtype(np.int32), (2, size // 8), 0)
    before, total = mapped_bytes(), int(array.sum(dtype=np.int64))
    assert mapped_bytes() - before > 0.9 * size
    release([array.T[5:]])
    assert mapped_bytes() - before < 0.1 * size
    assert int(array.sum(dtype=np.int64)) == total


def test_only_mapped_arrays_are_released() -> None:
    array = np.arange(5)
    release([array, array[:0], np.array(3.0)])
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_scratch_keeps_values_types_and_shapes() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.array(7),
        "c": np.zeros((0, 4), bool),
        "d": np.array([True, False]),
    }
    scratch = Scratch()
    for name, array in arrays.items():
        scratch.add(name, array)
    for found in (scratch.close(), stored(arrays)):
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
            assert not array.size or isinstance(found[name], np.memmap)


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux")
def test_many_external_weights_take_one_file_handle(tmp_path: Path) -> None:
    path = wide_model(300, 512).save(tmp_path / "m.onnx", external_data=True)
    before = len(os.listdir("/proc/self/fd"))
    model = load(path)
    assert len(model.weights) == 300
    assert all(isinstance(array, np.memmap) for array in model.weights.values())
    assert len(os.listdir("/proc/self/fd")) - before < 5


def test_models_above_the_limit_are_paged_and_so_is_all_that_is_made_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = wide_model(2, 512)
    assert not small.paged
    monkeypatch.setattr(storage, "LARGE_BYTES", 4095)
    path = small.save(tmp_path / "m.onnx")
    large = load(path)
    assert large.paged
    surgeon = Surgeon(large)
    surgeon.nodes[0].inputs[1] = surgeon.constant(np.full(512, 7, np.float32), "w0")
    edited = surgeon.close()
    assert edited.paged
    (new,) = [array for name, array in edited.weights.items() if name not in large.weights]
    assert isinstance(new, np.memmap)
    assert (new == 7).all()


def test_paged_models_are_written_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LARGE_BYTES", 0)
    path = wide_model(2, 512).save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 4096
    onnx.checker.check_model(str(path))
