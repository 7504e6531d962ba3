"""Clean-up that makes one form out of what exporters write, so that later rooms see few.

Constants become initializers, no-ops and dead nodes go, shape arithmetic folds, Reshape targets become constants (with 0 for a copied and
-1 for the one dynamic dimension) wherever two profile runs agree, and rows that no output reads are not computed. Numerics are untouched:
nothing is fused and no weight changes its value, but for a batch norm folded into the convolution in front of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, inliner

from onnxprune.errors import InputError
from onnxprune.graph.batch_norm import fold_batch_norms
from onnxprune.graph.computed_weights import fold_computed_weights
from onnxprune.graph.lowering import CannotLower, lower
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.rows import demanded_rows
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node

log = logging.getLogger(__name__)


def canonicalise(model: Model, samples: Mapping[str, np.ndarray] | None = None, *, all_rows: bool = False) -> tuple[Model, Profile]:
    """Canonical form of a model, and its profile.

    Args:
        samples: real inputs, used when made-up ones do not run.
        all_rows: also compute rows that no output reads, as the model was given.

    Raises:
        InputError: the model cannot be read or run.
    """
    model = _named(_inlined(model))
    model = _optimised(model)
    model = fold_batch_norms(_unfused(_plain_gathers(fold_computed_weights(_fold_weights(model)))))
    try:
        profile = take_profile(model, samples)
    except InputError:
        model = _expanded_caches(model)
        profile = take_profile(model, samples)
    model = _constant_targets(model, profile)
    profile = take_profile(model, samples)
    if all_rows:
        return model, profile
    model, smaller = demanded_rows(model, profile)
    return model, take_profile(model, samples) if smaller else profile


_FUSED_RESIDUALS = frozenset({("com.microsoft", "SkipLayerNormalization"), ("com.microsoft", "SkipSimplifiedLayerNormalization")})


def _unfused(model: Model) -> Model:
    """Residual additions taken out of fused normalisations: a branch must end in a sum to be compensated, and on CPU the sum is faster."""
    try:
        return lower(model, set(_FUSED_RESIDUALS))
    except CannotLower as error:
        log.warning("%s; its branches are pruned without compensation", error)
        return model


def _expanded_caches(model: Model) -> Model:
    """Rotary caches with a leading 1 expanded to the batch.

    The ONNX definition broadcasts them and exporters rely on it; onnxruntime refuses such a model at any batch but 1.
    """
    surgeon = Surgeon(model)
    for node in list(surgeon.nodes):
        if node.op != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue
        shape, batch, full = (surgeon.variable(node.name, np.int64) for _ in range(3))
        bounds = [surgeon.constant(np.array([value], np.int64), node.name) for value in (0, 1)]
        surgeon.add("Shape", [node.inputs[0]], shape, node.name)
        surgeon.add("Slice", [shape, *bounds], batch, node.name)
        surgeon.add("Concat", [batch, bounds[1], bounds[1]], full, node.name, axis=0)
        for slot in (1, 2):
            cache = surgeon.variable(node.name)
            surgeon.add("Expand", [node.inputs[slot], full], cache, node.name)
            node.inputs[slot] = cache
    return surgeon.close()


def _inlined(model: Model) -> Model:
    """Local functions expanded in place."""
    if not model.proto.functions:
        return model
    return model.with_proto(inliner.inline_local_functions(model.proto))


_WEIGHTS_ARE_NO_INPUTS = 4
"""The first IR version in which an initializer need not be an input as well."""


def _named(model: Model) -> Model:
    """Every node with a unique name: refusals, metadata and plans refer to them. An IR version in which weights need not be inputs."""
    proto = model.copy_proto()
    proto.ir_version = max(proto.ir_version, _WEIGHTS_ARE_NO_INPUTS)
    seen: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}#{index}"
        seen.add(node.name)
    return model.with_proto(proto)


def _optimised(model: Model) -> Model:
    """Constant folding and dead-code removal by the onnxscript optimizer, with the weights hidden as inputs so that none is copied."""
    from onnxscript import optimizer

    hidden = model.copy_proto()
    kept = [tensor for tensor in hidden.graph.initializer if tensor.name not in model.weights]
    placeholders = {tensor.name: tensor for tensor in model.proto.graph.initializer if tensor.name in model.weights}
    del hidden.graph.initializer[:]
    hidden.graph.initializer.extend(kept)
    declared = {value.name for value in hidden.graph.input}
    for name, tensor in placeholders.items():
        if name not in declared:
            hidden.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    del hidden.graph.value_info[:]
    try:
        folded = optimizer.optimize(hidden, onnx_shape_inference=False, input_size_limit=1024, output_size_limit=4096)
    except Exception as error:  # the optimizer is an aid: a graph it cannot digest is used as it is
        log.warning("the onnxscript optimizer could not process the graph (%s); continuing without it", error)
        return model
    used = {name for node in folded.graph.node for name in _reads(node)} | {value.name for value in folded.graph.output}
    inputs = [value for value in folded.graph.input if value.name not in placeholders]
    del folded.graph.input[:]
    folded.graph.input.extend(inputs)
    folded.graph.initializer.extend(tensor for name, tensor in placeholders.items() if name in used)
    folded.ir_version = model.proto.ir_version
    return model.with_proto(folded)


def _reads(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs):
            names.update(name for child in graph.node for name in _reads(child))
            names.update(value.name for value in graph.output)
    return names


def _fold_weights(model: Model) -> Model:
    """Identity, Transpose, Reshape, Squeeze, Unsqueeze and Constant nodes on weights become initializers.

    The same change of the same weight is made once, and a table that is also looked up (a tied embedding) is left alone, so that the model
    does not grow.
    """
    view = GraphView(model)
    surgeon = Surgeon(model)
    values: dict[str, np.ndarray] = {}
    made: dict[tuple[object, ...], gs.Tensor] = {}
    for node in view.nodes:
        if node.domain or node.op not in _FOLDABLE or len(node.outputs) != 1:
            continue
        operands = [values.get(name) if name in values else view.value(name) for name in node.inputs]
        if node.op != "Constant" and (not operands or any(array is None for array in operands)):
            continue
        result = view.value(node.outputs[0]) if node.op == "Constant" else _evaluate(node, [a for a in operands if a is not None])
        if result is None or node.outputs[0] in view.graph_outputs:
            continue
        edit = surgeon.nodes[node.index]
        if node.op not in ("Constant", "Identity") and any(reader.op == "Gather" for reader, _ in view.consumers[node.inputs[0]]):
            continue
        values[node.outputs[0]] = result
        if node.op == "Identity":
            constant = edit.inputs[0]
        else:
            key = (node.outputs[0],) if node.op == "Constant" else (edit.inputs[0].name, node.op, result.shape, str(dict(node.attrs)))
            constant = made.get(key) or surgeon.constant(result, node.inputs[0] if node.inputs else node.outputs[0])
            made[key] = constant
        for reader, slot in view.consumers.get(node.outputs[0], ()):
            if slot >= 0:
                surgeon.nodes[reader.index].inputs[slot] = constant
    return surgeon.close()


def _plain_gathers(model: Model) -> Model:
    """GatherND that picks constant positions of the first axis as Gather: torch writes ``x[:, :, [-1]]`` so (Falcon)."""
    view = GraphView(model)
    found = [node for node in view.nodes if node.op == "GatherND" and not node.domain and not node.attrs.get("batch_dims", 0)]
    picks = {node.index: index for node in found if (index := view.value(node.inputs[1])) is not None and index.shape[-1] == 1}
    if not picks:
        return model
    surgeon = Surgeon(model)
    for place, index in picks.items():
        edit = surgeon.nodes[place]
        edit.op, edit.attrs = "Gather", {"axis": 0}
        edit.inputs = [edit.inputs[0], surgeon.constant(index[..., 0], edit.inputs[1].name)]
    return surgeon.close()


_FOLDABLE = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Constant"})


def _evaluate(node: Node, operands: list[np.ndarray]) -> np.ndarray | None:
    array = operands[0]
    if node.op == "Identity":
        return array
    if node.op == "Transpose":
        return np.transpose(array, node.attrs.get("perm"))
    if node.op == "Reshape":
        if len(operands) < 2 or node.attrs.get("allowzero", 0):
            return None
        return array.reshape([array.shape[axis] if size == 0 else int(size) for axis, size in enumerate(operands[1])])
    axes = node.attrs.get("axes", operands[1].tolist() if len(operands) > 1 else None)
    if axes is None:
        return array.squeeze() if node.op == "Squeeze" else None
    if node.op == "Squeeze":
        return array.squeeze(tuple(int(axis) for axis in axes))
    return np.expand_dims(array, tuple(int(axis) for axis in axes))


def _constant_targets(model: Model, profile: Profile) -> Model:
    """Reshape targets that are computed at run time but hold at most one truly dynamic dimension become constants."""
    view = GraphView(model)
    surgeon = Surgeon(model)
    for node in view.nodes:
        if node.op != "Reshape" or node.domain or view.is_constant(node.inputs[1]):
            continue
        target = _target(node, profile)
        if target is not None:
            edit = surgeon.nodes[node.index]
            edit.inputs = [edit.inputs[0], surgeon.constant(target, node.name + ".target")]
            edit.attrs.pop("allowzero", None)
    return surgeon.close()


def _target(node: Node, profile: Profile) -> np.ndarray | None:
    source = [run.get(node.inputs[0]) for run in profile.shapes]
    result = [run.get(node.outputs[0]) for run in profile.shapes]
    if source[0] is None or source[1] is None or result[0] is None or result[1] is None:
        return None
    target, inferred = [], False
    for axis, (first, second) in enumerate(zip(result[0], result[1], strict=True)):
        if first == second and first > 0:
            target.append(first)
        elif axis < len(source[0]) and (source[0][axis], source[1][axis]) == (first, second):
            target.append(0)
        elif not inferred:
            target.append(-1)
            inferred = True
        else:
            return None
    return np.array(target, np.int64)


def with_fresh_shapes(model: Model) -> Model:
    """Intermediate types and shapes inferred anew: what a rewrite leaves stale, runtimes warn about or refuse."""
    proto = model.copy_proto()
    del proto.graph.value_info[:]
    try:
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
    except Exception as error:
        raise InputError(f"the rewritten graph does not pass ONNX shape inference: {error}") from error
    return model.with_proto(proto)


def check_prunable(model: Model) -> None:
    """Refuse what cannot be pruned in this form.

    Raises:
        InputError: the model is already quantized, computes in half precision, or draws random numbers.
    """
    view = GraphView(model)
    for index in sorted(view.ancestors(model.output_names)):
        node = view.nodes[index]
        if node.op in _RANDOM:
            raise InputError(
                f"the model draws random numbers ({node}), so two runs differ and nothing can be compared; "
                "make the numbers an input, or export the model without them"
            )
    check_float(model)


_RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial".split())


def check_float(model: Model) -> None:
    """Refuse numbers other than float32.

    Raises:
        InputError: the model is already quantized, or computes in half precision.
    """
    types = {tensor.data_type for tensor in model.proto.graph.initializer if len(tensor.dims) > 1}
    if {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4} & types:
        raise InputError("the model is already quantized (int8/int4 weights); prune the float model and quantize the result")
    if {TensorProto.FLOAT16, TensorProto.BFLOAT16} & types:
        raise InputError("the model has half-precision weights; prune the float32 model and convert the result to fp16")
