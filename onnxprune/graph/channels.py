"""Channels of convolutions: which of them form groups that can be cut, and what blocks the others.

A trace starts at the output of every convolution and then at the input of every one, so that each producer of a concatenation is a group of
its own where the axis allows it. Channels that are added together (a residual stage) are one group with several producers and consumers:
the closure of DepGraph (Fang et al., CVPR 2023) on the axes of an ONNX graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnxprune.errors import Refusal
from onnxprune.graph.axes import Tracer
from onnxprune.graph.axis_state import Blocked, Group
from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView, Node

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_Use = tuple[int, int, int]
"""(node index, slot, axis) of a constant."""


def is_convolutional(group: Group) -> bool:
    """Whether a group is about channels: a convolution of one group makes or reads it. A depthwise one in an FFN is part of the FFN."""
    return any(leaf.role != "rides" and is_dense(leaf.node) for leaf in group.leaves)


def is_dense(node: Node) -> bool:
    """Whether a node is a convolution in which every output channel reads every input channel."""
    return node.op in CONVOLUTIONS and not node.domain and int(node.attrs.get("group", 1)) == 1


def channel_groups(view: GraphView, profile: Profile, tracer: Tracer) -> tuple[list[Group], list[Refusal]]:
    """Groups of channels, no position of a weight in two of them, and what is left alone with its reason.

    The units of one group are alike: the same constants hold them.
    """
    groups: list[Group] = []
    taken: dict[_Use, np.ndarray] = {}
    refused: list[tuple[_Use, Refusal]] = []
    for tensor, node, use in _seeds(view):
        if (use in taken and taken[use].all()) or (profile.shape(tensor) or (0, 0))[1] < 2:
            continue
        results = tracer.trace(tensor, 1)
        found = [result for result in results if isinstance(result, Group) and is_convolutional(result)]
        if not found:
            blocked = next((result for result in results if isinstance(result, Blocked)), None)
            if blocked is not None:
                refused.append((use, _refuse_blocked(node, blocked)))
            continue
        finest = max(found, key=lambda group: group.units)
        refusal = _refuse_group(finest, node)
        for group in [finest] if refusal else _alike(_without(finest, taken)):
            if refusal or group.units < 2:
                refused.append((use, refusal or Refusal("OP303", node.name, "only one channel, or one group of them, is left")))
            else:
                groups.append(group)
            for leaf in group.leaves:
                key = (leaf.node.index, leaf.slot, leaf.axis)
                taken[key] = (leaf.labels >= 0) | taken.get(key, np.zeros(len(leaf.labels), bool))
    cut = {(leaf.node.index, leaf.slot, leaf.axis) for group in groups for leaf in group.leaves}
    # A trace from one end may be blocked where one from the other end was not.
    first = {(refusal.code, refusal.reason.split(" (at")[0]): refusal for use, refusal in reversed(refused) if use not in cut}
    return groups, list(reversed(first.values()))


def _seeds(view: GraphView) -> Iterator[tuple[str, Node, _Use]]:
    """(activation, convolution, the axis of its weight along the activation's channels): all outputs, then all inputs, in graph order."""
    nodes = [node for node in view.nodes if node.op in CONVOLUTIONS and not node.domain]
    for node in nodes:
        yield node.outputs[0], node, (node.index, 1, int(node.op == "ConvTranspose" and is_dense(node)))
    for node in nodes:
        if is_dense(node) and node.inputs[0] not in view.graph_inputs and not view.is_constant(node.inputs[0]):
            yield node.inputs[0], node, (node.index, 1, int(node.op == "Conv"))


def _without(group: Group, taken: dict[_Use, np.ndarray]) -> Group:
    """The units of which no position is taken."""
    free = np.ones(group.units, bool)
    for leaf in group.leaves:
        used = taken.get((leaf.node.index, leaf.slot, leaf.axis))
        if used is not None:
            free[np.unique(leaf.labels[used & (leaf.labels >= 0)])] = False
    return _only(group, free)


def _alike(group: Group) -> list[Group]:
    """The group split so that the units of each part are held by the same constants (after a Split, each half has its own readers)."""
    held = np.zeros((group.units, len(group.leaves)), bool)
    for column, leaf in enumerate(group.leaves):
        held[np.unique(leaf.labels[leaf.labels >= 0]), column] = True
    _, part = np.unique(held, axis=0, return_inverse=True)
    part = part.reshape(-1)
    order = dict.fromkeys(part.tolist())
    return [_only(group, part == number) for number in order] if group.units else []


def _only(group: Group, wanted: np.ndarray) -> Group:
    """The group of the units ``wanted`` (bool [units]), numbered anew; what none of them touches is no longer part of it."""
    if wanted.all():
        return group
    number = np.full(group.units + 1, -1)
    number[:-1][wanted] = np.arange(int(wanted.sum()))
    places = {key: number[labels] for key, labels in group.places.items() if (number[labels] >= 0).any()}
    leaves, picks = (
        tuple(replace(leaf, labels=number[leaf.labels]) for leaf in uses if (number[leaf.labels] >= 0).any())
        for uses in (group.leaves, group.picks)
    )
    names = {name for name, _ in places}
    weighted = {leaf.node.index for leaf in (*leaves, *picks)}
    nodes = tuple(node for node in group.nodes if node.index in weighted or names & {*node.inputs, *node.outputs})
    contracted = tuple(node for node in group.contracted if node.index in weighted)
    return Group(int(wanted.sum()), places, leaves, picks, nodes, group.batched, contracted)


def _refuse_blocked(node: Node, blocked: Blocked) -> Refusal:
    where = f"{blocked.reason} (at {blocked.node or 'the graph boundary'})"
    hint = "it is the width of the whole stream, which pruning cannot take back without training; nothing to do"
    return Refusal("OP301", node.name, where, hint if blocked.normalises else "")


def _refuse_group(group: Group, node: Node) -> Refusal | None:
    reading = {leaf.node.index for leaf in group.leaves if leaf.role == "consumes"}
    mixed = next((other for other in group.contracted if other.index not in reading), None)
    if mixed is not None or group.batched:
        where = f" (at {mixed.name})" if mixed is not None else ""
        reason = f"two activations are multiplied along the channels{where}"
        return Refusal("OP302", node.name, reason)
    if not reading or not any(leaf.role == "produces" for leaf in group.leaves):
        return Refusal("OP301", node.name, "no constant weight makes and reads these channels", "nothing to cut there; leave it")
    return None
