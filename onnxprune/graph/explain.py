"""What happened at one place of a graph: why it is cut the way it is, or why it is not cut at all."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from onnxprune.errors import Refusal
from onnxprune.graph.anatomy import Anatomy, Consumer, Site, consumers_of, kind_of, refuse_group
from onnxprune.graph.axes import Tracer
from onnxprune.graph.axis_links import Barrier, Link, Shapes, Tie
from onnxprune.graph.axis_rules import links
from onnxprune.graph.axis_state import Blocked, Group, Leaf
from onnxprune.graph.model import Model
from onnxprune.graph.tail import follow_tail
from onnxprune.graph.view import Node, captured
from onnxprune.refusals import CODES

_FEW = 4
"""So many nodes and tensors are explained in full; more are listed."""
_LISTED = 12
_ROLES = {"produces": "makes them", "consumes": "reads them", "rides": "lies along them"}
UNITS = {"heads": "heads", "ffn": "neurons", "channels": "channels", "qk": "directions", "vo": "directions"}


@dataclass(frozen=True)
class Answer:
    """What is known about one name: ``summary`` in a sentence, ``details`` as (label, text) pairs; a label may come several times."""

    about: Literal["code", "site", "refusal", "node", "tensor", "names"]
    name: str
    summary: str
    details: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(anatomy: Anatomy, name: str, given: Model | None = None) -> tuple[Answer, ...]:
    """Everything that ``name`` stands for: a refusal code, a site, a node, a tensor, or a part of such a name.

    Exact names come before parts, sites and refusals before nodes and tensors. What nothing matches is answered with the nearest names.

    Args:
        given: the model before it was simplified, to tell what became of a name that the simplified graph lacks.
    """
    if re.fullmatch(r"op\d{3}", name, re.IGNORECASE) and name.upper() in CODES:
        return (_code(anatomy, name.upper()),)
    places = _Places(anatomy)
    refusals = [refusal for refusal in anatomy.refusals if refusal.site == name]
    exact = [*(_site(anatomy, site) for site in anatomy.sites if site.name == name), *map(_refusal, refusals), *places.answers(name)]
    if exact:
        return tuple(exact)
    if gone := _gone(places, name, given):
        return gone
    wanted = name.lower()
    sites = [site for site in anatomy.sites if wanted in site.name.lower()]
    sites = [site for site in sites if site.name.lower().startswith(f"{wanted}.")] or sites
    found = [_site(anatomy, site) for site in sites]
    found += [_refusal(refusal) for refusal in anatomy.refusals if wanted in f"{refusal.site} {refusal.reason}".lower()]
    parts = [part for part in places.names if wanted in part.lower()]
    if found:
        return tuple(found)
    if len(parts) <= _FEW:
        found = [answer for part in parts for answer in places.answers(part)]
    else:
        found = [Answer("names", name, f"{len(parts)} nodes and tensors hold this name: {_some(parts)}. Name one of them in full.")]
    return tuple(found) or (_unknown(anatomy, places, name),)


def _code(anatomy: Anatomy, code: str) -> Answer:
    entry = CODES[code]
    here = [refusal for refusal in anatomy.refusals if refusal.code == code]
    details = [("means", entry.explanation), ("what to do", entry.hint), *((refusal.site, refusal.reason) for refusal in here)]
    count = f"{len(here)} place{'s' * (len(here) != 1)}" if here else "no place"
    return Answer("code", code, f"{entry.title}: {count} of this model", tuple(details))


def _refusal(refusal: Refusal) -> Answer:
    details = (("why", refusal.reason), ("means", CODES[refusal.code].explanation), ("what to do", refusal.hint))
    return Answer("refusal", refusal.site, f"{refusal.code}, {CODES[refusal.code].title}", details)


def _unknown(anatomy: Anatomy, places: _Places, name: str) -> Answer:
    sites = [site.name for site in anatomy.sites]
    near = difflib.get_close_matches(name, [*sites, *CODES, *places.names], 5, 0.6)
    known = f"sites are named like {sites[0]}" if sites else "the model has no site"
    nearest = f"the nearest names are {', '.join(near)}" if near else known
    return Answer("names", name, f"no code, site, node or tensor of this model holds {name!r}; {nearest}")


# --- sites -------------------------------------------------------------------------------------------------------------------------


def _site(anatomy: Anatomy, site: Site) -> Answer:
    unit = UNITS.get(site.kind, "units")
    ops = Counter(node.op for node in site.group.nodes)
    details = [("cuts", _cut(site, leaf)) for leaf in site.group.leaves]
    details += [("read by", _read(anatomy, consumer)) for consumer in site.consumers]
    if site.kind == "heads" and len({int((leaf.labels >= 0).sum()) for leaf in site.group.leaves if leaf.role == "produces"}) > 1:
        details.append(("one unit", "a head of keys and values with all heads of queries that share it"))
    details.append(("passes", ", ".join(f"{count} {op}" for op, count in ops.most_common())))
    details.append(("tied to", "; ".join(_ties(anatomy, site)) or "no other site: it is cut independently of all others"))
    if site.least:
        details.append(("keeps", f"at least {site.least}: nothing could go through the layer without"))
    return Answer("site", site.name, f"{site.units:,} {unit} can be removed one by one", tuple(details))


def _cut(site: Site, leaf: Leaf) -> str:
    held = np.flatnonzero(leaf.labels >= 0)
    shape = "x".join(map(str, site.leaf_shapes[leaf.node.index, leaf.slot]))
    each = len(held) / max(len(np.unique(leaf.labels[held])), 1)
    where = "" if len(held) == len(leaf.labels) else f" within {_ranges(held)} of {len(leaf.labels):,}"
    size = f"{each:g} position{'s' * (each != 1)} per unit{where}"
    return f"{leaf.tensor} [{shape}] along axis {leaf.axis}, {size}: {_ROLES[leaf.role]} (at {leaf.node.name})"


def _ranges(held: np.ndarray) -> str:
    """``0..63, 128..191``; many pieces are counted."""
    runs = np.split(held, np.flatnonzero(np.diff(held) != 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" for run in runs) if len(runs) <= _FEW else f"{len(held):,} positions"


def _read(anatomy: Anatomy, consumer: Consumer) -> str:
    tail = follow_tail(anatomy.view, consumer.output, anatomy.profile)
    end = f"; its result joins the residual stream at {tail.join.name}" if tail else ""
    node = consumer.leaf.node
    return f"{node.op} {node.name}, which sums axis {consumer.axis} of {consumer.tensor} away{end}"


def _ties(anatomy: Anatomy, site: Site) -> Iterator[str]:
    """Constants that another site cuts too, or that a node outside the site reads."""
    mine = {leaf.tensor for leaf in site.group.leaves}
    for other in anatomy.sites:
        shared = sorted(mine & {leaf.tensor for leaf in other.group.leaves}) if other is not site else []
        if shared:
            yield f"{other.name}, which also cuts {_some(shared)} (each use is cut on its own)"
    uses = {(leaf.node.index, leaf.slot) for leaf in site.group.leaves}
    cut = {(leaf.node.index, leaf.slot) for other in anatomy.sites for leaf in other.group.leaves}
    for tensor in sorted(mine):
        others = [node.name for node, slot in anatomy.view.consumers.get(tensor, ()) if (node.index, slot) not in uses | cut]
        if others:
            yield f"{_some(others)}, which reads {tensor} as well and keeps it whole"


# --- nodes and tensors -------------------------------------------------------------------------------------------------------------


class _Places:
    """Nodes and tensors of the simplified graph by name."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.tracer = Tracer(anatomy.view, anatomy.profile)
        self.nodes = {node.name: node for node in anatomy.view.nodes}
        tensors = [name for node in anatomy.view.nodes for name in (*node.inputs, *node.outputs) if name]
        self.tensors = dict.fromkeys([*anatomy.model.input_names, *tensors])
        self.names = tuple(dict.fromkeys([*self.nodes, *self.tensors]))

    def answers(self, name: str) -> Iterator[Answer]:
        if name in self.nodes:
            yield self._node(self.nodes[name])
        if name in self.tensors:
            yield self._tensor(name)

    def _node(self, node: Node) -> Answer:
        sites = [site for site in self.anatomy.sites if any(inner is node for inner in site.group.nodes)]
        names = ", ".join(site.name for site in sites)
        weights = [name for name in node.inputs if name and self.anatomy.view.value(name) is not None]
        details = [("reads", ", ".join(filter(None, node.inputs))), ("makes", ", ".join(filter(None, node.outputs)))]
        for name in dict.fromkeys([*weights, *filter(None, node.outputs)]):
            details += [(name, line) for line in self._axes(name, node)]
        return Answer("node", node.name, f"{node}: {f'part of {names}' if sites else 'part of no site'}", tuple(details))

    def _tensor(self, name: str) -> Answer:
        constant = self.anatomy.view.is_constant(name)
        sites = [site for site in self.anatomy.sites if self._held(site, name)]
        names = ", ".join(site.name for site in sites)
        readers = [node.name for node, _ in self.anatomy.view.consumers.get(name, ())]
        maker = self.anatomy.view.producer.get(name)
        details = [("made by", maker.name)] if maker else []
        details += [("read by", _some(readers) or "no node: it is an output of the graph"), *((name, line) for line in self._axes(name))]
        part = f"part of {names}" if sites else "part of no site"
        return Answer("tensor", name, f"{'constant' if constant else 'activation'} {name}: {part}", tuple(details))

    @staticmethod
    def _held(site: Site, name: str) -> bool:
        return any(leaf.tensor == name for leaf in site.group.leaves) or any(tensor == name for tensor, _ in site.group.places)

    def _axes(self, name: str, node: Node | None = None) -> Iterator[str]:
        """A line for each axis of a tensor: what is removed along it, or why nothing is."""
        array = self.anatomy.view.value(name)
        shape = array.shape if array is not None else self.anatomy.profile.shape(name)
        if shape is None:
            yield "was not seen when the model ran"
            return
        if array is not None and array.dtype.kind != "f" and array.ndim < 2:
            yield f"holds {array.dtype} values, not weights"
            return
        free = [axis for axis in range(len(shape)) if array is None and self.anatomy.profile.dim(name, axis) is None]
        if free:
            yield f"ax{'es' if len(free) > 1 else 'is'} {', '.join(map(str, free))}: of the length that the input has, no weights lie there"
        for axis, size in enumerate(shape):
            if axis in free:
                continue
            if size == 1:
                yield f"axis {axis} has length 1: nothing to remove"
            else:
                yield f"axis {axis} ({size:,}): {self._axis(name, axis, node, constant=array is not None)}"

    def _axis(self, name: str, axis: int, node: Node | None, *, constant: bool) -> str:
        if constant:
            sites = {
                site.name: leaf
                for site in self.anatomy.sites
                for leaf in site.group.leaves
                if (leaf.tensor, leaf.axis) == (name, axis) and node in (None, leaf.node)
            }
            if sites:
                return ", ".join(f"cut with {site} ({_ROLES[leaf.role]})" for site, leaf in sites.items())
            seeds = list(dict.fromkeys(self._along(name, axis, node)))
        else:
            held = [site.name for site in self.anatomy.sites if (name, axis) in site.group.places]
            if held:
                return f"shrinks with {', '.join(held)}"
            seeds = [(name, axis)]
        lines = [line for seed in seeds for line in self._traced(*seed)]
        return "; ".join(dict.fromkeys(lines)) or self._barriers(name, axis) or "no operator with a rule carries an activation along it"

    def _along(self, name: str, axis: int, node: Node | None) -> Iterator[tuple[str, int]]:
        """Activation axes that lie along an axis of a constant."""
        for shapes, slot, link in self._links(name):
            if not isinstance(link, Tie) or node not in (None, shapes.node):
                continue
            ends = (link.a, link.axis_a), (link.b, link.axis_b)
            for mine, (other, other_axis) in (ends, ends[::-1]):
                if mine == (slot, axis) and not self.anatomy.view.is_constant(shapes.name(other)):
                    yield shapes.name(other), other_axis

    def _barriers(self, name: str, axis: int) -> str:
        """What forbids to remove positions of a constant along an axis."""
        found = [
            f"{link.reason} (at {shapes.node.name})"
            for shapes, slot, link in self._links(name)
            if isinstance(link, Barrier) and (link.operand, link.axis) == (slot, axis)
        ]
        return "; ".join(dict.fromkeys(found))

    def _links(self, name: str) -> Iterator[tuple[Shapes, int, Link]]:
        """Every rule of every node that reads a tensor, with the slot it is read at."""
        for reader, slot in self.anatomy.view.consumers.get(name, ()):
            shapes = Shapes(self.anatomy.view, self.anatomy.profile, reader)
            try:
                found = links(reader, shapes) if slot >= 0 else None
            except LookupError:
                continue
            for link in found or ():
                yield shapes, slot, link

    def _traced(self, tensor: str, axis: int) -> list[str]:
        return [
            f"blocked: {result.reason} (at {result.node or 'the graph boundary'}{f', {result.op}' if result.op else ''})"
            if isinstance(result, Blocked)
            else self._verdict(result)
            for result in self.tracer.trace(tensor, axis)
        ]

    def _verdict(self, group: Group) -> str:
        """Why a group that could be traced is no site of its own."""
        for site in self.anatomy.sites:
            if site.group.key() == group.key():
                return f"goes with {site.name}"
        roles = {leaf.role for leaf in group.leaves}
        weighted = {leaf.node.index for leaf in group.leaves if leaf.role == "consumes"}
        products = [node for node in group.contracted if node.index not in weighted]
        if products:
            return f"two activations are multiplied along it (at {products[0].name}): a depth of queries and keys, not units of its own"
        if "produces" not in roles:
            return "no constant weight makes it"
        if "consumes" not in roles:
            return "no constant weight sums it away again"
        kind = kind_of(self.anatomy.view, group)
        if kind is None:
            return (
                f"{group.units:,} units could go, but nothing nonlinear lies between the matrices that make and read them, or they are "
                "the depth of an attention"
            )
        consumers = consumers_of(self.anatomy.view, self.anatomy.profile, group)
        refusal = refuse_group(self.anatomy.view, self.anatomy.profile, kind, group, consumers, consumers[0].leaf.node)
        if refusal is not None:
            return f"{refusal.code}, {refusal.reason} ({refusal.hint})"
        return f"{group.units:,} {UNITS.get(kind, 'units')} whose weights belong to another site"


def _gone(places: _Places, name: str, given: Model | None) -> tuple[Answer, ...]:
    """What became of a name of the file that the simplified graph does not have."""
    if given is None:
        return ()
    for node in given.proto.graph.node:
        if name == node.name and (left := [output for output in node.output if output in places.tensors]):
            return tuple(answer for output in left for answer in places.answers(output))
        if name == node.name or name in node.output:
            return (Answer("names", name, f"{node.op_type} {name} is in the file, but simplified away: its result is constant or unused"),)
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            if any(name in (inner.name, *inner.output) for body in bodies for inner in body.node):
                reads = _some(sorted(captured(node))) or "no tensor"
                summary = f"lies inside the body of {node.op_type} {node.name}, which is not entered; the body reads {reads} from outside"
                return (Answer("names", name, summary),)
    if any(tensor.name == name for tensor in given.proto.graph.initializer):
        return (Answer("names", name, f"the constant {name} is in the file, but simplified away: nothing reads it, or it was folded"),)
    return ()


def _some(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(names))
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more
