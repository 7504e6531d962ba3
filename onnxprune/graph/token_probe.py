"""What is to be known about tokens before any leaves: the attention between them and their features, as outputs of the graph."""

from __future__ import annotations

from onnx import TensorProto, helper

from onnxprune.graph.emitter import Emitter
from onnxprune.graph.model import Model
from onnxprune.graph.profile import take_profile
from onnxprune.graph.token_axis import TokenAxis


def with_probes(model: Model, axis: TokenAxis) -> tuple[Model, list[tuple[str, str]]]:
    """The model with outputs that tell of its tokens.

    Args:
        model: with attention spelled out; ``axis`` is its.

    Returns:
        it, and what its last outputs hold, in the order of the graph: (``attention``, name of the Softmax), mean attention over heads float
        [B, N, N]; (``features``, place), the features at a place, float [B, N, C].
    """
    e = Emitter(model, take_profile(model), prefix="onnxprune.probe")
    places = {place.tensor for place in axis.places}
    maps = axis.attentions | {place.softmax.index for place in axis.places}
    batch = e.size_of(axis.places[0].tensor, 0)
    probes: list[tuple[str, str]] = []
    made: list[str] = []
    for node in e.view.nodes:
        if node.index in maps:
            table = node.outputs[0]
            if e.rank(table) == 3:  # heads are part of the batch
                sizes = e.op("Concat", batch, e.int64([-1]), e.size_of(table, 1), e.size_of(table, 2), axis=0)
                table = e.op("Reshape", table, sizes)
            probes.append(("attention", node.name))
            made.append(e.reduce("ReduceMean", table, [1], keepdims=False))
        for tensor in places.intersection(node.outputs):
            probes.append(("features", tensor))
            made.append(tensor)
    proto = e.proto
    proto.graph.node.extend(e.nodes)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made)
    return e.model.with_proto(proto), probes
