"""Scores of tokens that are fitted to the attention to come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.graph.profile import synthetic_feeds
from onnxprune.graph.token_axis import TokenAxis
from onnxprune.graph.token_cut import study_tokens
from onnxprune.passes import token_predictor
from onnxprune.passes.token_predictor import attention_to_come, fit_predictors
from onnxprune.passes.token_ranks import Probed
from onnxprune.runtime.session import RuntimeOptions
from tests.architectures import exports

ORDER = (("attention", "first"), ("features", "a"), ("attention", "second"), ("features", "b"), ("attention", "third"))


def axis_of(name: str, variant: str = "do18-sdpa") -> TokenAxis:
    axis = study_tokens(canonicalise(load(exports.path(name, variant)))[0])
    assert isinstance(axis, TokenAxis)
    return axis


def test_attention_to_come_is_that_of_later_maps_from_tokens_that_are_read() -> None:
    rng = np.random.default_rng(0)
    maps = {name: rng.dirichlet(np.ones(3), (1, 4)) for name in ("first", "second", "third")}
    maps = {name: np.concatenate([table, np.zeros((1, 4, 1))], axis=2) for name, table in maps.items()}  # nobody sees the last token
    probed = Probed(maps, {name: np.ones((1, 4, 2)) for name in "ab"}, ORDER)
    axis = axis_of("vit")
    found = attention_to_come(replace(axis, leading=1), probed)
    np.testing.assert_allclose(found["b"], maps["third"][:, 0])
    np.testing.assert_allclose(found["a"], maps["second"][:, 0] + maps["third"][:, 0])
    found = attention_to_come(replace(axis, leading=0), probed)
    np.testing.assert_allclose(found["b"], maps["third"][:, :3].sum(1))


def test_the_fit_finds_what_attention_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of any length, rows of three lengths with padding, and attention that falls with one direction of them."""
    axis, rng = replace(axis_of("vit"), leading=1), np.random.default_rng(0)
    direction = rng.standard_normal(8)

    def batches() -> Iterator[Probed]:
        for _ in range(24):
            features = rng.standard_normal((4, 20, 8)).astype(np.float32) * rng.uniform(0.1, 9, (4, 20, 1)).astype(np.float32)
            wants = np.exp(features @ direction / np.linalg.norm(features, axis=2))
            wants[np.arange(20) >= np.array([[20], [12], [17], [5]])] = 0
            table = np.repeat((wants / wants.sum(1, keepdims=True))[:, None], 20, axis=1)
            yield Probed({"first": table, "second": table}, {"a": features, "b": features}, ORDER[:4])

    monkeypatch.setattr(token_predictor, "probe", lambda *_: (axis, batches()))
    found: dict[str, Any] = fit_predictors(None, None, None)  # type: ignore[arg-type]
    assert set(found) == {"a"}  # behind the other place nothing attends
    cosine = found["a"] @ direction / np.linalg.norm(found["a"]) / np.linalg.norm(direction)
    assert cosine > 0.99


def test_every_place_with_attention_behind_it_has_weights_as_wide_as_its_features() -> None:
    model, _ = canonicalise(load(exports.path("deit-teacher", "do18-eager")))
    rng = np.random.default_rng(0)
    feeds = {key: rng.standard_normal((8, *array.shape[1:])).astype(np.float32) for key, array in synthetic_feeds(model).items()}
    found = fit_predictors(model, CalibrationData(feeds, None, "noise"), RuntimeOptions())
    assert [len(weights) for weights in found.values()] == [32] * len(found)
    assert 0 < len(found) <= len(axis_of("deit-teacher", "do18-eager").places)
