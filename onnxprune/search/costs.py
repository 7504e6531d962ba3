"""What keeping k units of a site costs: milliseconds measured on this machine, or multiply-adds, parameters and bytes counted.

Latency is affine in kept heads, neurons and blocks (worst residual 1-3 % on encoder graphs), so six graphs measured in one interleaved
run determine the table; the architecture chosen in the end is measured again and the table re-anchored to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls

from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.canonical import with_fresh_shapes
from onnxprune.graph.depth import DEPTHS, FUSED_ATTENTION
from onnxprune.graph.macs import count_macs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.slicing import Kept
from onnxprune.graph.view import Node
from onnxprune.runtime.measure import clock_for, in_turn, latency_ms, ratio, replicas, time_sessions
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run
from onnxprune.search.joint import Pair, Split, split

CostUnit = Literal["ms", "macs", "params", "bytes"]

GRANULARITY: Mapping[str, int] = {"cpu": 16, "cuda": 8, "tensorrt": 8}
"""Widths below a multiple of this cost as much as the multiple: float32 GEMM tiles of AVX-512 are 16 wide, tensor cores 8."""


_STAMP_BYTES = 4096

_NOTHING = 1e-12
"""What is put for a share of zero, beside which the other site of a pair costs nothing."""

_SITE_BYTES = 512
"""Room for nodes that set sizes anew where a site is cut."""


@dataclass(frozen=True)
class CostTable:
    """``curves[site][k]`` is the cost of keeping k units, ``fixed`` everything no site can change.

    Where two sites share a weight, the curves are an upper bound of the truth, and ``pairs`` say by how much
    (:mod:`onnxprune.search.joint`).
    """

    unit: CostUnit
    fixed: float
    curves: Mapping[str, np.ndarray]
    pairs: tuple[Pair, ...] = ()

    @property
    def full(self) -> float:
        """Cost of the model with every unit kept."""
        return self.predict({})

    @property
    def floor(self) -> float:
        """Cost with nothing kept: no target below this can be met."""
        return self.predict({site: int(np.argmin(curve)) for site, curve in self.curves.items()})

    def predict(self, counts: Mapping[str, int]) -> float:
        """Cost of keeping ``counts[site]`` units; sites that are not named keep everything."""
        bound = sum(float(curve[counts.get(site, len(curve) - 1)]) for site, curve in self.curves.items())
        return (
            self.fixed + bound - sum(pair.excess(self._share(pair.first, counts), self._share(pair.second, counts)) for pair in self.pairs)
        )

    def _share(self, site: str, counts: Mapping[str, int]) -> float:
        """Share kept; a site that must keep a unit and is asked for none is taken to keep the least that changes its cost."""
        units = len(self.curves[site]) - 1
        count = counts.get(site, units)
        return max(count, int(np.flatnonzero(self.curves[site] <= self.curves[site][0])[-1])) / units

    def tuned(self, counts: Mapping[str, int]) -> CostTable:
        """The same costs with curves that add up to the truth at ``counts``."""
        curves = {site: np.array(curve) for site, curve in self.curves.items()}
        pairs = []
        for pair in self.pairs:
            first, second = self._share(pair.first, counts), self._share(pair.second, counts)
            new = replace(pair, ratio=max(second, _NOTHING) / max(first, _NOTHING))
            for site, before, after in zip((pair.first, pair.second), pair.halves(), new.halves(), strict=True):
                share = np.arange(len(curves[site])) / (len(curves[site]) - 1)
                curves[site] += (after - before) * np.maximum(share, self._share(site, {site: 0})) ** 2
            pairs.append(new)
        return replace(self, curves=curves, pairs=tuple(pairs))

    def scaled(self, factor: float) -> CostTable:
        """The table re-anchored: everything times ``factor``."""
        pairs = tuple(replace(pair, cost=pair.cost * factor) for pair in self.pairs)
        return replace(self, fixed=self.fixed * factor, curves={site: curve * factor for site, curve in self.curves.items()}, pairs=pairs)

    def as_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "fixed": self.fixed, "curves": {site: curve.tolist() for site, curve in self.curves.items()}}


def counted(model: Model, unit: Literal["params", "bytes"]) -> float:
    """Parameters of a model, or its bytes as a finished file: its weights, its graph with inferred shapes, a stamp."""
    return float(_file_bytes(model) if unit == "bytes" else model.parameters)


def counted_costs(anatomy: Anatomy, sites: Sequence[Site], unit: CostUnit, feeds: Feeds) -> CostTable:
    """Multiply-adds at the shapes of ``feeds``, parameters, or bytes of weights."""
    if unit == "macs":
        macs = count_macs(anatomy.model, shapes_of(anatomy.model, feeds))
        total, parts = float(sum(macs.values())), _split_macs(sites, macs)
    else:
        size = 4 if unit == "bytes" else 1
        total = counted(anatomy.model, "bytes" if unit == "bytes" else "params")
        total += _SITE_BYTES * len(sites) if unit == "bytes" else 0
        uses = {(leaf.node.index, leaf.slot): site for site in sites for leaf in site.group.leaves}
        parts = split(sites, {use: float(np.prod(site.leaf_shapes[use])) * size for use, site in uses.items()})
    return _table(unit, total, sites, parts)


def _table(unit: CostUnit, total: float, sites: Sequence[Site], parts: Split) -> CostTable:
    table = CostTable(unit, 0.0, {site.name: parts.curve(site) for site in sites}, parts.pairs)
    return replace(table, fixed=total - table.full)


def _split_macs(sites: Sequence[Site], macs: Mapping[str, int]) -> Split:
    """Multiply-adds by the sites that cut the weights, and of products of two activations by the sites they scale with."""
    slots = {leaf.node.index: leaf for site in sites for leaf in site.group.leaves if leaf.role != "rides"}
    amounts = {(index, leaf.slot): float(macs.get(leaf.node.name, 0)) for index, leaf in slots.items()}
    touching: dict[int, list[Site]] = {}
    nodes: dict[int, Node] = {}
    for site in sites:
        for node in site.group.nodes:
            if node.index not in slots and macs.get(node.name, 0):
                touching.setdefault(node.index, []).append(site)
                nodes[node.index] = node
    found = (part for index, held in touching.items() for part in _products(held, float(macs[nodes[index].name]), nodes[index]))
    return split(sites, amounts, found)


def _products(sites: Sequence[Site], amount: float, node: Node) -> list[tuple[tuple[str, ...], float]]:
    """A product of activations in proportion to its heads and to one depth; a fused attention is two of them, over two depths."""
    depths = [site.name for site in sites if site.kind in DEPTHS]
    others = [site.name for site in sites if site.kind not in DEPTHS]
    if node.op not in FUSED_ATTENTION:
        return [((*others, *depths), amount)]
    return [((*others, *depths[number : number + 1]), amount / 2) for number in range(2)]


def shipped_bytes(floats: CostTable, sites: Sequence[Site], build: Callable[[Kept], Model]) -> CostTable:
    """Bytes of the graph that is really shipped (in int8, say), from its size unpruned and halved."""
    full = _file_bytes(build({}))
    halved = {site.name: np.arange((site.units + 1) // 2) for site in sites}
    removed = floats.full - floats.predict({name: len(kept) for name, kept in halved.items()})
    table = floats.scaled((full - _file_bytes(build(halved))) / removed if removed else 0.0)
    return replace(table, fixed=full - (table.full - table.fixed))


def _file_bytes(model: Model) -> int:
    return int(with_fresh_shapes(model).proto.ByteSize()) + model.weight_bytes + _STAMP_BYTES


def site_macs(site: Site, macs: Mapping[str, int]) -> float:
    """Multiply-adds that scale with the number of units kept; of a product that makes other things as well, the share of this site."""
    share = {leaf.node.index: float((leaf.labels >= 0).mean()) for leaf in site.group.leaves if leaf.role != "rides"}
    one = 0.5 if site.kind in DEPTHS else 1.0  # of the two products of a fused attention, a depth is summed over in one
    return sum(share.get(node.index, one if node.op in FUSED_ATTENTION else 1.0) * macs.get(node.name, 0) for node in site.group.nodes)


@dataclass(frozen=True, eq=False)
class _Probe:
    """One of the graphs that are measured: how many units each site keeps."""

    name: str
    counts: Mapping[str, int]


def measured_costs(
    anatomy: Anatomy,
    sites: Sequence[Site],
    build: Callable[[Kept], Model],
    feeds: Feeds,
    options: RuntimeOptions,
    *,
    seed: int,
    given: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CostTable, float]:
    """Measure the table: full, each kind halved, all at an eighth, and half of the layers without each kind, in one interleaved run.

    Args:
        build: makes the graph that would be shipped from kept units (sliced and finished; its weights do not matter).
        feeds: one request as the user makes it.
        given: the file as given, timed in the same run.

    Returns:
        The table, and the milliseconds of ``given`` (of the full graph if there is none).
    """
    work = _Work(anatomy, sites, feeds)
    kinds = sorted({site.kind for site in sites})
    probes = _probes(sites, kinds)
    runs: dict[str, Callable[[], object]] = {}
    for done, probe in enumerate(probes):
        model = build({site.name: np.arange(probe.counts[site.name]) for site in sites})
        runs[probe.name] = _caller(model, feeds, options)
        if progress:
            progress(done + 1, len(probes))
    if given is not None:
        runs["given"] = _caller(given, feeds, options)
    timings = time_sessions(runs, clock=clock_for(options), seed=seed, rounds=41, tolerance=0.006, max_seconds=20.0)
    full = latency_ms(timings, "full")
    times = np.array([1.0 if probe.name == "full" else ratio(timings, probe.name, "full").median for probe in probes])
    features = np.array([work.features(probe.counts, kinds) for probe in probes])
    # Relative errors count; the full model anchors the table, so it weighs more.
    weight = np.where([probe.name == "full" for probe in probes], 4.0, 1.0) / times
    solution, _ = nnls(features * weight[:, None], times * weight)
    fixed, rest = solution[0], solution[1:].reshape(len(kinds), 2)
    table = work.priced(full * fixed, {kind: full * rest[number] for number, kind in enumerate(kinds)})
    as_given = full * ratio(timings, "given", "full").median if given is not None else full
    return table.scaled(full / table.full), as_given


def _probes(sites: Sequence[Site], kinds: Sequence[str]) -> list[_Probe]:
    def counts(share: Callable[[Site], float]) -> dict[str, int]:
        return {site.name: max(round(site.units * share(site)), site.least) for site in sites}

    probes = [_Probe("full", counts(lambda site: 1.0)), _Probe("eighth", counts(lambda site: 1 / 8))]
    for kind in kinds:
        position = {site.name: index for index, site in enumerate(s for s in sites if s.kind == kind)}
        probes.append(_Probe(f"{kind} halved", counts(lambda site, kind=kind: 0.5 if site.kind == kind else 1.0)))  # type: ignore[misc]
        probes.append(
            _Probe(f"every other {kind} gone", counts(lambda site, position=position: float(position.get(site.name, 0) % 2 == 0)))  # type: ignore[misc]
        )
    return probes


class _Work:
    """What a kind of site adds to a request: its multiply-adds, and what comes on top of them.

    That is the presence of a layer for heads and neurons, and the traffic of activations for channels, whose layers always stay.
    """

    def __init__(self, anatomy: Anatomy, sites: Sequence[Site], feeds: Feeds) -> None:
        shapes = shapes_of(anatomy.model, feeds)
        self.sites = sites
        self.macs = _table("macs", 0.0, sites, _split_macs(sites, count_macs(anatomy.model, shapes)))
        weight = {site.name: _traffic(site, shapes) if site.least else 1.0 for site in sites}
        whole: dict[str, float] = {}
        for site in sites:
            whole[site.kind] = whole.get(site.kind, 0.0) + weight[site.name]
        self.rest = {site.name: weight[site.name] / whole[site.kind] * _rest(site) for site in sites}
        self.kind = {site.name: site.kind for site in sites}
        self.whole = {kind: self._of_kind(kind, {}) for kind in whole}

    def _of_kind(self, kind: str, counts: Mapping[str, int]) -> float:
        """Multiply-adds of the sites of a kind; what two kinds share counts for the first."""
        mine = {name: curve for name, curve in self.macs.curves.items() if self.kind[name] == kind}
        bound = sum(float(curve[counts.get(name, len(curve) - 1)]) for name, curve in mine.items())
        pairs = tuple(pair for pair in self.macs.pairs if self.kind[pair.first] == kind)
        return bound + replace(self.macs, fixed=0.0, pairs=pairs).predict(counts) - replace(self.macs, fixed=0.0, pairs=()).predict(counts)

    def features(self, counts: Mapping[str, int], kinds: Sequence[str]) -> list[float]:
        """1, then for each kind its share of its multiply-adds, and of the rest."""
        row = [1.0]
        for kind in kinds:
            row.append(self._of_kind(kind, counts) / self.whole[kind])
            row.append(sum(float(curve[counts[name]]) for name, curve in self.rest.items() if self.kind[name] == kind))
        return row

    def priced(self, fixed: float, prices: Mapping[str, np.ndarray]) -> CostTable:
        """The table in milliseconds, from those of all multiply-adds of a kind, and of all the rest."""
        curves = {}
        for site in self.sites:
            work, rest = prices[site.kind]
            curves[site.name] = self.macs.curves[site.name] * (work / self.whole[site.kind]) + self.rest[site.name] * rest
        price = {kind: float(pair[0]) / self.whole[kind] for kind, pair in prices.items()}
        pairs = tuple(replace(pair, cost=pair.cost * price[self.kind[pair.first]]) for pair in self.macs.pairs)
        return CostTable("ms", float(fixed), curves, pairs)


def _rest(site: Site) -> np.ndarray:
    counts = np.arange(site.units + 1)
    return np.maximum(counts, site.least) / site.units if site.least else np.asarray(counts > 0, np.float64)


def _traffic(site: Site, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Elements of activations that scale with a site."""
    return sum(float(np.prod(shapes.get(name, ())) * (labels >= 0).mean()) for (name, _), labels in site.group.places.items())


def _caller(model: Model, feeds: Feeds, options: RuntimeOptions) -> Callable[[], object]:
    sessions = [open_session(model, options) for _ in range(replicas(model.weight_bytes))]
    return in_turn([partial(run, session, cut_feeds(model, feeds)) for session in sessions])
