"""The choice of an int8 scheme with a clock that is known, and its form on real graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import choose_objective
from onnxprune.errors import InputError
from onnxprune.graph.integer import int8_products
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView
from onnxprune.passes import int8
from onnxprune.passes.apply import finish
from onnxprune.passes.int8 import AS_GOOD, METHODS, Int8Choice, Scheme, Trial, choose_scheme, products_of, tailor, untailored
from onnxprune.runtime.measure import Timings
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.verification import Yardstick
from tests.calibration.models import image_model
from tests.passes.cases import BERT, VIT, anatomy, calibration, outlier_model

OPTIONS = RuntimeOptions()
CHANNELS, TENSOR = Scheme("dynamic", True), Scheme("dynamic", False)
MINMAX, PERCENTILE, ENTROPY, MSE = (Scheme("static", True, method) for method in METHODS)


def machine(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> list[list[str]]:
    """A machine on which schemes are what they are named by and take the times given; returns what was timed on it."""
    seen: list[list[str]] = []

    def timing(runs: dict[str, Any], **options: Any) -> Timings:
        seen.append(list(runs))
        return Timings({name: np.full(9, milliseconds[name]) for name in runs}, "thread", None)

    monkeypatch.setattr(int8, "tailor", lambda model, scheme, *_, smoothed=(): scheme)
    monkeypatch.setattr(int8, "finish", lambda model, rewrites, form=None: form or tuple(rewrites))
    monkeypatch.setattr(int8, "_static_trials", lambda *_: {scheme: scheme for scheme in (MINMAX, PERCENTILE, ENTROPY, MSE)})
    monkeypatch.setattr(int8, "timed", lambda *_: None)
    monkeypatch.setattr(int8, "time_sessions", timing)
    return seen


def chosen(
    errors: Callable[[Scheme], float], choice: Int8Choice = "auto", rewrites: Sequence[str] = ("int8",)
) -> tuple[Scheme | None, tuple[Trial, ...]]:
    model, rows = anatomy(VIT).model, calibration(VIT, 8)
    yardstick: Any = errors
    return choose_scheme(model, rewrites, yardstick, rows, rows.inputs, OPTIONS, choice=choice, seed=0)


def times(channels: float = 50.0, tensor: float = 50.0, static: float = 50.0) -> dict[str, float]:
    statics = {str(Scheme("static", True, method)): static for method in METHODS}
    return {"float": 100.0, str(CHANNELS): channels, str(TENSOR): tensor, **statics}


@pytest.mark.parametrize(
    ("milliseconds", "errors", "winner"),
    [
        (times(), (1.0, 3.0, 3.0), CHANNELS),
        (times(), (3.0, 1.0, 3.0), TENSOR),
        (times(), (3.0, 3.0, 1.0), MSE),
        (times(channels=51.0, tensor=49.0), (1.0, AS_GOOD * 0.99, 9.0), TENSOR),  # as good, and faster
        (times(channels=51.0, tensor=49.0), (1.0, AS_GOOD * 1.01, 9.0), CHANNELS),  # faster, but not as good
        (times(channels=60.0, tensor=49.0), (1.0, 9.0, 9.0), TENSOR),  # too slow for its error to count
        (times(channels=97.0, tensor=99.0, static=120.0), (9.0, 1.0, 1.0), CHANNELS),  # the only one that is faster than float
    ],
)
def test_of_nearly_equal_speeds_the_least_error_wins(
    milliseconds: dict[str, float], errors: tuple[float, float, float], winner: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, milliseconds)
    known = dict(zip((CHANNELS, TENSOR), errors[:2], strict=True))
    scheme, trials = chosen(lambda scheme: known.get(scheme, errors[2] + (scheme != MSE)))
    assert scheme == winner
    assert [trial.scheme for trial in trials] == [CHANNELS, TENSOR, MSE]
    assert [trial.speedup for trial in trials] == pytest.approx([100 / milliseconds[str(trial.scheme)] for trial in trials])
    assert [trial.divergence for trial in trials] == list(errors)


def test_a_dynamic_scheme_is_judged_by_what_smoothing_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, times())
    monkeypatch.setattr(int8, "tailor", lambda model, scheme, *_, smoothed=(): "smoothed" if smoothed and scheme == CHANNELS else scheme)
    errors = {CHANNELS: 4.0, "smoothed": 1.0, TENSOR: 9.0}
    scheme, trials = chosen(lambda built: errors.get(built, 2.0))
    assert scheme == CHANNELS
    assert trials[0].divergence == 1.0


def test_nothing_is_chosen_where_float_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, times(99.0, 101.0, 200.0))
    scheme, trials = chosen(lambda scheme: 0.0)
    assert scheme is None
    assert max(trial.speedup for trial in trials) == pytest.approx(100 / 99), "noise is no gain"


@pytest.mark.parametrize(
    ("choice", "timed"),
    [("dynamic", [CHANNELS, TENSOR]), ("static", [PERCENTILE]), ("auto", [CHANNELS, TENSOR, PERCENTILE])],
)
def test_of_static_forms_only_the_best_ranges_are_timed(choice: Any, timed: list[Scheme], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = machine(monkeypatch, times())
    scheme, trials = chosen(lambda scheme: 1.0 if scheme == PERCENTILE else 2.0, choice)
    assert seen == [["float", *map(str, timed)]]
    assert scheme in timed
    assert [trial.scheme for trial in trials] == timed


def test_without_finite_ranges_only_schemes_that_scale_at_run_time_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(*_: Any) -> Any:
        raise InputError("infinite values")

    machine(monkeypatch, times())
    monkeypatch.setattr(int8, "_static_trials", infinite)
    assert [trial.scheme for trial in chosen(lambda scheme: 1.0)[1]] == [CHANNELS, TENSOR]
    with pytest.raises(InputError, match="infinite values"):
        chosen(lambda scheme: 1.0, "static")


def test_a_model_without_products_has_no_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, times())
    rows = CalibrationData({"x": np.zeros((8, 3, 4), np.float32)}, None, "zeros")
    yardstick: Any = lambda model: 0.0  # noqa: E731
    found = choose_scheme(image_model(), ("int8",), yardstick, rows, rows.inputs, OPTIONS, choice="auto", seed=0)
    assert found == (None, ())


def test_float_is_finished_like_the_others_but_for_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, times())
    finished: list[Any] = []
    monkeypatch.setattr(int8, "timed", lambda model, *_: finished.append(model))
    chosen(lambda scheme: 1.0, "dynamic", ("clean", "int8", "fuse-attention"))
    assert finished == [("clean", "fuse-attention"), CHANNELS, TENSOR]


def test_schemes_and_trials_are_told_in_words() -> None:
    assert str(CHANNELS) == "dynamic, per channel"
    assert str(ENTROPY) == "static, per channel, entropy ranges"
    assert Trial(TENSOR, 2.0, 0.1).as_dict() == {"scheme": "dynamic, per tensor", "speedup": 2.0, "divergence": 0.1}


# --- the form of a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [CHANNELS, TENSOR, MINMAX, MSE], ids=str)
@pytest.mark.parametrize("name", [BERT, VIT])
def test_a_tailored_model_computes_in_integers_and_stays_near(name: str, scheme: Scheme) -> None:
    model, rows = anatomy(name).model, calibration(name, 16)
    form = tailor(model, scheme, rows, OPTIONS)
    assert (form.scheme, form.per_channel, form.factors) == (scheme.kind, scheme.per_channel, {})
    assert form.products == tuple(node.name for node in int8_products(GraphView(model)))
    assert set(form.ranges) == ({node.inputs[0] for node in products_of(model)} if scheme.kind == "static" else set())
    assert all(np.isfinite(bounds).all() and bounds.low <= 0 <= bounds.high for bounds in form.ranges.values())
    quantised = finish(model, ("int8",), form)
    assert any(node.op_type in ("MatMulInteger", "QuantizeLinear") for node in quantised.proto.graph.node)
    yardstick = Yardstick(model, rows, choose_objective(anatomy(name)), OPTIONS)
    nothing = finish(model, ("int8",), untailored(model, MINMAX))
    assert 0 < yardstick(quantised) < 0.3 * yardstick(nothing), "made-up ranges clip nearly everything"


def test_products_that_stay_in_float_are_neither_quantised_nor_looked_at() -> None:
    model = anatomy(VIT).model
    some = {node.name for node in products_of(model)[::2]}
    form = tailor(model, MINMAX, calibration(VIT, 8), OPTIONS, floats=some)
    assert not some & set(form.products)
    assert set(form.products) | some == {node.name for node in products_of(model)}
    assert set(form.ranges) == {node.inputs[0] for node in products_of(model, some)}
    assert tailor(model, MINMAX, calibration(VIT, 8), OPTIONS, floats=[node.name for node in products_of(model)]).ranges == {}


def outliers() -> tuple[Model, str, CalibrationData]:
    model, tensor = outlier_model()
    rows = np.random.default_rng(1).standard_normal((32, 5, 12)).astype(np.float32)
    return model, tensor, CalibrationData({"x": rows}, None, "noise")


def test_outliers_move_into_the_weights_of_the_tensors_named() -> None:
    model, tensor, rows = outliers()
    smooth = tailor(model, CHANNELS, rows, OPTIONS, smoothed=[tensor])
    assert set(smooth.factors) == {tensor}
    assert smooth.factors[tensor].dtype == np.float32
    assert smooth.factors[tensor].argmax() == 3, "the channel that holds the outliers"
    assert smooth.factors[tensor].min() == 1
    (want,) = run(open_session(model, OPTIONS), rows.inputs)
    errors = [
        float(np.linalg.norm(run(open_session(finish(model, ("int8",), form), OPTIONS), rows.inputs)[0] - want))
        for form in (tailor(model, CHANNELS, rows, OPTIONS), smooth)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("how", ["static", "in float", "no outliers"])
def test_nothing_is_smoothed_where_it_cannot_help(how: str) -> None:
    model, tensor, rows = outliers()
    readers = [node.name for node in products_of(model) if node.inputs[0] == tensor]
    smoothed = [tensor] if how != "no outliers" else [node.inputs[0] for node in products_of(model) if node.inputs[0] != tensor]
    form = tailor(
        model, MINMAX if how == "static" else CHANNELS, rows, OPTIONS, floats=readers if how == "in float" else (), smoothed=smoothed
    )
    assert tensor not in form.factors


def test_what_is_infinite_is_scaled_at_run_time_and_not_smoothed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensor, rows = outliers()
    rows.inputs["x"][0, 0, 3] = 1e38
    read = {node.inputs[0] for node in products_of(model)}
    assert np.isfinite(run(open_session(model, OPTIONS), rows.inputs)[0]).all(), "only inside"
    assert tensor not in tailor(model, CHANNELS, rows, OPTIONS, smoothed=read).factors
    with pytest.raises(InputError, match="infinite or NaN"):
        tailor(model, MINMAX, rows, OPTIONS)

    def half(runs: dict[str, Any], **options: Any) -> Timings:
        return Timings({name: np.full(9, 100.0 if name == "float" else 50.0) for name in runs}, "thread", None)

    monkeypatch.setattr(int8, "time_sessions", half)
    yardstick: Any = lambda model: 0.5  # noqa: E731
    for choice in ("auto", "dynamic"):
        _, trials = choose_scheme(model, ("int8",), yardstick, rows, rows.inputs, OPTIONS, choice=choice, seed=0)
        assert [trial.scheme for trial in trials] == [CHANNELS, TENSOR]


def test_made_up_forms_have_the_shape_of_real_ones() -> None:
    model = anatomy(VIT).model
    real = tailor(model, MINMAX, calibration(VIT, 8), OPTIONS)
    made_up = untailored(model, MINMAX)
    assert made_up.products == real.products
    assert made_up.ranges.keys() == real.ranges.keys()
    sizes = [finish(model, ("int8",), form).weight_bytes for form in (made_up, real)]
    assert sizes[0] == sizes[1]
