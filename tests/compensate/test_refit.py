"""Re-fitting a pruned model: it does nothing where nothing is missing, never makes things worse, and looks at real tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from onnxprune.calibration import Batch, load_calibration
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model, load
from onnxprune.graph.slicing import slice_model
from onnxprune.passes import refit as module
from onnxprune.passes.refit import Changes, Method, SiteFit, refit
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of

OPTIONS = RuntimeOptions()


@cache
def zoo_anatomy(name: str) -> Anatomy:
    return anatomy_of(load(zoo.path(name)))


def batches_of(anatomy: Anatomy, name: str, rows: int, seed: int = 0) -> list[Batch]:
    feeds = zoo.feeds(name, batch=rows, seq=12, seed=seed)
    if "attention_mask" in feeds and not name.startswith(("gpt2", "llama")):
        lengths = np.random.default_rng(seed).integers(4, 13, rows)
        feeds["attention_mask"] = (np.arange(12) < lengths[:, None]).astype(np.int64)
    data = load_calibration({key: feeds[key] for key in anatomy.model.input_names}, anatomy.model)
    return list(data.batches(32, trim=False))


def half_ffn(anatomy: Anatomy) -> Model:
    rng = np.random.default_rng(0)
    return slice_model(anatomy, {s.name: np.sort(rng.choice(s.units, s.units // 2, False)) for s in anatomy.sites if s.kind == "ffn"})


def outputs(model: Model, batches: Sequence[Batch]) -> np.ndarray:
    session = open_session(model)
    return np.concatenate([run(session, batch.feeds)[0] for batch in batches])


def divergence(model: Model, student: Model, batches: Sequence[Batch]) -> float:
    """Mean KL of the class distributions, in nats."""
    logs = []
    for each in (model, student):
        scores = outputs(each, batches).astype(np.float64)
        logs.append(scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)) - scores.max(-1, keepdims=True))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def by_site(reports: Sequence[SiteFit]) -> dict[str, SiteFit]:
    return {report.site: report for report in reports}


@pytest.mark.parametrize("name", ["bert-sdpa-do18", "vit-eager-ts17", "llama-sdpa-do23"])
def test_a_model_that_lost_nothing_is_not_changed(name: str) -> None:
    anatomy = zoo_anatomy(name)
    model, changes, reports = refit(anatomy, anatomy.model, batches_of(anatomy, name, 40), OPTIONS)
    assert model is anatomy.model
    assert changes == {}
    assert {report.reason for report in reports} == {"nothing to correct"}


@pytest.mark.parametrize("method", ["refit", "scale"])
@pytest.mark.parametrize("name", ["bert-sdpa-do18", "gpt2-eager-ts17", "vit-sdpa-do23"])
def test_it_brings_the_outputs_back_towards_the_dense_model(name: str, method: Method) -> None:
    anatomy = zoo_anatomy(name)
    student = half_ffn(anatomy)
    model, changes, reports = refit(anatomy, student, batches_of(anatomy, name, 256), OPTIONS, method=method)
    fresh = batches_of(anatomy, name, 96, seed=7)
    before, after = divergence(anatomy.model, student, fresh), divergence(anatomy.model, model, fresh)
    assert after < (0.8 if method == "refit" else 1.0) * before
    assert changes
    assert all(report.error < 1 for report in reports if report.applied)
    assert all(report.error >= 1 or report.reason for report in reports if not report.applied)
    assert model.parameters == student.parameters


def test_rows_kept_out_choose_the_ridge_that_leaves_least_of_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bert-sdpa-do18"
    anatomy = zoo_anatomy(name)
    student, batches = half_ffn(anatomy), batches_of(anatomy, name, 64)

    first = next(site for site in anatomy.sites if site.name == "layer.0.ffn").consumers[0].leaf

    def fitted_with(ridges: tuple[float, ...]) -> tuple[float, np.ndarray]:
        monkeypatch.setattr(module, "_RIDGES", ridges)
        _, changes, reports = refit(anatomy, student, batches, OPTIONS)
        return by_site(reports)["layer.0.ffn"].error, changes[first.node.name, first.slot]

    choices = (1e-6, 1e-3, 0.3)
    monkeypatch.setattr(module, "_ENOUGH", 1e9)
    alone = [fitted_with((ridge,)) for ridge in choices]
    best = min(range(3), key=lambda number: alone[number][0])
    assert best != 0
    error, weights = fitted_with(choices)
    assert error == alone[best][0]
    np.testing.assert_array_equal(weights, alone[best][1])
    monkeypatch.setattr(module, "_ENOUGH", 0)
    np.testing.assert_array_equal(fitted_with(choices)[1], fitted_with(choices[:1])[1])


def test_the_student_given_and_the_dense_model_are_not_touched() -> None:
    anatomy = zoo_anatomy("bert-sdpa-do18")
    student = half_ffn(anatomy)
    before = [student.to_proto().SerializeToString(deterministic=True), anatomy.model.to_proto().SerializeToString(deterministic=True)]
    refit(anatomy, student, batches_of(anatomy, "bert-sdpa-do18", 40), OPTIONS)
    after = [student.to_proto().SerializeToString(deterministic=True), anatomy.model.to_proto().SerializeToString(deterministic=True)]
    assert before == after


def test_a_block_that_keeps_nothing_is_skipped_and_the_next_ones_correct_for_it() -> None:
    name = "bert-sdpa-do18"
    anatomy = zoo_anatomy(name)
    student = slice_model(anatomy, {"layer.0.ffn": np.zeros(0, np.int64)})
    model, _, reports = refit(anatomy, student, batches_of(anatomy, name, 256), OPTIONS)
    assert by_site(reports)["layer.0.ffn"] == SiteFit("layer.0.ffn", False, 1.0, "nothing is left to fit")
    assert by_site(reports)["layer.1.heads"].applied
    fresh = batches_of(anatomy, name, 96, seed=7)
    assert divergence(anatomy.model, model, fresh) < divergence(anatomy.model, student, fresh)


def with_tokens(batches: Sequence[Batch], seed: int, left: bool) -> list[Batch]:
    """The same sentences with other garbage in the padding, which stands on the right or on the left."""
    rng = np.random.default_rng(seed)
    changed = []
    for batch in batches:
        assert batch.token_mask is not None
        mask = batch.token_mask[:, ::-1] if left else batch.token_mask
        ids = np.where(mask, batch.feeds["input_ids"], rng.integers(3, zoo.VOCABULARY, mask.shape))
        feeds = {**batch.feeds, "input_ids": ids, "attention_mask": mask.astype(np.int64)}
        changed.append(Batch(feeds, batch.index, batch.valid, mask.copy(), batch.labels))
    return changed


def same(a: Changes, b: Changes, tolerance: float) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[key], b[key], rtol=0, atol=tolerance) for key in a)


@pytest.mark.parametrize(("name", "left"), [("bert-sdpa-do18", False), ("minilm-sdpa-do18", False), ("minilm-sdpa-do18", True)])
def test_padding_does_not_count(name: str, left: bool) -> None:
    anatomy = zoo_anatomy(name)
    student = half_ffn(anatomy)
    batches = batches_of(anatomy, name, 64)
    clean, poisoned = (refit(anatomy, student, with_tokens(batches, seed, left), OPTIONS)[1] for seed in (0, 1))
    assert clean
    assert same(clean, poisoned, 1e-6)
    unmasked = [Batch(batch.feeds, batch.index, batch.valid, None, None) for batch in with_tokens(batches, 1, left)]
    assert not same(clean, refit(anatomy, student, unmasked, OPTIONS)[1], 1e-3)


def small(kind: str = "plain") -> Anatomy:
    """x + FFN(x), as most of the forms a branch can have."""
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    branch = net.linear(hidden, FFN, WIDTH)
    if kind == "scaled":
        branch = net("Mul", branch, net.weight(WIDTH, scale=2.0))
    elif kind == "gemm":
        flat = net("Reshape", hidden, net.ints(-1, FFN))
        product = net("Gemm", flat, net.weight(WIDTH, FFN), net.weight(WIDTH), alpha=0.25, transB=1)
        shape = net("Concat", net("Slice", net("Shape", "x"), net.ints(0), net.ints(2)), net.ints(WIDTH), axis=0)
        branch = net("Reshape", product, shape)
    return anatomy_of(net.done(net.add("x", branch)))


def rows_of(count: int, seed: int, filler: int = 0) -> list[Batch]:
    """Batches of eight rows [8, 6, WIDTH]; the last ``filler`` rows of each do not count and hold garbage."""
    rng = np.random.default_rng(seed)
    batches = []
    for start in range(0, count, 8):
        x = rng.standard_normal((8, 6, WIDTH)).astype(np.float32)
        valid = np.arange(8) < 8 - filler
        x[~valid] = 1e3 * np.random.default_rng(start + filler).standard_normal((filler, 6, WIDTH))
        batches.append(Batch({"x": x}, np.arange(start, start + 8), valid, None, None))
    return batches


@pytest.mark.parametrize("kind", ["plain", "scaled", "gemm"])
def test_the_fit_is_the_least_squares_solution_whatever_scales_the_branch(kind: str) -> None:
    anatomy = small(kind)
    student = slice_model(anatomy, {"layer.0.ffn": np.arange(0, FFN, 2)})
    batches, fresh = rows_of(512, 0), rows_of(256, 1)
    model, _, (report,) = refit(anatomy, student, batches, OPTIONS)
    assert report.applied
    dense, cut, fitted = (outputs(each, fresh) for each in (anatomy.model, student, model))
    gained = np.sum((fitted - dense) ** 2) / np.sum((cut - dense) ** 2)
    assert gained == pytest.approx(report.error, rel=0.15)
    # The best that any map of the kept neurons and an intercept can do, solved directly.
    tensor = anatomy.sites[0].consumers[0].tensor
    session = open_session(with_outputs(anatomy.model, [tensor]))
    hidden = [run(session, batch.feeds, [tensor])[0].reshape(-1, FFN)[:, ::2] for batch in batches]
    target = (outputs(anatomy.model, batches) - np.concatenate([batch.feeds["x"] for batch in batches])).reshape(-1, WIDTH)
    design = np.hstack([np.concatenate(hidden), np.ones((len(target), 1))])
    best = np.linalg.lstsq(design, target, rcond=None)[1].sum()
    reached = np.sum((outputs(model, batches) - outputs(anatomy.model, batches)) ** 2)
    assert best <= reached <= 1.02 * best


def test_filler_rows_of_a_fixed_batch_do_not_count() -> None:
    anatomy = small()
    student = slice_model(anatomy, {"layer.0.ffn": np.arange(5)})
    padded = rows_of(256, 0, filler=3)
    trimmed = [Batch({"x": batch.feeds["x"][:5]}, batch.index[:5], batch.valid[:5], None, None) for batch in padded]
    for batch, other in zip(padded, trimmed, strict=True):
        assert np.array_equal(batch.feeds["x"][:5], other.feeds["x"])
    assert same(*(refit(anatomy, student, batches, OPTIONS)[1] for batches in (padded, padded)), 0.0)
    garbage = [Batch({"x": np.where(b.valid[:, None, None], b.feeds["x"], -7)}, b.index, b.valid, None, None) for b in padded]
    assert same(refit(anatomy, student, padded, OPTIONS)[1], refit(anatomy, student, garbage, OPTIONS)[1], 1e-6)


def test_a_fit_that_does_not_hold_on_other_rows_is_not_applied() -> None:
    """The rows that are fitted and the rows that judge come from two different worlds."""
    anatomy = small()
    student = slice_model(anatomy, {"layer.0.ffn": np.arange(5)})
    batches = rows_of(64, 0)
    for batch in batches:
        judges = batch.index % 16 == 0
        batch.feeds["x"][~judges] += 4
        batch.feeds["x"][judges] -= 4
    model, changes, (report,) = refit(anatomy, student, batches, OPTIONS)
    assert not report.applied
    assert report.error >= 1
    assert "rows kept out" in report.reason
    assert changes == {}
    assert model is student


def test_row_weights_shift_the_fit_to_the_rows_they_favour() -> None:
    anatomy = small()
    student = slice_model(anatomy, {"layer.0.ffn": np.arange(5)})
    batches = rows_of(512, 0)
    for batch in batches:
        batch.feeds["x"][:, 1:] += 2.0  # the first token lives elsewhere

    def first_only(batch: Batch, read: tuple[int, ...]) -> np.ndarray:
        weight = np.full((len(batch), 6), 1e-3, np.float32)
        weight[:, 0] = 1
        return weight.reshape(-1)

    fresh = rows_of(128, 1)
    errors = []
    for weigh in (None, first_only):
        model = refit(anatomy, student, batches, OPTIONS, row_weight=weigh)[0]
        errors.append(np.sum((outputs(model, fresh)[:, 0] - outputs(anatomy.model, fresh)[:, 0]) ** 2))
    assert errors[1] < 0.95 * errors[0]
