"""Convolutional networks of transformers as both exporters write them: channels are found, cut, scored and re-fitted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from onnxprune.calibration import Batch
from onnxprune.calibration.objective import Targets, choose_objective
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.autodiff import TARGET
from onnxprune.graph.instrument import MASK, mask_feeds, masked_model
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from onnxprune.passes.refit import refit
from onnxprune.passes.scoring import local_scores, mask_gradients
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests.architectures import ARCHITECTURES, exports, feeds
from tests.graph.pruning import Comparison, anatomy_of, corner_cases, random_kept

NETS = ("resnet-basic", "resnet-bottleneck", "mobilenet-v2", "convnext", "unet")
FORMS = ("do18-eager", "ts17-eager")
CASES = [(name, form) for name in NETS for form in FORMS]


@cache
def anatomy(name: str, form: str) -> Anatomy:
    return anatomy_of(load(exports.path(name, form)))


@pytest.mark.parametrize("name", NETS)
def test_both_exporters_have_the_same_sites(name: str) -> None:
    found = [sorted((site.kind, site.units) for site in anatomy(name, form).sites) for form in FORMS]
    assert found[0] == found[1]
    kinds = {kind for kind, _ in found[0]}
    assert kinds == ({"ffn"} if name == "convnext" else {"channels"})


@pytest.mark.parametrize(("name", "form"), CASES)
def test_slices_are_what_masks_say(name: str, form: str) -> None:
    known = anatomy(name, form)
    compare = Comparison(known, feeds(ARCHITECTURES[name]))
    rng = np.random.default_rng(len(name))
    for kept in [*corner_cases(known.sites)[-3:], *(random_kept(known.sites, rng) for _ in range(3))]:
        compare.check(kept)


def test_what_a_normalised_stream_is_wide_is_refused() -> None:
    refusals = anatomy("convnext", "do18-eager").refusals
    assert "OP301" in {refusal.code for refusal in refusals}
    assert any("normalises" in refusal.reason for refusal in refusals)


def batches(name: str) -> list[Batch]:
    parts = [feeds(ARCHITECTURES[name], batch=16, seed=seed) for seed in range(8)]
    return [Batch(part, np.arange(16) + 16 * number, np.ones(16, bool), None, None) for number, part in enumerate(parts)]


@pytest.mark.parametrize("name", ["resnet-bottleneck", "mobilenet-v2", "convnext"])
def test_pruned_nets_come_back_towards_the_original(name: str) -> None:
    known = anatomy(name, "do18-eager")
    rng = np.random.default_rng(1)
    kept = {site.name: np.sort(rng.choice(site.units, max(3 * site.units // 4, 1), replace=False)) for site in known.sites}
    student = slice_model(known, kept)
    rows = batches(name)
    model, _, _ = refit(known, student, rows[:7], RuntimeOptions(), kept=kept)
    dense, cut, fitted = (run(open_session(each), rows[7].feeds)[0] for each in (known.model, student, model))
    assert np.square(fitted - dense).sum() < 0.7 * np.square(cut - dense).sum()


@pytest.mark.parametrize("name", ["resnet-basic", "mobilenet-v2"])
def test_mask_gradients_are_differences_of_the_loss(name: str) -> None:
    """Residual stages are read in many places: the gradient is that of a mask at all of them, each counted once."""
    known = anatomy(name, "do18-eager")
    kept = {site.name: np.arange(site.units) for site in known.sites}
    rows = batches(name)[:1]
    objective = choose_objective(known, None, None, None)
    targets = Targets(objective, rows, "sampled", 0)
    masked = open_session(masked_model(known), optimize=False)
    ones = mask_feeds(known.sites, {})
    targets.add(run(masked, {**rows[0].feeds, **ones}, [objective.tensor])[0])
    (found,) = mask_gradients(known.model, kept, known.sites, objective, targets, 0, RuntimeOptions())
    target = targets.feeds(0, 0)[TARGET]

    def loss(site: Site, change: np.ndarray) -> np.ndarray:
        feeds = {**rows[0].feeds, **ones, MASK + site.name: (1 + change).astype(np.float32)}
        logits = run(masked, feeds, [objective.tensor])[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return np.asarray(-(target * logs).sum(axis=-1))

    step = 2e-3
    for site in known.sites[:: max(len(known.sites) // 6, 1)]:
        change = step * np.random.default_rng(site.units).standard_normal(site.units)
        expected = (loss(site, change) - loss(site, -change)) / 2
        np.testing.assert_allclose(found[site.name] @ change, expected, rtol=0.1, atol=0.05 * np.abs(expected).max(), err_msg=site.name)


@pytest.mark.parametrize("criterion", ["magnitude", "energy"])
def test_scores_without_gradients(criterion: str) -> None:
    known = anatomy("resnet-basic", "do18-eager")
    kept = {site.name: np.arange(site.units) for site in known.sites}
    scores = local_scores(known.model, kept, known.sites, criterion, batches("resnet-basic")[:1], RuntimeOptions())
    assert all((values > 0).any() and len(values) == len(kept[site]) for site, values in scores.items())
