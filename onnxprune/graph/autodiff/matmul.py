"""Products: MatMul, Gemm and Einsum."""

from __future__ import annotations

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, rule
from onnxprune.graph.view import Node


@rule("MatMul")
def matmul(tape: Tape, node: Node, dy: str) -> Adjoints:
    a, b = node.inputs
    rank_a, rank_b = tape.rank(a), tape.rank(b)
    if rank_a == 1 or rank_b == 1:
        return _vector_matmul(tape, node, dy)
    adjoints = {}
    if tape.wants(node, 0):
        # A transposed constant is folded when the session starts; a transposed activation becomes a flag of the fused product.
        adjoints[0] = _batch_sum(tape, tape.op("MatMul", dy, tape.swap_last(b, rank_b)), a, node.outputs[0])
    if tape.wants(node, 1):
        if rank_b == 2 and rank_a > 2:
            flat_a = tape.op("Reshape", a, tape.op("Concat", tape.int64([-1]), tape.size_of(a, rank_a - 1), axis=0))
            flat_dy = tape.op("Reshape", dy, tape.op("Concat", tape.int64([-1]), tape.size_of(b, 1), axis=0))
            adjoints[1] = tape.op("MatMul", tape.op("Transpose", flat_a, perm=[1, 0]), flat_dy)
        else:
            adjoints[1] = _batch_sum(tape, tape.op("MatMul", tape.swap_last(a, rank_a), dy), b, node.outputs[0])
    return adjoints


def _batch_sum(tape: Tape, adjoint: str, operand: str, result: str) -> str:
    """Sum over batch axes that ``operand`` was broadcast along; its last two axes are its own."""
    first, second = tape.dims(operand)
    batch_first, batch_second = tape.dims(result)
    return tape.sum_to_dims(adjoint, (first, second), ((*batch_first[:-2], *first[-2:]), (*batch_second[:-2], *second[-2:])))


def _vector_matmul(tape: Tape, node: Node, dy: str) -> Adjoints:
    """A rank-1 operand is a row on the left or a column on the right."""
    a, b = node.inputs
    rank_a, rank_b = tape.rank(a), tape.rank(b)
    if rank_a > 2 and rank_b == 1 and not tape.wants(node, 1):
        return {0: tape.op("Mul", tape.unsqueeze(dy, -1), b)}
    if rank_a > 2 or rank_b > 2:
        raise MissingGradient(node, "a product of a vector with a batch of matrices")
    row = tape.unsqueeze(a, 0) if rank_a == 1 else a
    column = tape.unsqueeze(b, 1) if rank_b == 1 else b
    shaped = dy
    if rank_a == 1:
        shaped = tape.unsqueeze(shaped, 0)
    if rank_b == 1:
        shaped = tape.unsqueeze(shaped, 1 if rank_a == 2 else -1)
    adjoints = {}
    if tape.wants(node, 0):
        adjoints[0] = tape.like(tape.op("MatMul", shaped, tape.op("Transpose", column, perm=[1, 0])), a)
    if tape.wants(node, 1):
        adjoints[1] = tape.like(tape.op("MatMul", tape.op("Transpose", row, perm=[1, 0]), shaped), b)
    return adjoints


@rule("Gemm")
def gemm(tape: Tape, node: Node, dy: str) -> Adjoints:
    a, b = node.inputs[:2]
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    flip_a, flip_b = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
    adjoints = {}
    if tape.wants(node, 0):
        if flip_a:
            adjoints[0] = tape.op("Gemm", b, dy, alpha=alpha, transA=flip_b, transB=1)
        else:
            adjoints[0] = tape.op("Gemm", dy, b, alpha=alpha, transA=0, transB=1 - flip_b)
    if tape.wants(node, 1):
        if flip_b:
            adjoints[1] = tape.op("Gemm", dy, a, alpha=alpha, transA=1, transB=flip_a)
        else:
            adjoints[1] = tape.op("Gemm", a, dy, alpha=alpha, transA=1 - flip_a, transB=0)
    if tape.wants(node, 2):
        adjoints[2] = tape.sum_to(tape.scaled(dy, beta, node.outputs[0]), node.inputs[2], node.outputs[0])
    return adjoints


@rule("Einsum")
def einsum(tape: Tape, node: Node, dy: str) -> Adjoints:
    """The adjoint of one operand is the same sum with that operand and the result exchanged."""
    equation = node.attrs["equation"].decode().replace(" ", "")
    if "->" not in equation or "." in equation:
        raise MissingGradient(node, f"equation {equation!r} has an ellipsis or no explicit result")
    left, result = equation.split("->")
    terms = left.split(",")
    if any(len(set(term)) < len(term) for term in terms):
        raise MissingGradient(node, f"equation {equation!r} takes a diagonal")
    adjoints = {}
    for slot, term in enumerate(terms):
        if not tape.wants(node, slot):
            continue
        others = [index for index in range(len(terms)) if index != slot]
        known = set(result).union(*(terms[index] for index in others))
        kept = "".join(label for label in term if label in known)
        swapped = ",".join([result, *(terms[index] for index in others)]) + "->" + kept
        adjoint = tape.op("Einsum", dy, *(node.inputs[index] for index in others), equation=swapped)
        if kept != term:
            adjoint = tape.unsqueeze(adjoint, *(axis for axis, label in enumerate(term) if label not in known))
            adjoint = tape.op("Expand", adjoint, tape.shape_of(node.inputs[slot]))
        adjoints[slot] = adjoint
    _refuse_stretched_labels(tape, node, terms)
    return adjoints


def _refuse_stretched_labels(tape: Tape, node: Node, terms: list[str]) -> None:
    sizes: dict[str, set[int]] = {}
    for name, term in zip(node.inputs, terms, strict=True):
        for label, size in zip(term, tape.dims(name)[0], strict=True):
            sizes.setdefault(label, set()).add(size)
    stretched = [label for label, seen in sizes.items() if len(seen) > 1]
    if stretched:
        raise MissingGradient(node, f"index {stretched[0]!r} is broadcast between operands")
