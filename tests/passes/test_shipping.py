"""From a student to the file: what computes in integers there, and how often that is worked out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.calibration.objective import choose_objective
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import Model, load
from onnxprune.graph.slicing import slice_model
from onnxprune.passes import shipping as shipping_module
from onnxprune.passes.apply import finish
from onnxprune.passes.base import finishing
from onnxprune.passes.int8 import Scheme, products_of
from onnxprune.passes.precision import Group
from onnxprune.passes.rounds import cut
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import dense_student
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.verification import Yardstick
from tests import zoo
from tests.passes.cases import BERT, VIT, anatomy, calibration, workbench

OPTIONS = RuntimeOptions()
DYNAMIC, STATIC = Scheme("dynamic", True), Scheme("static", True)


def groups_of(model: Model, smoothed: bool = False) -> tuple[Group, ...]:
    by_tensor: dict[str, list[str]] = {}
    for node in products_of(model):
        by_tensor.setdefault(node.inputs[0], []).append(node.name)
    return tuple(Group(tensor, None, tuple(names), 1.0, 1.0, smoothed) for tensor, names in by_tensor.items())


def shipping(name: str = VIT, scheme: Scheme | None = DYNAMIC, **changes: Any) -> Shipping:
    known = anatomy(name)
    groups = groups_of(known.model) if scheme else ()
    return Shipping(known, ("residual-sum", "fuse-attention"), calibration(name, 8), OPTIONS, scheme=scheme, groups=groups, **changes)


def integer_products(model: Model) -> int:
    ops = [node.op_type for node in model.proto.graph.node]
    return ops.count("MatMulInteger") + sum(
        node.op_type == "DequantizeLinear" and node.input[0] in model.weights for node in model.proto.graph.node
    )


def test_integers_stand_between_standard_rewrites_and_fusions() -> None:
    assert shipping().steps == ("residual-sum", "int8", "fuse-attention")
    assert shipping(scheme=None).steps == ("residual-sum", "fuse-attention")
    assert shipping().in_float().steps == ("residual-sum", "fuse-attention")


def test_the_form_of_a_student_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = shipping()
    calls: list[Any] = []

    def watched(model: Model, *args: Any, **options: Any) -> Any:
        calls.append(model)
        return real(model, *args, **options)

    real = shipping_module.tailor
    monkeypatch.setattr(shipping_module, "tailor", watched)
    dense = dense_student(known.anatomy, known.anatomy.sites)
    pruned = cut(workbench(VIT, 8, compensation="none"), {"layer.0.heads": np.arange(2)})
    assert known.form(dense) is known.form(dense)
    assert len(calls) == 1
    assert known.form(pruned) is not known.form(dense)
    known.ship(pruned)
    known.ship(dense)
    assert len(calls) == 2
    other = known.with_floats(frozenset(known.groups[0].products))
    assert other.form(dense) is not known.form(dense), "with other products in float it is another form"
    assert len(calls) == 3


def test_products_left_in_float_are_float_in_the_file_and_in_what_is_timed() -> None:
    known = shipping()
    total = sum(len(group.products) for group in known.groups)
    left = known.with_floats(frozenset(known.groups[0].products + known.groups[-1].products))
    count = total - len(known.groups[0].products) - len(known.groups[-1].products)
    dense = dense_student(known.anatomy, known.anatomy.sites)
    assert integer_products(known.ship(dense)) == total
    assert integer_products(left.ship(dense)) == integer_products(left.probe({})) == count


def test_all_products_in_float_is_no_int8_at_all() -> None:
    known = shipping()
    alone = known.with_floats(frozenset(name for group in known.groups for name in group.products))
    assert alone.scheme is None
    assert alone.floats == frozenset()
    dense = dense_student(known.anatomy, known.anatomy.sites)
    assert alone.form(dense) is None
    assert integer_products(alone.ship(dense)) == 0
    assert alone.groups == known.groups, "the report tells them all the same"


@pytest.mark.parametrize("scheme", [None, DYNAMIC, STATIC], ids=str)
def test_what_is_timed_is_what_is_shipped_but_for_the_weights(scheme: Scheme | None) -> None:
    known = shipping(scheme=scheme)
    kept = {"layer.0.heads": np.arange(2), "layer.1.ffn": np.arange(48), "layer.2.ffn": np.zeros(0, np.int64)}
    probe, shipped = known.probe(kept), known.ship(cut(workbench(VIT, 8, compensation="none"), kept))
    assert [(node.op_type, node.name) for node in probe.proto.graph.node] == [
        (node.op_type, node.name) for node in shipped.proto.graph.node
    ]
    assert probe.weight_bytes == shipped.weight_bytes


def test_only_groups_that_gain_by_it_are_smoothed() -> None:
    plain = shipping()
    smooth = Shipping(plain.anatomy, (), plain.calibration, OPTIONS, scheme=DYNAMIC, groups=groups_of(plain.anatomy.model, smoothed=True))
    dense = dense_student(plain.anatomy, plain.anatomy.sites)
    forms = [known.form(dense) for known in (plain, smooth)]
    assert forms[0] is not None
    assert forms[1] is not None
    assert forms[0].factors == {}
    assert set(forms[1].factors) <= {group.tensor for group in smooth.groups}
    assert forms[1].factors


# --- all parts together, on all exports --------------------------------------------------------------------------------------------

UNEVEN = {"layer.0.heads": 0.0, "layer.0.ffn": 0.3, "layer.1.heads": 0.5, "layer.1.ffn": 0.0, "layer.2.ffn": 0.7}
"""Layers without heads or FFN, and different shares in between."""


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_export_is_finished_in_integers_pruned_or_not(name: str) -> None:
    """Each rewrite has tests of its own; here each finds the graph as the ones before left it."""
    known = study(*canonicalise(load(zoo.path(name))))
    # Both seeds of the feeds: where one token is read, the last block knows one vector a row, and static ranges clip what they never saw.
    rows = calibration(name, 16)
    exact = finishing("cpu")
    for shares in ({}, UNEVEN):
        kept = {site.name: np.arange(round(shares[site.name] * site.units)) for site in known.sites if site.name in shares}
        model = slice_model(known, kept)
        feeds = [{key: zoo.feeds(name, *shape)[key] for key in model.input_names} for shape in ((3, 11, 0), (1, 6, 1))]
        want = [run(open_session(model), feed)[0] for feed in feeds]
        finished = finish(model, exact)
        onnx.checker.check_model(finished.to_proto())
        for feed, expected in zip(feeds, want, strict=True):
            got = run(open_session(finished), feed)[0]
            assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
        for scheme in (DYNAMIC, STATIC):
            whole = Shipping(known, exact, rows, OPTIONS, scheme=scheme, groups=groups_of(model))
            student = cut(workbench(name, 8, compensation="none"), kept) if kept else dense_student(known, known.sites)
            shipped = whole.ship(student)
            onnx.checker.check_model(shipped.to_proto())
            assert integer_products(shipped) >= len(products_of(model)) - 3, "products that read one weight have one in the file"
            for feed, expected in zip(feeds, want, strict=True):
                got = run(open_session(shipped), feed)[0]
                assert got.shape == expected.shape
                assert np.linalg.norm(got - expected) < 0.08 * np.linalg.norm(expected), scheme
        fused = [len([node for node in m.proto.graph.node if node.op_type == "MultiHeadAttention"]) for m in (finished, shipped)]
        assert fused[0] == fused[1], "integers hide no attention from the fusion"


def test_finished_integers_are_near_the_float_model() -> None:
    for name, scheme in itertools.product((BERT, VIT), (DYNAMIC, STATIC)):
        known = shipping(name, scheme)
        yardstick = Yardstick(known.anatomy.model, known.calibration, choose_objective(known.anatomy), OPTIONS)
        assert 0 < yardstick(known.ship(dense_student(known.anatomy, known.anatomy.sites))) < 0.002
