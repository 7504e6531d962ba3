"""Fewer tokens against what they mean: all tokens, with those that left hidden from every attention behind the place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.errors import InputError, Refusal
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import Profile, synthetic_feeds, take_profile
from onnxprune.graph.token_axis import TokenAxis, token_axis, values_behind
from onnxprune.graph.token_cut import cut_tokens, spelled_out, study_tokens
from onnxprune.graph.token_plan import POLICIES, CannotCut, Policy, TokenCut, TokenPlan
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests.architectures import exports

IMAGES = [
    ("vit", "do18-sdpa"),
    ("vit", "ts14-eager"),
    ("deit-teacher", "do18-eager"),
    ("deit-teacher", "ts17-sdpa"),
    ("dinov2", "do18-sdpa"),
    ("dinov2", "do23-sdpa"),
    ("clip-vision", "do18-sdpa"),
]
PLACED = [("beit", "do18-sdpa"), ("beit", "do23-sdpa")]
TEXTS = [("bert", "do18-sdpa"), ("distilbert", "do18-eager"), ("electra", "ts17-sdpa")]


def prepared(name: str, variant: str) -> tuple[Model, Profile, TokenAxis]:
    model = spelled_out(canonicalise(load(exports.path(name, variant)))[0])
    profile = take_profile(model)
    axis = token_axis(GraphView(model), profile)
    assert isinstance(axis, TokenAxis)
    return model, profile, axis


def plan_of(axis: TokenAxis, share: float, policy: Policy = "drop") -> TokenPlan:
    cuts = tuple(TokenCut(place.tensor, place.softmax.name, share, block) for block, place in enumerate(axis.places))
    if policy == "static" and axis.count is not None:
        positions = (*range(axis.leading), *range(axis.leading, axis.count)[:: round(1 / share)])
        cuts = tuple(replace(cut, positions=positions) for cut in cuts)
    if policy == "grid" and axis.count is not None:
        joins = (*range(axis.leading), *(axis.leading + number // round(1 / share) for number in range(axis.count - axis.leading)))
        cuts = tuple(replace(cut, joins=joins) for cut in cuts)
    if policy == "threshold":
        cuts = tuple(replace(cut, threshold=0.0 if share == 1 else 0.99) for cut in cuts)
    return TokenPlan(policy, cuts)


def with_hidden_keys(model: Model, profile: Profile, axis: TokenAxis) -> Model:
    """An input ``hidden.i`` [B, N] for each place, added to the scores of keys behind it; the attention maps are outputs.

    An input ``counted`` is how often each token counts in a mean, if there is one.
    """
    emitter = Emitter(model, profile, prefix="test")
    behind = [values_behind(emitter.view, [place.tensor]) for place in axis.places]
    for node in emitter.view.nodes:
        stretch = sum(node.index in part for part in behind)
        if stretch and node.index in axis.attentions:
            node.proto.input[0] = emitter.op("Add", node.proto.input[0], emitter.unsqueeze(f"hidden.{stretch - 1}", 1, 2))
        if node.index in axis.pools:
            node.proto.input[0] = emitter.op("Mul", node.proto.input[0], emitter.unsqueeze("counted", 2))
        emitter.nodes.append(node.proto)
    proto = emitter.proto
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(emitter.nodes)
    if axis.pools:
        proto.graph.input.append(helper.make_tensor_value_info("counted", TensorProto.FLOAT, ["b", "counted"]))
    for number in range(len(axis.places)):
        proto.graph.input.append(helper.make_tensor_value_info(f"hidden.{number}", TensorProto.FLOAT, ["b", "n"]))
    proto.graph.output.extend(helper.make_empty_tensor_value_info(place.softmax.outputs[0]) for place in axis.places)
    return emitter.model.with_proto(proto)


def images(model: Model, rows: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal((rows, *array.shape[1:])).astype(np.float32) for name, array in synthetic_feeds(model).items()}


@pytest.mark.parametrize("policy", ["drop", "threshold"])
@pytest.mark.parametrize(("name", "variant"), [item for item in IMAGES if item[0] != "dinov2"])
def test_dropped_tokens_are_keys_that_nobody_sees(name: str, variant: str, policy: Policy) -> None:
    model, profile, axis = prepared(name, variant)
    feeds, share = images(model), 0.6
    assert axis.count is not None
    keep = int(np.ceil(share * (axis.count - axis.leading)))
    session = open_session(with_hidden_keys(model, profile, axis))
    hidden = [np.zeros((3, axis.count), np.float32) for _ in axis.places]
    there = np.ones((3, axis.count), bool)
    for number, place in enumerate(axis.places):
        maps = dict(zip([item.name for item in session.get_outputs()], run(session, {**feeds, **_named(hidden)}), strict=True))
        score = maps[place.softmax.outputs[0]].reshape(3, -1, *maps[place.softmax.outputs[0]].shape[-2:])[:, :, : axis.leading].mean((1, 2))
        score[~there] = -1
        for row in range(3):
            if policy == "threshold":
                keep = int((score[row, axis.leading :] >= 0.99 * score[row, there[row]].mean()).sum())
                assert 0 < keep < there[row].sum() - axis.leading
            gone = np.argsort(-score[row, axis.leading :])[keep:] + axis.leading
            there[row, gone] = False
        for later in range(number, len(axis.places)):
            hidden[later] = np.where(there, 0, -1e4).astype(np.float32)
    expected = run(session, {**feeds, **_named(hidden)})[: len(model.output_names)]
    actual = run(open_session(cut_tokens(model, plan_of(axis, share, policy))), feeds)
    for want, got in zip(expected, actual, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("name", "variant"), [("vit", "do18-sdpa"), ("deit-teacher", "ts17-sdpa"), *PLACED])
def test_positions_that_never_stay_are_keys_that_nobody_sees(name: str, variant: str) -> None:
    model, profile, axis = prepared(name, variant)
    feeds, all_positions = images(model), range(axis.count or 0)
    stays = [{*range(axis.leading), *(position for position in all_positions if position % 5 >= min(depth, 3))} for depth in range(1, 9)]
    cuts = [replace(cut, positions=tuple(sorted(stay))) for cut, stay in zip(plan_of(axis, 0.5).cuts, stays, strict=False)]
    hidden = [np.array([[0 if position in cut.positions else -1e4 for position in all_positions]] * 3, np.float32) for cut in cuts]
    if axis.pools:
        last = (hidden[-1][:, axis.leading :] == 0).astype(np.float32)
        feeds["counted"] = last / last.mean()
    session = open_session(with_hidden_keys(model, profile, axis))
    expected = run(session, {**feeds, **_named(hidden)})[: len(model.output_names)]
    feeds.pop("counted", None)
    actual = run(open_session(cut_tokens(model, TokenPlan("static", tuple(cuts)))), feeds)
    for want, got in zip(expected, actual, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def _named(hidden: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"hidden.{number}": array for number, array in enumerate(hidden)}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "variant"), [*IMAGES, *PLACED, *TEXTS])
def test_nothing_changes_while_all_tokens_stay(name: str, variant: str, policy: Policy) -> None:
    model, _, axis = prepared(name, variant)
    feeds = synthetic_feeds(model)
    unfit = {"package": PLACED, "merge": PLACED + TEXTS, "drop-merge": PLACED + TEXTS, "static": TEXTS, "grid": PLACED + TEXTS}
    if (name, variant) in unfit.get(policy, []):
        with pytest.raises(CannotCut, match="positions"):
            cut_tokens(model, plan_of(axis, 1.0, policy))
        return
    cut = cut_tokens(model, plan_of(axis, 1.0, policy))
    for want, got in zip(run(open_session(model), feeds), run(open_session(cut), feeds), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("policy", "predicted"), [("drop", False), ("drop", True), ("package", False), ("package", True), ("threshold", False)]
)
@pytest.mark.parametrize(("name", "variant"), TEXTS)
def test_neither_padding_nor_other_rows_change_what_stays(name: str, variant: str, policy: Policy, predicted: bool) -> None:
    model, profile, axis = prepared(name, variant)
    plan = plan_of(axis, 0.5, policy)
    width = profile.dim(axis.places[0].tensor, 2)
    assert width is not None
    session = open_session(cut_tokens(model, with_predictors(plan, width) if predicted else plan))
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 30, (3, 24))
    lengths = (9, 24, 17)
    mask = (np.arange(24) < np.array(lengths)[:, None]).astype(np.int64)
    feeds = {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.arange(24)[None] + 0 * ids,
    }
    feeds = {key: value for key, value in feeds.items() if key in model.input_names}
    together = run(session, feeds)
    for row, length in enumerate(lengths):
        alone = run(session, {key: value[row : row + 1, :length] for key, value in feeds.items()})
        for want, got in zip(alone, together, strict=True):
            np.testing.assert_allclose(got[row : row + 1], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_give_what_single_images_give_and_the_file_is_in_order(policy: Policy) -> None:
    model, _, axis = prepared("dinov2", "do18-sdpa")
    cut = cut_tokens(model, plan_of(axis, 0.5, policy))
    later = {name for node in cut.proto.graph.node for name in node.output}
    for node in cut.proto.graph.node:
        assert later.isdisjoint(node.input)
        later.difference_update(node.output)
    session, feeds = open_session(cut), images(model)
    together = run(session, feeds)
    for row in range(3):
        alone = run(session, {key: value[row : row + 1] for key, value in feeds.items()})
        for want, got in zip(alone, together, strict=True):
            np.testing.assert_allclose(got[row : row + 1], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "variant", "code"),
    [
        ("swin", "do18-sdpa", "OP704"),
        ("clip-text", "do18-sdpa", "OP704"),
        ("gpt2-cache", "do18-sdpa", "OP702"),
        ("mobilenet-v2", "do18-sdpa", "OP702"),
    ],
)
def test_networks_that_cannot_lose_tokens_say_why(name: str, variant: str, code: str) -> None:
    variant = (
        variant if variant in exports.variants_of(exports.ARCHITECTURES[name]) else exports.variants_of(exports.ARCHITECTURES[name])[0]
    )
    found = study_tokens(canonicalise(load(exports.path(name, variant)))[0])
    assert isinstance(found, Refusal)
    assert found.code == code


def test_plans_are_stored_with_positions_and_thresholds() -> None:
    cuts = (
        TokenCut("a", "s", 0.5, 0, positions=(0, 2)),
        TokenCut("b", "t", 0.25, 1, threshold=0.0, predictor=(0.5, -1.0)),
        TokenCut("c", "u", 0.1, 2),
        TokenCut("d", "v", 0.1, 3, joins=(0, 1, 1)),
    )
    plan = TokenPlan("threshold", cuts)
    assert TokenPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    assert plan.as_dict()["cuts"][2] == {"place": "c", "softmax": "u", "share": 0.1, "block": 2}


def test_positions_that_are_not_there_are_refused() -> None:
    model, _, axis = prepared("vit", "do18-sdpa")
    for positions in ((1, 2), (0, 2, 2), (0, 3, 99)):
        with pytest.raises(CannotCut, match="another file"):
            cut_tokens(model, TokenPlan("static", (replace(plan_of(axis, 0.5).cuts[0], positions=positions),)))


def test_joins_that_do_not_fit_are_refused() -> None:
    model, _, axis = prepared("vit", "do18-sdpa")
    first, *_ = plan_of(axis, 0.5, "grid").cuts
    unfit = (0, *(2 for _ in first.joins[1:])), (1, 0, *first.joins[2:]), tuple(0 for _ in first.joins), (*first.joins[:-1], 10**30)
    for joins in ((), first.joins[:-1], *unfit):
        with pytest.raises(CannotCut, match="damaged or for another file"):
            cut_tokens(model, TokenPlan("grid", (replace(first, joins=joins),)))


def with_lines(plan: TokenPlan, most: tuple[int, ...]) -> TokenPlan:
    """At each place the first patches of fifty tokens are one, so many and one more."""
    joins = [(0, *(1 + max(place - many, 0) for place in range(49))) for many in most]
    return replace(plan, cuts=tuple(replace(cut, joins=one) for cut, one in zip(plan.cuts, joins, strict=False)))


def trained() -> tuple[Model, TokenAxis]:
    """A network of fifty tokens and five places."""
    model = canonicalise(load(Path(__file__).parents[2] / "samples" / "vision" / "model.onnx"))[0]
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    return model, axis


def test_tokens_that_are_one_stay_one() -> None:
    model, axis = trained()
    with pytest.raises(CannotCut, match="told apart"):
        cut_tokens(model, with_lines(plan_of(axis, 0.5, "grid"), (8, 4)))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_left_of_a_plan_without_one_place_still_cuts(policy: Policy) -> None:
    """As in a model of which a layer has lost its heads."""
    model, axis = trained()
    plan = plan_of(axis, 0.5, policy)
    if policy == "grid":
        plan = with_lines(plan, (8, 16, 24, 32, 40))
    whole = run(open_session(model), images(model))
    for gone in range(len(plan.cuts)):
        left = replace(plan, cuts=tuple(cut for number, cut in enumerate(plan.cuts) if number != gone))
        found = run(open_session(cut_tokens(model, left)), images(model))
        assert [array.shape for array in found] == [array.shape for array in whole]


@pytest.mark.parametrize(("field", "value"), [("policy", "gird"), ("joins", [0.0]), ("positions", ["3"])])
def test_plans_that_make_no_sense_are_refused(field: str, value: Any) -> None:
    content = TokenPlan("grid", (TokenCut("a", "s", 0.5, 0, joins=(0, 1)),)).as_dict()
    (content if field == "policy" else content["cuts"][0])[field] = value
    with pytest.raises(InputError, match=r"damaged|known: drop"):
        TokenPlan.from_dict(content)


def test_a_plan_for_another_file_is_refused() -> None:
    model, _, axis = prepared("vit", "do18-sdpa")
    plan = TokenPlan("drop", (TokenCut("elsewhere", axis.places[0].softmax.name, 0.5, 0),))
    with pytest.raises(CannotCut, match="another file"):
        cut_tokens(model, plan)


TWO_BLOCKS = """
<ir_version: 9, opset_import: ["": 18]>
pooled (float[b, n, 6] x, float[6, 6] q, float[6, 6] k, float[6, 6] v, float[6, 3] w) => (float[b, 3] y) {
  one = Constant <value_ints: ints = [1]> ()
  q0 = MatMul (x, q)
  k0 = MatMul (x, k)
  kt0 = Transpose <perm = [0, 2, 1]> (k0)
  s0 = MatMul (q0, kt0)
  s0h = Unsqueeze (s0, one)
  p0 = Softmax <axis = -1> (s0h)
  v0 = MatMul (x, v)
  v0h = Unsqueeze (v0, one)
  c0h = MatMul (p0, v0h)
  c0 = Squeeze (c0h, one)
  h0 = Add (x, c0)
  q1 = MatMul (h0, q)
  k1 = MatMul (h0, k)
  kt1 = Transpose <perm = [0, 2, 1]> (k1)
  s1 = MatMul (q1, kt1)
  s1h = Unsqueeze (s1, one)
  p1 = Softmax <axis = -1> (s1h)
  v1 = MatMul (h0, v)
  v1h = Unsqueeze (v1, one)
  c1h = MatMul (p1, v1h)
  c1 = Squeeze (c1h, one)
  h1 = Add (h0, c1)
  m = ReduceMean <keepdims = 0> (h1, one)
  y = MatMul (m, w)
}
"""


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((6, 3 if name == "w" else 6)).astype(np.float32) / 2 for name in "qkvw"}


def two_blocks() -> Model:
    proto = onnx.parser.parse_model(TWO_BLOCKS)
    for name, array in random_weights().items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    given = [value for value in proto.graph.input if value.name == "x"]
    del proto.graph.input[:]
    proto.graph.input.extend(given)
    return canonicalise(load(proto))[0]


def test_joined_tokens_are_means_that_count_as_often() -> None:
    """Six tokens become four and then two, the first one by itself; written down once more in numpy."""
    q, k, v, w = (array.astype(np.float64) for array in random_weights().values())
    model = two_blocks()
    fixed = model.copy_proto()
    fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 6
    model = canonicalise(load(fixed))[0]
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    joins = ((0, 1, 1, 2, 3, 2), (0, 0, 0, 1, 1, 1))
    cuts = tuple(TokenCut(place.tensor, place.softmax.name, 0.5, block, joins=joins[block]) for block, place in enumerate(axis.places[:2]))
    x = np.random.default_rng(1).standard_normal((2, 6, 6)).astype(np.float32)
    (got,) = run(open_session(cut_tokens(model, TokenPlan("grid", cuts))), {"x": x})
    for row, found in zip(x.astype(np.float64), got, strict=True):
        sizes = np.ones(6)
        for block in range(2):
            scores = np.exp((row @ q) @ (row @ k).T) * sizes
            row = row + scores / scores.sum(1, keepdims=True) @ (row @ v)
            if block < len(cuts):
                now = np.array(joins[block])[np.unique(joins[block - 1], return_index=True)[1] if block else slice(None)]
                groups = [np.flatnonzero(now == number) for number in range(max(now) + 1)]
                row = np.stack([np.average(row[group], axis=0, weights=sizes[group]) for group in groups])
                sizes = np.array([sizes[group].sum() for group in groups])
        np.testing.assert_allclose(found, np.average(row, axis=0, weights=sizes) @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("policy", "repeats"), [("merge", 2), ("package", 8), ("drop-merge", 8)])
def test_tokens_that_are_the_same_lose_nothing_by_becoming_one(policy: Policy, repeats: int) -> None:
    """In attention by the logarithm of their size, in the mean by their weight."""
    model = two_blocks()
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    assert axis.pools
    x = np.repeat(np.random.default_rng(1).standard_normal((2, 8 // repeats, 6)).astype(np.float32), repeats, axis=1)
    cut = cut_tokens(model, plan_of(axis, 0.5, policy))
    (want,), (got,) = run(open_session(model), {"x": x}), run(open_session(cut), {"x": x})
    np.testing.assert_allclose(got, want, atol=1e-5)
    (want,), (got,) = (run(open_session(item), {"x": x[:, ::-1].cumsum(1, dtype=np.float32)}) for item in (model, cut))
    assert np.abs(got - want).max() > 1e-4  # others do lose something


def with_predictors(plan: TokenPlan, width: int) -> TokenPlan:
    weights = np.random.default_rng(5).standard_normal((len(plan.cuts), width))
    return replace(plan, cuts=tuple(replace(cut, predictor=tuple(row)) for cut, row in zip(plan.cuts, weights.tolist(), strict=True)))


def test_predictors_rank_by_features() -> None:
    """Six of twelve tokens stay; written down once more in numpy."""
    model = two_blocks()
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    plan = with_predictors(TokenPlan("drop", plan_of(axis, 0.5).cuts[:1]), 6)
    x = np.random.default_rng(3).standard_normal((12, 6)).astype(np.float32)
    q, k, v, w = random_weights().values()

    def block(h: np.ndarray) -> np.ndarray:
        scores = np.exp((h @ q) @ (h @ k).T)
        return np.asarray(h + scores / scores.sum(1, keepdims=True) @ (h @ v))

    h = block(x)
    score = h @ np.array(plan.cuts[0].predictor) / np.linalg.norm(h, axis=1)
    want = block(h[np.argsort(-score)[:6]]).mean(0) @ w
    np.testing.assert_allclose(run(open_session(cut_tokens(model, plan)), {"x": x[None]})[0][0], want, rtol=1e-3, atol=1e-5)
    with pytest.raises(CannotCut, match="another file"):
        cut_tokens(model, with_predictors(plan, 7))


def test_every_place_makes_a_package_of_its_own() -> None:
    """Of eight tokens six stay and then four, beside one package and then two; written down once more in numpy."""
    model = two_blocks()
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    shares = (0.75, 0.5)
    bare = [TokenCut(place.tensor, place.softmax.name, share, 0) for place, share in zip(axis.places[:2], shares, strict=True)]
    plan = with_predictors(TokenPlan("package", tuple(bare)), 6)
    x = np.random.default_rng(1).standard_normal((2, 8, 6)).astype(np.float32)
    q, k, v, w = (array.astype(np.float64) for array in random_weights().values())
    (got,) = run(open_session(cut_tokens(model, plan)), {"x": x})
    for row, found in zip(x.astype(np.float64), got, strict=True):
        free, packages, sizes = row, np.zeros((0, 6)), np.ones(8)
        for cut in plan.cuts:
            tokens = np.concatenate([free, packages])
            scores = np.exp((tokens @ q) @ (tokens @ k).T) * sizes
            tokens = tokens + scores / scores.sum(1, keepdims=True) @ (tokens @ v)
            free, packages, mass = tokens[: len(free)], tokens[len(free) :], sizes[len(free) :]
            order = np.argsort(-free @ np.array(cut.predictor) / np.linalg.norm(free, axis=1))
            stay, leave = np.split(order, [round(8 * cut.share)])
            packages = np.concatenate([packages, free[leave].mean(0)[None]])
            sizes = np.concatenate([np.ones(len(stay)), mass, [len(leave)]])
            free = free[stay]
        assert (len(free), len(packages)) == (4, 2)
        np.testing.assert_allclose(found, np.average(np.concatenate([free, packages]), axis=0, weights=sizes) @ w, rtol=1e-4, atol=1e-5)


def test_a_mean_counts_dropped_tokens_as_if_they_were_like_those_that_stay() -> None:
    model = two_blocks()
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    x = np.repeat(np.random.default_rng(1).standard_normal((2, 1, 6)).astype(np.float32), 8, axis=1)
    (want,), (got,) = (run(open_session(item), {"x": x}) for item in (model, cut_tokens(model, plan_of(axis, 0.5))))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_least_attended_leave_before_the_most_similar_merge() -> None:
    """Of eight tokens two leave, two merge; written down once more in numpy."""
    x = np.random.default_rng(3).standard_normal((8, 6)).astype(np.float32)
    q, k, v, w = random_weights().values()

    def block(h: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.exp((h @ q) @ (h @ k).T) * sizes
        attention = scores / scores.sum(1, keepdims=True)
        return h + attention @ (h @ v), attention

    h, attention = block(x, np.ones(8))
    h = h[np.argsort(-attention.mean(0), kind="stable")[:6]]
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    likeness = unit[::2] @ unit[1::2].T
    sizes = np.ones(3)
    joined, stay = h[1::2].copy(), []
    for rank, token in enumerate(np.argsort(-likeness.max(1))):
        to = likeness[token].argmax()
        if rank < 2:
            joined[to], sizes[to] = joined[to] + h[2 * token], sizes[to] + 1
        else:
            stay.append(h[2 * token])
    h, sizes = np.concatenate([stay, joined / sizes[:, None]]), np.concatenate([np.ones(1), sizes])
    h, _ = block(h, sizes)
    want = (sizes @ h / sizes.sum()) @ w

    model = two_blocks()
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    first = TokenPlan("drop-merge", plan_of(axis, 0.5).cuts[:1])
    np.testing.assert_allclose(run(open_session(cut_tokens(model, first)), {"x": x[None]})[0][0], want, rtol=1e-3, atol=1e-5)
