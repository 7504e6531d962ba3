"""Reverse mode: adjoints travel from the seeds back to the tensors asked for, by one rule per operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.graph.autodiff import activation, convolution, elementwise, indexing, matmul, normalization, reduction, shape
from onnxprune.graph.autodiff.rules import RULES, MissingGradient, Tape
from onnxprune.graph.emitter import FLOATS
from onnxprune.graph.view import GraphView, Node

FAMILIES = (activation, convolution, elementwise, indexing, matmul, normalization, reduction, shape)
"""Modules whose import fills the table of rules."""

_FLAT = frozenset({"Shape", "Size", "ConstantOfShape", "Floor", "Ceil", "Round", "Sign", "RandomNormalLike", "RandomUniformLike"})
"""Operators whose output does not move with the values of their inputs."""


def differentiate(tape: Tape, seeds: Mapping[str, str], wrt: Sequence[str]) -> dict[str, str]:
    """Emit the adjoints of ``wrt`` on the tape.

    Args:
        tape: the graph; nodes are emitted to it, and normalizations may gain optional outputs.
        seeds: tensor -> its adjoint (same shape), where the derivative starts.
        wrt: tensors of the graph whose adjoints are wanted.

    Returns:
        adjoint tensor by name; a tensor that no seed depends on is left out.

    Raises:
        MissingGradient: a node on the way has no rule.
    """
    tape.active = _active(tape, seeds, wrt)
    wanted = set(wrt)
    gelus = {gelu.last.index: gelu for gelu in erf_gelus(tape.view) if not wanted & gelu.interior}
    gathered: dict[str, list[str]] = {name: [seed] for name, seed in seeds.items()}
    result: dict[str, str] = {}
    for node in reversed(tape.view.nodes):
        adjoints = [_total(tape, gathered.pop(name, None)) if name else None for name in node.outputs]
        result.update((name, adjoint) for name, adjoint in zip(node.outputs, adjoints, strict=True) if name in wanted and adjoint)
        if not any(adjoints) or not any(name in tape.active for name in node.inputs):
            continue
        if node.index in gelus:
            gelu = gelus[node.index]
            adjoint = activation.erf_gelu(tape, gelu.scaled, gelu.one_plus_erf, gelu.x, str(adjoints[0]))
            gathered.setdefault(gelu.x, []).append(adjoint)
            continue
        found = RULES.get((node.domain, node.op))
        if found is None:
            raise MissingGradient(node)
        for slot, adjoint in found(tape, node, adjoints).items():
            if tape.wants(node, slot):
                gathered.setdefault(node.inputs[slot], []).append(adjoint)
    result.update((name, str(_total(tape, gathered[name]))) for name in wanted if name in gathered)
    return result


def _total(tape: Tape, parts: list[str] | None) -> str | None:
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return tape.op("Add" if len(parts) == 2 else "Sum", *parts)


def _active(tape: Tape, seeds: Mapping[str, str], wrt: Sequence[str]) -> set[str]:
    """Floating tensors on a path from ``wrt`` to a seed."""
    needed = tape.view.ancestors(list(seeds))
    captured = {(node.index, name) for name, uses in tape.view.consumers.items() for node, slot in uses if slot < 0}
    inner = {index: {name for other, name in captured if other == index} for index in {index for index, _ in captured}}
    active = set(wrt)
    for node in tape.view.nodes:
        if node.index not in needed or node.op in _FLAT:
            continue
        if active & inner.get(node.index, set()):
            raise MissingGradient(node, "its subgraph reads a tensor that depends on a mask")
        if any(name in active for name in node.inputs):
            active.update(name for name in node.outputs if name and (tape.type_of(name) or 1) in FLOATS)
    return active


@dataclass(frozen=True)
class ErfGelu:
    """x/2 (1 + erf(x / sqrt 2)) spelled out: its last node, x, x / sqrt 2, 1 + erf, and every tensor between x and the result."""

    last: Node
    x: str
    scaled: str
    one_plus_erf: str
    interior: frozenset[str]


def erf_gelus(view: GraphView) -> list[ErfGelu]:
    """The GELUs that a graph spells out; one closed derivative replaces the five rules of each."""
    return [match for node in view.nodes if node.op == "Erf" and (match := _erf_gelu(view, node)) is not None]


def _erf_gelu(view: GraphView, erf: Node) -> ErfGelu | None:
    """Either factor of the product may carry the half, or the product itself."""
    scale = view.producer.get(erf.inputs[0])
    if scale is None or scale.op not in ("Div", "Mul"):
        return None
    factor = _scalar(view, scale, math.sqrt(2.0) if scale.op == "Div" else math.sqrt(0.5))
    plus = _only_reader(view, erf.outputs[0], "Add")
    if factor is None or (scale.op == "Div" and factor == 0) or plus is None or _scalar(view, plus, 1.0) is None:
        return None
    x, grown = scale.inputs[1 - factor], plus.outputs[0]
    product = _only_reader(view, grown, "Mul")
    if product is None:
        return None
    interior = {scale.outputs[0], erf.outputs[0], grown}
    other = product.inputs[1 - product.inputs.index(grown)]
    halved = view.producer.get(other)
    last = product
    if halved is not None and halved.op == "Mul" and x in halved.inputs and _scalar(view, halved, 0.5) is not None:
        interior.add(other)
    elif other == x or _scalar(view, product, 0.5) is not None:
        reader = _only_reader(view, product.outputs[0], "Mul")
        if reader is None or (_scalar(view, reader, 0.5) is None if other == x else x not in reader.inputs):
            return None
        interior.add(product.outputs[0])
        last = reader
    else:
        return None
    return ErfGelu(last, x, scale.outputs[0], grown, frozenset(interior))


def _only_reader(view: GraphView, tensor: str, op: str) -> Node | None:
    readers = view.consumers.get(tensor, [])
    return readers[0][0] if len(readers) == 1 and readers[0][0].op == op and tensor not in view.graph_outputs else None


def _scalar(view: GraphView, node: Node, expected: float) -> int | None:
    """Slot of the input that is the constant expected, as exactly as its element type can say it, else None."""
    for slot, name in enumerate(node.inputs):
        value = view.value(name)
        if value is None or value.size != 1 or not np.issubdtype(value.dtype, np.floating):
            continue
        if abs(float(value.reshape(())) - expected) <= 2 * float(np.finfo(value.dtype).eps) * expected:
            return slot
    return None
