"""What a residual stream consists of: what a basis is folded into, and where it is entered and left by a product of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph.view import Node


class Unrotatable(Exception):
    """Something that reads or writes the stream does not allow a rotation; the message says what and where."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Axis ``axis`` of the constant at (``node``, ``slot``) lies along the stream.

    A constant that ``writes`` is multiplied by diag(``scale``) and the basis, one that is read with by the way back, diag(``scale``) and,
    for its bias, by ``shift``.
    """

    node: int
    slot: int
    axis: int
    writes: bool
    scale: np.ndarray | None
    shift: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Bridge:
    """A tensor that enters the basis (``inward``) or leaves it by a product of its own.

    ``readers`` (node, slot) read what is outside of the basis: of a tensor that enters the tensor as it was, of one that leaves what
    leaves. ``output``: the graph output of its name is what leaves.
    """

    tensor: str
    inward: bool
    readers: tuple[tuple[int, int], ...] = ()
    output: bool = False
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None


@dataclass(eq=False)
class Stream:
    """One residual stream of ``width``.

    ``norms`` are the tensors whose rows are normalised, ``centred`` whether norms remove their mean, ``members`` the tensors that hold the
    stream itself, ``neutral`` the constants (node, slot, value, full width) that move into the readers, ``places`` the axis along which
    every tensor holds the stream or what a norm makes of it, ``shapes`` the nodes that measure one of them.
    """

    name: str
    width: int
    centred: bool = False
    norms: list[str] = field(default_factory=list)
    members: set[str] = field(default_factory=set)
    folds: list[Fold] = field(default_factory=list)
    neutral: list[tuple[int, int, float, bool]] = field(default_factory=list)
    bridges: list[Bridge] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    shapes: list[Node] = field(default_factory=list)
