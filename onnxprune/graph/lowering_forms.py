"""Forms of composite operators that are spelled out, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.errors import InputError
from onnxprune.graph.view import Node


class CannotLower(InputError):
    """A composite operator is used in a form that has no spelling in primitives here."""

    def __init__(self, node: Node, why: str) -> None:
        domain = f"{node.domain}." if node.domain else ""
        where = f"{domain}{node.op} (node {(node.name or node.outputs[0])!r})"
        super().__init__(f"cannot spell out {where}: {why}; export the model without it")


def check_form(node: Node, attributes: Iterable[str], inputs: int, outputs: int) -> None:
    """Refuse attributes, inputs and outputs beyond the ones a lowering reads."""
    unknown = set(node.attrs) - set(attributes)
    if unknown:
        raise CannotLower(node, f"attribute {sorted(unknown)[0]!r} is not covered")
    if any(node.inputs[inputs:]):
        raise CannotLower(node, f"input {next(slot for slot in range(inputs, len(node.inputs)) if node.inputs[slot])} is not covered")
    if any(node.outputs[outputs:]):
        raise CannotLower(node, f"output {next(slot for slot in range(outputs, len(node.outputs)) if node.outputs[slot])} is not covered")


def operand(node: Node, slot: int) -> str | None:
    return node.inputs[slot] if slot < len(node.inputs) and node.inputs[slot] else None
