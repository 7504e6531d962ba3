"""The table of derivative rules, and what a rule may ask of the graph it is applied to.

A rule turns the adjoints of a node's outputs into adjoints of its inputs (a vector-Jacobian product) by emitting nodes. It is looked up
by (domain, operator); an operator without a rule is an error that names the node, never a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnxprune.errors import InputError
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.view import Node

Adjoints = Mapping[int, str]
"""Input slot -> adjoint contribution."""
Rule = Callable[["Tape", Node, Sequence[str | None]], Adjoints]
SimpleRule = Callable[["Tape", Node, str], Adjoints]

RULES: dict[tuple[str, str], Rule] = {}


class NoGradient(InputError):
    """Masks have no gradient in this model; ``found`` says why, without the way out."""

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"{found}; score without gradients (--importance energy or magnitude), or exclude the sites before this node")


class MissingGradient(NoGradient):
    """A node between a mask and the loss has no derivative rule, or is used in a form its rule does not cover."""

    def __init__(self, node: Node, why: str = "this operator has no derivative rule") -> None:
        domain = f"{node.domain}." if node.domain else ""
        super().__init__(f"no gradient through {domain}{node.op} (node {(node.name or node.outputs[0])!r}): {why}")


class Tape(Emitter):
    """An emitter that knows which tensors need adjoints."""

    active: set[str]

    def wants(self, node: Node, slot: int) -> bool:
        """Whether an adjoint of this input is needed."""
        return slot < len(node.inputs) and node.inputs[slot] in self.active

    def sum_to(self, adjoint: str, operand: str, result: str) -> str:
        """Undo the broadcast of ``operand`` in an adjoint of the shape of ``result``.

        An axis is broadcast where the operand lacks it, or has size 1 there in both profile runs while the result has not; the
        verdict is the graph's, so it also holds when a dynamic axis happens to have size 1 later.
        """
        return self.sum_to_dims(adjoint, self.dims(operand), self.dims(result))

    def sum_to_dims(
        self, adjoint: str, operand: tuple[tuple[int, ...], tuple[int, ...]], result: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> str:
        lacking = len(result[0]) - len(operand[0])
        stretched = [
            axis + lacking
            for axis, sizes in enumerate(zip(*operand, strict=True))
            if sizes == (1, 1) and (result[0][axis + lacking], result[1][axis + lacking]) != (1, 1)
        ]
        adjoint = self.reduce("ReduceSum", adjoint, stretched, keepdims=True)
        return self.reduce("ReduceSum", adjoint, range(lacking), keepdims=False)

    def like(self, adjoint: str, operand: str) -> str:
        """Reshape an adjoint to the shape of an operand with as many elements."""
        return self.op("Reshape", adjoint, self.shape_of(operand))

    def scaled(self, tensor: str, factor: float, like: str) -> str:
        return tensor if factor == 1.0 else self.op("Mul", tensor, self.scalar(factor, like))


def rule(*names: str, domain: str = "") -> Callable[[SimpleRule], SimpleRule]:
    """Register the rule of operators whose first output alone carries a derivative."""

    def register(function: SimpleRule) -> SimpleRule:
        def first_only(tape: Tape, node: Node, adjoints: Sequence[str | None]) -> Adjoints:
            if adjoints[0] is None or any(adjoint is not None for adjoint in adjoints[1:]):
                raise MissingGradient(node, "one of its further outputs is used")
            return function(tape, node, adjoints[0])

        for name in names:
            RULES[domain, name] = first_only
        return function

    return register


def multi_rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register the rule of operators with several differentiable outputs; an unused output has adjoint None."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[domain, name] = function
        return function

    return register
