"""One multiple-choice knapsack: each site offers kept sizes with a cost and an error; one is chosen per site, least error in budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 20_000
"""Resolution of the budget."""


@dataclass(frozen=True, eq=False)
class Options:
    """What one site offers: ``cost[i]`` and ``error[i]`` of its i-th option."""

    cost: np.ndarray
    error: np.ndarray


def solve(sites: Sequence[Options], budget: float, bins: int = BINS) -> list[int] | None:
    """Index of the option chosen for each site, or None if even the cheapest options exceed the budget.

    Dynamic programming over budget bins, O(sites x options x bins) in vectorised steps. Costs are rounded down first: if that choice fits
    the budget it is the exact optimum. Otherwise they are rounded up, which always fits and is exact up to the rounding.
    """
    if not sites:
        return []
    cheapest = sum(float(site.cost.min()) for site in sites)
    tolerance = 1e-9 * max(abs(budget), 1e-300)
    if cheapest > budget + tolerance:
        return None
    slack = max(budget - cheapest, 0.0)
    ceiling = sum(float(site.cost.max() - site.cost.min()) for site in sites)
    if slack >= ceiling:
        return [int(np.argmin(np.where(site.error <= site.error.min(), site.cost, np.inf))) for site in sites]
    excess = [
        (site.cost - site.cost.min()) / slack * bins if slack > 0 else np.where(site.cost > site.cost.min(), np.inf, 0) for site in sites
    ]
    picked = _choose(sites, [np.floor(np.minimum(cost, bins + 1) + 1e-9).astype(np.int64) for cost in excess], bins)
    if sum(float(site.cost[option]) for site, option in zip(sites, picked, strict=True)) <= budget + tolerance:
        return picked
    return _choose(sites, [np.ceil(np.minimum(cost, bins + 1) - 1e-9).astype(np.int64) for cost in excess], bins)


def _choose(sites: Sequence[Options], steps: Sequence[np.ndarray], bins: int) -> list[int]:
    """The options of least error whose ``steps`` add up to at most ``bins``; every site has an option of no steps."""
    best = np.zeros(bins + 1)
    choices = []
    for site, step in zip(sites, steps, strict=True):
        table = np.full(bins + 1, np.inf)
        picked = np.zeros(bins + 1, np.int32)
        for option in np.argsort(-site.error, kind="stable"):
            need = int(step[option])
            if need > bins:
                continue
            candidate = best[: bins + 1 - need] + site.error[option]
            target = table[need:]
            better = candidate < target
            target[better] = candidate[better]
            picked[need:][better] = option
        best = table
        choices.append(picked)
    room = int(np.argmin(best))
    result = []
    for picked, step in zip(reversed(choices), reversed(steps), strict=True):
        option = int(picked[room])
        result.append(option)
        room -= int(step[option])
    return result[::-1]
