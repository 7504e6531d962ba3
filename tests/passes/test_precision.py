"""Widths and precision in one knapsack: against brute force, and against tables whose ends are known."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import choose_objective
from onnxprune.graph import tables
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.integer import int8_products
from onnxprune.graph.macs import count_macs
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.view import GraphView
from onnxprune.passes import precision
from onnxprune.passes.int8 import Scheme, products_of
from onnxprune.passes.precision import SMOOTHING_PAYS, Group, Tables, assign, measure_groups, most_sensitive
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search.costs import CostTable
from onnxprune.verification import Yardstick
from tests.passes.cases import BERT, VIT, anatomy, calibration, outlier_model

OPTIONS = RuntimeOptions()
Offers = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sites that may shrink, with one or two groups each, and groups outside of sites."""

    tables: Tables
    groups: tuple[Group, ...]
    offers: Offers

    @property
    def units(self) -> dict[str, int]:
        return {site: int(kept[-1]) for site, (kept, _) in self.offers.items()}

    @property
    def products(self) -> set[str]:
        return {name for group in self.groups for name in group.products}

    def error(self, counts: dict[str, int], floats: Collection[str]) -> float:
        lost = sum(float(lost[list(kept).index(counts[site])]) for site, (kept, lost) in self.offers.items())
        for group in self.groups:
            share = counts[group.site] / self.units[group.site] if group.site else 1.0
            lost += share * group.error * (group.products[0] not in floats)
        return lost


def random_case(seed: int, groups_of_a_site: int = 1) -> Case:
    rng = np.random.default_rng(seed)
    sites = {"a": 3, "b": 2}
    curves = {site: np.concatenate([[0.0], np.cumsum(rng.random(units))]) for site, units in sites.items()}
    gain = rng.uniform(0.2, 1.1)
    fixed = rng.random()
    floats = CostTable("ms", fixed, curves)
    integers = CostTable("ms", fixed * rng.uniform(0.5, 1), {site: curve * gain for site, curve in curves.items()})
    homes: list[str | None] = [*(site for site in sites for _ in range(groups_of_a_site)), None, None]
    groups = [
        Group(f"t{number}", home, (f"p{number}", f"q{number}"), float(rng.uniform(1, 9)), float(rng.random()))
        for number, home in enumerate(homes)
    ]
    offers = {site: (np.arange(units + 1), np.concatenate([np.sort(rng.random(units))[::-1] * 3, [0.0]])) for site, units in sites.items()}
    return Case(Tables(floats, integers), tuple(groups), offers)


def best(case: Case, budget: float) -> float:
    """Least error over all widths and all sets of groups in float, of those whose blended table keeps the budget."""
    errors = [np.inf]
    for size in range(len(case.groups) + 1):
        for chosen in itertools.combinations(case.groups, size):
            floats = {name for group in chosen for name in group.products}
            table = case.tables.blend(case.groups, floats)
            for counts in itertools.product(*(kept for kept, _ in case.offers.values())):
                named = dict(zip(case.offers, map(int, counts), strict=True))
                if table.predict(named) <= budget * (1 + 1e-9):
                    errors.append(case.error(named, floats))
    return min(errors)


def error_with(case: Case, floats: Collection[str], budget: float) -> float:
    """Least error over all widths that keep the budget with these products in float."""
    table = case.tables.blend(case.groups, floats)
    found = [
        case.error(dict(zip(case.offers, map(int, counts), strict=True)), floats)
        for counts in itertools.product(*(kept for kept, _ in case.offers.values()))
        if table.predict(dict(zip(case.offers, map(int, counts), strict=True))) <= budget * (1 + 1e-6)
    ]
    return min(found, default=np.inf)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 1.2))
def test_widths_and_precision_together_lose_as_little_as_can_be(seed: int, share: float) -> None:
    case = random_case(seed)
    ends = [table for table in (case.tables.floats, case.tables.integers)]
    low, high = min(table.floor for table in ends), max(table.full for table in ends)
    budget = low + share * (high - low)
    floats = assign(case.tables, case.groups, case.offers, case.units, budget)
    expected = best(case, budget)
    if floats is None:
        assert expected == np.inf
        return
    assert floats <= case.products
    assert all({name in floats for name in group.products} in ({True}, {False}) for group in case.groups), "a group stays together"
    # Costs come in 20,000 steps, so that a choice within a step of the budget may be missed.
    assert error_with(case, floats, budget) <= best(case, budget - 1e-4 * (high - low)) + 1e-9
    assert error_with(case, floats, budget) >= expected - 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1.0))
def test_of_two_groups_in_a_site_the_one_worth_more_is_in_float_first(seed: int, share: float) -> None:
    case = random_case(seed, groups_of_a_site=2)
    budget = case.tables.integers.floor + share * (case.tables.floats.full - case.tables.integers.floor)
    floats = assign(case.tables, case.groups, case.offers, case.units, budget)
    if floats is None:
        return
    for site in case.offers:
        mine = sorted((group for group in case.groups if group.site == site), key=lambda group: group.error / group.macs)
        assert not (mine[0].products[0] in floats and mine[1].products[0] not in floats)
    assert case.tables.blend(case.groups, floats).floor <= budget * (1 + 1e-6)


def test_a_budget_that_float_meets_takes_no_integers_and_a_tight_one_takes_all() -> None:
    case = random_case(3)
    tables = Tables(case.tables.floats, case.tables.floats.scaled(0.5))
    assert assign(tables, case.groups, case.offers, case.units, tables.floats.full * 1.001) == case.products
    never = {site: (kept, np.where(kept == kept[-1], 0.0, 1e9)) for site, (kept, _) in case.offers.items()}
    assert assign(tables, case.groups, never, case.units, tables.integers.full * 1.001) == frozenset()
    assert assign(tables, case.groups, case.offers, case.units, tables.integers.floor * 0.99) is None


def test_integers_that_cost_nothing_spare_the_widths_and_useless_ones_do_not() -> None:
    """Both ways out of a budget are there: the errors decide which is taken."""
    case = random_case(4)
    tables = Tables(case.tables.floats, case.tables.floats.scaled(0.6))
    budget = 0.7 * tables.floats.full
    harmless = [dataclasses.replace(group, error=1e-6) for group in case.groups]
    harmful = [dataclasses.replace(group, error=1e6) for group in case.groups]
    assert assign(tables, harmless, case.offers, case.units, budget) != case.products
    assert assign(tables, harmful, case.offers, case.units, budget) == case.products


def test_without_sites_only_the_precision_is_decided() -> None:
    groups = [Group(name, None, (name,), macs, error) for name, macs, error in (("x", 1.0, 5.0), ("y", 1.0, 1.0), ("z", 2.0, 3.0))]
    tables = Tables(CostTable("ms", 8.0, {}), CostTable("ms", 4.0, {}))
    assert assign(tables, groups, {}, {}, 3.9) is None
    assert assign(tables, groups, {}, {}, 4.0) == frozenset()
    assert assign(tables, groups, {}, {}, 5.5) == {"x"}
    assert assign(tables, groups, {}, {}, 7.5) == {"x", "z"}
    assert assign(tables, groups, {}, {}, 8.0) == {"x", "y", "z"}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_products_that_break_the_model_stay_in_float() -> None:
    case = random_case(5)
    broken = [dataclasses.replace(group, error=np.inf) for group in case.groups]
    for budget in (case.tables.floats.full * 1.01, case.tables.floats.full * 0.9):
        assert assign(case.tables, broken, case.offers, case.units, budget) == case.products


# --- tables ------------------------------------------------------------------------------------------------------------------------


def test_a_blend_ends_at_the_tables_it_is_made_of() -> None:
    case = random_case(0, groups_of_a_site=2)
    for floats, table in ((set[str](), case.tables.integers), (case.products, case.tables.floats)):
        blended = case.tables.blend(case.groups, floats)
        assert blended.unit == table.unit
        assert blended.fixed == pytest.approx(table.fixed)
        for site, curve in table.curves.items():
            np.testing.assert_allclose(blended.curves[site], curve)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), chosen=st.sets(st.integers(0, 5)))
def test_a_blend_goes_by_multiply_adds(seed: int, chosen: set[int]) -> None:
    case = random_case(seed, groups_of_a_site=2)
    floats = {name for number in chosen for name in case.groups[number].products}
    blended = case.tables.blend(case.groups, floats)
    for site in case.offers:
        mine = [group for group in case.groups if group.site == site]
        share = sum(group.macs for group in mine if group.products[0] in floats) / sum(group.macs for group in mine)
        expected = share * case.tables.floats.curves[site] + (1 - share) * case.tables.integers.curves[site]
        np.testing.assert_allclose(blended.curves[site], expected)


def test_both_tables_are_scaled() -> None:
    case = random_case(0)
    scaled = case.tables.scaled(2.0)
    assert (scaled.floats.full, scaled.integers.full) == (
        pytest.approx(2 * case.tables.floats.full),
        pytest.approx(2 * case.tables.integers.full),
    )


def test_the_most_sensitive_are_those_that_lose_most_for_their_work() -> None:
    groups = [Group(name, None, (name, name.upper()), macs, error) for name, macs, error in (("x", 9, 3), ("y", 1, 1), ("z", 5, 4))]
    assert most_sensitive(groups, 0) == frozenset()
    assert most_sensitive(groups, 1) == {"y", "Y"}
    assert most_sensitive(groups, 2) == {"y", "Y", "z", "Z"}


# --- sensitivity -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BERT, VIT])
def test_groups_are_the_products_of_a_tensor_with_the_work_and_the_error_they_make(name: str) -> None:
    known, rows = anatomy(name), calibration(name, 8)
    yardstick = Yardstick(known.model, rows, choose_objective(known), OPTIONS)
    calls: list[tuple[int, int]] = []
    request = {key: array[:1] for key, array in rows.inputs.items()}
    groups = measure_groups(known, known.sites, Scheme("static", True), yardstick, rows, request, OPTIONS, lambda *call: calls.append(call))
    products = {node.name: node for node in products_of(known.model)}
    assert sorted(name for group in groups for name in group.products) == sorted(products)
    for group in groups:
        assert {products[name].inputs[0] for name in group.products} == {group.tensor}
    macs = count_macs(known.model, shapes_of(known.model, request))
    assert [group.macs for group in groups] == [sum(macs[name] for name in group.products) for group in groups]
    assert all(group.macs > 0 and 0 <= group.error < np.inf and not group.smoothed for group in groups)
    sites = {site.name for site in known.sites}
    assert {group.site for group in groups} == sites | {None}
    last = max(known.of_kind(("heads",)), key=lambda site: site.order).name
    for site in sites:
        # Queries of one row are made from another tensor than keys and values.
        wanted = 3 if site == last else 2
        assert len([group for group in groups if group.site == site]) == wanted, "what makes the units, and what reads them"
    assert calls[-1] == (len(groups) + 1, len(groups) + 1)


def test_the_error_of_a_group_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    known, rows = anatomy(BERT), calibration(BERT, 8)
    yardstick = Yardstick(known.model, rows, choose_objective(known), OPTIONS)
    errors = []
    for least in (1 << 40, 1):
        monkeypatch.setattr(tables, "SMALLEST_BYTES", least)
        groups = measure_groups(known, known.sites, Scheme("dynamic", True), yardstick, rows, rows.inputs, OPTIONS)
        errors.append([group.error for group in groups])
    assert errors[0] == errors[1]


def outliers() -> tuple[Any, CalibrationData, str]:
    model, tensor = outlier_model()
    rows = CalibrationData({"x": np.random.default_rng(1).standard_normal((24, 5, 12)).astype(np.float32)}, None, "noise")
    return study(*canonicalise(model)), rows, tensor


def measured(known: Any, rows: CalibrationData, scheme: Scheme) -> tuple[Group, ...]:
    yardstick = Yardstick(known.model, rows, choose_objective(known), OPTIONS)
    return measure_groups(known, known.sites, scheme, yardstick, rows, rows.inputs, OPTIONS)


@pytest.mark.parametrize(("pays", "smoothed"), [(SMOOTHING_PAYS, True), (1e-9, False)])
def test_smoothing_is_kept_where_the_model_gains_enough(pays: float, smoothed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known, rows, tensor = outliers()
    monkeypatch.setattr(precision, "SMOOTHING_PAYS", pays)
    (group,) = [group for group in measured(known, rows, Scheme("dynamic", True)) if tensor == group.tensor]
    (plain,) = [group for group in measured(known, rows, Scheme("static", True)) if tensor == group.tensor]
    assert group.smoothed == smoothed
    assert not plain.smoothed, "static ranges are not smoothed"
    assert (group.error < 0.6 * plain.error) == smoothed


def test_smoothing_is_tried_for_groups_that_cost_much(monkeypatch: pytest.MonkeyPatch) -> None:
    known, rows, tensor = outliers()
    tried: list[set[str]] = []

    def watched(*args: Any, smoothed: Collection[str] = (), **options: Any) -> Any:
        tried.append(set(smoothed))
        return real(*args, smoothed=smoothed, **options)

    real = precision.tailor
    monkeypatch.setattr(precision, "tailor", watched)
    groups = measured(known, rows, Scheme("dynamic", True))
    others = {group.tensor for group in groups} - {tensor}
    assert tensor in tried[-1]
    monkeypatch.setattr(precision, "_COSTLY", 0.999)
    measured(known, rows, Scheme("dynamic", True))
    assert not tried[-1] & others
    assert len(int8_products(GraphView(known.model))) == 2


def test_a_group_that_int8_destroys_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    known, rows, tensor = outliers()
    rows.inputs["x"][0, 0, 3] = 1e38
    tried: list[set[str]] = []

    def watched(*args: Any, smoothed: Collection[str] = (), **options: Any) -> Any:
        tried.append(set(smoothed))
        return real(*args, smoothed=smoothed, **options)

    real = precision.tailor
    monkeypatch.setattr(precision, "tailor", watched)
    groups = {group.tensor: group for group in measured(known, rows, Scheme("dynamic", True))}
    assert tried[-1] == set(groups), "its error is no sum that the others have to be a share of"
    lost = groups.pop(tensor)
    assert lost.error == np.inf
    assert not lost.smoothed
    assert all(np.isfinite(group.error) for group in groups.values())
    assert most_sensitive([lost, *groups.values()], 1) == set(lost.products)
