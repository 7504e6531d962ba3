"""Shapes as they really are: every tensor of a graph, seen in two small runs with unrelated sizes.

Static shape inference loses dimensions on real exports (rank-3 detours around attention, TorchScript shape arithmetic). Two concrete runs
do not: a dimension or an integer that is equal in both is a constant, one that differs is dynamic. Only shapes and small integer tensors
leave the runtime, so a profile costs kilobytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.errors import InputError
from onnxprune.graph.caches import cache_pairs
from onnxprune.graph.model import Model
from onnxprune.graph.paged import open_model
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import run

log = logging.getLogger(__name__)

Watched = list[tuple[str, str, str | None]]
"""(tensor, output that carries its shape, output that carries its integer values if any)."""
Run = tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]
"""Shapes by tensor, and values of small integer tensors."""

SMALL_INTEGERS = 64
"""Integer tensors up to this many elements are recorded by value."""

_SIZES = ((2, 7, 11, 13, 17, 19), (3, 5, 8, 10, 12, 14))


@dataclass(frozen=True)
class Profile:
    """Two runs. ``shapes[i][tensor]`` is a tuple of ints; ``integers[i][tensor]`` the values of a small integer tensor."""

    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]
    integers: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape in the first run; None for a tensor that was not seen."""
        return self.shapes[0].get(name)

    def dim(self, name: str, axis: int) -> int | None:
        """Size of an axis if it is the same in both runs, else None."""
        first, second = self.shapes[0].get(name), self.shapes[1].get(name)
        if first is None or second is None or first[axis] != second[axis]:
            return None
        return first[axis]

    def constant_elements(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(values of the first run, mask of the elements equal in both) of a small integer tensor."""
        first, second = self.integers[0].get(name), self.integers[1].get(name)
        if first is None or second is None or first.shape != second.shape:
            return None
        return first, first == second


def take_profile(model: Model, samples: Mapping[str, np.ndarray] | None = None) -> Profile:
    """Profile a model at two sizes of its dynamic dimensions.

    Args:
        samples: real inputs (axis 0 = samples), used when made-up ones do not run.

    Raises:
        InputError: the graph cannot be run.
    """
    session, watched = _open_probe(model)
    try:
        runs = [_run(session, feeds, watched) for feeds in _made_up(model, session, watched)]
    except InputError as error:
        if samples is None:
            raise InputError(f"the model does not run on small made-up inputs ({error}); give calibration data with --calib") from error
        log.info("made-up inputs do not run (%s); real samples are used", error)
        runs = _run_samples(model, session, samples, watched)
    first, second = runs
    return Profile((first[0], second[0]), (first[1], second[1]))


def shapes_of(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """True shape of every input and every node output of the top-level graph when the model is fed ``feeds``.

    Raises:
        InputError: the graph does not run on these inputs.
    """
    session, watched = _open_probe(model)
    return _run(session, {name: feeds[name] for name in model.input_names if name in feeds}, watched)[0]


def _made_up(model: Model, session: Any, watched: Watched) -> list[dict[str, np.ndarray]]:
    """Inputs of the two runs. Some fused operators take several tokens and several rows at once only while their cache is empty."""
    feeds = [synthetic_feeds(model, sizes) for sizes in _SIZES]
    try:
        _run(session, feeds[0], watched)
    except InputError:
        if not (past := past_symbols(model)):
            raise
        return [synthetic_feeds(model, sizes, empty=past) for sizes in _SIZES]
    return feeds


def past_symbols(model: Model) -> frozenset[str]:
    """Names of the dynamic lengths of the caches among the inputs."""
    caches = cache_pairs(GraphView(model))
    values = [value for value in model.proto.graph.input if value.name in caches]
    return frozenset(dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim[1:] if dim.dim_param)


def synthetic_feeds(
    model: Model, sizes: tuple[int, ...] = _SIZES[0], seed: int = 0, empty: frozenset[str] = frozenset()
) -> dict[str, np.ndarray]:
    """Small valid inputs: symbolic dimensions get ``sizes`` in order of appearance (equal names, equal sizes).

    A sum such as ``past + tokens``, as exporters name the mask of a decoder with a cache, is the sum of its parts. Symbols
    in ``empty`` are 0.
    """
    rng = np.random.default_rng(seed)
    symbols: dict[str, int] = dict.fromkeys(empty, 0)
    feeds: dict[str, np.ndarray] = {}
    wanted = set(model.input_names)
    for value in model.proto.graph.input:
        if value.name not in wanted:
            continue
        tensor = value.type.tensor_type
        shape = []
        for position, dim in enumerate(tensor.shape.dim):
            if dim.WhichOneof("value") == "dim_value":
                shape.append(dim.dim_value)
            else:
                parts = (dim.dim_param or f"?{position}").split("+")
                shape.append(sum(symbols.setdefault(part.strip(), sizes[min(len(symbols) - len(empty), len(sizes) - 1)]) for part in parts))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[value.name] = _fill_like(value.name, tuple(shape), dtype, rng)
    return feeds


def feeds_of_shapes(model: Model, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray] | None:
    """Made-up inputs of given shapes, None if a shape is missing: enough to profile a model that takes few sizes."""
    rng = np.random.default_rng(seed)
    types = {value.name: value.type.tensor_type.elem_type for value in model.proto.graph.input}
    if not all(name in shapes for name in model.input_names):
        return None
    return {name: _fill_like(name, tuple(shapes[name]), helper.tensor_dtype_to_np_dtype(types[name]), rng) for name in model.input_names}


def _fill_like(name: str, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        # Zero is a valid row of every embedding; a mask of zeros would hide every token.
        return np.ones(shape, dtype) if "mask" in name else np.zeros(shape, dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    return rng.standard_normal(shape).astype(dtype)


def _probe(model: Model, view: GraphView) -> tuple[onnx.ModelProto, Watched]:
    """A copy whose outputs are the shapes of all tensors and the values of integer ones."""
    proto = model.copy_proto()
    del proto.graph.output[:]
    integers, shapeless = _types(model)
    watched: Watched = []
    names = [name for node in view.nodes for name in node.outputs if name and name not in shapeless] + list(model.input_names)
    for index, name in enumerate(names):
        shape_output = f"onnxprune.shape.{index}"
        proto.graph.node.append(helper.make_node("Shape", [name], [shape_output], name=f"onnxprune.shape_of.{index}"))
        proto.graph.output.append(helper.make_tensor_value_info(shape_output, TensorProto.INT64, [None]))
        value_output = None
        if name in integers and name not in model.input_names:
            value_output = name
            proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, None))
        watched.append((name, shape_output, value_output))
    return proto, watched


def _types(model: Model) -> tuple[set[str], set[str]]:
    """What type inference says: (names of int64 tensors, names of sequences and optional values, which have no shape)."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model.proto)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise InputError(f"the graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    values = (*inferred.graph.value_info, *inferred.graph.output)
    return (
        {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.INT64},
        {value.name for value in values if value.type.WhichOneof("value") not in ("tensor_type", None)},
    )


def _open_probe(model: Model) -> tuple[Any, Watched]:
    probe, watched = _probe(model, GraphView(model))
    return open_model(replace(model, proto=probe), optimize=False), watched


def _run_samples(model: Model, session: Any, samples: Mapping[str, np.ndarray], watched: Watched) -> list[Run]:
    """Two runs on real rows that differ in the number of rows and, where the model runs so, in every symbolic size."""
    rows = min(len(samples[name]) for name in model.input_names)
    if rows < 3 and any(_symbolic(value, 0) for value in model.proto.graph.input if value.name in model.input_names):
        raise InputError(f"{rows} rows of real inputs are too few to see what depends on the batch; three are needed")
    first = {name: samples[name][: min(rows, 3)] for name in model.input_names}
    second = {name: samples[name][: min(rows, 2)] for name in model.input_names}
    runs = [_run(session, first, watched)]
    try:
        return [*runs, _run(session, _cut(model, second), watched)]
    except InputError:
        return [*runs, _run(session, second, watched)]


def _symbolic(value: onnx.ValueInfoProto, axis: int) -> bool:
    dims = value.type.tensor_type.shape.dim
    return axis < len(dims) and dims[axis].WhichOneof("value") != "dim_value"


def _cut(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds with two thirds of every symbolic axis but the first."""
    cut = dict(feeds)
    for value in model.proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis and value.name in cut and dim.WhichOneof("value") != "dim_value":
                size = -(-2 * cut[value.name].shape[axis] // 3)
                cut[value.name] = cut[value.name].take(range(size), axis=axis)
    return cut


def _run(session: Any, feeds: Mapping[str, np.ndarray], watched: Watched) -> Run:
    wanted = [output for _, shape, value in watched for output in (shape, value) if output]
    results = dict(zip(wanted, run(session, feeds, wanted), strict=True))
    shapes = {name: tuple(int(size) for size in results[shape]) for name, shape, _ in watched}
    integers = {name: results[value] for name, _, value in watched if value and results[value].size <= SMALL_INTEGERS}
    return shapes, integers
