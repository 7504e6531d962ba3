"""``polish``: a short distillation of all weights, with the dense model as the teacher.

Layer by layer least squares leave what a linear map cannot mend. Here the pruned model follows the dense one by gradient steps: the
divergence of the outputs, and how far the residual stream is from the teacher's behind each sublayer (hints: Romero et al., ICLR 2015; as
TinyBERT, Jiao et al., 2020, without its labels). All rows are made anew in every epoch, spliced from two or with words of others: on those
that the search has decided and fitted on, the student is several times nearer to its teacher than on others already. Rows that took no
part choose the epoch that counts; if none is better than the start, the start stays.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.calibration.objective import Objective
from onnxprune.calibration.splice import joined, reworded, spliced
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.autodiff.gradient import GRADIENT, TARGET, WEIGHT
from onnxprune.graph.autodiff.weights import parameters_of, weight_gradient_model
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView
from onnxprune.graph.vocabulary import word_tables
from onnxprune.passes.apply import install
from onnxprune.passes.base import WholePass
from onnxprune.passes.refit import followed
from onnxprune.passes.workbench import Student, Workbench
from onnxprune.runtime.session import open_session, run
from onnxprune.verification import Yardstick

log = logging.getLogger(__name__)

POLISH = WholePass(
    name="polish",
    kind="polish",
    summary="distil the pruned model from the dense one for a few epochs, without labels",
    detail=(
        "Gradient steps on all weights of the pruned model, towards the outputs and the residual stream of the dense model, on rows made "
        "of two calibration rows and more. Rows that took no part choose the epoch; a model that did not get better stays as it was. "
        "Takes minutes where the rest takes seconds."
    ),
    needs=("calibration", "gradients"),
)

EPOCHS = 16
STEP = 3e-3
"""Step of the optimiser relative to the root mean square of each weight; it falls linearly to zero."""

_TOO_FAR = 1.5
"""A divergence this many times that of the best epoch: the step was too long, and the next epoch begins there with a shorter one."""

_SHORTER = 0.25
_HINTS = 0.3
_WARM_UP = 20
_SMALLEST = 1e-3
_SORTED_BATCHES = 8


@dataclass(frozen=True)
class Polished:
    """What came of it: divergence from the file as given on rows that took no part, before and after; the epoch that counts, 0 for none."""

    before: float
    after: float
    epoch: int
    epochs: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def polish(
    bench: Workbench,
    student: Student,
    teacher: Model,
    data: CalibrationData,
    yardstick: Yardstick,
    *,
    hinted: bool = True,
    epochs: int = EPOCHS,
) -> tuple[Student, Polished] | Refusal:
    """Train all weights of ``student`` to follow the dense model.

    Args:
        teacher: the dense model, before anything of it went.
        data: rows to learn from.
        hinted: whether the residual streams of the two are in the same basis, so that the teacher's are hints.
        yardstick: divergence on rows that the fit has not seen.

    Returns:
        The student of the best epoch, or the one given; or why none of its weights can be trained.
    """
    if student.model.paged:
        return Refusal("OP901", "polish", "the model is read from disk piece by piece, and its optimiser would need all of it")
    try:
        run_ = _Run(bench, student, teacher, hinted)
    except InputError as reason:
        return Refusal("OP902", "polish", str(reason))
    before = best = yardstick(student.model)
    found, epoch, step = student, 0, STEP
    tell = bench.report("polish")
    for number in range(1, epochs + 1):
        run_.epoch(data, number, step * (1 - (number - 1) / epochs), step * (1 - number / epochs))
        candidate = run_.student()
        error = yardstick(candidate.model)
        log.info("polish: epoch %d, divergence %.4g (%.4g at the start)", number, error, before)
        if error < best:
            best, found, epoch = error, candidate, number
        elif not error <= _TOO_FAR * best:
            run_ = _Run(bench, found, teacher, hinted)
            step *= _SHORTER
        if tell:
            tell(number, epochs)
    return found, Polished(before, best, epoch, epochs)


class _Run:
    """The optimiser's state: one vector of all weights and its moments (Adam: Kingma and Ba, ICLR 2015)."""

    def __init__(self, bench: Workbench, student: Student, teacher: Model, hinted: bool) -> None:
        self.bench, self.start = bench, student
        objective = bench.objective
        self.hints = followed(bench.anatomy, student.model, student.kept) if hinted else []
        self.words = {name for tables in word_tables(GraphView(student.model))[0] for name in tables.inputs}
        self.teacher = open_session(with_outputs(teacher, [objective.tensor, *self.hints], keep=False), bench.options)
        known = parameters_of(student.model)
        names = [parameter.name for parameter in known]
        model = weight_gradient_model(student.model, names, objective.tensor, objective.link, self.hints, dict(bench.batches[0].feeds))
        self.session = open_session(model, bench.options)
        made = set(model.output_names)
        self.parameters = [parameter for parameter in known if GRADIENT + parameter.name in made]
        if not self.parameters:
            raise InputError("none of its weights is a float matrix of a product or a bias that the output depends on")
        values = [_weights(student.model, parameter.name) for parameter in self.parameters]
        self.shapes = [value.shape for value in values]
        self.bounds = np.cumsum([0, *(value.size for value in values)])
        self.weights = np.concatenate([value.reshape(-1) for value in values])
        self.scale = [np.float32(max(np.sqrt(np.mean(np.square(value, dtype=np.float64))), _SMALLEST)) for value in values]
        self.mean, self.square = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self.steps = 0
        self.spreads = self._spreads()

    def _spreads(self) -> dict[str, float]:
        """How far rows of what the teacher shows are from their mean, squared, on average: the measure of distances from them."""
        tensors = [self.bench.objective.tensor, *self.hints]
        sums: dict[str, np.ndarray] = {}
        for batch in self.bench.batches:
            for name, value in zip(tensors, run(self.teacher, batch.feeds, tensors), strict=True):
                rows = value.reshape(-1, value.shape[-1])[_real(batch, value.shape[:-1]).reshape(-1) > 0].astype(np.float64)
                sums[name] = sums.get(name, 0.0) + np.array([len(rows), np.square(rows).sum(), *rows.sum(axis=0)])
        squares = {name: all_[1] - np.square(all_[2:]).sum() / max(all_[0], 1) for name, all_ in sums.items()}
        return {name: float(max(squares[name], 1e-12) / max(sums[name][0], 1)) for name in tensors}

    def epoch(self, data: CalibrationData, number: int, step: float, last_step: float) -> None:
        """Walk number ``number`` through twice as many new rows, with steps that fall linearly to ``last_step``."""
        rng = np.random.default_rng([self.bench.recipe.seed, number])
        rows = _new_rows(data, self.words, rng)
        batches = _shuffled(rows, len(self.bench.batches[0]) * 2, rng)
        for done, index in enumerate(batches):
            self._step(rows.batch(index, trim=True), step + (last_step - step) * done / len(batches))

    def _step(self, batch: Batch, step: float) -> None:
        tensors = [self.bench.objective.tensor, *self.hints]
        wanted, *hints = run(self.teacher, batch.feeds, tensors)
        feeds = {**batch.feeds, **self._views(), **_pull(batch, wanted, self.bench.objective, self.spreads[tensors[0]])}
        for name, value in zip(self.hints, hints, strict=True):
            weight = _shares(batch, value.shape[:-1])
            feeds |= {f"{TARGET}.{name}": value, f"{WEIGHT}.{name}": weight * np.float32(_HINTS / len(hints) / self.spreads[name])}
        gradients = run(self.session, feeds, [GRADIENT + parameter.name for parameter in self.parameters])
        self._adam(gradients, step)

    def _adam(self, gradients: Sequence[np.ndarray], step: float) -> None:
        self.steps += 1
        warm = min(1.0, self.steps / _WARM_UP)
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for number, gradient in enumerate(gradients):
            part = slice(self.bounds[number], self.bounds[number + 1])
            flat = gradient.reshape(-1)
            self.mean[part] += np.float32(0.1) * (flat - self.mean[part])
            self.square[part] += np.float32(0.001) * (np.square(flat) - self.square[part])
            rate = np.float32(step * warm / first) * self.scale[number]
            self.weights[part] -= rate * self.mean[part] / (np.sqrt(self.square[part] / np.float32(second)) + np.float32(1e-8))

    def _views(self) -> dict[str, np.ndarray]:
        parts = zip(self.parameters, self.bounds, self.bounds[1:], self.shapes, strict=False)
        return {parameter.name: self.weights[start:end].reshape(shape) for parameter, start, end, shape in parts}

    def student(self) -> Student:
        """The student with the weights as they are now."""
        changes: dict[tuple[str, int], np.ndarray] = {}
        for parameter, value in zip(self.parameters, self._views().values(), strict=True):
            trained = value.copy()
            changes.update({use: trained for use in parameter.uses})
        return replace(self.start, model=install(self.start.model, changes), changes={**self.start.changes, **changes})


def _new_rows(data: CalibrationData, words: Collection[str], rng: np.random.Generator) -> CalibrationData:
    """As many spliced rows and as many others: with words of other rows, or spliced as well. The rows themselves where none can be made."""
    made = spliced(data, len(data), rng)
    if made is None:
        return replace(data, labels=None)
    return joined(made, reworded(data, words, rng) or spliced(data, len(data), rng))


def _weights(model: Model, name: str) -> np.ndarray:
    found = model.initializer(name)
    assert found is not None
    return found


def _shuffled(data: CalibrationData, rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches in random order, each of rows of about one length: of a few batches together the longest rows come first."""
    rows = data.fixed_rows or rows
    order = rng.permutation(len(data))
    if data.token_mask is not None:
        lengths = data.token_mask.sum(axis=1)
        many = rows * _SORTED_BATCHES
        parts = [order[start : start + many] for start in range(0, len(order), many)]
        order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    return [batches[number] for number in rng.permutation(len(batches))]


def _pull(batch: Batch, wanted: np.ndarray, objective: Objective, spread: float) -> dict[str, np.ndarray]:
    """Target and weight of the output: the mean divergence, or the squared distance relative to how far vectors differ."""
    weight = _shares(batch, wanted.shape[:-1])
    if objective.link == "identity":
        return {TARGET: wanted, WEIGHT: weight / np.float32(spread)}
    scores = np.exp(wanted - wanted.max(axis=-1, keepdims=True))
    return {TARGET: scores / scores.sum(axis=-1, keepdims=True), WEIGHT: weight}


def _shares(batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
    """The share that each row of values has in their mean, float32 of ``shape``."""
    weight = _real(batch, shape)
    return np.asarray(weight / np.float32(max(weight.sum(), 1.0)))


def _real(batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
    """1 where a row of values counts, 0 at padding and filler rows, float32 of ``shape``."""
    weight = np.ones(shape, np.float32) * batch.valid.reshape([-1] + [1] * (len(shape) - 1))
    if batch.token_mask is not None and batch.token_mask.shape == shape:
        weight = weight * batch.token_mask
    return np.asarray(weight, np.float32)
