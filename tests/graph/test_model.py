"""Loading and saving: what is refused, what survives a round trip, and what a failed save leaves behind."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune.graph.model as model_module
from onnxprune.errors import InputError
from onnxprune.graph.initializers import INLINE_BYTES
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import open_session, run

RNG = np.random.default_rng(0)
BIG = RNG.standard_normal((16, 64)).astype(np.float32)
SMALL = RNG.standard_normal(64).astype(np.float32)


def linear_proto() -> onnx.ModelProto:
    """y = x @ big + small; big is above INLINE_BYTES, small below."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "big"], ["xw"], name="mm"), helper.make_node("Add", ["xw", "small"], ["y"], name="add")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(BIG, "big"), numpy_helper.from_array(SMALL, "small")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    proto.metadata_props.add(key="author", value="someone")
    return proto


def external_model(folder: Path, location: str = "weights.bin") -> Path:
    """linear_proto with ``big`` in ``folder/weights.bin``, but declared to lie at ``location``."""
    proto = linear_proto()
    (folder / "weights.bin").write_bytes(BIG.tobytes())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(BIG.nbytes))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def output_of(path: Path | Model) -> np.ndarray:
    x = np.arange(32, dtype=np.float32).reshape(2, 16)
    return run(open_session(str(path) if isinstance(path, Path) else path), {"x": x})[0]


EXPECTED = np.arange(32, dtype=np.float32).reshape(2, 16) @ BIG + SMALL


def test_large_initializers_leave_the_skeleton_and_small_ones_stay() -> None:
    assert BIG.nbytes > INLINE_BYTES > SMALL.nbytes
    model = Model.from_proto(linear_proto())
    assert set(model.weights) == {"big"}
    assert len(model.proto.SerializeToString()) < BIG.nbytes
    np.testing.assert_array_equal(model.initializer("big"), BIG)
    np.testing.assert_array_equal(model.initializer("small"), SMALL)
    assert model.initializer("x") is None
    assert model.parameters == BIG.size + SMALL.size
    np.testing.assert_allclose(output_of(model), EXPECTED, rtol=1e-5, atol=1e-5)


def test_from_proto_does_not_change_its_argument() -> None:
    proto = linear_proto()
    before = proto.SerializeToString(deterministic=True)
    Model.from_proto(proto)
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("external", [False, True])
def test_round_trip_keeps_values_and_metadata(tmp_path: Path, external: bool) -> None:
    saved = Model.from_proto(linear_proto()).save(tmp_path / "m.onnx", external_data=external)
    assert (tmp_path / "m.onnx.data").exists() is external
    again = load(saved)
    np.testing.assert_array_equal(again.initializer("big"), BIG)
    assert again.proto.metadata_props[0].value == "someone"
    np.testing.assert_allclose(output_of(saved), EXPECTED, rtol=1e-5, atol=1e-5)
    onnx.checker.check_model(str(saved))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = Model.from_proto(linear_proto())
    assert model.save(tmp_path / "a.onnx").read_bytes() == model.save(tmp_path / "b.onnx").read_bytes()


def test_a_model_with_external_data_can_be_saved_over_itself(tmp_path: Path) -> None:
    path = Model.from_proto(linear_proto()).save(tmp_path / "m.onnx", external_data=True)
    load(path).save(path, external_data=True)
    np.testing.assert_array_equal(load(path).initializer("big"), BIG)


def test_the_hash_covers_external_data(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    first = load(path).source
    (tmp_path / "weights.bin").write_bytes((BIG + 1).tobytes())
    second = load(path).source
    assert first is not None
    assert second is not None
    assert first.sha256 != second.sha256
    assert first.bytes == path.stat().st_size + BIG.nbytes


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model not found: .*nowhere\.onnx"):
        load(tmp_path / "nowhere.onnx")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read model"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text and no protobuf", b"\x00" * 4096, b"PK\x03\x04" + b"\x11" * 300])
def test_files_that_are_no_onnx_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        load(path)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    raw = linear_proto().SerializeToString()
    path = tmp_path / "m.onnx"
    for size in range(1, len(raw), 37):
        path.write_bytes(raw[:size])
        with pytest.raises(InputError):
            load(path)


def test_an_initializer_that_does_not_fill_its_shape_is_refused() -> None:
    proto = linear_proto()
    proto.graph.initializer[0].raw_data = BIG.tobytes()[:-8]
    with pytest.raises(InputError, match="'big' is corrupt"):
        load(proto.SerializeToString())


def test_names_that_are_not_text_are_refused() -> None:
    raw = linear_proto().SerializeToString()
    assert raw.count(b"small") == 2
    with pytest.raises(InputError, match="names that are not text"):
        load(raw.replace(b"small", b"sm\xffll"))


def test_missing_external_data_names_the_file(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"external data file not found: .*weights\.bin"):
        load(path)


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(BIG.tobytes()[:-4])
    with pytest.raises(InputError, match="truncated: 'big'"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "x"), ("offset", "-4096"), ("length", "4k"), ("location", ""), ("location", "a\0b")], ids=str
)
def test_corrupt_external_data_entries_are_refused(tmp_path: Path, key: str, value: str) -> None:
    path = external_model(tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    next(entry for entry in proto.graph.initializer[0].external_data if entry.key == key).value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="'big' is corrupt"):
        load(path)


def test_external_data_needs_a_path(tmp_path: Path) -> None:
    raw = external_model(tmp_path).read_bytes()
    with pytest.raises(InputError, match="load it from its path"):
        load(raw)
    with pytest.raises(InputError, match="load it from its path"):
        load(onnx.load_model_from_string(raw))


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin", "{absolute}"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(BIG.tobytes())
    path = external_model(folder, location.format(absolute=tmp_path / "weights.bin"))
    with pytest.raises(InputError, match="outside its folder"):
        load(path)


def test_a_link_out_of_the_folder_is_refused_but_a_linked_store_of_both_files_is_read(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    store.mkdir()
    links.mkdir()
    model = external_model(store)
    (links / "weights.bin").symlink_to(store / "weights.bin")
    copied = links / "copied.onnx"
    copied.write_bytes(model.read_bytes())
    with pytest.raises(InputError, match="outside its folder"):
        load(copied)
    linked = links / "linked.onnx"
    linked.symlink_to(model)
    np.testing.assert_array_equal(load(linked).initializer("big"), BIG)


def test_external_data_of_types_numpy_cannot_share_is_read_into_the_skeleton(tmp_path: Path) -> None:
    packed = bytes(range(16))
    tensor = TensorProto(name="packed", data_type=TensorProto.INT4, dims=[32], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(packed)
    proto = linear_proto()
    proto.graph.initializer.append(tensor)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    model = load(path)
    assert "packed" not in model.weights
    assert model.proto.graph.initializer[2].raw_data == packed


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old one")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        Model.from_proto(linear_proto()).save(target, external_data=external)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert target.read_bytes() == b"the old one"


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, data: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Model.from_proto(linear_proto()).save(tmp_path / "m.onnx", external_data=True)
    assert not list(tmp_path.iterdir())


def test_external_data_starts_on_pages(tmp_path: Path) -> None:
    proto = linear_proto()
    proto.graph.initializer.append(numpy_helper.from_array(BIG[:, :61] + 1, "odd"))
    proto.graph.initializer.append(numpy_helper.from_array(BIG + 2, "last"))
    saved = Model.from_proto(proto).save(tmp_path / "m.onnx", external_data=True)
    tensors = [tensor for tensor in onnx.load(str(saved), load_external_data=False).graph.initializer if tensor.external_data]
    offsets = [int(entry.value) for tensor in tensors for entry in tensor.external_data if entry.key == "offset"]
    assert len(offsets) == 3
    assert all(offset % 4096 == 0 for offset in offsets)
    np.testing.assert_array_equal(load(saved).initializer("last"), BIG + 2)


def test_weights_beyond_one_file_go_outside_and_are_refused_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "EXTERNAL_DATA_BYTES", BIG.nbytes - 1)
    model = Model.from_proto(linear_proto())
    assert model.save(tmp_path / "m.onnx").stat().st_size < BIG.nbytes
    assert (tmp_path / "m.onnx.data").stat().st_size >= BIG.nbytes
    with pytest.raises(InputError, match="2 GiB limit"):
        model.save(tmp_path / "n.onnx", external_data=False)


def test_saving_into_a_missing_directory_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        Model.from_proto(linear_proto()).save(tmp_path / "no" / "m.onnx")


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    saved = Model.from_proto(linear_proto()).save(tmp_path / "m.onnx")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_with_proto_takes_new_weights_and_drops_unused_ones() -> None:
    model = Model.from_proto(linear_proto())
    proto = model.copy_proto()
    del proto.graph.initializer[0]
    proto.graph.initializer.append(numpy_helper.from_array(BIG * 2, "double"))
    proto.graph.node[0].input[1] = "double"
    edited = model.with_proto(proto)
    assert set(edited.weights) == {"double"}
    assert set(model.weights) == {"big"}
    np.testing.assert_allclose(output_of(edited), EXPECTED * 2 - SMALL, rtol=1e-4, atol=1e-4)


def test_a_listed_initializer_is_no_input_and_opsets_are_found() -> None:
    proto = linear_proto()
    proto.graph.input.append(helper.make_tensor_value_info("big", TensorProto.FLOAT, [16, 64]))
    proto.opset_import.add(domain="com.microsoft", version=1)
    model = Model.from_proto(proto)
    assert model.input_names == ("x",)
    assert (model.opset(), model.opset("ai.onnx"), model.opset("com.microsoft"), model.opset("nobody")) == (18, 18, 1, 0)
