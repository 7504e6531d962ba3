"""Which tokens a cut graph says it keeps, against what attention and features decide."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.errors import Refusal
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import synthetic_feeds, take_profile
from onnxprune.graph.token_cut import cut_tokens, spelled_out, study_tokens
from onnxprune.graph.token_plan import POLICIES, Policy, TokenPlan
from onnxprune.graph.token_trace import TRACE
from onnxprune.runtime.session import open_session, run
from tests.graph.test_tokens import images, plan_of, prepared, with_hidden_keys, with_lines

SHARES = (0.8, 0.8, 0.5, 0.3, 0.1)


@cache
def trained() -> Model:
    """A trained network of 50 tokens and five places."""
    return spelled_out(canonicalise(load(Path(__file__).parents[2] / "samples" / "vision" / "model.onnx"))[0])


def falling(policy: Policy) -> TokenPlan:
    axis = study_tokens(trained())
    assert not isinstance(axis, Refusal)
    plan = plan_of(axis, 0.5, policy)
    cuts = [replace(cut, share=share) for cut, share in zip(plan.cuts, SHARES, strict=True)]
    if policy == "static":
        cuts = [replace(cut, positions=(0, *range(1 + number, 50 - 8 * number))) for number, cut in enumerate(cuts)]
    if policy == "grid":
        return with_lines(TokenPlan(policy, tuple(cuts)), (0, 8, 16, 24, 32))
    return TokenPlan(policy, tuple(cuts))


def traced(model: Model, plan: TokenPlan, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    names = [f"{TRACE}.{number}" for number in range(len(plan.cuts) + 1)]
    return run(open_session(cut_tokens(model, plan, traced=True)), feeds, names)


def test_what_stays_by_attention_is_what_hiding_keys_one_place_after_the_other_keeps() -> None:
    model, plan = trained(), falling("drop")
    axis, profile = study_tokens(model), take_profile(model)
    assert not isinstance(axis, Refusal)
    feeds = images(model)
    session = open_session(with_hidden_keys(model, profile, axis))
    hidden = [np.zeros((3, 50), np.float32) for _ in axis.places]
    there = np.ones((3, 50), bool)
    found = traced(model, plan, feeds)
    assert (found[0] == np.arange(50)).all()
    for number, place in enumerate(axis.places):
        maps = run(session, {**feeds, **{f"hidden.{n}": array for n, array in enumerate(hidden)}}, [place.softmax.outputs[0]])[0]
        score = np.where(there, maps[:, :, 0].mean(axis=1), -1)
        score[:, 0] = np.inf
        keep = 1 + int(np.ceil(SHARES[number] * 49 - 1e-4))
        for row in range(3):
            there[row, np.argsort(-score[row])[keep:]] = False
            assert sorted(found[number + 1][row]) == np.flatnonzero(there[row]).tolist()
        for later in range(number, len(axis.places)):
            hidden[later] = np.where(there, 0, -1e4).astype(np.float32)


def test_those_that_merge_stand_where_the_token_was_that_took_them_in() -> None:
    model, plan = trained(), falling("merge")
    place = plan.cuts[0].place
    proto = model.copy_proto()
    proto.graph.output.append(helper.make_tensor_value_info(place, TensorProto.FLOAT, None))
    feeds = images(model)
    features = run(open_session(model.with_proto(proto)), feeds, [place])[0].astype(np.float64)
    unit = features / np.linalg.norm(features, axis=2, keepdims=True)
    ours, theirs = np.arange(1, 50, 2), np.arange(2, 50, 2)
    leaving = 49 - int(np.ceil(SHARES[0] * 49 - 1e-4))
    found = traced(model, plan, feeds)[1]
    for row in range(3):
        best = (unit[row, ours] @ unit[row, theirs].T).max(axis=1)
        gone = set(ours[np.argsort(-best)[:leaving]].tolist())
        assert sorted(found[row]) == [position for position in range(50) if position not in gone]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_place_keeps_some_of_those_before_and_the_model_computes_the_same(policy: Policy) -> None:
    model, plan = trained(), falling(policy)
    feeds = images(model)
    if policy == "static":
        for cut, positions in zip(plan.cuts, traced(model, plan, feeds)[1:], strict=True):
            assert (positions == cut.positions).all()
    before = traced(model, plan, feeds)
    for row in range(3):
        sets = [[int(position) for position in positions[row] if position >= 0] for positions in before]
        assert all(len(set(now)) == len(now) for now in sets)
        for earlier, later in itertools.pairwise(sets):
            assert set(later) <= set(earlier)
            assert 0 in later
        if policy in ("drop", "package"):
            assert [len(now) for now in sets[1:]] == [1 + int(np.ceil(cut.share * 49 - 1e-4)) for cut in plan.cuts]
    with_trace = open_session(cut_tokens(model, plan, traced=True))
    for want, got in zip(run(open_session(cut_tokens(model, plan)), feeds), run(with_trace, feeds, model.output_names), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("policy", ["drop", "package", "threshold"])
def test_padding_has_no_position(policy: Policy) -> None:
    model, _, axis = prepared("bert", "do18-sdpa")
    feeds = synthetic_feeds(model)
    feeds["attention_mask"][0, 5:] = 0
    whole, kept = traced(model, plan_of(axis, 0.7, policy), feeds)
    assert whole[0].tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert set(kept[0].tolist()) <= {-1, 0, 1, 2, 3, 4}
    if policy != "threshold":
        assert (kept[0] >= 0).sum() == 1 + 3  # of four others 70%


def test_a_plan_without_cuts_has_nothing_to_tell() -> None:
    plan = TokenPlan("drop", ())
    assert cut_tokens(trained(), plan, traced=True).output_names == trained().output_names
