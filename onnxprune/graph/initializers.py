"""Where the values of initializers lie: in the skeleton, beside it, or in external files; and how they are read from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph import storage

INLINE_BYTES = 1024
"""Initializers up to this size (shape constants, scales, small biases) stay inside the skeleton."""

_WEIGHT_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT32,
        TensorProto.INT64,
    }
)
_PLACEHOLDER = "onnxprune-weights"


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """All initializers and tensor attributes of a graph and of the bodies inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            for body in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from _tensors(body)


def external_files(graph: onnx.GraphProto, model: Path | None) -> tuple[Path, ...]:
    """The external data files of a graph, in order of name."""
    external = [tensor for tensor in _tensors(graph) if external_data_helper.uses_external_data(tensor)]
    return tuple(_external_file(location, model) for location in sorted({_place(tensor).location for tensor in external}))


def _external_file(location: str, model: Path | None) -> Path:
    """The file behind an external-data location, which must lie in the folder of the model (or of the file its link points to)."""
    if model is None:
        raise InputError(f"the model keeps weights in external file {location!r}; load it from its path instead of from bytes")
    file = (model.parent / location).resolve()
    if not {model.parent.resolve(), model.resolve().parent} & set(file.parents):
        raise InputError(f"{model} points outside its folder for its weights: {location!r}; refused")
    if not file.is_file():
        raise InputError(f"external data file not found: {model.parent / location} (named by {model}); copy it next to the model")
    return file


@dataclass(frozen=True)
class _Place:
    """Where external values lie; ``length`` 0 means up to the end of the file."""

    location: str
    offset: int
    length: int


def _place(tensor: TensorProto) -> _Place:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        place = _Place(entries.get("location", ""), int(entries.get("offset", 0)), int(entries.get("length", 0)))
    except ValueError as error:
        raise InputError(f"initializer {tensor.name!r} is corrupt: its external-data entry is not a number ({error})") from error
    # protobuf hands out text that is not UTF-8 as bytes.
    if (
        not isinstance(place.location, str)
        or not place.location
        or "\0" in place.location
        or min(place.offset, place.length, *tensor.dims) < 0
    ):
        raise InputError(f"initializer {tensor.name!r} is corrupt: its external-data entry is {entries}, its shape {list(tensor.dims)}")
    return place


def take_weights(proto: onnx.ModelProto, path: Path | None = None) -> dict[str, np.ndarray]:
    """Move large initializers out of ``proto`` (in place) and return them by name.

    Types that numpy or onnxruntime's Python side cannot share, and tensors of inner graphs, are read into the skeleton instead.
    """
    weights: dict[str, np.ndarray] = {}
    mapped: dict[Path, np.ndarray] = {}
    for tensor in proto.graph.initializer:
        external = external_data_helper.uses_external_data(tensor)
        if (external and _place(tensor).location == _PLACEHOLDER) or tensor.data_type not in _WEIGHT_TYPES:
            continue
        if external:
            array = _read_external(tensor, path, mapped)
        elif tensor.ByteSize() > INLINE_BYTES:
            array = _to_array(tensor)
        else:
            continue
        weights[tensor.name] = array
        point(tensor, _PLACEHOLDER, 0, array.nbytes)
    for tensor in _tensors(proto.graph):
        if external_data_helper.uses_external_data(tensor) and _place(tensor).location != _PLACEHOLDER:
            _load_inline(tensor, path)
    return weights


def _to_array(tensor: TensorProto) -> np.ndarray:
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise InputError(f"initializer {tensor.name!r} is corrupt: its values do not fill shape {list(tensor.dims)} ({error})") from error


def _read_external(tensor: TensorProto, model: Path | None, mapped: dict[Path, np.ndarray]) -> np.ndarray:
    """A view of the file, which is mapped once: a mapping of every tensor's own takes a file handle each."""
    place = _place(tensor)
    file = _external_file(place.location, model)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    expected = prod(shape) * dtype.itemsize
    if file.stat().st_size < place.offset + expected:
        raise InputError(f"external data file {file} is truncated: {tensor.name!r} needs {expected} bytes at offset {place.offset}")
    if file not in mapped:
        mapped[file] = storage.map_file(file)
    return storage.view_of(mapped[file], dtype, shape, place.offset)


def _load_inline(tensor: TensorProto, model: Path | None) -> None:
    place = _place(tensor)
    file = _external_file(place.location, model)
    with file.open("rb") as stream:
        stream.seek(place.offset)
        raw = stream.read(place.length or -1)
    if len(raw) < place.length:
        raise InputError(f"external data file {file} is truncated: {tensor.name!r} needs {place.length} bytes at offset {place.offset}")
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = raw


def placeholder(tensor: TensorProto, length: int) -> None:
    """Turn ``tensor`` into a placeholder for values that live in :attr:`Model.weights` (in place)."""
    point(tensor, _PLACEHOLDER, 0, length)


def is_placeholder(tensor: TensorProto) -> bool:
    """Whether the values of ``tensor`` live in :attr:`Model.weights`."""
    return external_data_helper.uses_external_data(tensor) and _place(tensor).location == _PLACEHOLDER


def point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Turn ``tensor`` into a placeholder for external bytes (in place)."""
    for name in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
        tensor.ClearField(name)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def fill(tensor: TensorProto, array: np.ndarray) -> None:
    """Put values into ``tensor`` (in place)."""
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = np.ascontiguousarray(array).tobytes()
