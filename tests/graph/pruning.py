"""Masked against sliced: what every structural test of pruning comes down to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxprune.graph.anatomy import Anatomy, Site, study
from onnxprune.graph.caches import cache_cuts, cut_feeds
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import mask_feeds, masked_model
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import synthetic_feeds
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.runtime.session import open_session, run

TOLERANCE = 1e-4
"""Largest difference, relative to the largest output."""


def anatomy_of(source: str | onnx.ModelProto | Model) -> Anatomy:
    return study(*canonicalise(load(onnx.parser.parse_model(source) if isinstance(source, str) else source)))


class Comparison:
    """One masked session of a model, against which slices are compared."""

    def __init__(self, anatomy: Anatomy, feeds: Mapping[str, np.ndarray] | None = None) -> None:
        self.anatomy = anatomy
        self.feeds = {name: feeds[name] for name in anatomy.model.input_names} if feeds else synthetic_feeds(anatomy.model)
        self.checks = _passes_checker(anatomy.model)
        self.masked = open_session(masked_model(anatomy), optimize=False)

    def check(self, kept: Kept, *, optimize: bool = False) -> Model:
        """Slice, and assert that the slice is valid and computes what the mask says."""
        sliced = slice_model(self.anatomy, kept)
        if self.checks:
            onnx.checker.check_model(sliced.to_proto(), full_check=False)
        expected = run(self.masked, {**self.feeds, **mask_feeds(self.anatomy.sites, kept)})
        actual = run(open_session(sliced, optimize=optimize), cut_feeds(sliced, self.feeds))
        cuts = {cut.output: cut for cut in cache_cuts(sliced).values()}
        for name, want, got in zip(sliced.output_names, expected, actual, strict=True):
            want = cuts[name].take(want) if name in cuts else want
            assert got.shape == want.shape, name
            assert got.dtype == want.dtype, name
            assert np.isfinite(got).all(), name
            assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max(), (name, {site: len(units) for site, units in kept.items()})
        return sliced


def _passes_checker(model: Model) -> bool:
    """The checker refuses operators that only onnxruntime knows in the domain of ONNX, which its own fusions write."""
    try:
        onnx.checker.check_model(model.to_proto(), full_check=False)
    except onnx.checker.ValidationError as error:
        if "No Op registered" not in str(error):
            raise
        return False
    return True


def random_kept(sites: tuple[Site, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Any number of any units of any sites, uneven across layers."""
    kept = {}
    for site in sites:
        if rng.random() < 0.8:
            count = int(rng.integers(site.least, site.units + 1))
            kept[site.name] = np.sort(rng.choice(site.units, count, replace=False))
    return kept


def corner_cases(sites: tuple[Site, ...]) -> list[dict[str, np.ndarray]]:
    """Everything gone that may go; each site gone alone; one unit left everywhere; one unit gone everywhere; first and last swapped out."""
    least = {site.name: np.arange(site.least) for site in sites}
    return [
        least,
        *({name: units} for name, units in least.items()),
        {site.name: np.array([site.units - 1]) for site in sites},
        {site.name: np.arange(1, site.units) for site in sites},
        {site.name: np.arange(site.order % site.units, site.units) for site in sites},
    ]
