"""Positions that stay in every sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.graph.profile import synthetic_feeds
from onnxprune.graph.token_axis import TokenAxis
from onnxprune.graph.token_cut import study_tokens
from onnxprune.graph.token_plan import CannotCut
from onnxprune.passes.token_ranks import Probed, nested, rank_positions, roll_out, thresholds
from onnxprune.runtime.session import RuntimeOptions
from tests.architectures import exports


@given(st.permutations(range(7)), st.permutations(range(7)), st.integers(1, 7), st.integers(1, 7))
def test_what_stays_behind_a_place_stays_in_front_of_it(first: list[int], second: list[int], many: int, few: int) -> None:
    few, many = sorted((few, many))
    below, above = nested([np.array(first), np.array(second)], [many, few])
    assert (len(below), len(above)) == (many, few)
    assert set(above) == set(second[:few])
    assert set(above) <= set(below)
    assert list(below) == sorted(below)


def test_attention_is_followed_from_the_tokens_that_are_read() -> None:
    """Token 0 reads token 2 behind the second place; in front of it, token 2 reads token 1."""
    axis = study_tokens(canonicalise(load(exports.path("vit", "do18-sdpa")))[0])
    assert isinstance(axis, TokenAxis)
    axis = replace(axis, leading=1, pools={})
    later, earlier = np.eye(3)[None].copy(), np.eye(3)[None].copy()
    later[0, 0] = [0, 0, 1]
    earlier[0, 2] = [0, 1, 0]
    norms = {"a": np.ones((1, 3)), "b": np.array([[1.0, 1.0, 10.0]]), "c": np.ones((1, 3))}
    order = (("features", "a"), ("attention", "early"), ("features", "b"), ("attention", "late"), ("features", "c"))
    features = {place: norm[:, :, None] for place, norm in norms.items()}
    found = roll_out(axis, Probed({"late": later, "early": earlier}, features, order))
    np.testing.assert_allclose(found["c"], [[1, 0, 0]])
    np.testing.assert_allclose(found["b"], [[0.5, 0, 5]])
    np.testing.assert_allclose(found["a"], [[0.5, 0.25, 0.25]])


def test_every_place_has_a_ranking_with_what_is_read_in_front() -> None:
    model, _ = canonicalise(load(exports.path("deit-teacher", "do18-eager")))
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    rng = np.random.default_rng(0)
    feeds = {key: rng.standard_normal((4, *array.shape[1:])).astype(np.float32) for key, array in synthetic_feeds(model).items()}
    ranks = rank_positions(model, axis, CalibrationData(feeds, None, "noise"), RuntimeOptions())
    assert len(ranks) == len(axis.places)
    for rank in ranks.values():
        assert sorted(rank) == list(range(axis.count or 0))
        assert sorted(rank[: axis.leading]) == list(range(axis.leading))


def test_thresholds_leave_the_share_that_is_asked_for_on_average() -> None:
    rng = np.random.default_rng(0)
    rows = [{place: rng.dirichlet(np.ones(length)) for place in "ab"} for length in (9, 33, 17, 25)]
    found = thresholds(rows, [("a", 0.7), ("b", 0.4)], leading=1)
    first, second, numbers = [], [], set()
    for row in rows:
        stays = row["a"] >= found[0] * row["a"].mean()
        stays[0] = True
        later = stays & (row["b"] >= found[1] * row["b"][stays].mean())
        first.append(stays[1:].mean())
        second.append(later[1:].mean())
        numbers.add(round(second[-1], 2))
    assert np.mean(first) == pytest.approx(0.7, abs=0.03)
    assert np.mean(second) == pytest.approx(0.4, abs=0.03)
    assert len(numbers) > 1  # each row has as many as it needs
    assert thresholds(rows, [("a", 1.0)], leading=1) == [0.0]


def test_texts_have_no_fixed_positions() -> None:
    model, _ = canonicalise(load(exports.path("bert", "do18-sdpa")))
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    with pytest.raises(CannotCut, match="not fixed"):
        rank_positions(model, axis, CalibrationData(synthetic_feeds(model), None, "a text"), RuntimeOptions())
