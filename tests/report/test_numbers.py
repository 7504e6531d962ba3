"""Numbers as people read them."""

from __future__ import annotations

import pytest

from onnxprune.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00001234, "1.2e-05"), (0.0123, "0.0123"), (1.5, "1.50"), (62.94, "62.9"), (999.4, "999"), (1234.5, "1,234")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert numbers.figures(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.99, "0.990 ms"), (12.345, "12.3 ms"), (1500, "1.50 s")])
def test_milliseconds_become_seconds_when_long(value: float | None, text: str) -> None:
    assert numbers.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (9_999, "9,999"), (10_000, "10.0 k"), (62_924_032, "62.9 M"), (7.1e9, "7.10 G"), (2e12, "2.00 T")],
)
def test_counts_are_short(value: float | None, text: str) -> None:
    assert numbers.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (512, "512 B"), (4_984_091, "4.98 MB"), (22_000, "22.0 kB")])
def test_sizes_are_decimal(value: float | None, text: str) -> None:
    assert numbers.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00 pp"), (-0.0000001, "0.00 pp"), (-0.0123, "-1.23 pp"), (0.004, "+0.40 pp")])
def test_differences_carry_a_sign(value: float, text: str) -> None:
    assert numbers.points(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"), [(1.2, "ms", "1.20 ms"), (6e6, "macs", "6.00 M MACs"), (None, "params", "-"), (5e6, "bytes", "5.00 MB")]
)
def test_costs_name_their_unit(value: float | None, unit: str, text: str) -> None:
    assert numbers.cost(value, unit) == text


@pytest.mark.parametrize(("value", "text"), [(3.04, "3.0 s"), (125, "2 min 05 s")])
def test_durations(value: float, text: str) -> None:
    assert numbers.seconds(value) == text
