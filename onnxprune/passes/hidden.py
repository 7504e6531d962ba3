"""``hidden``: the width of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Objective
from onnxprune.calibration.stream import stream
from onnxprune.compensate.principal import left_out, principal_basis
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.hidden import Narrowing, narrow
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile
from onnxprune.graph.stream import find_streams
from onnxprune.graph.stream_parts import Stream
from onnxprune.graph.view import GraphView
from onnxprune.passes.base import WholePass
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import Yardstick

HIDDEN = WholePass(
    name="hidden",
    kind="hidden",
    summary="narrow the residual stream of pre-norm networks",
    detail=(
        "The residual stream is turned into the basis of its principal directions on the data, the turn is folded into every matrix that "
        "writes or reads it, and directions that hold little go (SliceGPT). --hidden-keep says how much stays; the rest of the run sees "
        "the narrow model. Post-norm networks such as BERT are refused."
    ),
)

COLLAPSE = 0.5
"""Largest divergence from the model as given, in nats, for vectors as 1 - cosine: above it little of what the model knew is left."""

_ALIGN = 16
_RUN_ROWS = 8
_JUDGES = 128


@dataclass(frozen=True)
class Narrowed:
    """The model with narrow streams, and how it came about. ``lost`` is its divergence on rows that chose no basis."""

    model: Model
    profile: Profile
    narrowings: tuple[Narrowing, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    lost: float = 0.0
    left_out: tuple[float, ...] = ()

    def as_dict(self) -> list[dict[str, object]]:
        """For each stream its width before and after and the share of its energy that was left out."""
        return [
            {"stream": item.stream, "before": item.before, "after": item.after, "left_out": share, "lost": self.lost}
            for item, share in zip(self.narrowings, self.left_out, strict=True)
        ]


def narrow_streams(
    model: Model,
    profile: Profile,
    data: CalibrationData,
    objective: Objective,
    keep: float,
    options: RuntimeOptions,
    samples: Mapping[str, np.ndarray] | None = None,
) -> Narrowed:
    """Turn every stream into its principal directions and keep the share ``keep`` of them, rounded to a multiple of 16.

    Three quarters of the rows choose the bases, up to 128 of the others judge them.

    Args:
        model: the canonical model.
        data: calibration rows; padding does not count.
        samples: real inputs, for models that do not run on made-up ones.

    Returns:
        The narrow model; the model as it was, with refusals, where nothing can be turned (OP602, OP603) or nothing would be left of what
        it knew (OP604).

    Raises:
        InputError: fewer than four rows.
    """
    streams, refusals = find_streams(GraphView(model), profile)
    if not streams:
        return Narrowed(model, profile, refusals=refusals)
    if len(data) < 4:
        raise InputError(f"hidden needs at least 4 calibration rows, {data.origin} has {len(data)}")
    middle = max(3 * len(data) // 4, len(data) - _JUDGES)
    moments = second_moments(model, streams, data.take(slice(0, middle)), options)
    found = []
    shares = []
    for item in streams:
        width = max(_ALIGN, round(keep * item.width / _ALIGN) * _ALIGN)
        if width < item.width:
            basis = principal_basis(moments[item.name], width, centred=item.centred)
            found.append(Narrowing(item.name, basis))
            shares.append(left_out(moments[item.name], basis, centred=item.centred))
    if not found:
        widths = ", ".join(str(item.width) for item in streams)
        reason = f"{100 * keep:g}% of a width of {widths} rounds to all of it (widths are multiples of {_ALIGN})"
        return Narrowed(model, profile, refusals=(*refusals, Refusal("OP605", "hidden", reason)))
    small, its_profile = narrow(model, profile, found, samples)
    lost = Yardstick(model, data.take(slice(middle, None)), objective, options)(small)
    if not lost <= COLLAPSE:
        after = ", ".join(f"{item.after} of {item.before}" for item in found)
        measure = "1 - cosine" if objective.link == "identity" else "nats of divergence"
        reason = f"with {after} directions the outputs are off by {lost:.2g} {measure}, more than {COLLAPSE:g}"
        return Narrowed(model, profile, refusals=(*refusals, Refusal("OP604", "hidden", reason)))
    return Narrowed(small, its_profile, tuple(found), refusals, lost, tuple(shares))


def second_moments(model: Model, streams: tuple[Stream, ...], data: CalibrationData, options: RuntimeOptions) -> dict[str, np.ndarray]:
    """Sums of x'x over what norms make of the stream: rows of unit length, by stream, float64 ``[width, width]``.

    Whoever reads the stream reads it through a norm. Rows as they are would let a few long ones choose the directions.
    """
    read = {item.name: tuple(dict.fromkeys(item.norms)) for item in streams}
    names = [name for tensors in read.values() for name in tensors]
    sums = {item.name: np.zeros((item.width, item.width)) for item in streams}
    for batch, values in stream(with_outputs(model, names, keep=False), data, names, options=options, rows=_RUN_ROWS):
        for item in streams:
            for name in read[item.name]:
                rows = values[name].reshape(-1, item.width)
                real = rows[batch.real_rows(len(rows))].astype(np.float64)
                real -= real.mean(axis=1, keepdims=True) if item.centred else 0.0
                real /= np.maximum(np.linalg.norm(real, axis=1, keepdims=True), 1e-30)
                sums[item.name] += real.T @ real
    return sums
