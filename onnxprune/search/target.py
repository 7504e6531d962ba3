"""What the user wants to reach, parsed from the words of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from onnxprune.errors import InputError

Quantity = Literal["latency", "macs", "params", "size"]

_SCALES: dict[Quantity, dict[str, float]] = {
    "latency": {"ms": 1.0, "s": 1e3, "us": 1e-3},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "params": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "size": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9},
}
_EXAMPLES: dict[Quantity, str] = {"latency": "5ms, 60% or auto", "macs": "50% or 300M", "params": "50% or 10M", "size": "50% or 40MB"}


@dataclass(frozen=True)
class Target:
    """``value`` in ms, multiply-adds, parameters or bytes; a share in (0, 1] when ``relative``; None for ``auto``."""

    quantity: Quantity
    value: float | None
    relative: bool = False

    @property
    def auto(self) -> bool:
        return self.value is None

    def absolute(self, given: float) -> float:
        """The value to reach for a file that costs ``given``."""
        assert self.value is not None
        return self.value * given if self.relative else self.value

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.quantity}=auto"
        unit = {"latency": " ms", "size": " bytes"}.get(self.quantity, "")
        return f"{self.quantity}={100 * self.value:g}%" if self.relative else f"{self.quantity}={self.value:g}{unit}"


def parse_target(quantity: Quantity, text: str, option: str = "") -> Target:
    """``5ms``, ``60%``, ``auto``, ``300M``, ``40MB``.

    Args:
        option: what the user has written it behind, if not ``--target-QUANTITY``.

    Raises:
        InputError: not a quantity, no unit where one is needed, or out of range.
    """
    word = text.strip().lower()
    wanted = f"{option or f'--target-{quantity}'} takes a value such as {_EXAMPLES[quantity]}"
    if word == "auto":
        if quantity != "latency":
            raise InputError(f"{wanted}; auto is for latency only")
        return Target(quantity, None)
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)", word)
    if not match:
        raise InputError(f"cannot read {text!r}: {wanted}")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise InputError(f"{text!r} is not between 0% and 100% of the file as given: {wanted}")
        return Target(quantity, number / 100, relative=True)
    if unit not in _SCALES[quantity]:
        raise InputError(f"{text!r} has {'the unknown unit ' + repr(unit) if unit else 'no unit'}: {wanted}")
    if number == float("inf"):
        raise InputError(f"{text!r} is too large: {wanted}")
    if number <= 0:
        raise InputError(f"{text!r} is not positive: {wanted}")
    return Target(quantity, number * _SCALES[quantity][unit])
