"""Anatomy: from coupled groups to sites with the field's words.

A ``heads`` site is a group whose units are batch axes of a product of two activations (scores, context), an ``ffn`` site one that lies
between two weight matrices with a nonlinearity in between; both must end in a residual branch. What looks like a site and cannot be cut
becomes a :class:`Refusal`. A ``channels`` site is a group of channels of convolutions (:mod:`onnxprune.graph.channels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from onnxprune.errors import Refusal
from onnxprune.graph.axes import Tracer
from onnxprune.graph.axis_links import Shapes, Tie
from onnxprune.graph.axis_rules import NONLINEAR, links
from onnxprune.graph.axis_state import Blocked, Group, Leaf
from onnxprune.graph.channels import CONVOLUTIONS, channel_groups, is_convolutional
from onnxprune.graph.experts import refuse_experts
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile
from onnxprune.graph.resizing import unresizable
from onnxprune.graph.shared_layers import joined, with_the_same_weights
from onnxprune.graph.silence import can_be_silent
from onnxprune.graph.suspects import (
    WEIGHTED,
    attention_context,
    inside_bodies,
    is_attention,
    looks_like_ffn,
    only_one,
    refuse_blocked,
    refuse_unlike,
    uncovered_attention,
    unit_of,
)
from onnxprune.graph.tail import joins_stream, sums_of_their_own
from onnxprune.graph.view import GraphView, Node

Kind = Literal["heads", "ffn", "channels", "qk", "vo"]


@dataclass(frozen=True, eq=False)
class Consumer:
    """Where a site is read: activation ``tensor`` is contracted along ``axis`` with the constant of ``leaf``.

    Masking ``tensor`` by ``labels`` is what pruning means. ``output`` is the product, before any bias.
    """

    leaf: Leaf
    tensor: str
    axis: int
    labels: np.ndarray

    @property
    def output(self) -> str:
        return self.leaf.node.outputs[0]


@dataclass(frozen=True, eq=False)
class Site:
    """A place where units can be removed. ``order`` is its position in the graph; names are stable: ``layer.3.heads``.

    ``least`` units must stay: 0 where the graph can do without the branch.
    """

    name: str
    kind: Kind
    units: int
    group: Group
    consumers: tuple[Consumer, ...]
    order: int
    least: int = 0

    @cached_property
    def parameters_per_unit(self) -> float:
        """Weights that leave with one unit, on average (units of one group have equal shares in every known model).

        A weight that is used several times is counted once.
        """
        total = 0.0
        for leaf in {(leaf.tensor, leaf.axis): leaf for leaf in self.group.leaves}.values():
            shape = self._shape(leaf)
            total += float(np.prod(shape)) * float((leaf.labels >= 0).sum()) / shape[leaf.axis]
        return total / self.units

    def _shape(self, leaf: Leaf) -> tuple[int, ...]:
        return self.leaf_shapes[leaf.node.index, leaf.slot]

    @cached_property
    def leaf_shapes(self) -> dict[tuple[int, int], tuple[int, ...]]:
        return {}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Everything a later room may know about the structure of a model."""

    model: Model
    view: GraphView
    profile: Profile
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def of_kind(self, kinds: Iterator[str] | tuple[str, ...] | list[str] | set[str] | frozenset[str]) -> tuple[Site, ...]:
        wanted = set(kinds)
        return tuple(site for site in self.sites if site.kind in wanted)


def study(model: Model, profile: Profile) -> Anatomy:
    """Find the sites of a canonical model."""
    view = GraphView(model)
    tracer = Tracer(view, profile)
    found: list[tuple[Kind, Group, tuple[Consumer, ...]]] = []
    refusals: list[Refusal] = []
    seen: set[frozenset[tuple[int, int, int]]] = set()
    refused: set[int] = set()
    channels, no_channels = channel_groups(view, profile, tracer)
    for tensor, axis, node in _seeds(view, profile):
        if (profile.shape(tensor) or ())[axis : axis + 1] == (1,) and looks_like_ffn(view, tensor):
            refusals.append(only_one("ffn", node))
            continue
        results = tracer.trace(tensor, axis)
        for blocked in (result for result in results if isinstance(result, Blocked)):
            refusal = refuse_blocked(view, node, tensor, blocked)
            refusals += [refusal] if refusal else []
        kind, group = _best(view, results)
        if kind is None:
            refusals += refuse_unlike(view, node, tensor, results)
        if kind is None or group is None or group.key() in seen:
            continue
        seen.add(group.key())
        consumers = consumers_of(view, profile, group)
        refusal = refuse_group(view, profile, kind, group, consumers, node)
        if refusal is None:
            found.append((kind, group, consumers))
        else:
            # Neurons that hang together with heads are refused with them, and each is named.
            together = kind == "heads" and refusal.site == node.name
            places = [consumer.leaf.node.name for consumer in consumers] if together else [refusal.site]
            refusals += [replace(refusal, site=place) for place in places]
            refused.update(node.index for node in group.nodes)
    found = [
        (found[places[0]][0], joined([found[place][1] for place in places]), tuple(item for place in places for item in found[place][2]))
        for places in with_the_same_weights([group for _, group, _ in found])
    ]
    for group in channels:
        weight, rigid = foreign_weight(view, group), unresizable(view, profile, group)
        if weight is not None:
            refusals.append(Refusal("OP304", *weight))
        elif rigid is not None:
            refusals.append(Refusal("OP301", *rigid))
        else:
            found.append(("channels", group, consumers_of(view, profile, group)))
    sites = _named(view, profile, found)
    covered = refused | {node.index for site in sites if site.kind == "heads" for node in site.group.nodes}
    refusals += uncovered_attention(view, tracer, covered)
    refusals += inside_bodies(view)
    return Anatomy(model, view, profile, sites, tuple(dict.fromkeys([*refusals, *refuse_experts(view), *no_channels])))


def _seeds(view: GraphView, profile: Profile) -> Iterator[tuple[str, int, Node]]:
    """Activation axes that a constant matrix contracts, each once, in graph order."""
    done: set[tuple[str, int]] = set()
    for node in view.nodes:
        if node.op not in WEIGHTED or node.domain:
            continue
        for tensor, axis, slot, _ in _contractions(view, profile, node):
            if view.is_constant(node.inputs[slot]) and (tensor, axis) not in done:
                done.add((tensor, axis))
                yield tensor, axis, node


def _contractions(view: GraphView, profile: Profile, node: Node) -> Iterator[tuple[str, int, int, int]]:
    """(activation, its axis, operand slot of the other side, the other side's axis) for every contraction of a node."""
    try:
        found = links(node, Shapes(view, profile, node)) or ()
    except LookupError:
        return
    for link in found:
        if not (isinstance(link, Tie) and link.contracts):
            continue
        for (slot, axis), (other, other_axis) in (
            ((link.a, link.axis_a), (link.b, link.axis_b)),
            ((link.b, link.axis_b), (link.a, link.axis_a)),
        ):
            if not view.is_constant(node.inputs[slot]):
                yield node.inputs[slot], axis, other, other_axis


def _best(view: GraphView, results: Sequence[Group | Blocked]) -> tuple[Kind | None, Group | None]:
    """The group of a seed that cuts the most constants: key/value heads with their queries rather than one query head of every group."""
    kinds = [(kind_of(view, result), result) for result in results if isinstance(result, Group)]
    return max(((kind, group) for kind, group in kinds if kind), key=lambda item: len(item[1].leaves), default=(None, None))


def kind_of(view: GraphView, group: Group) -> Kind | None:
    roles = {leaf.role for leaf in group.leaves}
    if not {"produces", "consumes"} <= roles or group.units < 1:
        return None
    weighted = {leaf.node.index for leaf in group.leaves if leaf.role == "consumes"}
    if any(node.index not in weighted for node in group.contracted):
        return None  # a contraction of two activations: a query/key dimension, not a unit of its own
    if group.batched:
        return "heads"
    if is_convolutional(group):
        return None
    touches_scores = any(is_attention(view, node) for node in group.nodes)
    nonlinear = any(node.op in NONLINEAR for node in group.nodes)
    return "ffn" if nonlinear and not touches_scores else None


def consumers_of(view: GraphView, profile: Profile, group: Group) -> tuple[Consumer, ...]:
    result = []
    for leaf in group.leaves:
        if leaf.role != "consumes":
            continue
        for tensor, axis, slot, other_axis in _contractions(view, profile, leaf.node):
            if (slot, other_axis) == (leaf.slot, leaf.axis):
                result.append(Consumer(leaf, tensor, axis, group.places[tensor, axis]))
    return tuple(result)


def _named(view: GraphView, profile: Profile, found: list[tuple[Kind, Group, tuple[Consumer, ...]]]) -> tuple[Site, ...]:
    """Number the layers by the attentions of the graph, the refused ones too, so that a name does not depend on what was refused."""
    ordered = sorted(found, key=lambda item: min(consumer.leaf.node.index for consumer in item[2]))
    hearts = sorted(view.producer[context].index for node in view.nodes if (context := attention_context(view, node)) is not None)
    taken: set[str] = set()
    sites = []
    for order, (kind, group, consumers) in enumerate(ordered):
        place = min(consumer.leaf.node.index for consumer in consumers)
        number = _convolution(view, group) if kind == "channels" else max(sum(heart < place for heart in hearts) - 1, 0)
        part = 0
        while (name := _site_name(kind, number, part)) in taken:
            number, part = (number, part + 1) if kind == "channels" else (number + 1, 0)
        taken.add(name)
        needed = (
            kind == "channels"
            or bool(sums_of_their_own(view, [consumer.output for consumer in consumers]))
            or not can_be_silent(view, profile, [consumer.leaf for consumer in consumers])
        )
        site = Site(name, kind, group.units, group, consumers, order, least=int(needed))
        for leaf in group.leaves:
            array = view.value(leaf.tensor)
            site.leaf_shapes[leaf.node.index, leaf.slot] = array.shape if array is not None else (len(leaf.labels),)
        sites.append(site)
    return tuple(sites)


def _site_name(kind: Kind, number: int, part: int) -> str:
    """Parts of one convolution's channels that are cut apart from each other (a Split) are told by a letter."""
    return f"layer.{number}.{kind}" if kind != "channels" else f"conv.{number}{chr(ord('a') + part) if part else ''}.{kind}"


def _convolution(view: GraphView, group: Group) -> int:
    """Number, among the convolutions of the graph, of the first one that makes the channels (that reads them, if none makes them)."""
    numbers = {node.index: number for number, node in enumerate(node for node in view.nodes if node.op in CONVOLUTIONS)}
    held = sorted((leaf.role != "produces", numbers[leaf.node.index]) for leaf in group.leaves if leaf.node.index in numbers)
    return held[0][1]


# --- refusals ----------------------------------------------------------------------------------------------------------------------


def refuse_group(
    view: GraphView, profile: Profile, kind: Kind, group: Group, consumers: tuple[Consumer, ...], node: Node
) -> Refusal | None:
    where = node.name
    if group.units < 2:
        return only_one(kind, node)
    foreign = foreign_weight(view, group)
    if foreign is not None:
        return Refusal("OP104" if kind == "heads" else "OP204", where, foreign[1])
    if not joins_stream(view, profile, [consumer.output for consumer in consumers]):
        return _outside(view, profile, kind, consumers, where)
    rigid = unresizable(view, profile, group)
    if rigid is not None:
        return Refusal("OP101" if kind == "heads" else "OP201", *rigid)
    return None


def _outside(view: GraphView, profile: Profile, kind: Kind, consumers: tuple[Consumer, ...], where: str) -> Refusal:
    """Units that no residual branch ends; those of which some do are no classifier, and the reader that does not is named."""
    code, units = ("OP102" if kind == "heads" else "OP202"), f"{unit_of(kind)}s"
    others = [consumer for consumer in consumers if not joins_stream(view, profile, [consumer.output])]
    if 0 < len(others) < len(consumers):
        reason = f"the {units} are read by {others[0].leaf.node.name} as well, whose result does not end in a residual branch"
        return Refusal(code, where, reason, "the two readers need each other; leave it")
    return Refusal(code, where, f"the {units} do not end in a residual branch")


def foreign_weight(view: GraphView, group: Group) -> tuple[str, str] | None:
    """(node, reason) of the first constant of a group that is not a float initializer."""
    for leaf in group.leaves:
        array = view.value(leaf.tensor)
        if leaf.role == "rides" and (array is None or array.dtype.kind != "f") and array is not None:
            continue
        if array is None or array.dtype.kind != "f":
            maker = view.producer.get(leaf.tensor)
            made = f"computed by {maker.op}" if maker else f"of type {array.dtype if array is not None else 'unknown'}"
            return leaf.node.name, f"its weight {leaf.tensor} is {made}, not a float initializer"
    return None
