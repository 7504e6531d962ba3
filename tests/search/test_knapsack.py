"""The knapsack against brute force, and the edges where divisions by nothing hide."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from onnxprune.search.knapsack import Options, solve


def brute_force(sites: list[Options], budget: float) -> float:
    """Least error of all choices within the budget."""
    choices = product(*(range(len(site.cost)) for site in sites))
    totals = [
        (
            sum(float(site.cost[i]) for site, i in zip(sites, choice, strict=True)),
            sum(float(site.error[i]) for site, i in zip(sites, choice, strict=True)),
        )
        for choice in choices
    ]
    return min((error for cost, error in totals if cost <= budget * (1 + 1e-12)), default=np.inf)


def cost_of(sites: list[Options], choice: list[int]) -> float:
    return sum(float(site.cost[i]) for site, i in zip(sites, choice, strict=True))


def error_of(sites: list[Options], choice: list[int]) -> float:
    return sum(float(site.error[i]) for site, i in zip(sites, choice, strict=True))


def random_sites(rng: np.random.Generator, count: int, options: int, integers: bool) -> list[Options]:
    sites = []
    for _ in range(count):
        cost = rng.integers(0, 9, options).astype(float) if integers else rng.random(options)
        sites.append(Options(cost, rng.random(options)))
    return sites


@pytest.mark.parametrize("integers", [True, False], ids=["integer costs", "real costs"])
def test_equals_brute_force(integers: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sites = random_sites(rng, 3, 4, integers)
        floor, ceiling = (sum(float(f(site.cost)) for site in sites) for f in (np.min, np.max))
        budget = round(rng.uniform(floor, ceiling)) if integers else rng.uniform(floor, ceiling)
        choice = solve(sites, budget)
        best = brute_force(sites, budget)
        if choice is None:
            assert best == np.inf
            continue
        assert cost_of(sites, choice) <= budget * (1 + 1e-9)
        assert error_of(sites, choice) == pytest.approx(best, abs=1e-12)


def test_never_exceeds_the_budget_and_beats_greedy() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        sites = [Options(np.sort(rng.random(5)), -np.sort(-rng.random(5))) for _ in range(6)]
        floor, ceiling = (sum(float(f(site.cost)) for site in sites) for f in (np.min, np.max))
        budget = rng.uniform(floor, ceiling)
        choice = solve(sites, budget, bins=300)
        assert choice is not None
        assert cost_of(sites, choice) <= budget * (1 + 1e-9)
        # Costs are rounded up to bins, which is what greedy must do without.
        assert error_of(sites, choice) <= error_of(sites, greedy(sites, floor + (budget - floor) * (1 - len(sites) / 300))) + 1e-12


def greedy(sites: list[Options], budget: float) -> list[int]:
    """From the cheapest choice on, always the step of most error saved for its cost, while it fits."""
    choice = [int(np.argmin(site.cost)) for site in sites]
    while True:
        spent = cost_of(sites, choice)
        steps = [
            ((site.error[now] - site.error[option]) / (site.cost[option] - site.cost[now]), number, option)
            for number, (site, now) in enumerate(zip(sites, choice, strict=True))
            for option in range(len(site.cost))
            if site.cost[now] < site.cost[option] <= site.cost[now] + budget - spent
        ]
        if not steps:
            return choice
        _, number, option = max(steps)
        choice[number] = option


def test_free_options_are_taken_everywhere() -> None:
    sites = [Options(np.array([0.0, 0.0, 5.0]), np.array([3.0, 1.0, 0.0])) for _ in range(3)]
    assert solve(sites, 0.0) == [1, 1, 1]
    assert sorted(solve(sites, 5.0) or []) == [1, 1, 2]


def test_a_sum_that_is_rounded_otherwise_is_no_more_than_the_budget() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        sites = [Options(np.sort(rng.random(4)) + 0.1, -np.sort(-rng.random(4))) for _ in range(7)]
        fixed = rng.uniform(10, 100)
        floor = fixed + sum(float(site.cost.min()) for site in sites)
        assert solve(sites, floor - fixed) is not None


def test_a_budget_of_exactly_the_cheapest_choice() -> None:
    sites = [Options(np.array([1.0, 2.0]), np.array([5.0, 0.0])), Options(np.array([0.1, 3.0]), np.array([5.0, 0.0]))]
    assert solve(sites, 1.1) == [0, 0]


def test_a_budget_that_is_met_exactly_is_used() -> None:
    sites = [Options(np.array([0.0, 3.0]), np.array([1.0, 0.0])), Options(np.array([0.0, 4.0]), np.array([1.0, 0.0]))]
    assert solve(sites, 7.0) == [1, 1]
    assert solve([*sites, Options(np.array([0.0, 1.0]), np.array([0.1, 0.0]))], 7.0) == [1, 1, 0]


def test_budgets_that_are_too_small_or_ample() -> None:
    sites = [Options(np.array([1.0, 2.0, 3.0]), np.array([5.0, 0.0, 0.0]))]
    assert solve(sites, 0.99) is None
    assert solve(sites, 100.0) == [1]
    assert solve([], 0.0) == []


def test_the_same_tables_give_the_same_choice() -> None:
    sites = random_sites(np.random.default_rng(2), 4, 6, integers=True)
    assert solve(sites, 14.0) == solve(sites, 14.0)
