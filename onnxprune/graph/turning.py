"""Another basis inside attention heads: exact, and cut afterwards like any axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.depth import Depth, Side, depths_of, with_depths

Bases = Mapping[str, np.ndarray]
"""Site of kind ``qk`` or ``vo`` -> float32 [bases, depth, depth]: queries or values are multiplied by it, the other side by its inverse."""


def turned(anatomy: Anatomy, bases: Bases) -> Anatomy:
    """The anatomy of the same model with these bases inside its heads; sites and units are named as before.

    Raises:
        InputError: a basis for a site that the model does not have, or of another size, or one without an inverse.
    """
    if not bases:
        return anatomy
    depths = {depth.site.name: depth for depth in depths_of(anatomy)}
    changes: dict[tuple[int, int], np.ndarray] = {}
    for name, basis in bases.items():
        depth = depths.get(name)
        if depth is None or basis.shape != (depth.bases, depth.site.units, depth.site.units):
            raise InputError(f"a basis of shape {list(basis.shape)} for {name} does not fit this model; it was made for another file")
        for use, array in _turned(anatomy, depth, np.asarray(basis, np.float64), changes):
            changes[use] = array
    model = replace_constants(anatomy.model, changes, "~turned")
    return with_depths(study(model, anatomy.profile), {depths[name].site.kind for name in bases})


def _turned(
    anatomy: Anatomy, depth: Depth, basis: np.ndarray, changes: Mapping[tuple[int, int], np.ndarray]
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    try:
        inverse = np.linalg.inv(basis)
    except np.linalg.LinAlgError:
        raise InputError(f"the basis of {depth.site.name} has no inverse") from None
    done = dict(changes)
    for side, matrices in ((depth.left, basis), (depth.right, inverse.transpose(0, 2, 1))):
        for use, array in _side(anatomy, side, matrices, done):
            done[use] = array
            yield use, array


def _side(
    anatomy: Anatomy, side: Side, matrices: np.ndarray, done: Mapping[tuple[int, int], np.ndarray]
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Constants of one side after the turn; what another site or side has turned already (packed projections) is turned further."""
    for use in side.plain.constants:
        node = anatomy.view.nodes[use.index]
        given = done.get((use.index, use.slot))
        given = anatomy.view.value(node.inputs[use.slot]) if given is None else given
        assert given is not None
        array = np.array(given).reshape(-1) if use.axis is None else np.moveaxis(np.array(given), use.axis, -1)
        exact = array.astype(np.float64)
        for owner, places in zip(side.owner, use.positions, strict=True):
            array[..., places] = exact[..., places] @ matrices[owner]
        yield (use.index, use.slot), array.reshape(given.shape) if use.axis is None else np.moveaxis(array, -1, use.axis)
