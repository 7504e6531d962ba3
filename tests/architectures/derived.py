"""Files that other tools, or other ways of saving, make of one export of a few entries."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.fuse_attention import fuse_attention
from onnxprune.graph.model import load
from tests.architectures import exports
from tests.architectures.entry import HEADS, HIDDEN, Architecture
from tests.architectures.registry import ARCHITECTURES

_LAYER = re.compile(r"/(?:layer|layers|h)\.(\d+)/")
_MODEL_TYPES = {"bert": "bert", "vit": "vit", "gpt2": "gpt2", "llama-gqa": "gpt2"}
_SIZES = {"batch": 2, "tokens": 7}


@dataclass(frozen=True)
class Maker:
    """``make(architecture, source, target)`` writes a file made of the export ``base`` of ``entries``."""

    make: Callable[[Architecture, Path, Path], None]
    entries: tuple[str, ...] = ("bert", "vit", "llama-gqa")
    base: str = "ts17-eager"


def variants_of(architecture: Architecture) -> tuple[str, ...]:
    return tuple(name for name, maker in MAKERS.items() if architecture.name in maker.entries)


def path(name: str, variant: str) -> Path:
    """The file of a derived variant, made on every call: tools are quick, and each has its own version.

    Raises:
        ExportFails: the tool is missing, or fails.
    """
    maker = MAKERS[variant]
    source = exports.path(name, maker.base)
    folder = Path(tempfile.gettempdir()) / f"onnxprune-derived-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}-{variant}.onnx"
    try:
        maker.make(ARCHITECTURES[name], source, target)
    except Exception as error:  # whatever a tool of any make raises
        raise exports.ExportFails(exports.first_line(error)) from error
    return target


def _fused(architecture: Architecture, source: Path, target: Path) -> None:
    """Attention, SkipLayerNormalization, EmbedLayerNormalization, BiasGelu and FastGelu of onnxruntime, where its tool finds them."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    kind = _MODEL_TYPES[architecture.name]
    options = FusionOptions(kind)
    made = optimizer.optimize_model(str(source), kind, HEADS, HIDDEN, optimization_options=options, opt_level=0)
    onnx.save(made.model, target)


def _attention(_: Architecture, source: Path, target: Path) -> None:
    """MultiHeadAttention of onnxruntime, as our own pass writes it."""
    model, places = fuse_attention(canonicalise(load(source))[0])
    assert places
    model.save(target)


def _slim(_: Architecture, source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def _simplified(_: Architecture, source: Path, target: Path) -> None:
    import onnxsim

    made, valid = onnxsim.simplify(onnx.load(source))
    assert valid
    onnx.save(made, target)


def _half(_: Architecture, source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _static(_: Architecture, source: Path, target: Path) -> None:
    """All sizes fixed, those of intermediate values as well."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = _SIZES[dim.dim_param]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), target)


def _external(_: Architecture, source: Path, target: Path) -> None:
    load(source).save(target, external_data=True)


@dataclass(frozen=True)
class _Part:
    """Nodes of one layer, in order, the activations and weights they read, and what others read of them."""

    nodes: tuple[onnx.NodeProto, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]


def _parts(graph: onnx.GraphProto) -> dict[int, _Part]:
    """Layers by number, told by the names of their nodes."""
    groups: dict[int, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if found := _LAYER.search(node.name):
            groups.setdefault(int(found[1]), []).append(node)
    result = {}
    for number, nodes in groups.items():
        made = {name for node in nodes for name in node.output}
        reads = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
        others = {name for node in graph.node if node not in nodes for name in node.input} | {value.name for value in graph.output}
        result[number] = _Part(tuple(nodes), tuple(reads), tuple(name for name in made if name in others))
    return result


def _put(graph: onnx.GraphProto, part: _Part, replacement: Sequence[onnx.NodeProto]) -> None:
    """Nodes of a part replaced, where the first of them that needs all it reads can stand: before the first reader of what it gives."""
    left = [node for node in graph.node if node not in part.nodes]
    place = next(index for index, node in enumerate(left) if set(node.input) & set(part.gives))
    del graph.node[:]
    graph.node.extend([*left[:place], *replacement, *left[place:]])


def _functions(_: Architecture, source: Path, target: Path) -> None:
    """Every layer a function of its own, called once."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    for number, part in _parts(model.graph).items():
        name = f"Layer{number}"
        model.functions.append(helper.make_function("layers", name, part.reads, part.gives, part.nodes, model.opset_import))
        _put(model.graph, part, [helper.make_node(name, part.reads, part.gives, f"call_{name}", domain="layers")])
    model.opset_import.append(helper.make_opsetid("layers", 1))
    onnx.save(model, target)


def _branch(_: Architecture, source: Path, target: Path) -> None:
    """The last layer is skipped where the batch is larger than 100."""
    model = onnx.load(source)
    part = _last(model)
    stream = _stream(model, part)
    body = helper.make_graph(part.nodes, "layer", [], [_anything(name) for name in part.gives])
    skip = helper.make_graph([helper.make_node("Identity", [stream], ["skipped"])], "skip", [], [_anything("skipped")])
    limit = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(helper.make_tensor("", TensorProto.INT64, [1], [100])), "limit")
    model.graph.initializer.append(limit)
    nodes = [
        helper.make_node("Shape", [stream], ["sizes"], end=1),
        helper.make_node("Less", ["sizes", "limit"], ["small"]),
        helper.make_node("If", ["small"], part.gives, "choice", then_branch=body, else_branch=skip),
    ]
    _put(model.graph, part, nodes)
    onnx.save(model, target)


def _loop(_: Architecture, source: Path, target: Path) -> None:
    """The last layer is the body of a loop that runs once."""
    model = onnx.load(source)
    part = _last(model)
    stream = _stream(model, part)
    (result,) = part.gives
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in part.nodes]
    for node in nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = "state" if name == stream else name
    nodes.append(helper.make_node("Identity", ["going"], ["still"]))
    inputs = [helper.make_tensor_value_info("turn", TensorProto.INT64, []), helper.make_tensor_value_info("going", TensorProto.BOOL, [])]
    body = helper.make_graph(
        nodes,
        "layer",
        [*inputs, _anything("state")],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), _anything(result)],
    )
    model.graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [1]))
    model.graph.initializer.append(helper.make_tensor("always", TensorProto.BOOL, [], [True]))
    _put(model.graph, part, [helper.make_node("Loop", ["turns", "always", stream], [result + ".out"], "turning", body=body)])
    for node in model.graph.node:
        if node.op_type != "Loop":
            for slot, name in enumerate(node.input):
                node.input[slot] = result + ".out" if name == result else name
    onnx.save(model, target)


def _last(model: onnx.ModelProto) -> _Part:
    del model.graph.value_info[:]
    parts = _parts(model.graph)
    return parts[max(parts)]


def _stream(model: onnx.ModelProto, part: _Part) -> str:
    """What the layer before gives and this one reads."""
    parts = _parts(model.graph)
    before = parts[max(parts) - 1]
    return next(name for name in part.reads if name in before.gives)


def _anything(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


MAKERS: Mapping[str, Maker] = {
    "ort-fused": Maker(_fused, tuple(_MODEL_TYPES)),
    "mha": Maker(_attention, ("bert", "vit", "gpt2")),
    "onnxslim": Maker(_slim, ("bert", "vit", "llama-gqa", "gpt2", "swin")),
    "onnxslim-do18": Maker(_slim, base="do18-sdpa"),
    "onnxsim": Maker(_simplified, ("bert", "vit", "llama-gqa", "gpt2", "swin")),
    "onnxsim-do18": Maker(_simplified, base="do18-sdpa"),
    "fp16": Maker(_half),
    "static": Maker(_static),
    "external": Maker(_external),
    "functions": Maker(_functions),
    "if": Maker(_branch),
    "loop": Maker(_loop),
}
