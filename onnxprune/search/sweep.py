"""The exact answer when every unit of a kind has one price: Kwon et al. (NeurIPS 2022), Algorithm 1, without its overshoot.

With one price for heads and one for neurons the best choice of a given number of heads is the most important ones, so trying every number
of heads finds the optimum. The published code goes on past the budget once the heads alone exceed it; here such counts are not considered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def sweep(
    saliency: Mapping[str, np.ndarray], kind: Mapping[str, str], price: Mapping[str, float], budget: float
) -> dict[str, np.ndarray] | None:
    """Units to keep so that their price fits the budget and the saliency lost is least.

    Args:
        saliency: site -> float64 [units], what removing the unit costs.
        kind: site -> kind, at most two kinds; all units of a kind cost ``price[kind]``.
        budget: the most the kept units may cost together.

    Returns:
        site -> sorted kept units; None if the budget is negative.
    """
    if budget < 0:
        return None
    kinds = sorted({kind[site] for site in saliency})
    pools = {name: _ranked([(site, values) for site, values in saliency.items() if kind[site] == name]) for name in kinds}
    sums = {name: np.concatenate([[0.0], np.cumsum(pool[0])]) for name, pool in pools.items()}
    if len(kinds) < 2:
        counts = {name: int(_affordable(np.array([budget]), price[name], len(pools[name][0]))[0]) for name in kinds}
    else:
        few, many = sorted(kinds, key=lambda name: len(pools[name][0]))
        first = np.arange(len(pools[few][0]) + 1)
        left = budget - first * price[few]
        feasible = left >= 0
        second = _affordable(left, price[many], len(pools[many][0]))
        kept = np.where(feasible, sums[few][first] + sums[many][second], -np.inf)
        best = int(np.argmax(kept))
        counts = {few: best, many: int(second[best])}
    chosen: dict[str, list[int]] = {site: [] for site in saliency}
    for name, count in counts.items():
        for site, unit in pools[name][1][:count]:
            chosen[site].append(unit)
    return {site: np.array(sorted(units), np.int64) for site, units in chosen.items()}


def _affordable(money: np.ndarray, price: float, units: int) -> np.ndarray:
    """How many of ``units`` the money buys; a billionth of a unit is forgiven to rounding."""
    if price <= 0:
        return np.where(money >= 0, units, 0)
    return np.clip(np.floor(money / price + 1e-9), 0, units).astype(np.int64)


def _ranked(sites: Sequence[tuple[str, np.ndarray]]) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """All units of some sites, most salient first; ties keep the order of the sites, so the result is deterministic."""
    values = np.concatenate([array for _, array in sites])
    names = [(site, unit) for site, array in sites for unit in range(len(array))]
    order = np.argsort(-values, kind="stable")
    return values[order], [names[position] for position in order]
