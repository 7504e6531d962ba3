"""From kept units to a smaller graph: the one place where weights are cut and shapes rewritten.

Kept positions are computed per axis from the labels of the group; every constant is cut along its axes, every node that carries a shape
is reset (:mod:`onnxprune.graph.resizing`). A site that keeps nothing is replaced by the constant it computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.caches import CacheCut, cache_pairs, fills_a_cache, record_cuts
from onnxprune.graph.model import Model
from onnxprune.graph.resizing import Patient, resize
from onnxprune.graph.silence import silence
from onnxprune.graph.surgery import SlicingError, Surgeon

Kept = Mapping[str, np.ndarray]
"""Site name -> sorted indices of the units that stay. Sites that are not named keep everything."""


def slice_model(anatomy: Anatomy, kept: Kept) -> Model:
    """Remove every unit that is not kept.

    Equal, up to floating-point rounding, to multiplying the consumers' inputs by the mask of kept units.

    Raises:
        InputError: ``kept`` names a site or a unit that the model does not have, or leaves a site fewer units than it needs.
    """
    _check(anatomy, kept)
    cut = [site for site in anatomy.sites if site.name in kept and len(kept[site.name]) < site.units]
    if not cut:
        return anatomy.model
    plan = _Cut(anatomy, cut, kept)
    surgeon = Surgeon(anatomy.model)
    _cut_uses(anatomy, plan, surgeon)
    touched = {node.index: node for site in cut for node in site.group.nodes}
    for _, node in sorted(touched.items()):
        resize(Patient(anatomy.view, anatomy.profile, plan.tensors, plan.uses, surgeon, node))
    for site in cut:
        if len(kept[site.name]) == 0:
            for consumer in site.consumers:
                silence(anatomy.view, anatomy.profile, consumer.leaf, surgeon)
    return record_cuts(surgeon.close(), _cache_cuts(anatomy, plan))


def _cache_cuts(anatomy: Anatomy, plan: _Cut) -> dict[str, CacheCut]:
    """Caches that lose heads. One is cut along one axis only, as only heads reach it."""
    cuts = {}
    for source, output in cache_pairs(anatomy.view).items():
        for (name, axis), stays in plan.tensors.items():
            if name == source and not stays.all():
                cuts[source] = CacheCut(output, axis, len(stays), tuple(np.flatnonzero(stays).tolist()))
    return cuts


def cuts_of(anatomy: Anatomy, kept: Kept) -> dict[str, CacheCut]:
    """What a decision does to the caches of a model, by input name; caches that keep everything are left out."""
    cut = [site for site in anatomy.sites if site.name in kept and len(kept[site.name]) < site.units]
    return _cache_cuts(anatomy, _Cut(anatomy, cut, kept))


def kept_positions(anatomy: Anatomy, kept: Kept) -> dict[tuple[str, int], np.ndarray]:
    """Which positions stay, bool, by (activation, axis); axes that are not cut are left out."""
    cut = [site for site in anatomy.sites if site.name in kept and len(kept[site.name]) < site.units]
    return {place: stays for place, stays in _Cut(anatomy, cut, kept).tensors.items() if not stays.all()}


def _check(anatomy: Anatomy, kept: Kept) -> None:
    units = {site.name: site.units for site in anatomy.sites}
    least = {site.name: site.least for site in anatomy.sites}
    for name, indices in kept.items():
        if name not in units:
            raise InputError(f"the model has no site {name!r}; it has {', '.join(units) or 'none'}")
        given = np.asarray(indices)
        if len(given) and (given.min() < 0 or given.max() >= units[name] or (np.diff(given) <= 0).any()):
            raise InputError(f"kept units of {name} must be ascending numbers from 0 to {units[name] - 1}, each once")
        if len(given) < least[name]:
            raise InputError(f"{name} must keep at least one unit: nothing can go through the layer without")


class _Cut:
    """Which positions stay, along every axis that any site touches."""

    def __init__(self, anatomy: Anatomy, sites: list[Site], kept: Kept) -> None:
        self.tensors: dict[tuple[str, int], np.ndarray] = {}
        self.uses: dict[tuple[int, int, int], np.ndarray] = {}
        caches = cache_pairs(anatomy.view)
        for site in sites:
            alive = np.zeros(site.units + 1, bool)  # the last entry answers for label -1: not of this group, stays
            alive[-1] = True
            alive[np.asarray(kept[site.name], np.int64)] = True
            places = {name for name, _ in site.group.places}
            merged = any(anatomy.profile.dim(*place) is None for place in site.group.places)
            if not len(kept[site.name]) and (merged or fills_a_cache(anatomy.view, caches, site.group.nodes, places)):
                # Nobody reads what it computes any more, but a cache without heads is one that few can allocate, and nobody can tell
                # the batch from an axis that held batch x heads.
                alive[0] = True
            for place, labels in site.group.places.items():
                self._and(self.tensors, place, alive[labels])
            for leaf in (*site.group.leaves, *site.group.picks):
                self._and(self.uses, (leaf.node.index, leaf.slot, leaf.axis), alive[leaf.labels])

    @staticmethod
    def _and(table: dict, key: object, stays: np.ndarray) -> None:  # type: ignore[type-arg]
        table[key] = table[key] & stays if key in table else stays


def _cut_uses(anatomy: Anatomy, plan: _Cut, surgeon: Surgeon) -> None:
    """Cut each use of a constant or a side tensor; uses that end up equal share one tensor again, other uses keep the original."""
    per_use: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for (index, slot, axis), stays in plan.uses.items():
        per_use.setdefault((index, slot), {})[axis] = np.flatnonzero(stays)
    shared: dict[tuple[object, ...], gs.Tensor] = {}
    for (index, slot), axes in sorted(per_use.items()):
        name = anatomy.view.nodes[index].inputs[slot]
        key = (name, *((axis, axes[axis].tobytes()) for axis in sorted(axes)))
        if key not in shared:
            shared[key] = _cut_tensor(anatomy, surgeon, name, axes)
        surgeon.nodes[index].inputs[slot] = shared[key]


def _cut_tensor(anatomy: Anatomy, surgeon: Surgeon, name: str, axes: Mapping[int, np.ndarray]) -> gs.Tensor:
    """The positions that stay of a constant, or, picked at run time, of a side tensor."""
    array = anatomy.view.value(name)
    if array is not None:
        for axis, kept in sorted(axes.items()):
            array = np.take(array, kept, axis=axis)
        return surgeon.constant(array, name)
    tensor = surgeon.tensors[name]
    for axis, kept in sorted(axes.items()):
        if len(kept) < (anatomy.profile.shape(name) or ())[axis]:
            tensor = _picked(anatomy, surgeon, tensor, name, axis, kept)
    return tensor


def _picked(anatomy: Anatomy, surgeon: Surgeon, tensor: gs.Tensor, name: str, axis: int, kept: np.ndarray) -> gs.Tensor:
    """Positions of an axis; where it holds batch x heads, it is taken apart first, as its size is not known before."""
    first, second = (run[name] for run in anatomy.profile.shapes)
    period = int(np.gcd(first[axis], second[axis]))
    bounds = {value: surgeon.constant(np.array([value], np.int64), name) for value in (0, axis, axis + 1, len(first), -1)}

    def regrouped(source: gs.Tensor, sizes: list[int]) -> gs.Tensor:
        before, after, target, result = (surgeon.variable(name, np.int64) for _ in range(4))
        surgeon.add("Slice", [shape, bounds[0], bounds[axis]], before, name)
        surgeon.add("Slice", [shape, bounds[axis + 1], bounds[len(first)]], after, name)
        surgeon.add("Concat", [before, surgeon.constant(np.array(sizes, np.int64), name), after], target, name, axis=0)
        result.dtype = tensor.dtype
        surgeon.add("Reshape", [source, target], result, name)
        return result

    def gathered(source: gs.Tensor, places: np.ndarray, along: int) -> gs.Tensor:
        result = surgeon.variable(name, tensor.dtype)
        surgeon.add("Gather", [source, surgeon.constant(places.astype(np.int64), name)], result, name, axis=along)
        return result

    if first[axis] == second[axis]:
        return gathered(tensor, kept, axis)
    stays = np.zeros(first[axis], bool)
    stays[kept] = True
    if (stays.reshape(-1, period) != stays[:period]).any():
        raise SlicingError(f"the units of {name} do not repeat along axis {axis}, whose size varies; they cannot be picked at every size")
    shape = surgeon.variable(name, np.int64)
    surgeon.add("Shape", [tensor], shape, name)
    return regrouped(gathered(regrouped(tensor, [-1, period]), np.flatnonzero(stays[:period]), axis + 1), [-1])
