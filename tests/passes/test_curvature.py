"""Curvature scores: the gradients they are made of, what they predict, and where they cannot be had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import onnxprune
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Targets, choose_objective
from onnxprune.calibration.statistics import SampleMoment
from onnxprune.graph.anatomy import study
from onnxprune.graph.autodiff import ADJOINT, adjoint_model
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.importance.registry import CRITERIA
from onnxprune.passes import curvature, rounds
from onnxprune.passes.curvature import _factors, _sample_by_sample, curvature_scores, obstacle
from onnxprune.passes.readers import Reader
from onnxprune.passes.refit import student_reader
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.scoring import mask_gradients
from onnxprune.passes.workbench import Recipe, Workbench, dense_student
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests.graph.net import FFN, WIDTH, Net
from tests.passes.cases import BERT, GPT2, LLAMA, VIT, workbench


def halved(bench: Workbench) -> dict[str, np.ndarray]:
    return {site.name: np.arange(site.order % 2, site.units, 2) for site in bench.sites}


def readers(bench: Workbench, kept: dict[str, np.ndarray], view: GraphView) -> dict[str, Reader]:
    by_name = {node.name: node for node in view.nodes}
    found = {site.name: student_reader(bench.anatomy, site, site.consumers[0], view, by_name, kept) for site in bench.sites}
    assert all(isinstance(reader, Reader) for reader in found.values())
    return {name: reader for name, reader in found.items() if isinstance(reader, Reader)}


@pytest.mark.parametrize("name", [BERT, VIT, GPT2, LLAMA])
def test_what_is_read_times_what_the_loss_feels_is_the_mask_gradient(name: str) -> None:
    """Of a pruned student: the two factors come from the same rows in the same order, whatever lies between product and residual sum."""
    bench = workbench(name)
    student = cut(bench, halved(bench))
    view = GraphView(student.model)
    found = readers(bench, student.kept, view)
    batch = bench.batches[0]
    model, felt = adjoint_model(
        student.model,
        [reader.target for reader in found.values()],
        [reader.tensor for reader in found.values()],
        bench.objective.tensor,
        bench.objective.link,
        batch.feeds,
    )
    assert felt == {reader.target for reader in found.values()}
    names = [*(ADJOINT + tensor for tensor in felt), *(reader.tensor for reader in found.values())]
    values = dict(zip(names, run(open_session(model), {**batch.feeds, **bench.targets.feeds(0, 1)}, names), strict=True))
    masks = next(iter(mask_gradients(student.model, student.kept, bench.sites, bench.objective, bench.targets, 1, bench.options)))
    for site, reader in found.items():
        weight = view.value(reader.node.inputs[reader.slot])
        assert weight is not None
        product = reader.rows(values[reader.tensor]) * (reader.gradients(values[ADJOINT + reader.target]) @ reader.matrix(weight).T)
        by_unit = product @ (reader.units()[:, None] == np.arange(len(student.kept[site])))
        by_sample = by_unit.reshape(len(batch), -1, by_unit.shape[1]).sum(axis=1)
        expected = masks[site]
        np.testing.assert_allclose(by_sample[batch.valid], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_units_of_no_use_cost_nothing_and_go_first() -> None:
    bench = workbench(BERT)
    site = next(site for site in bench.sites if site.kind == "ffn")
    leaf = site.consumers[0].leaf
    student = dense_student(bench.anatomy, bench.sites)
    weight = student.model.weights[leaf.tensor].copy()
    np.moveaxis(weight, leaf.axis, 0)[::3] = 0
    model = replace(student.model, weights={**student.model.weights, leaf.tensor: weight})
    scores = curvature_scores(bench.anatomy, model, student.kept, bench.sites, bench.objective, bench.targets, 1, bench.options)[site.name]
    dead = np.zeros(site.units, bool)
    dead[::3] = True
    assert scores[dead].max() < 1e-6 * scores[~dead].max()


def moments(rows: np.ndarray, real: np.ndarray | None = None) -> SampleMoment:
    """Of rows [samples, tokens, width], real or not [samples, tokens]."""
    found = SampleMoment(rows.shape[2])
    there = np.ones(rows.shape[:2], bool) if real is None else real
    found.add(rows.reshape(-1, rows.shape[2]).astype(np.float32), there.reshape(-1), len(rows))
    return found


def test_where_all_tokens_feel_the_same_their_errors_add_up() -> None:
    """As in front of a mean over tokens: what each one's error has of its own does not count, however large it is."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 1, 5)) + 10 * rng.standard_normal((40, 6, 5)) * [0, 0, 0, 1, 1]
    gradient = np.tile(rng.standard_normal(3), (40, 6, 1))
    factors = _factors(moments(x), moments(gradient), 40, centred=False)
    assert factors is not None
    for change in rng.standard_normal((8, 5, 3)):
        felt = np.square(np.einsum("spi,io,spo->s", x, change, gradient)).mean()
        np.testing.assert_allclose(np.trace(factors[0] @ change @ factors[1] @ change.T), felt, rtol=1e-3)


def test_a_mean_over_tokens_feels_the_same_of_short_and_of_long_samples() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 30, 200)
    real = np.arange(30) < lengths[:, None]
    x = np.tile(rng.standard_normal((200, 1, 4)), (1, 30, 1))
    gradient = np.tile(rng.standard_normal((1, 1, 3)) / lengths[:, None, None], (1, 30, 1))
    factors = _factors(moments(x, real), moments(gradient, real), 200, centred=False)
    assert factors is not None
    for change in rng.standard_normal((8, 4, 3)):
        felt = np.square(np.einsum("spi,io,spo,sp->s", x, change, gradient, real)).mean()
        np.testing.assert_allclose(np.trace(factors[0] @ change @ factors[1] @ change.T), felt, rtol=0.2)


def test_where_one_token_is_read_moments_are_those_of_all() -> None:
    rng = np.random.default_rng(1)
    x, gradient = rng.standard_normal((50, 1, 4)) + 3, rng.standard_normal((50, 1, 3))
    factors = _factors(moments(x), moments(gradient), 50, centred=True)
    assert factors is not None
    expected = np.kron(np.cov(x[:, 0].T, bias=True), gradient[:, 0].T @ gradient[:, 0] / 50)
    np.testing.assert_allclose(np.kron(*factors), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_always_the_same_costs_nothing_beside_a_bias(seed: int) -> None:
    """Its variation is rounding, which may be below zero."""
    rng = np.random.default_rng(seed)
    x = np.tile(rng.standard_normal(7) * 3, (30, 5, 1))
    felt = moments(rng.standard_normal((30, 5, 3)))
    assert _factors(moments(x), felt, 30, centred=True) is None
    assert _factors(moments(x), felt, 30, centred=False) is not None
    assert _factors(moments(rng.standard_normal((30, 5, 7))), moments(np.zeros((30, 5, 3))), 30, centred=True) is None


BLOCK = """
<ir_version: 9, opset_import: ["": 18]>
block (float[b, n, 6] x, float[6, 12] up, float[12, 6] down) => (float[b, 6] embedding) {
  one = Constant <value_ints: ints = [1]> ()
  rows = Constant <value_ints: ints = [-1, 6]> ()
  turned = Transpose <perm = [PERM]> (x)
  shape = Shape (turned)
  flat = Reshape (turned, rows)
  wide = MatMul (flat, up)
  active = Relu (wide)
  narrow = MatMul (active, down)
  whole = Reshape (narrow, shape)
  back = Transpose <perm = [PERM]> (whole)
  y = Add (x, back)
  embedding = ReduceMean <keepdims = 0> (y, one)
}
"""


def block(tokens_first: bool) -> Workbench:
    """A feed-forward block in front of a mean over tokens, its rows sample by sample or token by token."""
    proto = onnx.parser.parse_model(BLOCK.replace("PERM", "1, 0, 2" if tokens_first else "0, 1, 2"))
    rng = np.random.default_rng(0)
    for name, shape in (("up", (6, 12)), ("down", (12, 6))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    del proto.graph.input[1:]
    model, profile = canonicalise(load(proto))
    known = study(model, profile)
    objective = choose_objective(known)
    x = rng.standard_normal((32, 1, 6)) + 3 * rng.standard_normal((32, 10, 6))
    batches = list(CalibrationData({"x": x.astype(np.float32)}, None, "made up").batches(8, trim=False))
    targets = Targets(objective, batches, "sampled", 0)
    session = open_session(with_outputs(model, [objective.tensor]))
    for batch in batches:
        targets.add(run(session, batch.feeds, [objective.tensor])[0])
    return Workbench(known, known.sites, objective, batches, targets, RuntimeOptions(), Recipe())


def test_rows_that_are_not_in_the_order_of_samples_are_not_taken_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch.nn.MultiheadAttention, which computes with tokens on the first axis: there all rows are one crowd."""

    def scores(bench: Workbench) -> np.ndarray:
        student = dense_student(bench.anatomy, bench.sites)
        (found,) = curvature_scores(
            bench.anatomy, student.model, student.kept, bench.sites, bench.objective, bench.targets, 1, bench.options
        ).values()
        return found

    by_sample, by_token = block(tokens_first=False), block(tokens_first=True)
    for bench in (by_sample, by_token):
        (reader,) = readers(bench, dense_student(bench.anatomy, bench.sites).kept, bench.anatomy.view).values()
        assert _sample_by_sample(bench.anatomy, reader) is (bench is by_sample)
    apart, crowd = scores(by_sample), scores(by_token)
    assert not np.allclose(apart, crowd, rtol=0.1)
    monkeypatch.setattr(curvature, "_sample_by_sample", lambda *rest: False)
    np.testing.assert_allclose(scores(by_sample), crowd, rtol=1e-3)


def test_scores_of_a_student_are_those_of_its_kept_units() -> None:
    bench = workbench(BERT, importance="kfac")
    kept = {**halved(bench), "layer.1.heads": np.zeros(0, np.int64)}
    scores = score(bench, cut(bench, kept), 1)
    assert {name: len(values) for name, values in scores.saliency.items()} == {name: len(units) for name, units in kept.items()}
    assert all((values >= 0).all() for values in scores.saliency.values())


def test_large_models_and_sites_without_a_plain_reader_are_obstacles() -> None:
    bench = workbench(BERT)
    site = bench.sites[0]
    assert obstacle(bench.anatomy, site) is None
    paged = replace(bench.anatomy, model=replace(bench.anatomy.model, paged=True))
    assert "too large" in str(obstacle(paged, site))
    assert obstacle(bench.anatomy, replace(site, consumers=site.consumers * 2)) == "several matrices read this axis"


def test_units_of_unequal_size_are_scored_by_their_masks() -> None:
    """A projection that reads heads and neurons side by side: a head is four columns, a neuron is one."""
    net, x = Net(), "x"
    for _ in range(2):
        q, k, v = (net.heads(net.linear(x)) for _ in range(3))
        hidden = net("Tanh", net.linear(x, WIDTH, FFN))
        x = net.add(x, net.linear(net("Concat", net.attend(q, k, v), hidden, axis=-1), WIDTH + FFN, WIDTH))
    model = Model.from_proto(net.done(x))
    data = {"x": np.random.default_rng(0).standard_normal((32, 6, WIDTH)).astype(np.float32)}
    result = onnxprune.prune(model, calib=data, target_macs="60%", dry_run=True)
    assert sum(result.plan.removed.values()) > 0


def test_what_curvature_cannot_score_is_scored_by_fisher_in_the_same_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(BERT, importance="kfac")
    student = dense_student(bench.anatomy, bench.sites)
    first = bench.sites[0]
    monkeypatch.setattr(rounds, "obstacle", lambda _, site: "why" if site is first else None)
    mixed = score(bench, student, 1).saliency
    fisher = score(replace(bench, recipe=replace(bench.recipe, importance="fisher")), student, 1).saliency
    assert list(mixed) == [site.name for site in bench.sites]
    np.testing.assert_array_equal(mixed[first.name], fisher[first.name])
    for site in bench.sites[1:]:
        assert 0 < mixed[site.name].mean() <= 2 * fisher[site.name].mean()
        assert not np.array_equal(mixed[site.name], fisher[site.name])


def test_where_nothing_is_left_nothing_is_scored() -> None:
    """Sites of one kind may be empty while others still have units."""
    bench = workbench(VIT, 8, compensation="none")
    empty = cut(bench, {site.name: np.zeros(0, np.int64) for site in bench.sites})
    for importance in CRITERIA:
        scores = score(replace(bench, recipe=replace(bench.recipe, importance=importance)), empty, 1).saliency
        assert {name: values.shape for name, values in scores.items()} == {site.name: (0,) for site in bench.sites}, importance
