"""The int8 decision: written, read, and narrowed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import InputError
from onnxprune.quantize.form import Int8Form
from onnxprune.quantize.ranges import Range

FORM = Int8Form(
    "static", True, ("up", "down"), {"x": Range(-1.5, 0.1), "h": Range(0.0, np.float32(0.3))}, {"x": np.arange(1.0, 4.0)}, ("words",)
)


def test_what_is_written_is_read_again() -> None:
    content = json.loads(json.dumps(FORM.as_dict()))
    again = Int8Form.from_dict(content, FORM.factors)
    assert again == FORM
    assert all(isinstance(entry, Range) for entry in again.ranges.values())
    np.testing.assert_array_equal(again.factors["x"], FORM.factors["x"])
    assert "factors" not in content
    assert Int8Form.from_dict(content).factors == {}


def test_a_form_written_without_tables_has_none() -> None:
    content = {name: value for name, value in FORM.as_dict().items() if name != "tables"}
    assert Int8Form.from_dict(content).tables == ()


def test_products_are_taken_out_and_nothing_else() -> None:
    narrowed = FORM.without(["up", "unknown"])
    assert narrowed.products == ("down",)
    assert narrowed.ranges == FORM.ranges
    assert narrowed.factors is FORM.factors
    assert narrowed.tables == ("words",)
    assert FORM.products == ("up", "down")


def test_forms_are_compared_without_their_factors() -> None:
    assert Int8Form("dynamic", True, ("a",), {}, {"x": np.ones(3)}) == Int8Form("dynamic", True, ("a",))
    assert Int8Form("dynamic", True, ("a",)) != Int8Form("dynamic", False, ("a",))


def test_forms_say_what_they_are() -> None:
    assert FORM.describe() == "static activations, weights scaled per column"
    assert Int8Form("dynamic", False, ()).describe() == "dynamic activations, weights scaled per matrix"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scheme": "both"}, "'both' with per_channel True is no int8 form"),
        ({"scheme": None}, "None with per_channel"),
        ({"per_channel": 1}, "per_channel 1 is no"),
        ({"products": "up"}, "names no products"),
        ({"products": [1]}, "names no products"),
        ({"tables": "words"}, "tables of the int8 form are no list"),
        ({"tables": [1]}, "tables of the int8 form are no list"),
        ({"ranges": [1]}, "not a pair"),
        ({"ranges": {"x": [0.0]}}, "not a pair"),
        ({"ranges": {"x": [0.0, "1"]}}, "not a pair"),
        ({"ranges": {"x": [0.0, float("inf")]}}, "not a pair"),
        ({"ranges": {"x": [1.0, -1.0]}}, "not a pair"),
        ({"ranges": {"x": [False, True]}}, "not a pair"),
    ],
)
def test_entries_of_another_kind_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Int8Form.from_dict({**FORM.as_dict(), **change})
