"""Does the graph compute what the network computes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxprune.errors import InputError
from onnxprune.export.signature import Case
from onnxprune.graph.model import Model
from onnxprune.runtime.session import open_session, run

TOLERANCE = 1e-4
"""Largest difference of an element, relative to the largest element of the same output."""


@dataclass(frozen=True)
class Proof:
    """A case, its inputs, and what torch computes on them."""

    case: Case
    feeds: Mapping[str, np.ndarray]
    expected: Sequence[np.ndarray]


@dataclass(frozen=True)
class Parity:
    """Error per case, in their order; infinite where the graph did not run, or gave another shape or no number. ``reason`` says which."""

    cases: tuple[Case, ...]
    errors: tuple[float, ...]
    reason: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors)

    @property
    def holds(self) -> bool:
        return self.worst <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        """``relative_error`` is null where there was no number."""
        rows = [
            asdict(case) | {"relative_error": error if np.isfinite(error) else None}
            for case, error in zip(self.cases, self.errors, strict=True)
        ]
        return {"holds": self.holds, "tolerance": TOLERANCE, "cases": rows, "reason": self.reason}


def compare(model: Model, proofs: Sequence[Proof]) -> Parity:
    """Run the graph in onnxruntime on every case.

    Raises:
        InputError: onnxruntime cannot load the graph.
        RuntimeUnavailable: there is no onnxruntime.
    """
    session = open_session(model)
    errors, reasons = [], []
    for proof in proofs:
        try:
            found = run(session, proof.feeds)
        except InputError as error:
            reasons.append(str(error))
            errors.append(float("inf"))
            continue
        worst = max(_error(a, b) for a, b in zip(found, proof.expected, strict=True))
        if not worst <= TOLERANCE:
            name = max(zip(model.output_names, found, proof.expected, strict=True), key=lambda row: _error(row[1], row[2]))[0]
            reasons.append(f"{name} differs by {worst:.1e} of its largest value at {proof.case}")
        errors.append(worst)
    return Parity(tuple(proof.case for proof in proofs), tuple(errors), next(iter(reasons), ""))


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude expected; infinite if shapes differ or a value is NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found - expected).max(initial=0.0)) / scale
