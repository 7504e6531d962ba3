"""Every attention block and FFN of real exports is found, with the counts of the configuration it was made from."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest

from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import Model, load
from onnxprune.graph.slicing import slice_model
from onnxprune.runtime.session import open_session, run
from tests import zoo


@cache
def anatomy_of(name: str) -> Anatomy:
    return study(*canonicalise(load(zoo.path(name))))


def expected_units(architecture: str) -> dict[str, int]:
    """Units of every site; query heads that share a key/value head are one unit."""
    heads = zoo.KV_HEADS if architecture == "llama" else zoo.HEADS[architecture]
    return {
        f"layer.{layer}.{kind}": units for layer in range(zoo.LAYERS) for kind, units in (("heads", heads), ("ffn", zoo.FFN[architecture]))
    }


def outputs(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run(open_session(model), {name: feeds[name] for name in model.input_names})


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_block_is_found_with_its_true_counts(name: str) -> None:
    anatomy = anatomy_of(name)
    assert {site.name: site.units for site in anatomy.sites} == expected_units(name.split("-")[0])
    assert [site.order for site in anatomy.sites] == list(range(2 * zoo.LAYERS))
    assert all(site.name.endswith(site.kind) for site in anatomy.sites)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_only_the_pooler_of_classifiers_and_the_width_of_patches_are_refused(name: str) -> None:
    codes = Counter(refusal.code for refusal in anatomy_of(name).refusals)
    assert codes == {"bert": {"OP202": 1}, "vit": {"OP301": 1}, "deit": {"OP301": 1}}.get(name.split("-")[0], {})


@pytest.mark.parametrize("name", zoo.NAMES)
def test_canonical_form_computes_the_same_and_is_not_larger(name: str) -> None:
    original, canonical = load(zoo.path(name)), anatomy_of(name).model
    for batch, seq in ((3, 11), (1, 5)):
        feeds = zoo.feeds(name, batch, seq)
        if batch > 1 and name.startswith("llama") and name.endswith("do23"):
            # onnxruntime takes rotary caches of the original at batch 1 only.
            with pytest.raises(Exception, match="cos_cache"):
                outputs(original, feeds)
            continue
        for before, after in zip(outputs(original, feeds), outputs(canonical, feeds), strict=True):
            np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max())
    assert canonical.parameters <= original.parameters * 1.001
    assert canonical.input_names == original.input_names
    assert canonical.output_names == original.output_names


@pytest.mark.parametrize("name", ["bert-sdpa-do18", "llama-eager-ts17", "vit-sdpa-do23"])
def test_the_consumers_of_a_site_are_the_output_projections(name: str) -> None:
    anatomy = anatomy_of(name)
    hidden = zoo.HIDDEN[name.split("-")[0]]
    for site in anatomy.sites:
        assert len(site.consumers) == 1
        weight = anatomy.view.value(site.consumers[0].leaf.tensor)
        assert weight is not None
        assert weight.shape[1 - site.consumers[0].leaf.axis] == hidden
        assert sorted(set(site.consumers[0].labels.tolist())) == list(range(site.units))


@pytest.mark.parametrize("name", ["bert-eager-ts17", "gpt2-sdpa-do18", "llama-sdpa-do23"])
def test_parameters_per_unit_are_what_slicing_removes(name: str) -> None:
    anatomy = anatomy_of(name)
    for site in anatomy.sites[:2]:
        smaller = slice_model(anatomy, {site.name: np.arange(1, site.units)})
        assert anatomy.model.parameters - smaller.parameters == pytest.approx(site.parameters_per_unit)
