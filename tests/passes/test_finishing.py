"""Finishing drops what is slower or computes something else, and obeys what was asked for."""

from __future__ import annotations

import itertools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxprune.graph.model import Model
from onnxprune.passes import base, finishing
from onnxprune.passes.base import RewritePass, Stage, registry
from onnxprune.passes.finishing import SLOWER, Part, choose_parts
from onnxprune.runtime.measure import Timings
from onnxprune.runtime.session import RuntimeOptions
from tests import zoo
from tests.passes.cases import BERT, anatomy

CPU = RuntimeOptions()
TRIED = ("clean", "residual-sum", "fusable-gelu", "fuse-attention")


@pytest.fixture
def speedups(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine on which each part, in the order in which they are tried, is as many times faster as is written here."""
    known: dict[str, float] = {}
    asked = itertools.count()

    def timing(runs: Mapping[str, Any], **options: Any) -> Timings:
        assert list(runs) == ["before", "after"]
        return Timings({"before": np.full(9, list(known.values())[next(asked)]), "after": np.ones(9)}, "thread", None)

    monkeypatch.setattr(finishing, "time_sessions", timing)
    monkeypatch.setattr(finishing, "timed", lambda *_: None)
    return known


def parts_of(*asked: str, options: RuntimeOptions = CPU) -> tuple[tuple[str, ...], dict[str, Part]]:
    model = anatomy(BERT).model
    feeds = zoo.feeds(BERT)
    names, parts = choose_parts(model, asked, feeds, options, 0, [feeds])
    return names, {part.name: part for part in parts}


def offer(monkeypatch: pytest.MonkeyPatch, *items: RewritePass) -> None:
    """These passes besides the built-in ones."""
    known = {**registry(), **{item.name: item for item in items}}
    for module in (base, finishing):
        monkeypatch.setattr(module, "registry", lambda: types.MappingProxyType(known))


def test_what_is_slower_is_left_out(speedups: dict[str, float]) -> None:
    speedups |= {"clean": 1.1, "residual-sum": SLOWER, "fusable-gelu": SLOWER - 0.001, "fuse-attention": 0.8}
    names, parts = parts_of()
    assert tuple(parts) == TRIED
    assert names == ("clean", "residual-sum")
    assert {name: part.speedup for name, part in parts.items()} == pytest.approx(speedups)
    assert {name: part.kept for name, part in parts.items()} == {name: name in names for name in TRIED}
    assert [parts[name].why for name in TRIED] == ["", "", "slower here", "slower here"]
    assert all(part.places > 0 for part in parts.values())
    assert parts["clean"].as_dict() == {"name": "clean", "places": parts["clean"].places, "speedup": 1.1, "kept": True, "why": ""}


def test_parts_asked_for_are_kept_without_a_trial_and_run_in_their_order(speedups: dict[str, float]) -> None:
    speedups |= {"residual-sum": 2.0, "fusable-gelu": 0.5}
    names, parts = parts_of("fuse-attention", "clean")
    assert tuple(parts) == ("residual-sum", "fusable-gelu")
    assert names == ("clean", "residual-sum", "fuse-attention")


def test_other_numbers_asked_for_stay_and_are_no_part_of_the_trials(speedups: dict[str, float]) -> None:
    speedups |= {"clean": 0.5, "residual-sum": 2.0, "fusable-gelu": 0.5, "fuse-attention": 2.0}
    names, parts = parts_of("fp16")
    assert names == ("residual-sum", "fp16", "fuse-attention")
    assert "fp16" not in parts


def test_each_part_is_tried_on_top_of_those_kept_so_far(speedups: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    speedups |= {"clean": 2.0, "residual-sum": 0.5, "fusable-gelu": 2.0, "fuse-attention": 0.5}
    tried: list[tuple[str, ...]] = []

    def watched(model: Model, rewrites: tuple[str, ...]) -> Model:
        tried.append(tuple(rewrites))
        return real(model, rewrites)

    real = finishing.finish
    monkeypatch.setattr(finishing, "finish", watched)
    parts_of()
    assert tried == [
        (),
        ("clean",),
        ("clean",),
        ("clean", "residual-sum"),
        ("clean",),
        ("clean", "fusable-gelu"),
        ("clean", "fusable-gelu"),
        ("clean", "fusable-gelu", "fuse-attention"),
    ]


@pytest.mark.parametrize("factor", [1.001, -1.0, float("nan"), float("inf")])
def test_a_rewrite_that_changes_the_outputs_is_left_out_however_fast(
    factor: float, speedups: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def harm(model: Model) -> tuple[Model, int]:
        proto = model.copy_proto()
        (output,) = model.output_names
        node = next(node for node in proto.graph.node if output in node.output)
        node.output[:] = ["unharmed" if name == output else name for name in node.output]
        proto.graph.node.extend(
            [
                helper.make_node("Constant", [], ["harm.factor"], name="harm.factor", value_float=factor),
                helper.make_node("Mul", ["unharmed", "harm.factor"], [output], name="harm"),
            ]
        )
        return model.with_proto(proto), 7

    offer(monkeypatch, RewritePass("harm", harm, "nothing", "good", finishing=("cpu",)))
    speedups |= {"clean": 0.5, "residual-sum": 2.0, "fusable-gelu": 0.5, "fuse-attention": 2.0}
    names, parts = parts_of()
    assert "harm" not in names
    assert parts["harm"] == Part("harm", 7, None, False, "changes the outputs")
    assert names == ("residual-sum", "fuse-attention"), "the others are tried without it"


def test_a_rewrite_that_finds_nothing_is_not_timed(speedups: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, RewritePass("idle", lambda model: (model, 0), "nothing", "at all", stage=Stage.FUSED, finishing=("cpu",)))
    speedups |= {"clean": 0.5, "residual-sum": 0.5, "fusable-gelu": 0.5, "fuse-attention": 0.5}
    names, parts = parts_of()
    assert names == ()
    assert parts["idle"] == Part("idle", 0, None, False, "nothing to change")


def test_each_provider_has_its_own_parts() -> None:
    assert base.finishing("cpu") == TRIED
    assert base.finishing("cuda") == ("clean", "fusable-gelu", "fuse-attention")
    assert base.finishing("tensorrt") == ("clean", "fusable-gelu")


def test_standard_operators_come_before_integers_and_integers_before_fusions() -> None:
    names = ("fuse-attention", "fp16", "int8", "int4", "fusable-gelu", "residual-sum", "clean", "int8")
    assert base.ordered(names) == ("clean", "residual-sum", "fusable-gelu", "int8", "int4", "fp16", "fuse-attention")
    assert base.exact(base.ordered(names)) == ("clean", "residual-sum", "fusable-gelu", "fuse-attention")
