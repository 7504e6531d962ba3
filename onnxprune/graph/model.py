"""What an ONNX model is to us: a small graph, and its weights beside it.

The protobuf we keep is a skeleton: every initializer of more than a kilobyte is replaced by an external-data placeholder, and its values
live in :attr:`Model.weights` as numpy arrays. Copying, editing, differentiating or re-inferring a graph then costs kilobytes
whatever the size of the model, sessions share the arrays instead of serialising them again, and the 2 GB limit of protobuf never applies.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph import storage
from onnxprune.graph.initializers import external_files, fill, point, take_weights

EXTERNAL_DATA_BYTES = int(1.9e9)
"""Files above this size are saved with external data: protobuf ends at 2 GiB."""

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_INTEGERS = frozenset({TensorProto.INT8, TensorProto.UINT8})


@dataclass(frozen=True)
class Source:
    """Where a model came from. ``sha256`` and ``bytes`` cover the file and, in order of name, its ``external`` data files."""

    path: Path | None
    sha256: str
    bytes: int
    external: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Model:
    """A skeleton and its weights. Treat both as immutable: edits return a new Model that shares untouched arrays.

    ``paged``: the model was loaded with more weights than :data:`onnxprune.graph.storage.LARGE_BYTES`. It and everything made from it keeps
    its weights in files and runs piece by piece.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, np.ndarray]
    source: Source | None = field(default=None, compare=False)
    paged: bool = field(default=False, compare=False)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, source: Source | None = None) -> Model:
        """Split a complete ModelProto into skeleton and weights. The argument is not modified."""
        skeleton = onnx.ModelProto()
        skeleton.CopyFrom(proto)
        weights = take_weights(skeleton)
        return cls(skeleton, weights, source, _is_large(weights))

    def with_proto(self, proto: onnx.ModelProto, weights: Mapping[str, np.ndarray] | None = None) -> Model:
        """A model around an edited skeleton; large initializers it gained are moved to the weights, unused ones dropped."""
        merged = {**self.weights, **(weights or {}), **take_weights(proto)}
        names = {tensor.name for tensor in proto.graph.initializer}
        return replace(self, proto=proto, weights={name: array for name, array in merged.items() if name in names})

    def copy_proto(self) -> onnx.ModelProto:
        """A private copy of the skeleton, to edit."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return proto

    def initializer(self, name: str) -> np.ndarray | None:
        """Values of an initializer, or None if there is none of that name. Do not write into the result."""
        if name in self.weights:
            return self.weights[name]
        tensor = self._inline.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    @property
    def _inline(self) -> dict[str, TensorProto]:
        index = self.__dict__.get("_inline_index")
        if index is None:
            index = {tensor.name: tensor for tensor in self.proto.graph.initializer if tensor.name not in self.weights}
            self.__dict__["_inline_index"] = index
        return index

    @property
    def initializer_names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.proto.graph.initializer)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Graph inputs that a caller must feed (initializers listed as inputs, an old habit, are left out)."""
        fixed = self.initializer_names
        return tuple(value.name for value in self.proto.graph.input if value.name not in fixed)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self.proto.graph.output)

    def opset(self, domain: str = "") -> int:
        """Version of an operator domain, 0 if the model does not import it."""
        aliases = {"", "ai.onnx"} if domain in ("", "ai.onnx") else {domain}
        return max((entry.version for entry in self.proto.opset_import if entry.domain in aliases), default=0)

    @property
    def parameters(self) -> int:
        """Number of weights: floating-point initializer elements, and integer ones of a matrix."""
        return sum(
            int(np.prod(tensor.dims, dtype=np.int64))
            for tensor in self.proto.graph.initializer
            if tensor.data_type in _FLOATS or (tensor.data_type in _INTEGERS and len(tensor.dims) > 1)
        )

    @property
    def weight_bytes(self) -> int:
        return sum(array.nbytes for array in self.weights.values())

    def to_proto(self) -> onnx.ModelProto:
        """The complete ModelProto with all weights inside (below 2 GiB only)."""
        proto = self.copy_proto()
        for tensor in proto.graph.initializer:
            if tensor.name in self.weights:
                fill(tensor, self.weights[tensor.name])
        return proto

    def save(self, path: str | os.PathLike[str], external_data: bool | None = None) -> Path:
        """Write the model atomically: either the whole file is there afterwards, or what was there before.

        Args:
            path: target file; its directory must exist.
            external_data: weights in ``<name>.data`` beside the file; None does so above :data:`EXTERNAL_DATA_BYTES` and for paged models,
                whose weights are then never in memory together.

        Raises:
            InputError: the path cannot be written.
        """
        target = Path(path)
        if external_data is None:
            external_data = self.paged or self.weight_bytes > EXTERNAL_DATA_BYTES
        elif not external_data and self.weight_bytes > EXTERNAL_DATA_BYTES:
            raise InputError(f"{target} would pass the 2 GiB limit of one file ({self.weight_bytes} bytes of weights); use external data")
        try:
            if external_data:
                self._save_external(target)
            else:
                with atomic_file(target) as temporary:
                    temporary.write_bytes(self.to_proto().SerializeToString(deterministic=True))
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror or error}; nothing was left half-written") from error
        return target

    def _save_external(self, target: Path) -> None:
        data = target.with_name(target.name + ".data")
        proto = self.copy_proto()
        offset = 0
        with atomic_file(data) as temporary_data:
            with temporary_data.open("wb") as stream:
                for tensor in proto.graph.initializer:
                    if tensor.name not in self.weights:
                        continue
                    array = self.weights[tensor.name]
                    aligned = -(-offset // 4096) * 4096
                    stream.write(b"\0" * (aligned - offset))
                    stream.write(np.ascontiguousarray(array).data)
                    storage.release([array])
                    point(tensor, data.name, aligned, array.nbytes)
                    offset = aligned + array.nbytes
            with atomic_file(target) as temporary:
                temporary.write_bytes(proto.SerializeToString(deterministic=True))


def load(source: str | os.PathLike[str] | bytes | onnx.ModelProto | Model) -> Model:
    """Load a model from a path, serialized bytes or a ModelProto. The input is never modified.

    Raises:
        InputError: missing, unreadable or corrupt file, or external data that is not there.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        raw = source.SerializeToString(deterministic=True)
        return Model.from_proto(source, Source(None, hashlib.sha256(raw).hexdigest(), len(raw)))
    if isinstance(source, bytes):
        return _from_bytes(source, None)
    path = Path(source)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"model not found: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read model {path}: {error.strerror or error}") from error
    return _from_bytes(raw, path)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it on success and disappears on any failure."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _from_bytes(raw: bytes, path: Path | None) -> Model:
    label = str(path) if path else "the bytes given"
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(raw)
    except Exception as error:  # protobuf raises its own, version-dependent DecodeError
        raise InputError(f"{label} is not an ONNX file, or it is truncated: {error}") from error
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise InputError(f"{label} holds no ONNX graph (no nodes, outputs or opset): is it truncated or another format?")
    _check_names(proto.graph, label)
    digest = hashlib.sha256(raw)
    size = len(raw)
    del raw
    files = external_files(proto.graph, path)
    for file in files:
        with file.open("rb") as stream:
            digest = _extend(digest, stream)
        size += file.stat().st_size
    weights = take_weights(proto, path)
    return Model(proto, weights, Source(path, digest.hexdigest(), size, files), _is_large(weights))


def _is_large(weights: Mapping[str, np.ndarray]) -> bool:
    return sum(array.nbytes for array in weights.values()) > storage.LARGE_BYTES


def _check_names(graph: onnx.GraphProto, label: str) -> None:
    """Names that are not UTF-8 (protobuf hands them out as bytes) mean a damaged file, and break the runtime later."""
    groups = [[value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)]]
    groups += [[node.name, node.op_type, node.domain, *node.input, *node.output] for node in graph.node]
    if any(not isinstance(name, str) for group in groups for name in group):
        raise InputError(f"{label} is corrupt: it holds names that are not text")


def _extend(digest: hashlib._Hash, stream) -> hashlib._Hash:  # type: ignore[no-untyped-def]
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest
