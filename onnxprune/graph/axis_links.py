"""The vocabulary of axis rules: how positions along the axes of one node's operands belong together.

Operands are numbered like the node's inputs (0, 1, ...) and, for outputs, -1, -2, ... .
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView, Node

Index = np.ndarray


@dataclass(frozen=True, eq=False)
class Tie:
    """Position ``index_a[k]`` of one axis goes with position ``index_b[k]`` of another; None stands for all positions in order.

    ``contracts``: the operator sums over this axis, so a unit that is zero on one side may leave both.
    ``batch``: both axes are batch axes of a product of two activations; that is what makes a unit an attention head.
    """

    a: int
    axis_a: int
    b: int
    axis_b: int
    index_a: Index | None = None
    index_b: Index | None = None
    contracts: bool = False
    batch: bool = False


@dataclass(frozen=True)
class Regroup:
    """The axes ``axes_a`` of input 0, read in row-major order, are the axes ``axes_b`` of output 0."""

    axes_a: tuple[int, ...]
    axes_b: tuple[int, ...]


@dataclass(frozen=True)
class Barrier:
    """Removing positions along this axis would change the result of the operator."""

    operand: int
    axis: int
    reason: str


Link = Tie | Regroup | Barrier


class Shapes:
    """Concrete shapes of one node's operands."""

    def __init__(self, view: GraphView, profile: Profile, node: Node) -> None:
        self.view, self.profile, self.node = view, profile, node

    def name(self, operand: int) -> str:
        names = self.node.inputs if operand >= 0 else self.node.outputs
        position = operand if operand >= 0 else -1 - operand
        return names[position] if position < len(names) else ""

    def of(self, operand: int) -> tuple[int, ...]:
        name = self.name(operand)
        shape = self.profile.shape(name)
        if shape is None:
            array = self.view.value(name)
            if array is None:
                raise LookupError(name)
            shape = array.shape
        return shape

    def rank(self, operand: int) -> int:
        return len(self.of(operand))

    def integers(self, operand: int) -> np.ndarray | None:
        """Values of a small integer operand, if constant in both runs of the profile."""
        name = self.name(operand)
        if not name:
            return None
        array = self.view.value(name)
        if array is not None:
            return np.atleast_1d(array)
        seen = self.profile.constant_elements(name)
        return np.atleast_1d(seen[0]) if seen is not None and bool(np.all(seen[1])) else None


Rule = Callable[[Node, Shapes], Sequence[Link]]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[domain, name] = function
        return function

    return register
