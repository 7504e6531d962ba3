"""Small models, calibration rows and workbenches for the tests of the search."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Targets, choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model, load
from onnxprune.passes import meter
from onnxprune.passes.workbench import Recipe, Student, Workbench
from onnxprune.runtime.measure import time_sessions
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.search.costs import CostTable
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of

BERT, VIT, GPT2, LLAMA = "bert-sdpa-do18", "vit-sdpa-do23", "gpt2-sdpa-do18", "llama-sdpa-do18"


def arrays(name: str, count: int = 32, seq: int = 12) -> dict[str, np.ndarray]:
    """Inputs of a zoo model, ``count`` rows (a multiple of 8) of mixed lengths."""
    parts = [zoo.feeds(name, batch=8, seq=seq, seed=seed) for seed in range(count // 8)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def calibration(name: str, count: int = 32, labels: np.ndarray | None = None) -> CalibrationData:
    extra = {} if labels is None else {"labels": labels}
    return load_calibration({**arrays(name, count), **extra}, load(zoo.path(name)))


@cache
def anatomy(name: str) -> Anatomy:
    return anatomy_of(load(zoo.path(name)))


def workbench(name: str, count: int = 32, progress: Any = None, **recipe: Any) -> Workbench:
    """What a search on a zoo model works with."""
    known = anatomy(name)
    objective = choose_objective(known)
    batches = list(calibration(name, count).batches(8, trim=True))
    targets = Targets(objective, batches, "sampled", 0)
    session = open_session(with_outputs(known.model, [objective.tensor]))
    for batch in batches:
        targets.add(run(session, batch.feeds, [objective.tensor])[0])
    return Workbench(known, known.sites, objective, batches, targets, RuntimeOptions(), Recipe(**recipe), progress)


def linear_table(sites: tuple[Site, ...], presence: Mapping[str, float] | None = None) -> CostTable:
    """Milliseconds as a machine might show them: each site 1 ms, spread over its units and, in part, paid by the first one alone."""
    curves = {}
    for site in sites:
        paid = (presence or {}).get(site.name, 0.2)
        counts = np.arange(site.units + 1)
        curves[site.name] = (1 - paid) * counts / site.units + paid * (counts > 0)
    return CostTable("ms", 1.0, curves)


@cache
def easy_model(name: str, alive: float = 0.25) -> Model:
    """A zoo model of which only the first units of every site matter: the others are read through zeros."""
    known = anatomy(name)
    constants: dict[tuple[int, int], np.ndarray] = {}
    for site in known.sites:
        for consumer in site.consumers:
            leaf = consumer.leaf
            weight = known.view.value(leaf.tensor)
            assert weight is not None
            dead = np.flatnonzero(leaf.labels >= max(1, round(alive * site.units)))
            changed = np.moveaxis(np.array(weight), leaf.axis, 0)
            changed[dead] = 0
            constants[leaf.node.index, leaf.slot] = np.ascontiguousarray(np.moveaxis(changed, 0, leaf.axis))
    return replace_constants(known.model, constants, "~easy")


def clockwork(monkeypatch: pytest.MonkeyPatch, given: float = 7.0) -> None:
    """A machine of which the table is known: six sites of 1 ms each and 1 ms for the rest; the file as given takes ``given`` ms."""

    def measured(anatomy: Any, sites: Any, *args: Any, **options: Any) -> tuple[CostTable, float]:
        return linear_table(sites), given

    def as_predicted(self: Any, student: Student, *rest: Any) -> float:
        return linear_table(self.bench.sites).predict(student.counts)

    monkeypatch.setattr(meter, "measured_costs", measured)
    monkeypatch.setattr(meter.Meter, "measure", as_predicted)


def brief_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a few rounds: what a benchmark says does not matter here, only that it is made."""

    def brief(runs: Any, **options: Any) -> Any:
        return time_sessions(runs, **{**options, "rounds": 7, "min_seconds": 0.0005})

    for module in (
        "onnxprune.passes.meter",
        "onnxprune.passes.finishing",
        "onnxprune.passes.int8",
        "onnxprune.search.costs",
        "onnxprune.benchmark",
    ):
        monkeypatch.setattr(f"{module}.time_sessions", brief)


def outlier_model() -> tuple[Model, str]:
    """A small net of which one hidden tensor (named as well) has a channel a hundred times larger than all others."""
    net = Net()
    large = np.ones(WIDTH, np.float32)
    large[3] = 100.0
    scaled = net("Mul", "x", net.constant(large))
    rows = (net.rng.standard_normal((WIDTH, FFN)) / WIDTH**0.5 / large[:, None]).astype(np.float32)
    hidden = net("Tanh", net("MatMul", scaled, net.constant(rows)))
    return Model.from_proto(net.done(net.add("x", net.linear(hidden, FFN, WIDTH)))), str(scaled)
