"""Rows and columns of a grid that become one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.graph.profile import synthetic_feeds, take_profile
from onnxprune.graph.token_axis import TokenAxis
from onnxprune.graph.token_cut import cut_tokens, study_tokens
from onnxprune.graph.token_plan import CannotCut
from onnxprune.graph.view import GraphView
from onnxprune.passes.token_lines import Grid, Patches, fewer, grid_of, joins_of, patches_by_place
from onnxprune.passes.tokens import Planner
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests.architectures import exports


def grid(rows: int, columns: int) -> Grid:
    return Grid(np.ones(rows, np.int64), np.ones(columns, np.int64))


def patches(features: np.ndarray, attention: np.ndarray | None = None) -> Patches:
    unit = features / np.linalg.norm(features, axis=3, keepdims=True)
    return Patches(unit, np.ones(features.shape[:3]) if attention is None else attention)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_what_is_left_is_a_grid_of_whole_lines_that_are_neighbours(rows: int, columns: int, most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = fewer(grid(rows, columns), patches(rng.standard_normal((3, rows, columns, 4)), rng.random((3, rows, columns))), most)
    assert found.count <= most
    assert (found.heights.sum(), found.widths.sum()) == (rows, columns)
    numbers = found.numbers().reshape(rows, columns)
    assert sorted(np.unique(numbers)) == list(range(found.count))
    for one, other in ((numbers, len(found.widths)), (numbers.T, len(found.heights))):
        assert all(len(np.unique(line)) == other for line in one)
        changes = np.diff(one, axis=0).any(axis=1)
        assert changes.sum() + 1 == len({tuple(line) for line in one.tolist()})


def test_lines_that_are_alike_go_first() -> None:
    features = np.random.default_rng(0).standard_normal((4, 5, 6, 8))
    features[:, :, 3] = features[:, :, 2]
    found = fewer(grid(5, 6), patches(features), 25)
    assert found.widths.tolist() == [1, 1, 2, 1, 1]
    assert found.heights.tolist() == [1] * 5


def test_lines_that_nobody_looks_at_go_before_others() -> None:
    features = np.random.default_rng(0).standard_normal((4, 5, 5, 8))
    attention = np.ones((4, 5, 5))
    attention[:, :2] = 1e-3
    assert fewer(grid(5, 5), patches(features, attention), 20).heights.tolist() == [2, 1, 1, 1]


def test_means_are_those_of_the_first_patches() -> None:
    features = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    found = Grid(np.array([1, 2]), np.array([3, 1])).means(features)
    np.testing.assert_allclose(found[:, 1, 0], features[:, 1:, :3].mean(axis=(1, 2)))
    np.testing.assert_allclose(found[:, 0, 1], features[:, 0, 3])


def test_joins_number_the_patches_behind_all_others() -> None:
    assert joins_of(Grid(np.array([1, 1]), np.array([1, 2])), 1) == (0, 1, 2, 2, 3, 4, 4)
    assert joins_of(Grid(np.array([2]), np.array([1, 2])), 2) == (0, 1, 2, 3, 3, 2, 3, 3)


PATCHES = """
<ir_version: 9, opset_import: ["": 18]>
patches (float[b, 3, 4, 6] x) => (float[b, n, 5] y) {
  image = Conv <strides = [2, 2]> (x, w)
  ROUTE
  batch = Shape <start = 0, end = 1> (x)
  one = Constant <value_ints: ints = [1]> ()
  five = Constant <value_ints: ints = [5]> ()
  size = Concat <axis = 0> (batch, one, five)
  first = Expand (token, size)
  y = Concat <axis = 1> (ORDER)
}
"""
FLAT = "sizes = Constant <value_ints: ints = [0, 5, -1]> () flat = Reshape (image, sizes) tokens = Transpose <perm = [0, 2, 1]> (flat)"
TURNED = "turned = Transpose <perm = [PERM]> (image) sizes = Constant <value_ints: ints = [0, 6, 5]> () tokens = Reshape (turned, sizes)"
MIXED = "sizes = Constant <value_ints: ints = [0, 6, 5]> () tokens = Reshape (image, sizes)"


@pytest.mark.parametrize(
    ("route", "order", "known"),
    [
        (FLAT, "first, tokens", True),
        (TURNED.replace("PERM", "0, 2, 3, 1"), "first, tokens", True),
        (TURNED.replace("PERM", "0, 3, 2, 1"), "first, tokens", False),
        (MIXED, "first, tokens", False),
        (FLAT, "tokens, first", False),
    ],
    ids=["flattened", "channels last", "column by column", "channels among places", "class token last"],
)
def test_a_grid_is_known_where_tokens_are_its_places_row_by_row(route: str, order: str, known: bool) -> None:
    proto = onnx.parser.parse_model(PATCHES.replace("ROUTE", route).replace("ORDER", order))
    for name, shape in (("w", (5, 3, 2, 2)), ("token", (1, 1, 5))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    model = load(proto)
    found = grid_of(GraphView(model), take_profile(model), 7)
    assert (found is not None) == known
    if found is not None:
        assert (len(found.heights), len(found.widths)) == (2, 3)
    assert grid_of(GraphView(model), take_profile(model), 8) is None


@pytest.mark.parametrize(("name", "variant"), [("vit", "do18-sdpa"), ("deit-teacher", "ts17-sdpa"), ("dinov2", "do18-sdpa")])
def test_the_grid_is_that_of_the_patches(name: str, variant: str) -> None:
    model = canonicalise(load(exports.path(name, variant)))[0]
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    assert axis.count is not None
    found = grid_of(GraphView(model), take_profile(model), axis.count)
    assert found is not None
    assert len(found.heights) == len(found.widths) == 4


def test_a_plan_merges_lines_where_the_share_falls_and_runs() -> None:
    model, _ = canonicalise(load(Path(__file__).parents[2] / "samples" / "vision" / "model.onnx"))
    axis = study_tokens(model)
    rng = np.random.default_rng(0)
    feeds = {key: rng.standard_normal((8, *array.shape[1:])).astype(np.float32) for key, array in synthetic_feeds(model).items()}
    planner = Planner(model, axis, CalibrationData(feeds, None, "noise"), RuntimeOptions())  # type: ignore[arg-type]
    plan = planner.plan("grid", False, (0.99, 0.75, 0.75, 0.72, 0.4))
    assert [cut.block for cut in plan.cuts] == [1, 4]  # behind the first, the grid has fewer than 72 % already
    assert all(cut.share <= share for cut, share in zip(plan.cuts, (0.75, 0.4), strict=True))
    whole, cut = (run(open_session(item), feeds) for item in (model, cut_tokens(model, plan)))
    assert [array.shape for array in cut] == [array.shape for array in whole]
    assert any(not np.allclose(one, other) for one, other in zip(whole, cut, strict=True))


def test_texts_are_no_grid() -> None:
    model, _ = canonicalise(load(exports.path("bert", "do18-sdpa")))
    feeds = {key: np.repeat(array[:1], 4, axis=0) for key, array in synthetic_feeds(model).items()}
    with pytest.raises(CannotCut, match="lines of a grid cannot merge"):
        patches_by_place(model, CalibrationData(feeds, None, "noise"), RuntimeOptions())
