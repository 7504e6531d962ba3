"""Appending nodes to a graph: fresh names, shared constants, and the spelling that each opset wants.

Axes of reductions, Squeeze and Unsqueeze moved from attributes to inputs over the years; callers of :class:`Emitter` need not know when.
Equal nodes are emitted once, so a rule may ask for ``shape_of(x)`` or a transposed weight as often as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView

_AXES_ARE_INPUT_FROM = {"ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
_OTHER_REDUCTIONS_FROM = 18
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})


class Emitter:
    """A private copy of a model's skeleton and the nodes emitted so far.

    ``profile`` is needed by whatever asks for shapes; ``prefix`` starts every name that is made up.
    """

    def __init__(self, model: Model, profile: Profile | None = None, prefix: str = "onnxprune.ad") -> None:
        self.model = model.with_proto(model.copy_proto())
        self.proto = self.model.proto
        self.view = GraphView(self.model)
        self.opset = self.model.opset()
        self.nodes: list[onnx.NodeProto] = []
        self._profile = profile
        self._settled = profile is not None and _all_sizes_varied(self.proto, self.model.input_names, profile)
        self._prefix = prefix
        self._count = 0
        self._integers: dict[str, int] = {}
        self._known: dict[Any, list[str]] = {}
        self._dims = {tensor.name: tuple(tensor.dims) for tensor in self.proto.graph.initializer}
        self._shapes, self._types = _inferred(self.proto)
        self._taken = set(self.view.producer) | set(self.model.input_names) | set(self._dims)

    # What is known about tensors of the original graph.

    def type_of(self, tensor: str) -> int | None:
        """TensorProto element type, None where type inference does not know."""
        if tensor in self._types:
            return self._types[tensor]
        if self._profile is not None and tensor in self._profile.integers[0]:
            return TensorProto.INT64
        return None

    def dims(self, tensor: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a tensor in the two profile runs."""
        if tensor in self._dims:
            return self._dims[tensor], self._dims[tensor]
        if self._profile is None or tensor not in self._profile.shapes[0]:
            raise KeyError(f"tensor {tensor!r} was not profiled")
        return self._profile.shapes[0][tensor], self._profile.shapes[1][tensor]

    def rank(self, tensor: str) -> int:
        if tensor in self._dims:
            return len(self._dims[tensor])
        if self._profile is not None and tensor in self._profile.shapes[0]:
            return len(self._profile.shapes[0][tensor])
        if tensor in self._shapes:
            return len(self._shapes[tensor])
        raise KeyError(f"rank of tensor {tensor!r} is unknown")

    def static_dim(self, tensor: str, axis: int) -> int | None:
        """Size of an axis as far as static inference knows it."""
        return self._shapes[tensor][axis] if tensor in self._shapes else None

    def constant(self, tensor: str) -> np.ndarray | None:
        """Values that are the same in every run: an initializer, a Constant, or a small integer tensor equal in both profile runs."""
        value = self.view.value(tensor)
        if value is not None or self._profile is None or not self._settled:
            return value
        seen = self._profile.constant_elements(tensor)
        if seen is None or not seen[1].all():
            return None
        return seen[0]

    # Constants.

    def scalar(self, value: float, like: str) -> str:
        """A rank-0 constant of the element type of the tensor ``like``."""
        return self.array(np.array(value, helper.tensor_dtype_to_np_dtype(self.type_of(like) or TensorProto.FLOAT)))

    def int64(self, values: int | Sequence[int]) -> str:
        array = np.array(values, np.int64)
        name = self.array(array)
        if array.size == 1:
            self._integers[name] = int(array.reshape(()))
        return name

    def array(self, values: np.ndarray) -> str:
        key = ("", values.dtype.str, values.shape, values.tobytes())
        if key not in self._known:
            name = self.fresh("const")
            self.proto.graph.initializer.append(numpy_helper.from_array(values, name))
            self._dims[name] = values.shape
            self._known[key] = [name]
        return self._known[key][0]

    def known(self, tensor: str) -> int | None:
        """Value of a one-element integer constant made by :meth:`int64`."""
        return self._integers.get(tensor)

    # Nodes.

    def fresh(self, hint: str) -> str:
        """A tensor name nobody uses."""
        while True:
            self._count += 1
            name = f"{self._prefix}.{hint}.{self._count}"
            if name not in self._taken:
                return name

    def op(self, op: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Emit a node with one output and return its name; a node equal to an earlier one is not emitted again."""
        return self.ops(1, op, *inputs, outputs=[output] if output else None, domain=domain, **attributes)[0]

    def ops(
        self, count: int, op: str, *inputs: str, outputs: Sequence[str] | None = None, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Emit a node with ``count`` outputs and return their names."""
        key = (op, domain, inputs, count, repr(sorted(attributes.items())))
        if outputs is None and key in self._known:
            return self._known[key]
        names = list(outputs) if outputs is not None else [self.fresh(op) for _ in range(count)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=self.fresh(f"{op}_node"), domain=domain, **attributes))
        if outputs is None:
            self._known[key] = names
        return names

    def shape_of(self, tensor: str) -> str:
        return self.op("Shape", tensor)

    def size_of(self, tensor: str, axis: int) -> str:
        """Size of one axis as int64 [1]; a constant where the profile says so."""
        first, second = self.dims(tensor)
        settled = self._settled or tensor in self._dims
        if settled and first[axis] == second[axis] and axis % len(first) > 0:
            return self.int64([first[axis]])
        return self.op("Gather", self.shape_of(tensor), self.int64([axis % len(first)]), axis=0)

    def reduce(self, op: str, tensor: str, axes: Sequence[int], keepdims: bool, output: str | None = None) -> str:
        """ReduceSum, ReduceMean, ... over constant axes. No axes is no reduction."""
        if not axes:
            return tensor
        threshold = _AXES_ARE_INPUT_FROM.get(op, _OTHER_REDUCTIONS_FROM)
        if self.opset >= threshold:
            return self.op(op, tensor, self.int64(sorted(axes)), keepdims=int(keepdims), output=output)
        return self.op(op, tensor, axes=sorted(axes), keepdims=int(keepdims), output=output)

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        return self._axes_op("Unsqueeze", tensor, axes)

    def squeeze(self, tensor: str, *axes: int) -> str:
        return self._axes_op("Squeeze", tensor, axes)

    def _axes_op(self, op: str, tensor: str, axes: Sequence[int]) -> str:
        if self.opset >= _AXES_ARE_INPUT_FROM[op]:
            return self.op(op, tensor, self.int64(list(axes)))
        return self.op(op, tensor, axes=list(axes))

    def transpose(self, tensor: str, perm: Sequence[int], output: str | None = None) -> str:
        """Transpose that looks through a Transpose of the original graph instead of undoing it."""
        source = self.view.producer.get(tensor)
        if output is None and source is not None and source.op == "Transpose" and "perm" in source.attrs:
            inner = source.attrs["perm"]
            tensor, perm = source.inputs[0], [inner[axis] for axis in perm]
        if output is None and list(perm) == list(range(len(perm))):
            return tensor
        return self.op("Transpose", tensor, perm=list(perm), output=output)

    def swap_last(self, tensor: str, rank: int) -> str:
        """Transpose the last two axes."""
        return self.transpose(tensor, [*range(rank - 2), rank - 1, rank - 2])

    def slice(self, tensor: str, axis: int, start: str, end: str, step: int = 1, output: str | None = None) -> str:
        """Slice one axis; ``start`` and ``end`` are int64 [1] tensors."""
        return self.op("Slice", tensor, start, end, self.int64([axis]), self.int64([step]), output=output)

    def zeros(self, shape: str, like: str) -> str:
        """Zeros of a shape given as an int64 tensor, of the element type of ``like``."""
        dtype = helper.tensor_dtype_to_np_dtype(self.type_of(like) or TensorProto.FLOAT)
        return self.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, dtype), "zero"))

    def constant_of(self, op_value: float, shape: str, like: str) -> str:
        """A tensor filled with one value."""
        return self.op("Expand", self.scalar(op_value, like), shape)

    def require_domain(self, domain: str) -> None:
        """Import an operator domain at version 1 if the model does not."""
        if self.model.opset(domain) == 0:
            self.proto.opset_import.append(helper.make_opsetid(domain, 1))


def _all_sizes_varied(proto: onnx.ModelProto, names: Sequence[str], profile: Profile) -> bool:
    """Whether every symbolic size of every input differs between the two runs, so that what is equal in both is a constant."""
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        if value.name not in names:
            continue
        if not tensor.HasField("shape") or value.name not in profile.shapes[0]:
            return False
        sizes = zip(tensor.shape.dim, profile.shapes[0][value.name], profile.shapes[1][value.name], strict=True)
        if any(not dim.HasField("dim_value") and first == second for dim, first, second in sizes):
            return False
    return True


def _inferred(proto: onnx.ModelProto) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    """(shapes with None for unknown sizes, element types) as far as static inference knows them."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise InputError(f"the graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    shapes: dict[str, tuple[int | None, ...]] = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return shapes, types
