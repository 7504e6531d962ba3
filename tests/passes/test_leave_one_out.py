"""Measured importance against the masked model."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.instrument import MASK, mask_feeds, masked_model
from onnxprune.passes.leave_one_out import growth_without
from onnxprune.passes.rounds import cut
from onnxprune.runtime.session import open_session, run
from tests.passes.cases import BERT, GPT2, workbench


def test_a_head_is_worth_twice_the_divergence_that_its_mask_adds() -> None:
    bench = workbench(BERT, count=16, compensation="none")
    kept = {site.name: np.arange(site.order % 2, site.units, 2) for site in bench.sites}
    student = cut(bench, kept)
    heads = [site for site in bench.sites if site.kind == "heads"]
    scores = growth_without(bench.anatomy, student.model, kept, heads, bench.objective, bench.targets, bench.options)
    session = open_session(masked_model(bench.anatomy))

    def log_softmax(masks: dict[str, np.ndarray]) -> np.ndarray:
        parts = [run(session, {**batch.feeds, **masks}, [bench.objective.tensor])[0] for batch in bench.batches]
        values = np.concatenate(parts).astype(np.float64)
        return np.asarray(values - np.log(np.exp(values).sum(-1, keepdims=True)))

    dense = log_softmax(mask_feeds(bench.anatomy.sites, {}))

    def divergence(masks: dict[str, np.ndarray]) -> float:
        return float((np.exp(dense) * (dense - log_softmax(masks))).sum(-1).mean())

    now = divergence(mask_feeds(bench.anatomy.sites, kept))
    for site in heads:
        expected = []
        for unit in kept[site.name]:
            masks = mask_feeds(bench.anatomy.sites, kept)
            masks[MASK + site.name][unit] = 0.0
            expected.append(max(2 * (divergence(masks) - now), 0.0))
        np.testing.assert_allclose(scores[site.name], expected, rtol=1e-3, atol=1e-6)
    assert max(values.max() for values in scores.values()) > 1e-4


def test_every_token_counts_where_every_token_is_predicted() -> None:
    bench = workbench(GPT2, count=8)
    dense = {site.name: np.arange(site.units) for site in bench.sites}
    heads = [site for site in bench.sites if site.kind == "heads"][:1]
    calls: list[tuple[int, int]] = []
    scores = growth_without(
        bench.anatomy,
        bench.anatomy.model,
        dense,
        heads,
        bench.objective,
        bench.targets,
        bench.options,
        lambda done, total: calls.append((done, total)),
    )
    assert (scores[heads[0].name] > 0).all()
    assert calls[-1] == (heads[0].units, heads[0].units)
