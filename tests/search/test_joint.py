"""Costs of weights that lie between two pruned axes: predicted exactly, bounded by curves, chosen within budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.macs import total_macs
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.slicing import slice_model
from onnxprune.passes.choice import choose, offers_of
from onnxprune.passes.workbench import Recipe, Scores, Workbench, dense_student
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search.costs import CostTable, CostUnit, counted_costs
from onnxprune.search.joint import Pair
from tests.graph.convnet import BLOCKS, SIDE, build
from tests.graph.pruning import anatomy_of, random_kept

FEEDS = {"x": np.zeros((2, 3, SIDE, SIDE), np.float32)}


@cache
def anatomy(block: str) -> Anatomy:
    return anatomy_of(build(list(BLOCKS) if block == "all" else [block], flat=block == "basic"))


@cache
def table(block: str, unit: CostUnit) -> CostTable:
    return counted_costs(anatomy(block), anatomy(block).sites, unit, FEEDS)


@pytest.mark.parametrize("block", [*BLOCKS, "all"])
def test_predictions_are_what_slices_cost(block: str) -> None:
    known = anatomy(block)
    for seed in range(3):
        kept = random_kept(known.sites, np.random.default_rng(seed))
        counts = {site: len(units) for site, units in kept.items()}
        sliced = slice_model(known, kept)
        assert table(block, "macs").predict(counts) == pytest.approx(total_macs(sliced, shapes_of(sliced, FEEDS)), rel=1e-9)
        assert table(block, "params").predict(counts) == pytest.approx(sliced.parameters, rel=1e-9)


def test_curves_bound_the_truth_and_meet_it_where_they_are_tuned() -> None:
    known, costs = anatomy("all"), table("all", "macs")
    assert costs.pairs
    rng = np.random.default_rng(3)
    for _ in range(5):
        here, there = ({site.name: int(rng.integers(1, site.units + 1)) for site in known.sites} for _ in range(2))
        tuned = costs.tuned(here)
        assert bound(tuned, here) == pytest.approx(costs.predict(here))
        assert bound(tuned, there) >= costs.predict(there) * (1 - 1e-9)
        assert tuned.predict(there) == pytest.approx(costs.predict(there))
        assert tuned.scaled(2.0).predict(there) == pytest.approx(2 * costs.predict(there))


def bound(costs: CostTable, counts: dict[str, int]) -> float:
    return replace(costs, pairs=()).predict(counts)


def test_what_must_stay_costs_no_less_when_nothing_is_asked_for() -> None:
    costs = table("basic", "macs")
    none = dict.fromkeys(costs.curves, 0)
    assert costs.predict(none) == pytest.approx(costs.predict(dict.fromkeys(costs.curves, 1)))
    assert costs.floor == pytest.approx(costs.predict(none))


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.1, 10))
def test_the_bound_of_a_pair_is_one(first: float, second: float, ratio: float) -> None:
    pair = Pair("a", "b", 7.0, ratio)
    assert pair.excess(first, second) >= -1e-9
    assert replace(pair, ratio=second / first).excess(first, second) == pytest.approx(0, abs=1e-9)


def bench_of(block: str) -> Workbench:
    unused: Any = None
    return Workbench(anatomy(block), anatomy(block).sites, unused, (), unused, RuntimeOptions(), Recipe())


@settings(max_examples=10, deadline=None)
@given(st.floats(0.0, 0.95), st.integers(0, 2**31))
def test_choices_keep_a_channel_everywhere_and_use_the_budget(share: float, seed: int) -> None:
    bench, costs = bench_of("all"), table("all", "macs")
    rng = np.random.default_rng(seed)
    scores = Scores({site.name: rng.exponential(size=site.units) for site in bench.sites})
    budget = costs.fixed + share * (costs.full - costs.fixed)
    kept = choose(bench, dense_student(bench.anatomy, bench.sites), scores, costs, max(budget, costs.floor))
    assert kept is not None
    assert all(len(units) >= 1 for units in kept.values())
    spent = costs.predict({site: len(units) for site, units in kept.items()})
    assert spent <= max(budget, costs.floor) * (1 + 1e-9)
    assert spent >= 0.85 * budget


def test_timed_widths_are_blocks_of_eight_channels() -> None:
    bench = bench_of("grouped")
    scores = Scores({site.name: np.ones(site.units) for site in bench.sites})
    kept = {name: offered.tolist() for name, (offered, _) in offers_of(bench, scores, timed=True).items()}
    assert kept["conv.4.channels"] == [8, 10]
    assert kept["conv.1.channels"] == [1, 2, 3, 4]  # a unit is a group of eight channels
    assert offers_of(bench, scores, timed=False)["conv.4.channels"][0].tolist() == list(range(1, 11))
