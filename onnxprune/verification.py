"""Proof: the sliced graph equals its mask, and how far the pruned model is from the original on rows that decided nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from onnxprune.calibration.checks import fixed_rows, input_specs
from onnxprune.calibration.data import IGNORED_LABEL, Batch, CalibrationData
from onnxprune.calibration.objective import Objective
from onnxprune.calibration.stream import DEFAULT_ROWS, stream
from onnxprune.errors import GateError, InputError
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.instrument import mask_feeds, masked_model
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.runtime.session import RuntimeOptions

TOLERANCE = 1e-4
"""Largest accepted difference between masked and sliced outputs, relative to the largest output."""

_RESAMPLES = 1000
_CLASS_ROWS = 5
_OUTPUT_VALUES = 8_000_000
_KNOWN_VALUES = 100_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """Masked dense graph against sliced graph, before compensation: the same function, computed twice."""

    max_abs: float
    scale: float
    samples: int
    tolerance: float

    @property
    def relative(self) -> float:
        return self.max_abs / self.scale if self.scale else self.max_abs

    @property
    def passed(self) -> bool:
        return bool(np.isfinite(self.relative) and self.relative <= self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative": self.relative, "passed": self.passed}


@dataclass(frozen=True)
class WorstClass:
    """The class, of those the original predicts for five rows or more, whose rows keep their prediction least often."""

    name: int
    agreement: float
    samples: int


@dataclass(frozen=True)
class Comparison:
    """A model against the original on the same samples.

    Class outputs: ``agreement`` (same prediction), ``kl`` (nats, original || model) and ``expected_drop``, the accuracy that would be lost
    if labels followed the original's own probabilities: it needs no labels and is far less noisy than a count. With labels also the
    ``accuracy`` of both and ``drop`` (original minus model, paired); with one prediction per sample the ``worst_class``.
    Vector outputs: ``cosine`` and ``relative_error`` |y - y0| / |y0|.
    """

    samples: int
    output: str
    agreement: Interval | None = None
    kl: Interval | None = None
    expected_drop: Interval | None = None
    accuracy_before: Interval | None = None
    accuracy_after: Interval | None = None
    drop: Interval | None = None
    cosine: Interval | None = None
    relative_error: Interval | None = None
    worst_class: WorstClass | None = None

    @property
    def loss(self) -> tuple[str, float]:
        """The figure a gate looks at, as a loss: accuracy drop with labels, else 1 - agreement, for vectors 1 - cosine."""
        if self.drop is not None:
            return "accuracy drop", self.drop.value
        if self.agreement is not None:
            return "1 - agreement", 1 - self.agreement.value
        assert self.cosine is not None
        return "1 - cosine", 1 - self.cosine.value

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def masked_equals_sliced(anatomy: Anatomy, kept: Kept, data: CalibrationData, options: RuntimeOptions, output: str) -> Fidelity:
    """Run masked and sliced graph on real samples."""
    masks = mask_feeds(anatomy.sites, kept)
    masked = stream(masked_model(anatomy), data, [output], options=options, extra=lambda batch: masks)
    sliced = stream(slice_model(anatomy, kept), data, [output], options=options)
    worst, scale = 0.0, 0.0
    for (_, a), (_, b) in zip(masked, sliced, strict=True):
        difference = np.abs(a[output].astype(np.float64) - b[output])
        worst = max(worst, float(difference.max())) if np.isfinite(difference).all() else float("inf")
        scale = max(scale, float(np.abs(a[output]).max()))
    return Fidelity(worst, scale, len(data), TOLERANCE)


def compare(
    original: Model, model: Model, data: CalibrationData, objective: Objective, options: RuntimeOptions, seed: int = 0
) -> Comparison:
    """Compare two models on all rows of ``data``; padding and ignored labels do not count.

    Raises:
        InputError: the models insist on batches of different sizes, or their outputs differ in shape.
        GateError: the output is not finite where the original's is.
    """
    columns: dict[str, list[np.ndarray]] = {}
    data = _for_both(data, model)
    size = rows_per_run(objective, data)
    first = stream(original, data, [objective.output], options=options, rows=size)
    second = stream(model, data, [objective.output], options=options, rows=size)
    for (batch, a), (_, b) in zip(first, second, strict=True):
        before, after = a[objective.output].astype(np.float64), b[objective.output].astype(np.float64)
        if before.shape != after.shape:
            raise InputError(f"output {objective.output!r} has shape {list(after.shape)}, the original's has {list(before.shape)}")
        if not np.isfinite(after).all() and np.isfinite(before).all():
            raise GateError(f"output {objective.output!r} is not finite where the original's is")
        for name, values in per_sample(batch, before, after, objective).items():
            columns.setdefault(name, []).append(values[batch.valid])
    rows = {name: np.concatenate(parts) for name, parts in columns.items()}
    labelled = rows.pop("labelled", None)
    if labelled is not None:
        before, after = (rows.pop(name)[labelled] for name in ("accuracy_before", "accuracy_after"))
        if labelled.any():
            rows |= {"accuracy_before": before, "accuracy_after": after, "drop": before - after}
    predicted = rows.pop("predicted", None)
    worst = None if predicted is None else _worst_class(predicted, rows["agreement"])
    means = {name: _interval(values, seed) for name, values in rows.items()}
    return Comparison(len(data), objective.output, **means, worst_class=worst)


def _worst_class(predicted: np.ndarray, agreement: np.ndarray) -> WorstClass | None:
    names, counts = np.unique(predicted, return_counts=True)
    found = [
        WorstClass(int(name), float(agreement[predicted == name].mean()), int(count))
        for name, count in zip(names, counts, strict=True)
        if count >= _CLASS_ROWS
    ]
    return min(found, key=lambda each: each.agreement, default=None)


def _for_both(data: CalibrationData, model: Model) -> CalibrationData:
    """Data as the original takes it, in the sizes that ``model`` insists on."""
    specs = input_specs(model)
    rows = fixed_rows(specs)
    if rows and data.fixed_rows and rows != data.fixed_rows:
        raise InputError(
            f"the first model takes batches of {data.fixed_rows} rows only, the second of {rows}; export both with one batch size"
        )
    fixed = any(name in specs and isinstance(specs[name].dims[axis], int) for name, axis in data.sequence_axes.items())
    return replace(data, fixed_rows=rows or data.fixed_rows, sequence_axes={} if fixed else data.sequence_axes)


def rows_per_run(objective: Objective, data: CalibrationData) -> int:
    """Rows per run: a score for every word of a vocabulary at every token is large, and compared in float64."""
    return int(np.clip(_OUTPUT_VALUES // _values_per_row(objective, data), 1, DEFAULT_ROWS))


def _values_per_row(objective: Objective, data: CalibrationData) -> int:
    """Values of the output for one row; of a model without an attention mask the tokens are those of its longest table of ids."""
    tokens = 1
    if objective.token_level:
        mask = data.token_mask
        tokens = (
            mask.shape[1] if mask is not None else max((array.shape[1] for array in data.inputs.values() if array.ndim == 2), default=1)
        )
    return max((objective.width or 1) * tokens, 1)


class Yardstick:
    """The divergence of many models from one: its outputs on the rows are computed once, and kept.

    Of scores of a vocabulary at every token as many rows are taken, spread evenly over all, as have 400 MB of them.
    """

    def __init__(self, original: Model, rows: CalibrationData, objective: Objective, options: RuntimeOptions) -> None:
        most = max(_KNOWN_VALUES // _values_per_row(objective, rows), 1)
        if len(rows) > most:
            rows = rows.take(np.linspace(0, len(rows) - 1, most).round().astype(np.int64))
        self.rows, self.objective, self.options = rows, objective, options
        self._known = [values[objective.output] for _, values in self._run(original)]

    def __call__(self, model: Model) -> float:
        """Mean KL divergence of the outputs of ``model``, for vectors 1 - cosine; infinite if they are not finite."""
        total, count = 0.0, 0
        for before, (batch, values) in zip(self._known, self._run(model), strict=True):
            after = values[self.objective.output].astype(np.float64)
            found = per_sample(batch, before.astype(np.float64), after, self.objective)
            error = found["kl"] if "kl" in found else 1 - found["cosine"]
            total += float(error[batch.valid].sum())
            count += int(batch.valid.sum())
        return total / count if np.isfinite(total) else float("inf")

    def _run(self, model: Model) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        size = rows_per_run(self.objective, self.rows)
        return stream(model, self.rows, [self.objective.output], options=self.options, rows=size)


def per_sample(batch: Batch, before: np.ndarray, after: np.ndarray, objective: Objective) -> Mapping[str, np.ndarray]:
    """How far two outputs are apart, float64 [rows] by measure."""
    weight = np.ones(before.shape[:-1])
    if batch.token_mask is not None and batch.token_mask.shape == weight.shape:
        weight = weight * batch.token_mask
    if objective.link == "identity":
        dot = (before * after).sum(-1)
        norms = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
        cosine = dot / np.maximum(norms[0] * norms[1], 1e-30)
        error = np.linalg.norm(after - before, axis=-1) / np.maximum(norms[0], 1e-30)
        return {"cosine": _mean(cosine, weight), "relative_error": _mean(error, weight)}
    if objective.width is None and batch.token_mask is not None and batch.token_mask.shape == before.shape:
        before, after = (np.where(batch.token_mask, values, -1e9) for values in (before, after))  # padding is no candidate
    log_p, log_q = (_log_softmax(values, objective) for values in (before, after))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    predicted, now = before.argmax(-1), after.argmax(-1)
    given_up = np.exp(np.take_along_axis(log_p, predicted[..., None], -1)) - np.exp(np.take_along_axis(log_p, now[..., None], -1))
    result = {"agreement": _mean(predicted == now, weight), "kl": _mean(kl, weight), "expected_drop": _mean(given_up[..., 0], weight)}
    if predicted.ndim == 1 and objective.width is not None:
        result["predicted"] = predicted
    labels = batch.labels
    if labels is not None and labels.dtype.kind == "i" and labels.shape == predicted.shape:
        counted = weight * (labels != IGNORED_LABEL)
        result["accuracy_before"] = _mean(predicted == labels, counted)
        result["accuracy_after"] = _mean(now == labels, counted)
        # A row of which no token has a label is neither right nor wrong.
        result["labelled"] = counted.reshape(len(counted), -1).any(axis=1)
    return result


def _log_softmax(values: np.ndarray, objective: Objective) -> np.ndarray:
    if objective.tensor != objective.output:
        # The output is a probability already, or its logarithm.
        values = values if values.max() <= 0 else np.log(np.maximum(values, 1e-30))
    shifted = values - values.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean per sample over all axes but the first."""
    axes = tuple(range(1, values.ndim))
    return np.asarray((values * weight).sum(axes) / np.maximum(weight.sum(axes), 1e-30)) if axes else values.astype(np.float64)


def _interval(values: np.ndarray, seed: int) -> Interval:
    picks = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
