"""What looks like a site and is none: the suspicion that makes a refusal out of a trace that led nowhere.

An attention is known by its heart, a feed-forward by a nonlinearity between two products; where no group was found for either, somebody
who reads the graph would ask why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from onnxprune.errors import Refusal
from onnxprune.graph.axes import Tracer
from onnxprune.graph.axis_rules import MEASURES, NONLINEAR
from onnxprune.graph.axis_state import Blocked, Group
from onnxprune.graph.view import GraphView, Node, captured, inner_views

ATTENTION_OPS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
WEIGHTED = frozenset({"MatMul", "Gemm", "Einsum"})
_NORMS = ("Norm", "Reduce")
_NORM_PARTS = frozenset({"Pow", "Sqrt", "Abs", "Max", "Clip"})
"""What norms spelled out are made of, besides :data:`_NORMS`: no nonlinearity of a feed-forward block."""


def is_attention(view: GraphView, node: Node) -> bool:
    return node.op in ATTENTION_OPS or _is_activation_product(view, node)


def _is_activation_product(view: GraphView, node: Node) -> bool:
    return node.op == "MatMul" and not any(view.is_constant(name) for name in node.inputs)


def refuse_blocked(view: GraphView, node: Node, tensor: str, blocked: Blocked) -> Refusal | None:
    """A blocked trace is worth a word only if it started inside something that looks like an FFN."""
    if looks_like_ffn(view, tensor, normalised=True):
        reason = f"{blocked.reason} (at {blocked.node or 'the graph boundary'}) between the nonlinearity and the second matrix"
        return Refusal("OP201", node.name, reason, "what is left would be normalised otherwise; leave it")
    if blocked.normalises or not looks_like_ffn(view, tensor):
        return None
    return Refusal("OP201", node.name, f"{blocked.reason} (at {blocked.node or 'the graph boundary'})")


def refuse_unlike(view: GraphView, node: Node, tensor: str, results: Sequence[Group | Blocked]) -> list[Refusal]:
    """What looks like an FFN and can be followed, and whose neurons turn out to be something else."""
    groups = [result for result in results if isinstance(result, Group)]
    if len(groups) < len(results) or not looks_like_ffn(view, tensor):
        return []
    if not groups:
        return [Refusal("OP201", node.name, "reshapes regroup its neurons so that all of them go together", "leave it")]
    inside = next((other for group in groups for other in group.nodes if is_attention(view, other)), None)
    if inside is not None:
        reason = f"the same neurons are dimensions inside heads (at {inside.name})"
        return [Refusal("OP201", node.name, reason, "a projection serves both; leave it")]
    if all(leaf.role != "produces" for group in groups for leaf in group.leaves):
        return [Refusal("OP201", node.name, "no constant weight makes the axis: its positions are copies of one neuron", "leave it")]
    return []


def looks_like_ffn(view: GraphView, tensor: str, normalised: bool = False) -> bool:
    """Walking back from ``tensor`` to the nearest weight products meets a nonlinearity, and no attention or normalisation.

    Args:
        normalised: a normalisation must be met as well (ConvNeXt V2, MAGNETO), and nothing but weight products behind it all: a residual
            stream that is normalised leads back to embeddings or convolutions.
    """
    pending, nonlinear, products, norms, visited = [tensor], False, 0, 0, set()
    ends = ("Softmax", "Conv") if normalised else ("Softmax", *_NORMS)
    while pending:
        node = view.producer.get(pending.pop())
        if node is not None and (node.index in visited or node.op in MEASURES):
            continue  # a shape that is measured somewhere upstream is no way back
        if node is None:
            if normalised:
                return False
            continue
        visited.add(node.index)
        if node.op in WEIGHTED and any(view.is_constant(name) for name in node.inputs[:2]):
            products += 1
        elif is_attention(view, node) or any(word in node.op for word in ends):
            return False
        else:
            norms += any(word in node.op for word in _NORMS)
            nonlinear |= node.op in NONLINEAR and not (normalised and node.op in _NORM_PARTS)
            data = sorted(captured(node.proto)) if node.op == "If" else node.inputs  # its input is the condition
            pending.extend(name for name in data if name and not view.is_constant(name))
    return nonlinear and products > 0 and (norms > 0) == normalised


def uncovered_attention(view: GraphView, tracer: Tracer, covered: Collection[int]) -> list[Refusal]:
    """Attention blocks of which no node is ``covered``: part of a site, or of a group that was refused with its own reason."""
    result = []
    for node in view.nodes:
        context = attention_context(view, node)
        if context is None or node.index in covered:
            continue
        maker = view.producer[context]
        shape = tracer.profile.shape(context) or ()
        if len(shape) == 4 and shape[1] == 1:
            result.append(only_one("heads", maker))
            continue
        blocked = next((r for axis in range(1, len(shape)) for r in tracer.trace(context, axis) if isinstance(r, Blocked)), None)
        where = blocked and (blocked.node or "the graph boundary")
        reason = f"{blocked.reason} (at {where})" if blocked else "no projection with a constant weight reads its heads"
        together = blocked is not None and (blocked.normalises or "reduces over" in blocked.reason)
        hint = "its heads are normalised together, or tied to the width of the stream; leave them" if together else ""
        result.append(Refusal("OP101", maker.name, reason, hint))
    return result


def inside_bodies(view: GraphView) -> Iterator[Refusal]:
    """What looks like a site in the body of an If, Loop or Scan: only the graph itself is traced."""
    for outer, inner in inner_views(view):
        reason = f"it lies in the body of {outer}, where nothing is traced"
        for node in inner.nodes:
            name = node.name or node.outputs[0]
            if attention_context(inner, node) is not None:
                yield Refusal("OP101", name, reason)
            elif (
                node.op in WEIGHTED and len(node.inputs) > 1 and inner.is_constant(node.inputs[1]) and looks_like_ffn(inner, node.inputs[0])
            ):
                yield Refusal("OP201", name, reason)


def only_one(kind: str, node: Node) -> Refusal:
    return Refusal("OP103" if kind == "heads" else "OP203", node.name, f"only one {unit_of(kind)} is left")


def attention_context(view: GraphView, node: Node) -> str | None:
    """The context tensor if ``node`` is the heart of an attention: a fused operator, or a Softmax whose result weighs an activation."""
    if node.op in ATTENTION_OPS:
        return node.outputs[0]
    if node.op != "Softmax":
        return None
    pending = [node.outputs[0]]
    seen: set[int] = set()
    while pending:
        tensor = pending.pop()
        for consumer, slot in view.consumers.get(tensor, ()):
            if consumer.index in seen:
                continue
            seen.add(consumer.index)
            if _is_activation_product(view, consumer) and slot == 0:
                return consumer.outputs[0]
            if consumer.op in ("IsNaN", "Where", "Cast", "Dropout", "Identity", "Mul", "Reshape", "Transpose"):
                pending.extend(consumer.outputs)
    return None


def unit_of(kind: str) -> str:
    return "head" if kind == "heads" else "neuron"
