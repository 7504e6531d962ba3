"""Mixtures of experts: stacks of weights from which every token takes those of its own experts."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.errors import Refusal
from onnxprune.graph.view import GraphView, Node

_MOVES = frozenset("Cast Identity Transpose Unsqueeze Squeeze Reshape".split())
_PRODUCTS = frozenset({"MatMul", "Einsum", "Gemm"})


def refuse_experts(view: GraphView) -> list[Refusal]:
    """Two refusals for every mixture of experts: of its experts, and of the neurons inside them.

    Seen are ``MoE`` and ``QMoE`` of onnxruntime, and products with weights ``[experts, ...]`` that tokens choose by Gather or GatherND.
    """
    result = []
    for where, stack in _mixtures(view):
        result.append(Refusal("OP601", where.name, f"its experts ({stack}) are chosen token by token, and their scores compete"))
        result.append(Refusal("OP205", where.name, f"the weights of its neurons ({stack}) are gathered for every token"))
    return result


def _mixtures(view: GraphView) -> Iterator[tuple[Node, str]]:
    """The node where experts meet their tokens first, and a tensor that holds all of them; one for each choice of experts."""
    seen: set[str] = set()
    for node in view.nodes:
        if node.op in ("MoE", "QMoE"):
            yield node, node.inputs[2]
        elif node.op in ("Gather", "GatherND") and not node.domain and node.inputs[1] not in seen and _stacked(view, node):
            product = _product(view, node)
            if product is not None:
                seen.add(node.inputs[1])
                yield product, node.inputs[0]


def _stacked(view: GraphView, node: Node) -> bool:
    """Whether matrices are picked out of a stack by an index that depends on the input."""
    array = view.value(node.inputs[0])
    return array is not None and array.ndim > 2 and node.attrs.get("axis", 0) == 0 and not view.is_constant(node.inputs[1])


def _product(view: GraphView, node: Node) -> Node | None:
    tensor = node.outputs[0]
    for _ in range(6):
        readers = [reader for reader, slot in view.consumers.get(tensor, ()) if slot >= 0]
        found = next((reader for reader in readers if reader.op in _PRODUCTS), None)
        if found is not None:
            return found
        moved = next((reader for reader in readers if reader.op in _MOVES), None)
        if moved is None:
            return None
        tensor = moved.outputs[0]
    return None
