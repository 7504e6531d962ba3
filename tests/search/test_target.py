"""The words of a target, and every way to get them wrong."""

from __future__ import annotations

import pytest

from onnxprune.errors import InputError
from onnxprune.search.target import Quantity, Target, parse_target


@pytest.mark.parametrize(
    ("quantity", "text", "value", "relative"),
    [
        ("latency", "5ms", 5.0, False),
        ("latency", " 2.5 MS ", 2.5, False),
        ("latency", "0.5s", 500.0, False),
        ("latency", "800us", 0.8, False),
        ("latency", "60%", 0.6, True),
        ("macs", "300M", 3e8, False),
        ("macs", "1e9", 1e9, False),
        ("macs", "1.5g", 1.5e9, False),
        ("params", "10k", 1e4, False),
        ("params", "100%", 1.0, True),
        ("size", "40MB", 4e7, False),
        ("size", "1gb", 1e9, False),
        ("size", ".5kb", 500.0, False),
    ],
)
def test_values_with_their_units(quantity: Quantity, text: str, value: float, relative: bool) -> None:
    target = parse_target(quantity, text)
    assert target == Target(quantity, pytest.approx(value), relative)
    assert not target.auto
    assert target.absolute(50.0) == pytest.approx(value * 50 if relative else value)


def test_auto_is_for_latency() -> None:
    assert parse_target("latency", "Auto").auto
    for quantity in ("macs", "params", "size"):
        with pytest.raises(InputError, match=f"--target-{quantity} takes a value such as .*auto is for latency only"):
            parse_target(quantity, "auto")


@pytest.mark.parametrize(
    ("quantity", "text", "message"),
    [
        ("latency", "", "cannot read ''"),
        ("latency", "fast", "cannot read 'fast'"),
        ("latency", "-5ms", "cannot read '-5ms'"),
        ("latency", "5 ms please", "cannot read"),
        ("latency", "nan", "cannot read"),
        ("latency", "inf", "cannot read"),
        ("latency", "5", "'5' has no unit"),
        ("latency", "5min", "unknown unit 'min'"),
        ("latency", "0ms", "is not positive"),
        ("latency", "0%", "not between 0% and 100%"),
        ("latency", "101%", "not between 0% and 100%"),
        ("macs", "5ms", "unknown unit 'ms'"),
        ("macs", "0", "is not positive"),
        ("macs", "1e999", "too large"),
        ("params", "10x", "unknown unit 'x'"),
        ("size", "40", "'40' has no unit"),
        ("size", "40M", "unknown unit 'm'"),
    ],
)
def test_what_is_wrong_is_said_with_an_example(quantity: Quantity, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_target(quantity, text)
    assert f"--target-{quantity} takes a value such as" in str(caught.value)


@pytest.mark.parametrize(
    ("quantity", "text", "shown"),
    [
        ("latency", "5ms", "latency=5 ms"),
        ("latency", "60%", "latency=60%"),
        ("latency", "auto", "latency=auto"),
        ("size", "1kb", "size=1000 bytes"),
        ("macs", "2k", "macs=2000"),
    ],
)
def test_targets_print_as_they_are_meant(quantity: Quantity, text: str, shown: str) -> None:
    assert str(parse_target(quantity, text)) == shown
