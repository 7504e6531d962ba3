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

from onnxprune.graph.anatomy import Anatomy, Kind, Site
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.canonical import with_fresh_shapes
from onnxprune.graph.macs import count_macs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.slicing import Kept
from onnxprune.runtime.measure import clock_for, in_turn, latency_ms, ratio, replicas, time_sessions
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run

CostUnit = Literal["ms", "macs", "params", "bytes"]

GRANULARITY: Mapping[str, int] = {"cpu": 16, "cuda": 8, "tensorrt": 8}
"""Widths below a multiple of this cost as much as the multiple: float32 GEMM tiles of AVX-512 are 16 wide, tensor cores 8."""


_STAMP_BYTES = 4096


@dataclass(frozen=True)
class CostTable:
    """``curves[site][k]`` is the cost of keeping k units, ``fixed`` everything no site can change."""

    unit: CostUnit
    fixed: float
    curves: Mapping[str, np.ndarray]

    @property
    def full(self) -> float:
        """Cost of the model with every unit kept."""
        return self.fixed + sum(float(curve[-1]) for curve in self.curves.values())

    @property
    def floor(self) -> float:
        """Cost with nothing kept: no target below this can be met."""
        return self.fixed + sum(float(curve.min()) for curve in self.curves.values())

    def predict(self, counts: Mapping[str, int]) -> float:
        """Cost of keeping ``counts[site]`` units; sites that are not named keep everything."""
        return self.fixed + sum(float(curve[counts.get(site, len(curve) - 1)]) for site, curve in self.curves.items())

    def scaled(self, factor: float) -> CostTable:
        """The table re-anchored: everything times ``factor``."""
        return replace(self, fixed=self.fixed * factor, curves={site: curve * factor for site, curve in self.curves.items()})

    def as_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "fixed": self.fixed, "curves": {site: curve.tolist() for site, curve in self.curves.items()}}


def counted_costs(anatomy: Anatomy, sites: Sequence[Site], unit: CostUnit, feeds: Feeds) -> CostTable:
    """Multiply-adds at the shapes of ``feeds``, parameters, or bytes of weights."""
    if unit == "macs":
        macs = count_macs(anatomy.model, shapes_of(anatomy.model, feeds))
        total = float(sum(macs.values()))
        per_unit = {site.name: site_macs(site, macs) / site.units for site in sites}
    else:
        size = 4 if unit == "bytes" else 1
        # A file is its weights and its graph; the finished one also holds inferred shapes and a stamp.
        total = float(_file_bytes(anatomy.model) if unit == "bytes" else anatomy.model.parameters)
        per_unit = {site.name: site.parameters_per_unit * size for site in sites}
    curves = {site.name: per_unit[site.name] * np.arange(site.units + 1) for site in sites}
    return CostTable(unit, total - sum(float(curve[-1]) for curve in curves.values()), curves)


def shipped_bytes(floats: CostTable, sites: Sequence[Site], build: Callable[[Kept], Model]) -> CostTable:
    """Bytes of the graph that is really shipped (in int8, say), from its size unpruned and halved."""
    full = _file_bytes(build({}))
    halved = {site.name: np.arange((site.units + 1) // 2) for site in sites}
    removed = sum(float(floats.curves[name][-1] - floats.curves[name][len(kept)]) for name, kept in halved.items())
    factor = (full - _file_bytes(build(halved))) / removed if removed else 0.0
    curves = {name: curve * factor for name, curve in floats.curves.items()}
    return CostTable(floats.unit, full - sum(float(curve[-1]) for curve in curves.values()), curves)


def _file_bytes(model: Model) -> int:
    return int(with_fresh_shapes(model).proto.ByteSize()) + model.weight_bytes + _STAMP_BYTES


def site_macs(site: Site, macs: Mapping[str, int]) -> float:
    """Multiply-adds that scale with the number of units kept; of a product that makes other things as well, the share of this site."""
    share = {leaf.node.index: float((leaf.labels >= 0).mean()) for leaf in site.group.leaves if leaf.role != "rides"}
    return sum(share.get(node.index, 1.0) * macs.get(node.name, 0) for node in site.group.nodes)


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
    macs = count_macs(anatomy.model, shapes_of(anatomy.model, feeds))
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
    whole: dict[Kind, float] = {kind: sum(site_macs(site, macs) for site in sites if site.kind == kind) for kind in kinds}
    number = {kind: sum(site.kind == kind for site in sites) for kind in kinds}
    features = np.array([_features(probe, sites, kinds, macs, whole, number) for probe in probes])
    # Relative errors count; the full model anchors the table, so it weighs more.
    weight = np.where([probe.name == "full" for probe in probes], 4.0, 1.0) / times
    solution, _ = nnls(features * weight[:, None], times * weight)
    fixed, rest = solution[0], solution[1:].reshape(len(kinds), 2)
    curves = {}
    for site in sites:
        slope, presence = rest[kinds.index(site.kind)]
        share = site_macs(site, macs) / whole[site.kind]
        counts = np.arange(site.units + 1)
        curve = slope * share * counts / site.units + presence / number[site.kind] * (counts > 0)
        curves[site.name] = curve * full
    table = CostTable("ms", float(fixed * full), curves)
    as_given = full * ratio(timings, "given", "full").median if given is not None else full
    return table.scaled(full / table.full), as_given


def _probes(sites: Sequence[Site], kinds: Sequence[str]) -> list[_Probe]:
    def counts(share: Callable[[Site], float]) -> dict[str, int]:
        return {site.name: round(site.units * share(site)) if share(site) else 0 for site in sites}

    probes = [_Probe("full", counts(lambda site: 1.0)), _Probe("eighth", counts(lambda site: 1 / 8))]
    for kind in kinds:
        position = {site.name: index for index, site in enumerate(s for s in sites if s.kind == kind)}
        probes.append(_Probe(f"{kind} halved", counts(lambda site, kind=kind: 0.5 if site.kind == kind else 1.0)))  # type: ignore[misc]
        probes.append(
            _Probe(f"every other {kind} gone", counts(lambda site, position=position: float(position.get(site.name, 0) % 2 == 0)))  # type: ignore[misc]
        )
    return probes


def _features(
    probe: _Probe,
    sites: Sequence[Site],
    kinds: Sequence[Kind],
    macs: Mapping[str, int],
    whole: Mapping[Kind, float],
    number: Mapping[Kind, int],
) -> list[float]:
    row = [1.0]
    for kind in kinds:
        mine = [site for site in sites if site.kind == kind]
        row.append(sum(site_macs(site, macs) * probe.counts[site.name] / site.units for site in mine) / whole[kind])
        row.append(sum(probe.counts[site.name] > 0 for site in mine) / number[kind])
    return row


def _caller(model: Model, feeds: Feeds, options: RuntimeOptions) -> Callable[[], object]:
    sessions = [open_session(model, options) for _ in range(replicas(model.weight_bytes))]
    return in_turn([partial(run, session, cut_feeds(model, feeds)) for session in sessions])
