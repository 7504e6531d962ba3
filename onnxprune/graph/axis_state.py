"""What a trace knows while it runs, and what it gives: labels by place, leaves, groups, and the ways in which it ends early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxprune.graph.view import Node

Role = Literal["produces", "consumes", "rides"]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A use of a tensor that is cut along ``axis``: ``labels[i]`` is the unit of position i, -1 for positions outside the group.

    ``produces``: its product makes the axis; ``consumes``: its product sums the axis away; ``rides``: a bias or scale along it.
    """

    node: Node
    slot: int
    tensor: str
    axis: int
    labels: np.ndarray
    role: Role


@dataclass(frozen=True, eq=False)
class Group:
    """A coupled group: ``units`` sets of positions that can be removed one by one.

    ``places[tensor, axis]`` are the labels of every activation axis in the group, ``leaves`` the constants it cuts, ``picks`` the uses of
    side tensors in front of which it picks the positions that stay.
    """

    units: int
    places: dict[tuple[str, int], np.ndarray]
    leaves: tuple[Leaf, ...]
    picks: tuple[Leaf, ...]
    nodes: tuple[Node, ...]
    batched: bool
    contracted: tuple[Node, ...]

    def key(self) -> frozenset[tuple[int, int, int]]:
        """Identity of the group: the constants it cuts."""
        return frozenset((leaf.node.index, leaf.slot, leaf.axis) for leaf in self.leaves)


@dataclass(frozen=True)
class Blocked:
    """Why a trace found no group."""

    node: str
    op: str
    reason: str
    normalises: bool = False


@dataclass
class Place:
    labels: np.ndarray
    node: Node | None = None
    slot: int = 0


@dataclass
class State:
    """Labels found so far. Constants and held side tensors are kept per use, so that what is shared couples nothing.

    ``held``: side tensors that are not followed; ``merged``: side tensors of several readers that turned out to belong to the group.
    """

    parent: np.ndarray
    held: frozenset[str] = frozenset()
    merged: set[str] = field(default_factory=set)
    places: dict[tuple[str, int], Place] = field(default_factory=dict)
    uses: dict[tuple[int, int, int], Place] = field(default_factory=dict)
    roles: dict[tuple[int, int, int], Role] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    contracted: dict[int, Node] = field(default_factory=dict)
    batched: bool = False

    def canon(self, labels: np.ndarray) -> np.ndarray:
        return np.where(labels >= 0, self.parent[np.maximum(labels, 0)], -1)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make the labels ``a[i]`` and ``b[i]`` one unit, for all i."""
        for x, y in zip(self.parent[a].tolist(), self.parent[b].tolist(), strict=True):
            x, y = int(self.parent[x]), int(self.parent[y])
            if x != y:
                self.parent[self.parent == max(x, y)] = min(x, y)


class Fork(Exception):
    """Units are finer than a split of their axis allows; each alternative is a way to make them coarser."""

    def __init__(self, alternatives: list[np.ndarray]) -> None:
        super().__init__()
        self.alternatives = alternatives


class Stop(Exception):
    def __init__(self, blocked: Blocked) -> None:
        super().__init__()
        self.blocked = blocked


class Hold(Exception):
    """A side tensor cannot be followed: hold it, and start again."""

    def __init__(self, tensor: str) -> None:
        super().__init__()
        self.tensor = tensor


def coarser(state: State, block: np.ndarray) -> list[np.ndarray]:
    """For every axis of ``block``: the units after uniting all labels that share an index of that axis. Useless ones are left out."""
    alternatives: list[np.ndarray] = []
    for position in range(block.ndim):
        rows = np.moveaxis(block, position, 0).reshape(block.shape[position], -1)
        trial = State(state.parent.copy())
        for row in rows:
            trial.unite(np.repeat(row[:1], len(row)), row)
        if len(np.unique(trial.parent)) > 1:
            alternatives.append(trial.parent)
    return alternatives
