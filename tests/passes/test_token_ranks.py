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
from onnxprune.passes.token_ranks import Probed, nested, rank_positions, roll_out
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
    order = (("norm", "a"), ("attention", "early"), ("norm", "b"), ("attention", "late"), ("norm", "c"))
    found = roll_out(axis, Probed({"late": later, "early": earlier}, norms, order))
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


def test_texts_have_no_fixed_positions() -> None:
    model, _ = canonicalise(load(exports.path("bert", "do18-sdpa")))
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    with pytest.raises(CannotCut, match="not fixed"):
        rank_positions(model, axis, CalibrationData(synthetic_feeds(model), None, "a text"), RuntimeOptions())
