"""Counted costs against models that were really sliced; measured ones against a machine that is known exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.canonical import with_fresh_shapes
from onnxprune.graph.macs import total_macs
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import shapes_of, synthetic_feeds
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.passes.apply import finish
from onnxprune.passes.int8 import Scheme, untailored
from onnxprune.runtime.measure import Timings
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search import costs
from onnxprune.search.costs import CostTable, counted_costs, measured_costs, shipped_bytes
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of, random_kept

NAMES = ["bert-sdpa-do18", "gpt2-eager-ts17", "llama-sdpa-do23", "vit-eager-do18"]


def real(name: str) -> tuple[Anatomy, dict[str, np.ndarray]]:
    return anatomy_of(load(zoo.path(name))), zoo.feeds(name, batch=2, seq=7)


def fused_parallel() -> tuple[Anatomy, dict[str, np.ndarray]]:
    """One product makes queries, keys, values and the hidden neurons."""
    net = Net()
    q, k, v, hidden = net("Split", net.linear("x", WIDTH, 3 * WIDTH + FFN), net.ints(WIDTH, WIDTH, WIDTH, FFN), axis=2, outputs=4)
    attention = net.linear(net.attend(*(net.heads(part) for part in (q, k, v))))
    anatomy = anatomy_of(net.done(net.add("x", net.add(attention, net.linear(net("Relu", hidden), FFN, WIDTH)))))
    return anatomy, synthetic_feeds(anatomy.model)


CASES: list[Callable[[], tuple[Anatomy, dict[str, np.ndarray]]]] = [*(lambda name=name: real(name) for name in NAMES), fused_parallel]


@pytest.mark.parametrize("make", CASES, ids=[*NAMES, "fused parallel"])
def test_counted_costs_are_those_of_the_sliced_model(make: Callable[[], tuple[Anatomy, dict[str, np.ndarray]]]) -> None:
    anatomy, feeds = make()
    feeds = {name: feeds[name] for name in anatomy.model.input_names}
    tables = {unit: counted_costs(anatomy, anatomy.sites, unit, feeds) for unit in ("macs", "params", "bytes")}  # type: ignore[arg-type]
    assert tables["macs"].full == pytest.approx(total_macs(anatomy.model, shapes_of(anatomy.model, feeds)))
    rng = np.random.default_rng(0)
    nothing = {site.name: np.zeros(0, np.int64) for site in anatomy.sites}
    some = [{name: units if len(units) else np.arange(1) for name, units in random_kept(anatomy.sites, rng).items()} for _ in range(2)]
    for kept in [*some, random_kept(anatomy.sites, rng), nothing]:
        sliced = slice_model(anatomy, kept)
        counts = {site: len(units) for site, units in kept.items()}
        assert tables["macs"].predict(counts) == pytest.approx(total_macs(sliced, shapes_of(sliced, feeds)), rel=1e-9)
        predicted = tables["params"].predict(counts)
        assert tables["bytes"].full - tables["bytes"].predict(counts) == pytest.approx(4 * (tables["params"].full - predicted))
        assert len(with_fresh_shapes(sliced).to_proto().SerializeToString()) <= tables["bytes"].predict(counts)
        if all(counts.values()):
            assert predicted == pytest.approx(sliced.parameters, rel=1e-9)
        else:  # with a whole block goes what belongs to no unit: the norm in front of it, a scale
            assert sliced.parameters <= predicted <= 1.1 * sliced.parameters


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ["bert-sdpa-do18", "vit-eager-do18"])
def test_shipped_bytes_are_those_of_files_in_integers(name: str, per_channel: bool) -> None:
    anatomy, feeds = real(name)

    def build(kept: Kept) -> Model:
        model = slice_model(anatomy, kept)
        return finish(model, ("int8",), untailored(model, Scheme("dynamic", per_channel)))

    floats = counted_costs(anatomy, anatomy.sites, "bytes", feeds)
    table = shipped_bytes(floats, anatomy.sites, build)
    assert table.unit == "bytes"
    assert table.full < 0.7 * floats.full
    for share in (1.0, 0.75, 0.5, 0.25):
        counts = {site.name: round(share * site.units) for site in anatomy.sites}
        size = len(build({site: np.arange(count) for site, count in counts.items()}).to_proto().SerializeToString())
        assert size <= table.predict(counts) <= 1.05 * size + 4096 + 2000


def test_shipped_bytes_of_nothing_that_shrinks_are_fixed() -> None:
    anatomy, feeds = real("vit-eager-do18")
    floats = counted_costs(anatomy, (), "bytes", feeds)
    table = shipped_bytes(floats, (), lambda kept: slice_model(anatomy, kept))
    assert table.curves == {}
    assert table.full == table.floor == pytest.approx(floats.full)


def test_a_table_adds_up() -> None:
    table = CostTable("ms", 2.0, {"a": np.array([0.0, 1.0, 3.0]), "b": np.array([0.5, 1.0])})
    assert (table.full, table.floor) == (6.0, 2.5)
    assert table.predict({}) == table.full
    assert table.predict({"a": 1, "b": 0}) == 3.5
    doubled = table.scaled(2.0)
    assert (doubled.full, doubled.predict({"a": 1}), table.full) == (12.0, 8.0, 6.0)
    assert table.as_dict() == {"unit": "ms", "fixed": 2.0, "curves": {"a": [0.0, 1.0, 3.0], "b": [0.5, 1.0]}}


@pytest.mark.parametrize("kinds", [("heads", "ffn"), ("ffn",)])
def test_an_affine_machine_is_recovered(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]) -> None:
    """Fixed time, time per unit and time per block that is there at all are found from the few graphs that are timed."""
    anatomy, feeds = real("minilm-sdpa-do18")
    sites = [site for site in anatomy.sites if site.kind in kinds]
    per_unit, per_block, fixed = {"heads": 0.3, "ffn": 0.01}, {"heads": 0.2, "ffn": 0.0}, 1.5

    def true_ms(counts: Mapping[str, int]) -> float:
        return fixed + sum(per_unit[s.kind] * counts[s.name] + per_block[s.kind] * (counts[s.name] > 0) for s in sites)

    def timed(runs: Mapping[str, Any], **options: Any) -> Timings:
        return Timings({name: np.full(9, call()) for name, call in runs.items()}, "thread", None)

    monkeypatch.setattr(costs, "_caller", lambda counts, feeds, options: lambda: true_ms(counts))
    monkeypatch.setattr(costs, "time_sessions", timed)
    build: Any = lambda kept: {name: len(units) for name, units in kept.items()}  # noqa: E731
    table, as_given = measured_costs(anatomy, sites, build, feeds, RuntimeOptions(), seed=0)
    assert as_given == pytest.approx(table.full)
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = {site.name: int(rng.integers(0, site.units + 1)) for site in sites}
        assert table.predict(counts) == pytest.approx(true_ms(counts), rel=1e-6)
    assert all((np.diff(curve) >= 0).all() and curve[0] == 0 for curve in table.curves.values())


def test_a_machine_that_gains_nothing_gives_flat_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy, feeds = real("bert-sdpa-do18")
    monkeypatch.setattr(costs, "_caller", lambda *_: None)
    monkeypatch.setattr(costs, "time_sessions", lambda runs, **_: Timings({name: np.full(9, 4.0) for name in runs}, "thread", None))
    table, _ = measured_costs(anatomy, anatomy.sites, lambda _: anatomy.model, feeds, RuntimeOptions(), seed=0)
    assert table.full == pytest.approx(4.0)
    assert table.floor == pytest.approx(4.0, rel=1e-3)
