"""Properties of the rewrites that hold for any shapes and any decision."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.axis_rules import blocks
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import mask_feeds, masked_model
from onnxprune.graph.model import load
from onnxprune.graph.residual import residual_sum
from onnxprune.graph.slicing import slice_model
from onnxprune.runtime.session import open_session, run
from tests import zoo

NAME = "bert-sdpa-do18"


@cache
def anatomy() -> Anatomy:
    return study(*canonicalise(load(zoo.path(NAME))))


@cache
def masked_session():  # type: ignore[no-untyped-def]
    return open_session(masked_model(anatomy()))


@st.composite
def decisions(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Kept units of every site; hypothesis shrinks towards nothing kept."""
    return {site.name: np.array(sorted(draw(st.sets(st.integers(0, site.units - 1)))), np.int64) for site in anatomy().sites}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(decisions(), st.integers(1, 4), st.integers(2, 20))
def test_slicing_and_finishing_equal_the_mask_at_any_size(kept: dict[str, np.ndarray], batch: int, seq: int) -> None:
    feeds = zoo.feeds(NAME, batch, seq)
    meant = run(masked_session(), {**feeds, **mask_feeds(anatomy().sites, kept)})[0]
    sliced = slice_model(anatomy(), kept)
    onnx.checker.check_model(sliced.to_proto())
    for model in (sliced, residual_sum(sliced)[0]):
        found = run(open_session(model), feeds)[0]
        assert np.abs(found - meant).max() <= 1e-4 * np.abs(meant).max()


@given(st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_blocks_of_a_reshape_have_equal_sizes_and_cover_every_axis(factors: list[list[int]], data: st.DataObject) -> None:
    merged = [math.prod(group) for group in factors]
    split = [size for group in factors for size in group]
    shapes = [merged, split]
    if data.draw(st.booleans()):
        shapes.reverse()
    found = blocks(*shapes)
    assert found is not None
    for left, right in found:
        assert math.prod(shapes[0][axis] for axis in left) == math.prod(shapes[1][axis] for axis in right)
    assert [axis for left, _ in found for axis in left] == list(range(len(shapes[0])))
    assert [axis for _, right in found for axis in right] == list(range(len(shapes[1])))
