"""The masked model is the meaning, the sliced model the implementation: on every export, for any choice of units, they agree."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from tests import zoo
from tests.graph.pruning import Comparison, anatomy_of, corner_cases, random_kept

CASES = 30


@pytest.mark.parametrize("name", zoo.NAMES)
def test_slices_compute_what_masks_say(name: str) -> None:
    anatomy = anatomy_of(load(zoo.path(name)))
    compare = Comparison(anatomy, zoo.feeds(name, batch=2, seq=5))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    cases = corner_cases(anatomy.sites)
    cases += [random_kept(anatomy.sites, rng) for _ in range(CASES - len(cases))]
    assert len(cases) == CASES
    for number, kept in enumerate(cases):
        compare.check(kept, optimize=number % 10 == 0)


@pytest.mark.parametrize("name", ["bert-sdpa-ts17", "llama-eager-do18", "deit-sdpa-do23"])
def test_slices_run_at_other_shapes(name: str) -> None:
    anatomy = anatomy_of(load(zoo.path(name)))
    kept = random_kept(anatomy.sites, np.random.default_rng(3))
    for batch, seq in ((1, 1), (3, 17)):
        Comparison(anatomy, zoo.feeds(name, batch, seq)).check(kept)


def test_a_mask_that_differs_from_the_slice_is_noticed() -> None:
    """The comparison itself can fail: another unit masked gives another output."""
    anatomy = anatomy_of(load(zoo.path("bert-sdpa-do18")))
    compare = Comparison(anatomy, zoo.feeds("bert-sdpa-do18", batch=2, seq=5))
    wrong = {"layer.0.heads": np.array([0, 1])}
    original = compare.masked
    compare.check(wrong)

    class Swapped:
        def run(self, outputs: object, feeds: dict[str, np.ndarray]) -> object:
            feeds["onnxprune.mask.layer.0.heads"] = np.array([0, 0, 1, 1], np.float32)
            return original.run(outputs, feeds)

    compare.masked = Swapped()  # type: ignore[assignment]
    with pytest.raises(AssertionError):
        compare.check(wrong)


def test_keeping_everything_returns_the_model_itself() -> None:
    anatomy = anatomy_of(load(zoo.path("vit-sdpa-do18")))
    assert slice_model(anatomy, {}) is anatomy.model
    assert slice_model(anatomy, {site.name: np.arange(site.units) for site in anatomy.sites}) is anatomy.model
