"""Layers with the same weights (ALBERT): what is cut for one is cut for all of them, or the file would hold a copy for each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from onnxprune.graph.axis_state import Group
from onnxprune.graph.view import Node


def with_the_same_weights(groups: Sequence[Group]) -> list[list[int]]:
    """Positions of groups that cut the same matrices in the same way, in order of the first of each."""
    found: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        matrices = frozenset((leaf.tensor, leaf.axis, leaf.labels.tobytes()) for leaf in group.leaves if leaf.role != "rides")
        found.setdefault(matrices or position, []).append(position)
    return list(found.values())


def joined(groups: Sequence[Group]) -> Group:
    """One group of the units of all, which have the same numbers in each."""
    if len(groups) == 1:
        return groups[0]
    return Group(
        groups[0].units,
        {key: labels for group in groups for key, labels in group.places.items()},
        tuple(leaf for group in groups for leaf in group.leaves),
        tuple(pick for group in groups for pick in group.picks),
        _by_index(node for group in groups for node in group.nodes),
        any(group.batched for group in groups),
        _by_index(node for group in groups for node in group.contracted),
    )


def _by_index(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(node for _, node in sorted({node.index: node for node in nodes}.items()))
