"""Every figure of the proof against a few lines of numpy, on models that are small enough to compute by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune import verification
from onnxprune.calibration.data import IGNORED_LABEL, CalibrationData
from onnxprune.calibration.objective import Link, Objective
from onnxprune.errors import InputError
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import (
    TOLERANCE,
    Comparison,
    Fidelity,
    Interval,
    WorstClass,
    Yardstick,
    _worst_class,
    compare,
    masked_equals_sliced,
)
from tests import zoo
from tests.calibration.models import build
from tests.passes.cases import BERT, VIT, anatomy, calibration

OPTIONS = RuntimeOptions()
ROWS, TOKENS, WIDTH, CLASSES = 40, 5, 6, 4
RNG = np.random.default_rng(0)
BEFORE = RNG.standard_normal((WIDTH, CLASSES)).astype(np.float32)
AFTER = (BEFORE + 0.5 * RNG.standard_normal(BEFORE.shape)).astype(np.float32)
ROW_INPUT = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)
TOKEN_INPUT = RNG.standard_normal((ROWS, TOKENS, WIDTH)).astype(np.float32)
MASK = np.arange(TOKENS) < RNG.integers(1, TOKENS + 1, (ROWS, 1))


def linear(weight: np.ndarray, head: str = "", tokens: bool = False) -> Model:
    """``y = head(x @ weight)``."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z" if head else "y"], name="product")]
    if head:
        nodes.append(helper.make_node(head, ["z"], ["y"], name="head", **({} if head == "Exp" else {"axis": -1})))
    shape = ["n", "s", WIDTH] if tokens else ["n", WIDTH]
    return build(nodes, [("x", TensorProto.FLOAT, shape)], {"y": TensorProto.FLOAT}, {"w": weight})


def objective(link: Link = "softmax", tensor: str = "y", tokens: bool = False) -> Objective:
    return Objective("y", tensor, link, CLASSES, tokens, False, "")


def data(labels: np.ndarray | None = None) -> CalibrationData:
    return CalibrationData({"x": ROW_INPUT}, labels, "numbers")


def tokens(labels: np.ndarray | None = None, mask: np.ndarray = MASK) -> CalibrationData:
    return CalibrationData({"x": TOKEN_INPUT}, labels, "numbers", token_mask=mask, sequence_axes={"x": 1})


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def value(interval: Interval | None) -> float:
    assert interval is not None
    return interval.value


def test_classes_without_labels() -> None:
    result = compare(linear(BEFORE), linear(AFTER), data(), objective(), OPTIONS)
    p, q = softmax(ROW_INPUT @ BEFORE), softmax(ROW_INPUT @ AFTER)
    old, new, row = p.argmax(-1), q.argmax(-1), np.arange(ROWS)
    assert 0 < (old != new).sum() < ROWS
    assert value(result.agreement) == pytest.approx((old == new).mean())
    assert value(result.kl) == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert value(result.expected_drop) == pytest.approx((p[row, old] - p[row, new]).mean(), rel=1e-4)
    assert (result.samples, result.output) == (ROWS, "y")
    assert result.drop is result.accuracy_before is result.cosine is None
    assert result.loss == ("1 - agreement", pytest.approx((old != new).mean()))


def test_classes_with_labels() -> None:
    labels = np.random.default_rng(1).integers(0, CLASSES, ROWS)
    result = compare(linear(BEFORE), linear(AFTER), data(labels), objective(), OPTIONS)
    before, after = ((ROW_INPUT @ weight).argmax(-1) == labels for weight in (BEFORE, AFTER))
    assert value(result.accuracy_before) == pytest.approx(before.mean())
    assert value(result.accuracy_after) == pytest.approx(after.mean())
    assert value(result.drop) == pytest.approx(before.mean() - after.mean())
    assert result.loss == ("accuracy drop", value(result.drop))


def test_the_drop_is_paired() -> None:
    """Both models are wrong on the same rows, so the drop is known far better than either accuracy."""
    labels = np.where(np.arange(ROWS) % 2, (ROW_INPUT @ BEFORE).argmax(-1), 0)
    result = compare(linear(BEFORE), linear(BEFORE), data(labels), objective(), OPTIONS)
    assert result.accuracy_before is not None
    assert result.accuracy_before.high - result.accuracy_before.low > 0.1
    assert result.drop == Interval(0, 0, 0)


def test_vectors() -> None:
    result = compare(linear(BEFORE), linear(AFTER), data(), objective("identity"), OPTIONS)
    y0, y = ROW_INPUT @ BEFORE, ROW_INPUT @ AFTER
    cosine = (y0 * y).sum(-1) / np.linalg.norm(y0, axis=-1) / np.linalg.norm(y, axis=-1)
    error = np.linalg.norm(y - y0, axis=-1) / np.linalg.norm(y0, axis=-1)
    assert value(result.cosine) == pytest.approx(cosine.mean(), rel=1e-5)
    assert value(result.relative_error) == pytest.approx(error.mean(), rel=1e-5)
    assert result.agreement is result.kl is None
    assert result.loss == ("1 - cosine", pytest.approx(1 - cosine.mean(), rel=1e-4))


def test_a_vector_that_is_zero_gives_numbers() -> None:
    result = compare(linear(BEFORE), linear(np.zeros_like(BEFORE)), data(), objective("identity"), OPTIONS)
    assert value(result.cosine) == 0
    assert value(result.relative_error) == pytest.approx(1)


@pytest.mark.parametrize("head", ["Softmax", "LogSoftmax"])
def test_probabilities_are_told_from_scores(head: str) -> None:
    scores = compare(linear(BEFORE), linear(AFTER), data(), objective(), OPTIONS)
    given = compare(linear(BEFORE, head), linear(AFTER, head), data(), objective(tensor="z"), OPTIONS)
    for name in ("agreement", "kl", "expected_drop"):
        assert value(getattr(given, name)) == pytest.approx(value(getattr(scores, name)), rel=1e-4), name


def test_a_probability_of_zero_gives_a_finite_divergence() -> None:
    result = compare(linear(BEFORE, "Softmax"), linear(300 * AFTER, "Softmax"), data(), objective(tensor="z"), OPTIONS)
    assert np.isfinite(value(result.kl))


def test_padding_does_not_count() -> None:
    result = compare(linear(BEFORE, tokens=True), linear(AFTER, tokens=True), tokens(), objective(tokens=True), OPTIONS)
    p, q = softmax(TOKEN_INPUT @ BEFORE), softmax(TOKEN_INPUT @ AFTER)
    same = p.argmax(-1) == q.argmax(-1)
    kl = (p * np.log(p / q)).sum(-1)
    per_row = [(same[row][MASK[row]].mean(), kl[row][MASK[row]].mean()) for row in range(ROWS)]
    assert value(result.agreement) == pytest.approx(np.mean([pair[0] for pair in per_row]))
    assert value(result.kl) == pytest.approx(np.mean([pair[1] for pair in per_row]), rel=1e-4)
    unmasked = compare(linear(BEFORE, tokens=True), linear(AFTER, tokens=True), tokens(mask=MASK | True), objective(tokens=True), OPTIONS)
    assert value(unmasked.kl) == pytest.approx(kl.mean(), rel=1e-4)
    assert value(unmasked.kl) != pytest.approx(value(result.kl), rel=1e-3)


def test_ignored_labels_do_not_count() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, CLASSES, (ROWS, TOKENS))
    labels[rng.random(labels.shape) < 0.3] = IGNORED_LABEL
    labels[np.arange(ROWS), 0] = 1  # at least one label in each row
    result = compare(linear(BEFORE, tokens=True), linear(AFTER, tokens=True), tokens(labels), objective(tokens=True), OPTIONS)
    hit = (TOKEN_INPUT @ BEFORE).argmax(-1) == labels
    counted = MASK & (labels != IGNORED_LABEL)
    assert value(result.accuracy_before) == pytest.approx(np.mean([hit[row][counted[row]].mean() for row in range(ROWS)]))


def test_a_row_without_any_label_is_no_wrong_answer() -> None:
    predicted = (TOKEN_INPUT @ BEFORE).argmax(-1)
    labels = np.where(np.arange(ROWS)[:, None] % 4, predicted, IGNORED_LABEL)
    result = compare(linear(BEFORE, tokens=True), linear(BEFORE, tokens=True), tokens(labels), objective(tokens=True), OPTIONS)
    assert value(result.accuracy_before) == pytest.approx(1)
    assert result.drop == Interval(0, 0, 0)
    assert result.samples == ROWS


def test_rows_whose_label_is_ignored_do_not_count() -> None:
    predicted = (ROW_INPUT @ BEFORE).argmax(-1)
    labels = np.where(np.arange(ROWS) % 4, predicted, IGNORED_LABEL)
    assert value(compare(linear(BEFORE), linear(AFTER), data(labels), objective(), OPTIONS).accuracy_before) == 1


def test_labels_that_are_all_ignored_are_no_labels() -> None:
    labels = np.full((ROWS, TOKENS), IGNORED_LABEL)
    result = compare(linear(BEFORE, tokens=True), linear(AFTER, tokens=True), tokens(labels), objective(tokens=True), OPTIONS)
    assert result.drop is result.accuracy_before is None
    assert result.loss[0] == "1 - agreement"


def test_filler_rows_of_a_fixed_batch_do_not_count() -> None:
    fixed = CalibrationData({"x": ROW_INPUT[:10]}, None, "numbers", fixed_rows=4)
    free = CalibrationData({"x": ROW_INPUT[:10]}, None, "numbers")
    results = [compare(linear(BEFORE), linear(AFTER), rows, objective(), OPTIONS) for rows in (fixed, free)]
    assert results[0].samples == 10
    assert value(results[0].kl) == pytest.approx(value(results[1].kl))


@pytest.mark.parametrize("labels", [np.zeros(ROWS, np.float32), np.zeros((ROWS, 3), np.int64)], ids=["numbers", "of another shape"])
def test_labels_that_are_no_classes_of_this_output_are_left_out(labels: np.ndarray) -> None:
    assert compare(linear(BEFORE), linear(AFTER), data(labels), objective(), OPTIONS).drop is None


def test_intervals_hold_their_value_and_shrink_with_rows() -> None:
    few, many = (CalibrationData({"x": np.tile(ROW_INPUT, (times, 1))}, None, "numbers") for times in (1, 9))
    widths = []
    for rows in (few, many):
        result = compare(linear(BEFORE), linear(AFTER), rows, objective(), OPTIONS)
        for interval in (result.agreement, result.kl, result.expected_drop):
            assert interval is not None
            assert interval.low < interval.value < interval.high
        assert result.kl is not None
        widths.append(result.kl.high - result.kl.low)
    assert widths[1] == pytest.approx(widths[0] / 3, rel=0.25)


def test_one_row_has_an_interval_of_no_width() -> None:
    result = compare(linear(BEFORE), linear(AFTER), data().take([0]), objective(), OPTIONS)
    assert result.kl is not None
    assert result.kl.low == result.kl.value == result.kl.high


def test_the_seed_draws_the_resamples() -> None:
    first, again, other = (compare(linear(BEFORE), linear(AFTER), data(), objective(), OPTIONS, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert value(first.kl) == value(other.kl)


def test_a_comparison_is_plain_json() -> None:
    result = compare(linear(BEFORE), linear(AFTER), data(), objective(), OPTIONS)
    found = json.loads(json.dumps(result.as_dict()))
    assert found["agreement"]["value"] == value(result.agreement)
    assert found["cosine"] is None


def test_the_loss_prefers_labels() -> None:
    one = Interval(0.9, 0.8, 1.0)
    assert Comparison(3, "y", agreement=one, drop=Interval(0.02, 0, 0.1)).loss == ("accuracy drop", 0.02)
    assert Comparison(3, "y", agreement=one).loss == ("1 - agreement", pytest.approx(0.1))
    assert Comparison(3, "y", cosine=one).loss == ("1 - cosine", pytest.approx(0.1))


# --- masked against sliced ---------------------------------------------------------------------------------------------------------


def half(name: str) -> dict[str, np.ndarray]:
    return {site.name: np.arange(0, site.units, 2) for site in anatomy(name).sites}


@pytest.mark.parametrize("name", [BERT, VIT])
def test_a_slice_is_its_mask(name: str) -> None:
    result = masked_equals_sliced(anatomy(name), half(name), calibration(name), OPTIONS, "logits")
    assert result.passed
    assert result.samples == 32
    assert result.relative == result.max_abs / result.scale <= TOLERANCE
    assert result.as_dict()["passed"] is True


def test_a_slice_that_lost_another_unit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = verification.slice_model

    def wrong(anatomy: Any, kept: Any) -> Model:
        return real(anatomy, {**kept, "layer.1.ffn": kept["layer.1.ffn"] + 1})

    monkeypatch.setattr(verification, "slice_model", wrong)
    result = masked_equals_sliced(anatomy(BERT), half(BERT), calibration(BERT), OPTIONS, "logits")
    assert not result.passed
    assert result.relative > TOLERANCE


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_a_slice_that_is_not_finite_fails(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load(zoo.path(BERT))
    output = next(node for node in known.proto.graph.node if "logits" in node.output)

    def broken(anatomy: Any, kept: Any) -> Model:
        proto = known.copy_proto()
        node = next(node for node in proto.graph.node if "logits" in node.output)
        node.output[:] = ["unharmed" if name == "logits" else name for name in node.output]
        constant = helper.make_node("Constant", [], ["factor"], name="factor", value_float=factor)
        proto.graph.node.extend([constant, helper.make_node("Mul", ["unharmed", "factor"], ["logits"], name="harm")])
        return known.with_proto(proto)

    assert output.op_type in ("Gemm", "Add")
    monkeypatch.setattr(verification, "slice_model", broken)
    result = masked_equals_sliced(anatomy(BERT), half(BERT), calibration(BERT), OPTIONS, "logits")
    assert not result.passed
    assert result.relative == np.inf


def test_outputs_of_nothing_but_zeros_are_compared_as_they_are() -> None:
    assert Fidelity(0.0, 0.0, 4, TOLERANCE).passed
    assert not Fidelity(1.0, 0.0, 4, TOLERANCE).passed
    assert not Fidelity(float("nan"), 1.0, 4, TOLERANCE).passed


# --- many models against one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("link", "measure"), [("softmax", "kl"), ("identity", "cosine")])
@pytest.mark.parametrize("padded", [False, True])
def test_a_yardstick_measures_what_a_comparison_does(link: Link, measure: str, padded: bool) -> None:
    rows = tokens() if padded else data()
    known = objective(link, tokens=padded)
    models = [linear(weight, tokens=padded) for weight in (BEFORE, AFTER, 2 * AFTER)]
    yardstick = Yardstick(models[0], rows, known, OPTIONS)
    for model in models:
        expected = value(getattr(compare(models[0], model, rows, known, OPTIONS), measure))
        assert yardstick(model) == pytest.approx(1 - expected if measure == "cosine" else expected, abs=1e-12)
    assert yardstick(models[1]) > 0.01


def test_a_yardstick_runs_the_original_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Model] = []

    def watched(model: Model, *args: Any, **options: Any) -> Any:
        ran.append(model)
        return real(model, *args, **options)

    real = verification.stream
    monkeypatch.setattr(verification, "stream", watched)
    original, other = linear(BEFORE), linear(AFTER)
    yardstick = Yardstick(original, data(), objective(), OPTIONS)
    yardstick(other)
    yardstick(other)
    assert ran == [original, other, other]


@pytest.mark.parametrize("link", ["softmax", "identity"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_far(bad: float, link: Link) -> None:
    broken = AFTER.copy()
    broken[0, 0] = bad
    with np.errstate(all="ignore"):
        assert Yardstick(linear(BEFORE), data(), objective(link), OPTIONS)(linear(broken)) == np.inf


def test_filler_rows_are_not_on_the_yardstick() -> None:
    """A model that insists on 16 rows is given rows to fill up, which count for nothing."""
    rows = CalibrationData({"x": ROW_INPUT}, None, "numbers", fixed_rows=16)
    assert len(rows) % 16
    free, fixed = (Yardstick(linear(BEFORE), some, objective(), OPTIONS)(linear(AFTER)) for some in (data(), rows))
    assert fixed == pytest.approx(free, rel=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_a_yardstick_keeps_no_more_than_fits(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """A score for every word of a vocabulary at every token would fill gigabytes; rows are spread, as data may be sorted."""
    monkeypatch.setattr(verification, "_KNOWN_VALUES", 10 * TOKENS * CLASSES)
    rows = tokens() if masked else CalibrationData({"x": TOKEN_INPUT, "ids": TOKEN_INPUT[..., 0]}, None, "numbers")
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["z"]),
            helper.make_node("Unsqueeze", ["ids", "last"], ["i"]),
            helper.make_node("Add", ["z", "i"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", "s", WIDTH]), ("ids", TensorProto.FLOAT, ["n", "s"])],
        {"y": TensorProto.FLOAT},
        {"w": BEFORE, "last": np.array([-1])},
    )
    yardstick = Yardstick(linear(BEFORE, tokens=True) if masked else model, rows, objective(tokens=True), OPTIONS)
    assert len(yardstick.rows) == 10
    assert sum(values.size for values in yardstick._known) <= 10 * TOKENS * CLASSES
    chosen = yardstick.rows.inputs["x"]
    assert np.array_equal(chosen[[0, -1]], TOKEN_INPUT[[0, -1]])


def shaped(model: Model, *sizes: int | str) -> Model:
    """The same model for inputs of this shape only."""
    proto = model.copy_proto()
    for dim, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, sizes, strict=False):
        dim.Clear()
        setattr(dim, "dim_value" if isinstance(size, int) else "dim_param", size)
    return model.with_proto(proto)


def test_a_model_of_fixed_sizes_is_compared_with_one_that_takes_any() -> None:
    rows, known = tokens(), objective(tokens=True)
    before, after = linear(BEFORE, tokens=True), linear(AFTER, tokens=True)
    free = compare(before, after, rows, known, OPTIONS)
    assert compare(before, shaped(after, 3, "s"), rows, known, OPTIONS) == free
    assert compare(before, shaped(after, 1, TOKENS), rows, known, OPTIONS).samples == ROWS
    assert value(compare(before, shaped(after, 1, TOKENS), rows, known, OPTIONS).kl) == pytest.approx(value(free.kl), rel=1e-6)
    insisting = replace(rows, fixed_rows=4)
    with pytest.raises(InputError, match="the first model takes batches of 4 rows only, the second of 3"):
        compare(shaped(before, 4, "s"), shaped(after, 3, "s"), insisting, known, OPTIONS)


def test_the_worst_class_is_the_predicted_one_that_changes_most_often() -> None:
    predicted = np.repeat([0, 1, 2, 3], [20, 10, 5, 4])
    agreement = np.concatenate([np.ones(20), np.tile([0.0, 1.0], 5), [0.0, 1.0, 1.0, 1.0, 1.0], np.zeros(4)])
    assert _worst_class(predicted, agreement) == WorstClass(1, 0.5, 10), "four rows of a class say too little"
    assert _worst_class(predicted[-4:], agreement[-4:]) is None


def test_only_one_class_per_sample_has_a_worst_one() -> None:
    weight = np.eye(WIDTH, CLASSES, dtype=np.float32)
    known = compare(linear(weight), linear(-weight), data(), objective(), RuntimeOptions())
    assert known.worst_class is not None
    assert known.agreement is not None
    assert known.worst_class.agreement <= known.agreement.value
    by_token = linear(weight, tokens=True)
    assert compare(by_token, by_token, tokens(), objective(tokens=True), RuntimeOptions()).worst_class is None
    assert compare(linear(weight), linear(weight), data(), objective("identity"), RuntimeOptions()).worst_class is None
