"""From scores and a budget to the units that stay: the knapsack, the exact sweep, equal layers, and other tastes within one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.graph.anatomy import Site
from onnxprune.graph.depth import DEPTHS
from onnxprune.importance.fisher import rearrange
from onnxprune.passes.workbench import Scores, Student, Workbench
from onnxprune.search.costs import CostTable
from onnxprune.search.knapsack import Options, solve
from onnxprune.search.sweep import sweep

_BISECTIONS = 8
_TUNINGS = 4
_ROUNDING = 1e-12
"""Relative error that a sum of costs may have."""

_CHANNELS_AT_ONCE = 8
"""Convolution kernels of runtimes work on blocks of this many channels."""


_DEPTHS_AT_ONCE = 4
"""Steps in which the depth of a head is offered when the cost is measured time."""


def choose(
    bench: Workbench, student: Student, scores: Scores, table: CostTable, budget: float, *, spare: bool = False
) -> dict[str, np.ndarray] | None:
    """Units to keep within ``budget`` (total cost, as ``table`` counts it); None if no choice fits.

    Args:
        spare: empty no site; for timed costs and uniform recipes.
    """
    room = budget - table.fixed
    if table.unit == "ms" or bench.recipe.uniform or any(site.least for site in bench.sites):
        positions = _tuned_knapsack(bench, scores, table, budget, spare)
    else:
        positions = _by_price(bench, scores, table, room)
    if positions is None:
        return None
    if scores.gradients is not None:
        for site, keep in positions.items():
            if site in scores.gradients:
                units = scores.gradients[site].shape[1]
                removed = rearrange(scores.gradients[site], np.setdiff1d(np.arange(units), keep))
                positions[site] = np.setdiff1d(np.arange(units), removed)
    return {site.name: student.kept[site.name][positions[site.name]] for site in bench.sites}


def _tuned_knapsack(bench: Workbench, scores: Scores, table: CostTable, budget: float, spare: bool) -> dict[str, np.ndarray] | None:
    """The knapsack; where sites share weights, again with costs tuned to the choice before, as long as less is lost."""
    budget *= 1 + _ROUNDING
    best = _by_knapsack(bench, scores, table, budget - table.fixed, spare)
    if best is None and table.pairs:
        # Curves bound the truth from above: near the least that can stay, only those that are true there fit.
        least = table.tuned({name: int(np.argmin(curve)) for name, curve in table.curves.items()})
        best = _by_knapsack(bench, scores, least, budget - least.fixed, spare)
    for _ in range(_TUNINGS if table.pairs and best is not None else 0):
        assert best is not None
        tuned = table.tuned({name: len(keep) for name, keep in best.items()})
        found = _by_knapsack(bench, scores, tuned, budget - tuned.fixed, spare)
        if found is None or not _kept_saliency(scores, found) > _kept_saliency(scores, best):
            break
        best = found
    return best


def _kept_saliency(scores: Scores, positions: Mapping[str, np.ndarray]) -> float:
    return sum(float(scores.saliency[name][keep].sum()) for name, keep in positions.items())


def _by_price(bench: Workbench, scores: Scores, table: CostTable, room: float) -> dict[str, np.ndarray] | None:
    """Counted costs: one price per kind has an exact answer; otherwise the knapsack."""
    kind = {site.name: site.kind for site in bench.sites}
    prices: dict[str, set[float]] = {}
    for site in bench.sites:
        prices.setdefault(site.kind, set()).add(round(float(table.curves[site.name][1]), 6))
    if len(prices) <= 2 and all(len(values) == 1 for values in prices.values()):
        return sweep(scores.saliency, kind, {name: next(iter(values)) for name, values in prices.items()}, room)
    return _by_knapsack(bench, scores, table, room)


def _by_knapsack(bench: Workbench, scores: Scores, table: CostTable, room: float, spare: bool = False) -> dict[str, np.ndarray] | None:
    offers = offers_of(bench, scores, timed=table.unit == "ms")
    if spare:
        offers = without_nothing(offers)
    if bench.recipe.uniform:
        sizes = _uniform_sizes(bench, offers, table, room)
    else:
        picked = solve([Options(table.curves[name][kept], lost) for name, (kept, lost) in offers.items()], room)
        sizes = None if picked is None else {name: int(offers[name][0][option]) for name, option in zip(offers, picked, strict=True)}
    if sizes is None:
        return None
    return {name: np.sort(np.argsort(-scores.saliency[name], kind="stable")[:size]) for name, size in sizes.items()}


def offers_of(bench: Workbench, scores: Scores, *, timed: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each site offers: (numbers of units kept, saliency lost with each). Timed widths come in steps that the runtime pays for."""
    offers = {}
    for site in bench.sites:
        saliency = np.sort(scores.saliency[site.name])
        count = len(saliency)
        step = _step(bench, site) if timed else 1
        least = min(site.least, count)
        # The rank that is left to heads that are gone must cost no more than it has to.
        ends = [least, count] if site.kind in DEPTHS else [count]
        kept = np.unique(np.concatenate([np.arange(0, count + 1, step), ends]))
        kept = kept[kept >= least]
        offers[site.name] = kept, np.concatenate([[0.0], np.cumsum(saliency)])[count - kept]
    return offers


def without_nothing(offers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The offers of :func:`offers_of` without those that would empty a site."""
    return {name: (kept[1:], lost[1:]) if len(kept) > 1 and not kept[0] else (kept, lost) for name, (kept, lost) in offers.items()}


def _step(bench: Workbench, site: Site) -> int:
    """Units between two widths that the runtime tells apart."""
    if site.kind == "channels":
        positions = max(int((leaf.labels >= 0).sum()) for leaf in site.group.leaves if leaf.role == "produces")
        return max(_CHANNELS_AT_ONCE * site.units // positions, 1)
    if site.kind in DEPTHS:
        return min(_DEPTHS_AT_ONCE, bench.recipe.align)
    return bench.recipe.align if site.kind == "ffn" else 1


def _uniform_sizes(
    bench: Workbench, offers: Mapping[str, tuple[np.ndarray, np.ndarray]], table: CostTable, room: float
) -> dict[str, int] | None:
    """One number of units for all sites alike: the same knapsack, with all sites of a kind and size as one."""
    alike: dict[tuple[str, int], list[str]] = {}
    for site in bench.sites:
        alike.setdefault((site.kind, len(offers[site.name][0])), []).append(site.name)
    together = [
        Options(
            np.sum([table.curves[name][offers[name][0]] for name in names], axis=0), np.sum([offers[name][1] for name in names], axis=0)
        )
        for names in alike.values()
    ]
    picked = solve(together, room)
    if picked is None:
        return None
    return {name: int(offers[name][0][option]) for names, option in zip(alike.values(), picked, strict=True) for name in names}


@dataclass(frozen=True, eq=False)
class Taste:
    """One way to choose within the same budget: ``spare`` empties no site, ``shape`` weighs sites by the costs of another table."""

    spare: bool = False
    shape: CostTable | None = None

    def choose(self, bench: Workbench, student: Student, scores: Scores, table: CostTable, budget: float) -> dict[str, np.ndarray] | None:
        """Units to keep so that ``table`` predicts at most ``budget``; None if this taste finds none."""
        if self.shape is None:
            return choose(bench, student, scores, table, budget, spare=self.spare)
        low, high, best = self.shape.floor, self.shape.full, None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            kept = choose(bench, student, scores, self.shape, middle, spare=self.spare)
            if kept is not None and table.predict({site: len(units) for site, units in kept.items()}) <= budget:
                low, best = middle, kept
            elif kept is None:
                low = middle
            else:
                high = middle
        return best
