"""Every architecture of the registry: all blocks of its configuration are found, or refused by name, and slices compute what masks say."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import onnx
import pytest

from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.model import load
from onnxprune.runtime.session import open_session, run
from tests.architectures import ARCHITECTURES, derived, exports, feeds
from tests.graph.pruning import Comparison, anatomy_of, random_kept

VARIANT = "ts17-eager"
MASKS = 2
REFUSED = {(f"{name}{ending}", "ffn"): "OP205" for name in ("mixtral", "qwen3-moe") for ending in ("", "-cache")}
"""Blocks that may be refused with a code instead; a rule that they lack may come."""


def found(anatomy: Anatomy, kind: str) -> Counter[int]:
    """Units of every block: layers that share a table are one site with several consumers."""
    return Counter(site.units for site in anatomy.of_kind([kind]) for _ in site.consumers)


def compare(anatomy: Anatomy, name: str, masks: int = MASKS) -> None:
    comparison = Comparison(anatomy, feeds(ARCHITECTURES[name]))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for number in range(masks):
        comparison.check(random_kept(anatomy.sites, rng), optimize=number == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_is_found_or_refused_and_slices_compute_what_masks_say(name: str) -> None:
    anatomy = anatomy_of(load(exports.path(name, VARIANT)))
    for kind in ("heads", "ffn"):
        expected = Counter(ARCHITECTURES[name].sites.get(kind, ()))
        if found(anatomy, kind) != expected:
            assert REFUSED[name, kind] in {refusal.code for refusal in anatomy.refusals}
            assert found(anatomy, kind) <= expected
    if anatomy.sites:
        compare(anatomy, name)


def test_a_layer_in_the_body_of_a_branch_or_loop_is_refused_and_the_others_are_pruned() -> None:
    for variant in ("if", "loop"):
        file = derived.path("vit", variant)
        anatomy = anatomy_of(load(file))
        assert [site.name for site in anatomy.sites] == ["layer.0.heads", "layer.0.ffn"]
        told = {refusal.code: refusal.reason for refusal in anatomy.refusals if refusal.code[:3] in ("OP1", "OP2")}
        assert sorted(told) == ["OP101", "OP201"]
        assert all("body of" in reason for reason in told.values())
        compare(anatomy, "vit", masks=3)


def test_weights_that_only_a_body_reads_reach_the_runtime() -> None:
    file = derived.path("vit", "if")
    inputs = feeds(ARCHITECTURES["vit"])
    (want,) = run(open_session(str(file)), inputs)
    (got,) = run(open_session(load(file)), inputs)
    np.testing.assert_array_equal(got, want)


def test_layers_that_are_functions_are_found() -> None:
    file = derived.path("vit", "functions")
    assert len(onnx.load(file).functions) == 2
    anatomy = anatomy_of(load(file))
    assert {kind: found(anatomy, kind) for kind in ("heads", "ffn")} == {
        kind: Counter(units) for kind, units in ARCHITECTURES["vit"].sites.items()
    }


def test_unused_statistics_of_a_fused_normalisation_do_not_keep_it_fused() -> None:
    """onnxruntime's optimizer leaves mean and deviation out; other tools give such outputs names."""
    anatomy = anatomy_of(load(derived.path("gpt2", "ort-fused")))
    assert not [node for node in anatomy.view.nodes if node.op == "SkipLayerNormalization"]
    compare(anatomy, "gpt2", masks=2)
