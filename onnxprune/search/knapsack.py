"""One multiple-choice knapsack: each site offers kept sizes with a cost and an error; one is chosen per site, least error in budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 20_000
"""Resolution of the budget. Costs are rounded up to bins, so a choice never exceeds the budget."""


@dataclass(frozen=True, eq=False)
class Options:
    """What one site offers: ``cost[i]`` and ``error[i]`` of its i-th option."""

    cost: np.ndarray
    error: np.ndarray


def solve(sites: Sequence[Options], budget: float, bins: int = BINS) -> list[int] | None:
    """Index of the option chosen for each site, or None if even the cheapest options exceed the budget.

    Dynamic programming over budget bins, O(sites x options x bins) in vectorised steps; exact up to the rounding of costs to bins.
    """
    if not sites:
        return []
    cheapest = sum(float(site.cost.min()) for site in sites)
    if cheapest > budget:
        return None
    slack = budget - cheapest
    ceiling = sum(float(site.cost.max() - site.cost.min()) for site in sites)
    if slack >= ceiling:
        return [int(np.argmin(np.where(site.error <= site.error.min(), site.cost, np.inf))) for site in sites]
    width = max(slack, 1e-300) / bins
    steps = [np.ceil((site.cost - site.cost.min()) / width - 1e-9).astype(np.int64) for site in sites]
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
    if not np.isfinite(best[bins]):
        return None
    room = int(np.argmin(best))
    result = []
    for picked, step in zip(reversed(choices), reversed(steps), strict=True):
        option = int(picked[room])
        result.append(option)
        room -= int(step[option])
    return result[::-1]
