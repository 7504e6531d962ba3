"""Residual streams: where a model writes them, where it reads them, and whether a rotation can pass between the two.

SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024) narrows the width of a transformer in a rotated basis. That takes a stream that
only linear operators write and that every norm reads without ever writing back: a pre-norm network. No node pattern of an exporter is
known here; a stream is what additions and rearrangements connect, and a norm is what keeps the length of its rows.
"""

from __future__ import annotations

from onnxprune.errors import Refusal
from onnxprune.graph.norms import begins_norm
from onnxprune.graph.profile import Profile
from onnxprune.graph.stream_parts import Stream, Unrotatable
from onnxprune.graph.stream_walk import SUMS, Walk
from onnxprune.graph.view import GraphView

MOST_BRIDGES = 2
"""Products that may be added to a model to enter and to leave the narrow basis: one where words come in and one where they go out."""


def find_streams(view: GraphView, profile: Profile) -> tuple[tuple[Stream, ...], tuple[Refusal, ...]]:
    """Streams that can be rotated, in graph order, and why others cannot.

    A sum that one norm reads and nothing else adds to is none; a network of such sums is refused as a whole.
    """
    streams: list[Stream] = []
    refusals: dict[str, Refusal] = {}
    seen: set[str] = set()
    sums = 0
    for node in view.nodes:
        if not begins_norm(view, profile, node) or node.inputs[0] in seen:
            continue
        walk = Walk(view, profile, node.inputs[0])
        reason = None
        try:
            walk.run(f"stream.{len(streams)}")
        except Unrotatable as error:
            reason = str(error)
        stream = walk.stream
        seen |= stream.members
        if len(set(stream.norms)) < 2:
            sums += _is_sum(view, node.inputs[0])
        elif not any(_is_sum(view, name) for name in stream.members):
            continue  # heads whose queries are normalised one by one, for instance: no branch writes them
        elif reason is not None or len(stream.bridges) > MOST_BRIDGES:
            reason = reason or _too_many(view, stream)
            refusals.setdefault(reason, Refusal("OP603", node.name, reason))
        else:
            streams.append(stream)
    if not streams and not refusals:
        post_norm = Refusal("OP602", "stream", f"each of {sums} sums is normalised before anything else is added to it")
        return (), (post_norm if sums > 1 else Refusal("OP603", "stream", "no sum in this graph is read by two norms"),)
    return tuple(streams), tuple(refusals.values())


def _is_sum(view: GraphView, tensor: str) -> bool:
    """Whether two activations are added up in ``tensor``."""
    maker = view.producer.get(tensor)
    return maker is not None and maker.op in SUMS and sum(not view.is_constant(name) for name in maker.inputs) > 1


def _too_many(view: GraphView, stream: Stream) -> str:
    bridge = stream.bridges[0]
    found = view.producer.get(bridge.tensor) if bridge.inward else view.nodes[bridge.readers[0][0]] if bridge.readers else None
    does = "writes" if bridge.inward else "reads"
    return f"{len(stream.bridges)} places read or write the stream by no constant matrix ({found or 'the graph boundary'} {does} it)"
