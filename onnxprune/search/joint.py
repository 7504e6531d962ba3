"""What is shared by two sites: a weight between two pruned axes costs in proportion to both.

A table of one curve per site cannot say k_a * k_b. But a*b <= (a^2 r + b^2 / r) / 2 for the kept shares a and b and any r > 0, with
equality at b = a r: a bound that is a sum of curves, and exact at the widths it is tuned to (majorise and minimise, Hunter and Lange
2004).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


Names = tuple[str, ...]


def split(sites: Sequence[Site], amounts: Mapping[tuple[int, int], float], products: Iterable[tuple[Names, float]] = ()) -> Split:
    """Attribute the amounts of constants, by (node index, slot), to the sites that cut them.

    Two sites may cut different axes of a constant, different parts of one axis, or the same positions of one axis (heads, and the depth
    of every head).

    Args:
        products: amounts that are in proportion to all sites named.
    """
    axes: dict[tuple[int, int], dict[int, list[tuple[str, np.ndarray]]]] = {}
    for site in sites:
        for leaf in site.group.leaves:
            axes.setdefault((leaf.node.index, leaf.slot), {}).setdefault(leaf.axis, []).append((site.name, leaf.labels >= 0))
    parts = list(products)
    for use, cuts in axes.items():
        whole: list[tuple[Names, float]] = [((), amounts.get(use, 0.0))]
        for cut in cuts.values():
            whole = [((*names, *more), amount * share) for names, amount in whole for more, share in _classes(cut)]
        parts += whole
    linear: dict[str, float] = {}
    square: dict[str, float] = {}
    pairs: dict[tuple[str, str], float] = {}
    for names, amount in parts:
        if not names or not amount:
            continue
        first, second = (names[0], names[-1])  # of more than two, the others count as kept: an upper bound
        if len(names) == 1:
            linear[first] = linear.get(first, 0.0) + amount
        elif first == second:
            square[first] = square.get(first, 0.0) + amount
        else:
            key = (min(first, second), max(first, second))
            pairs[key] = pairs.get(key, 0.0) + amount
    return Split(linear, square, tuple(Pair(first, second, cost) for (first, second), cost in sorted(pairs.items())))


def _classes(cuts: Sequence[tuple[str, np.ndarray]]) -> list[tuple[Names, float]]:
    """Sets of sites that cut the same positions of an axis, each with its share of the positions."""
    held = np.stack([mask for _, mask in cuts])
    patterns, counts = np.unique(held, axis=1, return_counts=True)
    return [
        (tuple(name for (name, _), inside in zip(cuts, pattern, strict=True) if inside), float(count / held.shape[1]))
        for pattern, count in zip(patterns.T, counts, strict=True)
    ]
