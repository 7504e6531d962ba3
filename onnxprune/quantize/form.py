"""What an int8 model is to be: which products compute in integers, how their inputs are scaled, which tables it holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np

from onnxprune.errors import InputError
from onnxprune.quantize.ranges import Range

Scheme = Literal["dynamic", "static"]
SCHEMES: tuple[Scheme, ...] = ("dynamic", "static")


@dataclass(frozen=True)
class Int8Form:
    """A decision on the int8 form of a float32 graph; weights are symmetric int8, activations asymmetric uint8.

    Attributes:
        scheme: activations are scaled at run time (``dynamic``), or by ranges from calibration (``static``).
        per_channel: one weight scale per output column instead of one per matrix.
        products: names of the nodes that compute in integers; all others stay as they are.
        ranges: static only, activation tensor -> what uint8 covers. Where ``factors`` holds the tensor, the range of ``x / s``.
        factors: activation tensor -> s, float [n_in]: the products read ``x / s`` and their weights are multiplied by s instead.
        tables: names of the Gather nodes whose embedding tables are held in int8, one scale a row.
        integers: product -> its weights as int8 [n_in, n_out], rounded with care on the scales that plain rounding uses; all others are
            rounded to nearest.
    """

    scheme: Scheme
    per_channel: bool
    products: tuple[str, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    factors: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    tables: tuple[str, ...] = ()
    integers: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the arrays, ready for JSON; :meth:`from_dict` reads it."""
        ranges = {name: [float(low), float(high)] for name, (low, high) in self.ranges.items()}
        names = {"products": list(self.products), "tables": list(self.tables)}
        return {"scheme": self.scheme, "per_channel": self.per_channel, **names, "ranges": ranges}

    @classmethod
    def from_dict(
        cls,
        content: Mapping[str, Any],
        factors: Mapping[str, np.ndarray] | None = None,
        integers: Mapping[str, np.ndarray] | None = None,
    ) -> Int8Form:
        """The form that :meth:`as_dict` wrote, and its arrays.

        Raises:
            InputError: an entry is missing or of another kind.
        """
        scheme, per_channel, products = (content.get(key) for key in ("scheme", "per_channel", "products"))
        ranges, tables = content.get("ranges", {}), content.get("tables", [])
        if scheme not in SCHEMES or not isinstance(per_channel, bool):
            raise InputError(f"scheme {scheme!r} with per_channel {per_channel!r} is no int8 form; give dynamic or static, true or false")
        if not isinstance(products, list) or not all(isinstance(name, str) for name in products):
            raise InputError("the int8 form names no products; give the list of the names of the nodes that compute in integers")
        if not isinstance(tables, list) or not all(isinstance(name, str) for name in tables):
            raise InputError("the tables of the int8 form are no list; give the names of the Gather nodes that look their rows up")
        if not isinstance(ranges, Mapping) or not all(_is_range(entry) for entry in ranges.values()):
            raise InputError("the int8 form holds a range that is not a pair of finite numbers with the lower one first")
        read = {str(name): Range(float(low), float(high)) for name, (low, high) in ranges.items()}
        kind = cast(Scheme, scheme)
        return cls(kind, per_channel, tuple(products), read, dict(factors or {}), tuple(tables), dict(integers or {}))

    def describe(self) -> str:
        """The kind of int8 in a few words, for people."""
        return f"{self.scheme} activations, weights scaled per {'column' if self.per_channel else 'matrix'}"

    def without(self, products: Iterable[str]) -> Int8Form:
        """The same form with these products left in float."""
        left = set(products)
        integers = {name: array for name, array in self.integers.items() if name not in left}
        return replace(self, products=tuple(name for name in self.products if name not in left), integers=integers)

    def present_in(self, nodes: Collection[str]) -> Int8Form:
        """The part of the form that concerns these nodes: products and tables may leave a graph with what is pruned."""
        form = self.without(name for name in self.products if name not in nodes)
        return replace(form, tables=tuple(name for name in self.tables if name in nodes))


def _is_range(entry: object) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return False
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in entry):
        return False
    return math.isfinite(entry[0]) and math.isfinite(entry[1]) and entry[0] <= entry[1]
