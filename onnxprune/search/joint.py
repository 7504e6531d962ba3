"""What is shared by two sites: a weight between two pruned axes costs in proportion to both.

A table of one curve per site cannot say k_a * k_b. But a*b <= (a^2 r + b^2 / r) / 2 for the kept shares a and b and any r > 0, with
equality at b = a r: a bound that is a sum of curves, and exact at the widths it is tuned to (majorise and minimise, Hunter and Lange
2004).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.graph.anatomy import Site


@dataclass(frozen=True)
class Pair:
    """``cost`` of what two different sites share, with both kept in full; ``ratio`` is the r of the bound in force."""

    first: str
    second: str
    cost: float
    ratio: float = 1.0

    def halves(self) -> tuple[float, float]:
        """Factors of the squared shares of the two sites in the bound."""
        return self.cost * self.ratio / 2, self.cost / self.ratio / 2

    def excess(self, first: float, second: float) -> float:
        """How much the bound is above the truth at these shares."""
        left, right = self.halves()
        return left * first**2 + right * second**2 - self.cost * first * second


@dataclass(frozen=True, eq=False)
class Split:
    """Amounts by site: in proportion to the share kept, to its square, and shared with another site."""

    linear: Mapping[str, float]
    square: Mapping[str, float]
    pairs: tuple[Pair, ...]

    def curve(self, site: Site) -> np.ndarray:
        """Cost of 0, 1, ... units of a site, its halves of the pairs included; nothing is saved below what must stay."""
        share = np.maximum(np.arange(site.units + 1), site.least) / site.units
        square = self.square.get(site.name, 0.0)
        for pair in self.pairs:
            square += sum(half for name, half in zip((pair.first, pair.second), pair.halves(), strict=True) if name == site.name)
        return np.asarray(self.linear.get(site.name, 0.0) * share + square * share**2)


def split(sites: Iterable[Site], amounts: Mapping[tuple[int, int], float]) -> Split:
    """Attribute the amounts of constants, by (node index, slot), to the sites that cut them."""
    axes: dict[tuple[int, int], dict[int, list[tuple[str, float]]]] = {}
    for site in sites:
        for leaf in site.group.leaves:
            cuts = axes.setdefault((leaf.node.index, leaf.slot), {}).setdefault(leaf.axis, [])
            cuts.append((site.name, float((leaf.labels >= 0).mean())))
    linear: dict[str, float] = {}
    square: dict[str, float] = {}
    pairs: dict[tuple[str, str], float] = {}
    for use, cuts_by_axis in axes.items():
        parts = [[*cuts, ("", 1.0 - sum(share for _, share in cuts))] for cuts in cuts_by_axis.values()]
        for name, other, share in _products(parts):
            amount = amounts.get(use, 0.0) * share
            if not amount or not (name or other):
                continue
            if not name or not other:
                linear[name or other] = linear.get(name or other, 0.0) + amount
            elif name == other:
                square[name] = square.get(name, 0.0) + amount
            else:
                key = (min(name, other), max(name, other))
                pairs[key] = pairs.get(key, 0.0) + amount
    return Split(linear, square, tuple(Pair(first, second, cost) for (first, second), cost in sorted(pairs.items())))


def _products(parts: list[list[tuple[str, float]]]) -> list[tuple[str, str, float]]:
    """(site or none, site or none, share) of every piece of a constant cut along one or two axes."""
    if len(parts) == 1:
        return [(name, "", share) for name, share in parts[0]]
    return [(name, other, share * more) for name, share in parts[0] for other, more in parts[1]]
