"""What models cost, in the unit of the target: tables for the search, and one student by the clock."""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.macs import count_macs
from onnxprune.graph.profile import shapes_of
from onnxprune.passes.int8 import timed
from onnxprune.passes.precision import Tables
from onnxprune.passes.scope import Settings, Study
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Student, Workbench
from onnxprune.runtime.measure import clock_for, ratio, time_sessions
from onnxprune.runtime.session import Feeds
from onnxprune.search.costs import CostTable, CostUnit, counted, counted_costs, measured_costs, shipped_bytes

UNITS: dict[str, CostUnit] = {"latency": "ms", "macs": "macs", "params": "params", "size": "bytes"}
"""By what is asked for, what is counted or timed."""


@dataclass(frozen=True)
class Meter:
    """Costs for one request."""

    study: Study
    bench: Workbench
    request: Feeds
    settings: Settings

    @property
    def unit(self) -> CostUnit:
        return UNITS[self.settings.target.quantity]

    def tables(self, shipping: Shipping) -> tuple[Tables, float]:
        """Costs in float and, if there is a scheme, in integers; and what the file as given costs."""
        study_, sites = self.study, self.bench.sites
        if self.unit != "ms":
            table = counted_costs(study_.anatomy, sites, self.unit, self.request)
            if self.unit == "macs":
                return Tables(table, table), self._given_macs()
            given = counted(study_.whole, self.unit)
            if self.unit == "params":
                return Tables(table, table), given
            floats = shipped_bytes(table, sites, shipping.in_float().probe)
            return Tables(floats, floats if shipping.scheme is None else shipped_bytes(table, sites, shipping.probe)), given
        table, given = self._timed(shipping.in_float(), "cost table")
        if shipping.scheme is None:
            return Tables(table, table), given
        integers, again = self._timed(shipping, "cost table of int8")
        # Two measurements of one file: the second table is put on the scale of the first.
        return Tables(table, integers.scaled(given / again)), given

    def measure(self, student: Student, given: float, shipping: Shipping) -> float:
        """Bytes of a student as it would be shipped, or milliseconds: its paired share of the file as given, which takes ``given``."""
        models = {"given": self.study.given, "pruned": shipping.ship(student)}
        if self.unit == "bytes":
            return counted(models["pruned"], "bytes")
        runtime = self.settings.runtime
        calls = {name: timed(model, self.request, runtime) for name, model in models.items()}
        seed = self.settings.recipe.seed
        timings = time_sessions(calls, clock=clock_for(runtime), seed=seed, rounds=121, tolerance=0.004, max_seconds=20.0)
        return given * ratio(timings, "pruned", "given").median

    def _given_macs(self) -> float:
        """Multiply-adds of the file as given, rows that no output reads included."""
        model, _ = canonicalise(self.study.given, dict(self.bench.batches[0].feeds), all_rows=True)
        return float(sum(count_macs(model, shapes_of(model, self.request)).values()))

    def _timed(self, shipping: Shipping, what: str) -> tuple[CostTable, float]:
        return measured_costs(
            self.study.anatomy,
            self.bench.sites,
            shipping.probe,
            self.request,
            self.settings.runtime,
            seed=self.settings.recipe.seed,
            given=self.study.given,
            progress=self.bench.report(what),
        )
