"""How int8 is done on this machine: schemes are measured on the unpruned model, and the winner is fitted to the model that is shipped.

Every stock default is a trap on some machine: signed activations are slower than float on x86, unsigned weights halve the gain, one scale
per matrix costs accuracy, quantizing everything is slower than quantizing products with constant weights. So nothing is assumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from onnxprune.calibration.activations import summarise
from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import InputError
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.integer import int8_products
from onnxprune.graph.model import Model
from onnxprune.graph.tables import int8_tables
from onnxprune.graph.view import GraphView, Node
from onnxprune.passes.apply import finish
from onnxprune.quantize.form import Int8Form
from onnxprune.quantize.ranges import Method, Range, range_of
from onnxprune.quantize.rounding import search_smoothing
from onnxprune.runtime.measure import clock_for, in_turn, ratio, replicas, time_sessions
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run
from onnxprune.verification import Yardstick

log = logging.getLogger(__name__)

Int8Choice = Literal["auto", "dynamic", "static"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")

NEAR = 0.95
"""Schemes at least this fast, relative to the fastest, are judged by their error."""

FASTER = 1.02
"""Less than this over float is noise, and the error would be for nothing."""

AS_GOOD = 1.25
"""Of those, an error up to this many times the least counts as equally good, and speed decides: the judging rows are few."""

_SUMMARISED = 256


@dataclass(frozen=True)
class Scheme:
    """``per_channel``: a scale per column of a weight; ``method``: how static ranges are found."""

    kind: Literal["dynamic", "static"]
    per_channel: bool
    method: Method = "minmax"

    def __str__(self) -> str:
        words = [self.kind, "per channel" if self.per_channel else "per tensor"]
        words += [f"{self.method} ranges"] if self.kind == "static" else []
        return ", ".join(words)


@dataclass(frozen=True)
class Trial:
    """A scheme on the unpruned model: times faster than the finished float model, and divergence from it on judging rows.

    The divergence of a dynamic scheme is the better one of with and without smoothing; which activations are smoothed is decided later.
    """

    scheme: Scheme
    speedup: float
    divergence: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scheme": str(self.scheme)}


def products_of(model: Model, floats: Collection[str] = ()) -> tuple[Node, ...]:
    """Nodes of ``model`` that compute in integers."""
    return tuple(node for node in int8_products(GraphView(model)) if node.name not in floats)


def untailored(model: Model, scheme: Scheme, floats: Collection[str] = ()) -> Int8Form:
    """A form of the right shape for timing: ranges are made up."""
    products = products_of(model, floats)
    ranges = {node.inputs[0]: Range(-1.0, 1.0) for node in products} if scheme.kind == "static" else {}
    tables = tuple(node.name for node in int8_tables(GraphView(model)))
    return Int8Form(scheme.kind, scheme.per_channel, tuple(node.name for node in products), ranges, tables=tables)


def tailor(
    model: Model,
    scheme: Scheme,
    rows: CalibrationData,
    options: RuntimeOptions,
    *,
    floats: Collection[str] = (),
    smoothed: Collection[str] = (),
) -> Int8Form:
    """The form of ``model`` (float, with its final weights): static ranges and smoothing factors from calibration rows.

    Args:
        rows: calibration rows; at most 256 are run, in one pass, and only sums and histograms are kept.
        floats: names of products that stay in float.
        smoothed: names of activations whose outliers move into the weights that read them; dynamic schemes only.
    """
    form = untailored(model, scheme, floats)
    products = products_of(model, floats)
    read = dict.fromkeys(node.inputs[0] for node in products)
    tensors = [name for name in read if scheme.kind == "static" or name in smoothed]
    if not tensors:
        return form
    # What is infinite has no range, but needs none at run time: it is only not smoothed.
    found = summarise(model, tensors, rows.take(slice(0, _SUMMARISED)), options, leave_infinite=scheme.kind == "dynamic")
    if scheme.kind == "static":
        return replace(form, ranges={name: range_of(found[name].histogram, scheme.method) for name in tensors})
    view = GraphView(model)
    factors = {}
    for tensor, known in found.items():
        joined = np.concatenate([weight_of(node, view) for node in products if node.inputs[0] == tensor], axis=1)
        best = search_smoothing(joined, known.low, known.high, known.power, scheme.per_channel)
        if best.limit is not None:
            factors[tensor] = best.factors.astype(np.float32)
    return replace(form, factors=factors)


def weight_of(node: Node, view: GraphView) -> np.ndarray:
    """The weight of a product as [n_in, n_out]."""
    weight = view.value(node.inputs[1])
    assert weight is not None
    return weight.T if node.attrs.get("transB", 0) else weight


def choose_scheme(
    model: Model,
    rewrites: Sequence[str],
    yardstick: Yardstick,
    calibration: CalibrationData,
    request: Feeds,
    options: RuntimeOptions,
    *,
    choice: Int8Choice,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scheme | None, tuple[Trial, ...]]:
    """Measure schemes on the unpruned model: of those nearly as fast as the fastest, the one of least error.

    Returns:
        The scheme, None if integers are not faster than float here; and what was measured.

    Raises:
        InputError: ``choice`` is static, and a tensor has no finite range on the calibration rows, or the opset is too old.
    """

    if not products_of(model):
        return None, ()

    def build(scheme: Scheme, smoothed: Collection[str] = ()) -> Model:
        return finish(model, rewrites, tailor(model, scheme, calibration, options, smoothed=smoothed))

    read = {node.inputs[0] for node in products_of(model)}

    schemes = [Scheme("dynamic", True), Scheme("dynamic", False)] if choice != "static" else []
    models = {scheme: build(scheme) for scheme in schemes}
    if choice != "dynamic":
        try:
            trials = _static_trials(model, rewrites, calibration, options)
            errors = {scheme: yardstick(built) for scheme, built in trials.items()}
            best = min(errors, key=lambda scheme: errors[scheme])
            models[best] = trials[best]
        except InputError as error:
            # A tensor without a finite range, or an opset that cannot be raised: no obstacle to scaling at run time.
            if choice == "static":
                raise
            log.warning("static int8 is not tried: %s", error)
    calls: dict[str, Callable[[], object]] = {"float": timed(finish(model, _without_integers(rewrites)), request, options)}
    calls |= {str(scheme): timed(built, request, options) for scheme, built in models.items()}
    timings = time_sessions(calls, clock=clock_for(options), seed=seed, rounds=61, tolerance=0.006, max_seconds=20.0)
    measured = []
    for number, (scheme, built) in enumerate(models.items()):
        speed = ratio(timings, "float", str(scheme))
        divergence = yardstick(built)
        if scheme.kind == "dynamic":
            # It costs next to no time, and without it a static scheme looks better than it will be in the end.
            divergence = min(divergence, yardstick(build(scheme, read)))
        measured.append(Trial(scheme, speed.median, divergence))
        log.info("int8 %s: %.3fx, divergence %.3g", scheme, speed.median, measured[-1].divergence)
        if progress:
            progress(number + 1, len(models))
    faster = [trial for trial in measured if trial.speedup > FASTER]
    if not faster:
        return None, tuple(measured)
    near = [trial for trial in faster if trial.speedup >= NEAR * max(trial.speedup for trial in faster)]
    good = [trial for trial in near if trial.divergence <= AS_GOOD * min(trial.divergence for trial in near)]
    return max(good, key=lambda trial: trial.speedup).scheme, tuple(measured)


def _static_trials(model: Model, rewrites: Sequence[str], rows: CalibrationData, options: RuntimeOptions) -> dict[Scheme, Model]:
    """The model with static ranges by every method, from one pass over the rows."""
    form = untailored(model, Scheme("static", True))
    found = summarise(model, form.ranges, rows.take(slice(0, _SUMMARISED)), options)
    trials = {}
    for method in METHODS:
        ranges = {name: range_of(found[name].histogram, method) for name in form.ranges}
        trials[Scheme("static", True, method)] = finish(model, rewrites, replace(form, ranges=ranges))
    return trials


def timed(model: Model, feeds: Feeds, options: RuntimeOptions) -> Callable[[], object]:
    """A call that runs the model once, over several sessions in turn where they are small."""
    fed = cut_feeds(model, feeds)
    return in_turn([partial(run, open_session(model, options), fed) for _ in range(replicas(model.weight_bytes))])


def _without_integers(rewrites: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in rewrites if name != "int8")
