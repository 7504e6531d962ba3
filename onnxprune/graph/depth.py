"""The depth of attention heads: sites whose units are directions inside every head of a layer.

Queries and keys of a head meet in a product over their depth, values and the output projection in another. Any invertible matrix R may
stand between the two sides, (x R) (R^-1 y) = x y, so a basis in which few directions carry the product can be turned into first, without
changing the model; what is cut afterwards are positions along an axis, like everywhere else. That needs both sides to be plain: between
the projection and the product nothing but biases, scales and layout. Where there is more (rotary embeddings, norms), the site is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.errors import Refusal
from onnxprune.graph.anatomy import Anatomy, Consumer, Kind, Site, consumers_of, foreign_weight
from onnxprune.graph.axes import Tracer
from onnxprune.graph.axis_rules import MEASURES
from onnxprune.graph.axis_state import Blocked, Group, Leaf
from onnxprune.graph.plain import Plain, Reason, projection_of, reader_of
from onnxprune.graph.side import side_tensors
from onnxprune.graph.suspects import attention_context
from onnxprune.graph.tail import joins_stream
from onnxprune.graph.view import GraphView, Node

DEPTHS: tuple[Kind, ...] = ("qk", "vo")
FUSED_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_CANNOT_FOLLOW = "OP107"


@dataclass(frozen=True, eq=False)
class Side:
    """One factor of a product over the depth: ``plain`` says where its positions lie, ``owner[block]`` which basis turns the block.

    Blocks are heads; query heads that share keys and values share a basis.
    """

    plain: Plain
    owner: np.ndarray


@dataclass(frozen=True, eq=False)
class Depth:
    """A site of kind ``qk`` or ``vo`` with the two sides of its product. ``bases`` matrices of [units, units] turn it."""

    site: Site
    left: Side
    right: Side

    @property
    def bases(self) -> int:
        return int(self.left.owner.max()) + 1


@dataclass(frozen=True, eq=False)
class _Heart:
    """The two products of one attention, of which a fused operator does both."""

    scores: Node
    context: Node

    @property
    def fused(self) -> bool:
        return self.scores is self.context

    def operands(self, kind: Kind) -> tuple[str, int, str, int]:
        """(left factor, its depth axis, right factor, its depth axis), axes counted from the end; ``vo`` has the values on the left."""
        if kind == "vo":
            return self.context.inputs[2 if self.fused else 1], -1, self.context.outputs[0], -1
        return self.scores.inputs[0], -1, self.scores.inputs[1], -1 if self.fused else -2


def with_depths(anatomy: Anatomy, kinds: Collection[str] = DEPTHS) -> Anatomy:
    """The anatomy with the sites of ``kinds``, and a refusal for each attention whose depth cannot be turned."""
    found, refusals = _search(anatomy, kinds)
    sites = sorted([*anatomy.sites, *(depth.site for depth in found)], key=_place)
    return replace(
        anatomy,
        sites=tuple(_ordered(site, order) for order, site in enumerate(sites)),
        refusals=tuple(dict.fromkeys([*anatomy.refusals, *refusals])),
    )


def depths_of(anatomy: Anatomy) -> tuple[Depth, ...]:
    """The sites of kind ``qk`` and ``vo`` of an anatomy, with their sides."""
    sites = {site.name: site for site in anatomy.sites}
    found, _ = _search(anatomy, {site.kind for site in anatomy.sites} & set(DEPTHS))
    return tuple(replace(depth, site=sites[depth.site.name]) for depth in found if depth.site.name in sites)


def _place(site: Site) -> tuple[int, str]:
    return min(consumer.leaf.node.index for consumer in site.consumers), site.kind


def _ordered(site: Site, order: int) -> Site:
    same = replace(site, order=order)
    same.leaf_shapes.update(site.leaf_shapes)
    return same


def _search(anatomy: Anatomy, kinds: Collection[str]) -> tuple[list[Depth], list[Refusal]]:
    view = anatomy.view
    tracer = Tracer(view, anatomy.profile)
    found: list[Depth] = []
    refusals: list[Refusal] = []
    for number, heart in enumerate(_hearts(view)):
        for kind in (kind for kind in DEPTHS if kind in kinds):
            try:
                found.append(_depth(anatomy, tracer, heart, kind, f"layer.{number}.{kind}"))
            except Reason as reason:
                node = heart.scores if kind == "qk" else heart.context
                refusals.append(Refusal(reason.code, node.name, f"{'queries and keys' if kind == 'qk' else 'values'}: {reason}"))
    return found, refusals


def _hearts(view: GraphView) -> Iterator[_Heart]:
    """Attentions in the order in which anatomy numbers the layers."""
    side = side_tensors(view)
    found = []
    for node in view.nodes:
        context = attention_context(view, node)
        if context is not None:
            heart = view.producer[context]
            found.append(_Heart(heart if node.op in FUSED_ATTENTION else _scores(view, node, side) or node, heart))
    return iter(sorted(found, key=lambda heart: heart.context.index))


def _scores(view: GraphView, softmax: Node, side: frozenset[str]) -> Node | None:
    """The product of two activations that a Softmax normalises; None if there is not exactly one."""
    pending, seen, products = [softmax.inputs[0]], set(), []
    while pending:
        name = pending.pop()
        node = view.producer.get(name)
        if node is None or node.index in seen or name in side or view.is_constant(name):
            continue
        seen.add(node.index)
        if node.op == "MatMul" and not any(view.is_constant(operand) for operand in node.inputs):
            products.append(node)
        elif node.op in ("MatMul", "Gemm", "Einsum", "Softmax") or "Norm" in node.op:
            return None
        else:
            pending += [operand for operand in node.inputs if operand]
    return products[0] if len(products) == 1 else None


def _depth(anatomy: Anatomy, tracer: Tracer, heart: _Heart, kind: Kind, name: str) -> Depth:
    """Raises :class:`Reason` where the depth cannot be turned or cut."""
    view, profile = anatomy.view, anatomy.profile
    if heart.fused and (heart.context.domain or len(profile.shape(heart.context.inputs[0]) or ()) != 4):
        raise Reason("OP108", f"{heart.context} holds heads and depth in one axis")
    if kind == "qk" and heart.scores.op == "Softmax":
        raise Reason(_CANNOT_FOLLOW, "the scores are not one product of two activations")
    first, axis, second, other = heart.operands(kind)
    left = projection_of(view, profile, first, axis)
    right = projection_of(view, profile, second, other) if kind == "qk" else reader_of(view, profile, second, left.rows)
    depth = left.columns.shape[1]
    if depth < 2:
        raise Reason(_CANNOT_FOLLOW, "a head is one number deep")
    owners = _owners(left, right)
    rank = len(profile.shape(first) or ())
    group = _group(view, tracer, heart, first if kind == "qk" else second, rank + axis, depth, (left, right))
    if kind == "qk":
        labels = group.places[first, rank + axis]
        leaf = Leaf(heart.scores, 1, second, len(profile.shape(second) or ()) + other, labels, "consumes")
        consumers: tuple[Consumer, ...] = (Consumer(leaf, first, rank + axis, labels),)
    else:
        consumers = consumers_of(view, profile, group)
        if len(consumers) != 1 or not joins_stream(view, profile, [consumer.output for consumer in consumers]):
            raise Reason(_CANNOT_FOLLOW, "the values do not end in one residual branch")
    site = Site(name, kind, depth, group, consumers, 0, least=1)
    for leaf in group.leaves:
        array = view.value(leaf.tensor)
        site.leaf_shapes[leaf.node.index, leaf.slot] = array.shape if array is not None else (len(leaf.labels),)
    return Depth(site, Side(left, owners[0]), Side(right, owners[1]))


def _owners(left: Plain, right: Plain) -> tuple[np.ndarray, np.ndarray]:
    """Number of the basis of every block of both sides: blocks that meet in a product have the same."""
    if left.columns.shape[1] != right.columns.shape[1] or left.rows.shape != right.rows.shape:
        raise Reason(_CANNOT_FOLLOW, "the heads of its two sides do not go together one by one")
    parent = np.arange(len(left.columns) + len(right.columns))
    for a, b in zip(left.rows, right.rows + len(left.columns), strict=True):
        parent[parent == parent[b]] = parent[a]
    numbers = np.unique(parent, return_inverse=True)[1]
    return numbers[: len(left.columns)], numbers[len(left.columns) :]


def _group(view: GraphView, tracer: Tracer, heart: _Heart, tensor: str, axis: int, depth: int, sides: tuple[Plain, Plain]) -> Group:
    """The group of the depth, all of whose nodes are understood as linear."""
    results = tracer.trace(tensor, axis)
    group = next((result for result in results if isinstance(result, Group) and result.units == depth), None)
    if group is None:
        blocked = next((result for result in results if isinstance(result, Blocked)), None)
        where = f"{blocked.reason} (at {blocked.node or 'the graph boundary'})" if blocked else "its dimensions do not go one by one"
        raise Reason(_CANNOT_FOLLOW, where)
    known = {heart.scores.index, heart.context.index} | {node.index for side in sides for node in side.nodes}
    strange = next((node for node in group.nodes if node.index not in known and node.op not in MEASURES), None)
    if strange is not None or group.picks:
        raise Reason(_CANNOT_FOLLOW, f"{strange or group.picks[0].node} reads it as well")
    uses = {(use.index, use.slot) for side in sides for use in side.constants}
    if {(leaf.node.index, leaf.slot) for leaf in group.leaves} != uses:
        raise Reason(_CANNOT_FOLLOW, "a constant along it could not be placed")
    foreign = foreign_weight(view, group)
    if foreign is not None:
        raise Reason(_CANNOT_FOLLOW, foreign[1])
    shared = next((leaf for leaf in group.leaves if leaf.role != "rides" and len(view.consumers[leaf.tensor]) > 1), None)
    if shared is not None:
        raise Reason("OP109", f"its weight {shared.tensor} is read in several places")
    return group
