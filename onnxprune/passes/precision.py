"""Which products compute in int8, decided together with how many units each site keeps.

What int8 costs at each product is measured alone (the errors add up), and so are the times of the float and the int8 graph. Each site then
offers every number of units at every precision, and one knapsack takes the cheapest error within the budget: it prunes less and computes in
integers, prunes more and stays in float, or mixes the two, whichever the measurements say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.macs import count_macs
from onnxprune.graph.profile import shapes_of
from onnxprune.passes.apply import finish
from onnxprune.passes.int8 import Scheme, products_of, tailor
from onnxprune.quantize.form import Int8Form
from onnxprune.runtime.session import Feeds, RuntimeOptions
from onnxprune.search.costs import CostTable
from onnxprune.search.knapsack import Options, solve
from onnxprune.verification import Yardstick

SMOOTHING_PAYS = 0.6
"""A group is smoothed if that brings its error below this share: the division costs a little time."""

_COSTLY = 0.02


@dataclass(frozen=True)
class Group:
    """Products that read one tensor, so that they are quantised together.

    ``error`` is the divergence when these alone compute in int8, after smoothing if ``smoothed``; ``macs`` their multiply-adds in the
    unpruned model; ``site`` the site they belong to, None outside of sites.
    """

    tensor: str
    site: str | None
    products: tuple[str, ...]
    macs: float
    error: float
    smoothed: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Tables:
    """Costs of the same sites with every product in float, and with every product in int8."""

    floats: CostTable
    integers: CostTable

    def blend(self, groups: Sequence[Group], floats: Collection[str]) -> CostTable:
        """Costs with the products ``floats`` in float and the others in int8: in proportion to multiply-adds."""
        curves = {}
        for site, integer in self.integers.curves.items():
            share = _float_share([group for group in groups if group.site == site], floats)
            curves[site] = integer + share * (self.floats.curves[site] - integer)
        share = _float_share([group for group in groups if group.site not in curves], floats)
        fixed = self.integers.fixed + share * (self.floats.fixed - self.integers.fixed)
        both = zip(self.integers.pairs, self.floats.pairs, strict=True)
        pairs = tuple(replace(integer, cost=integer.cost + share * (full.cost - integer.cost)) for integer, full in both)
        return CostTable(self.integers.unit, fixed, curves, pairs)

    def plausible(self) -> Tables:
        """Float costs at least its part in proportion to the units kept more than int8.

        At few units both tables are small and their difference is noise; taken at its word it makes float free, and pruning pays for it.
        """
        curves = {}
        for site, integer in self.integers.curves.items():
            more = self.floats.curves[site] - integer
            curves[site] = integer + np.maximum(more, more[-1] * np.arange(len(more)) / (len(more) - 1))
        return Tables(replace(self.floats, curves=curves), self.integers)

    def scaled(self, factor: float) -> Tables:
        return Tables(self.floats.scaled(factor), self.integers.scaled(factor))


def measure_groups(
    anatomy: Anatomy,
    sites: Sequence[Site],
    scheme: Scheme,
    yardstick: Yardstick,
    calibration: CalibrationData,
    request: Feeds,
    options: RuntimeOptions,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Group, ...]:
    """Quantise one group of products at a time, and measure the divergence from the unpruned model.

    Groups that cost much are tried again with their outliers smoothed. What smoothing promises for a product's output says little about
    the model's (a column that holds an outlier of the next layer may suffer), so the model decides.
    """
    model = anatomy.model
    macs = count_macs(model, shapes_of(model, request))
    home = {leaf.node.name: site.name for site in sites for leaf in site.group.leaves}
    readers: dict[str, list[str]] = {}
    for node in products_of(model):
        readers.setdefault(node.inputs[0], []).append(node.name)
    plain = tailor(model, scheme, calibration, options)

    def error(form: Int8Form, names: Sequence[str]) -> float:
        return yardstick(finish(model, ("int8",), form.present_in(names)))

    groups = []
    for number, (tensor, names) in enumerate(readers.items()):
        size = float(sum(macs.get(name, 0) for name in names))
        groups.append(Group(tensor, home.get(names[0]), tuple(names), size, error(plain, names)))
        if progress:
            progress(number + 1, len(readers) + 1)
    if scheme.kind == "dynamic":
        total = sum(group.error for group in groups if np.isfinite(group.error))
        costly = [group for group in groups if group.error > _COSTLY * total]
        smooth = tailor(model, scheme, calibration, options, smoothed={group.tensor for group in costly})
        better = {group.tensor: error(smooth, group.products) for group in costly if group.tensor in smooth.factors}
        groups = [
            replace(group, error=better[group.tensor], smoothed=True)
            if better.get(group.tensor, np.inf) < SMOOTHING_PAYS * group.error
            else group
            for group in groups
        ]
    if progress:
        progress(len(readers) + 1, len(readers) + 1)
    return tuple(groups)


def assign(
    tables: Tables, groups: Sequence[Group], offers: Mapping[str, tuple[np.ndarray, np.ndarray]], units: Mapping[str, int], budget: float
) -> frozenset[str] | None:
    """Names of the products that stay in float for least error within ``budget``; None if nothing fits.

    Args:
        offers: site -> (kept sizes on offer, error of each); errors in the unit of the groups' errors.
        units: site -> units before pruning.
    """
    choices: list[list[tuple[str, ...]]] = []
    options: list[Options] = []
    for site, (kept, lost) in offers.items():
        mine = _by_worth([group for group in groups if group.site == site])
        integer, full = tables.integers.curves[site][kept], tables.floats.curves[site][kept]
        share_kept = kept / units[site]
        costs, errors, names = [], [], []
        # Of equals the first is taken: where a site goes empty, its products count as float.
        for level in reversed(range(len(mine) + 1)):
            floats = tuple(name for group in mine[:level] for name in group.products)
            costs.append(integer + _float_share(mine, floats) * (full - integer))
            quantised = sum(group.error for group in mine[level:])
            # An error may be infinite, and nothing kept has none.
            errors.append(lost + np.multiply(share_kept, quantised, out=np.zeros(len(kept)), where=kept > 0))
            names += [floats] * len(kept)
        options.append(Options(np.concatenate(costs), np.concatenate(errors)))
        choices.append(names)
    rest = [group for group in groups if group.site not in offers]
    whole = sum(group.macs for group in rest)
    gain = sum(tables.floats.curves[site][-1] - tables.integers.curves[site][-1] for site in tables.floats.curves if site not in offers)
    gain += tables.floats.fixed - tables.integers.fixed
    for group in rest:
        saved = gain * group.macs / whole if whole else 0.0
        options.append(Options(np.array([0.0, saved]), np.array([group.error, 0.0])))
        choices.append([(), group.products])
    fixed = tables.integers.fixed + sum(float(curve[-1]) for site, curve in tables.integers.curves.items() if site not in offers)
    picked = solve(options, budget - fixed)
    if picked is None:
        return None
    return frozenset(name for names, option in zip(choices, picked, strict=True) for name in names[option])


def most_sensitive(groups: Sequence[Group], count: int) -> frozenset[str]:
    """Products of the ``count`` groups whose error per multiply-add is largest."""
    return frozenset(name for group in _by_worth(groups)[:count] for name in group.products)


def _by_worth(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: -group.error / max(group.macs, 1.0))


def _float_share(groups: Sequence[Group], floats: Collection[str]) -> float:
    whole = sum(group.macs for group in groups)
    return sum(group.macs for group in groups if group.products[0] in floats) / whole if whole else 0.0
