"""Compensation: every map that reads a pruned axis is re-fitted, bottom-up, on the activations of the already pruned and re-fitted prefix.

Teacher (dense) and student run side by side, one sublayer at a time. At each sublayer the student's residual stream must come as near as
possible to the teacher's, so drift inherited from below is corrected as well. Only the boundary between two sublayers is in memory, and
each model runs through its graph exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from onnxprune.calibration.data import Batch
from onnxprune.calibration.prefix import Prefix
from onnxprune.compensate.ridge import Fit, HeldRows, NormalEquations
from onnxprune.compensate.scale import solve_scales
from onnxprune.graph.anatomy import Anatomy, Consumer, Site
from onnxprune.graph.branch import Branch, follow_branch
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import RuntimeOptions

Method = Literal["refit", "scale"]
Changes = dict[tuple[str, int], np.ndarray]
"""New constants by (node name, input slot): all that a re-fit does to a graph."""
_NewConstants = dict[tuple[int, int], np.ndarray]

RIDGE = 1e-2
"""Ridge relative to the mean diagonal of the Gram matrix; the value that held up in every published and measured setting we know."""

_DEAD_GAIN = 1e-6

_CHECK_EVERY = 16
"""One calibration row in this many does not enter the fit but judges it."""


@dataclass(frozen=True)
class SiteFit:
    """What the re-fit of one site did: squared error of the residual stream on rows not fitted, relative to no re-fit."""

    site: str
    applied: bool
    error: float
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Stage:
    site: Site
    consumer: Consumer
    branch: Branch
    node: int
    """index of the consumer's node in the student"""


def refit(
    anatomy: Anatomy,
    student: Model,
    batches: Sequence[Batch],
    options: RuntimeOptions,
    *,
    row_weight: Callable[[Batch], np.ndarray | None] | None = None,
    method: Method = "refit",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, Changes, tuple[SiteFit, ...]]:
    """Re-fit all sites of ``student``, a slice of ``anatomy.model`` with the dense weights.

    Args:
        batches: calibration batches; rows and tokens that are not valid are left out of the sums.
        method: ``refit`` solves for the weights and the bias, ``scale`` for one factor per unit.
        row_weight: weights [rows * tokens] of a batch for its flattened rows; None weighs all alike.
        progress: called with (sublayers done, sublayers in all).

    Returns:
        The re-fitted student, the constants that changed by (node name, input slot), and what happened at each site. A fit that does not
        lower the error on held-back rows is not applied.
    """
    stages, skipped = _stages(anatomy, student)
    teacher_run = Prefix(anatomy.model, batches, options)
    student_run = Prefix(student, batches, options)
    reports = list(skipped)
    changes: Changes = {}
    for done, stage in enumerate(stages):
        # BLAS threads spin while they wait: on a busy machine two of them took ten times the CPU time of one.
        with threadpool_limits(options.threads or None):
            fitted, held = _accumulate(stage, teacher_run, student_run, batches, row_weight)
            new, report = _solve(student_run.view, stage, fitted, held, method)
        if new:
            student = replace_constants(student, new, "~refit")
            student_run.replace(student)
            changes.update({(student_run.view.nodes[index].name, slot): array for (index, slot), array in new.items()})
        reports.append(report)
        if progress:
            progress(done + 1, len(stages))
    return student, changes, tuple(reports)


def _stages(anatomy: Anatomy, student: Model) -> tuple[list[_Stage], list[SiteFit]]:
    view = GraphView(student)
    index_of = {node.name: node.index for node in view.nodes}
    stages, skipped = [], []
    for site in sorted(anatomy.sites, key=lambda site: site.order):
        consumer = site.consumers[0]
        node = consumer.leaf.node
        weight = anatomy.view.value(consumer.leaf.tensor)
        reason = ""
        branch = None
        if len(site.consumers) > 1:
            reason = "several matrices read this axis"
        elif node.name not in index_of:
            reason = "nothing is left to fit"
        elif weight is None or weight.ndim != 2 or consumer.axis != len(anatomy.profile.shape(consumer.tensor) or ()) - 1:
            reason = "its consumer is not a plain matrix product"
        elif not leads_with_samples(anatomy, consumer.tensor):
            reason = "its first axis is not the batch, so padding cannot be told apart"
        else:
            branch = follow_branch(view, view.nodes[index_of[node.name]], weight.shape[1 - consumer.leaf.axis])
            reason = "" if branch else "the way to the residual stream is not linear"
        if branch is None:
            skipped.append(SiteFit(site.name, False, 1.0, reason))
        else:
            stages.append(_Stage(site, consumer, branch, index_of[node.name]))
    return stages, skipped


def leads_with_samples(anatomy: Anatomy, tensor: str) -> bool:
    """Whether the leading axis of ``tensor`` holds samples (or samples times positions), as far as the profile can tell."""
    profile = anatomy.profile
    samples, shape = profile.shape(anatomy.model.input_names[0]), profile.shape(tensor)
    return not samples or not shape or shape[0] % samples[0] == 0


def _accumulate(
    stage: _Stage,
    teacher_run: Prefix,
    student_run: Prefix,
    batches: Sequence[Batch],
    row_weight: Callable[[Batch], np.ndarray | None] | None,
) -> tuple[NormalEquations, HeldRows]:
    """Sums for the fit, and the rows kept out of it to judge it."""
    total = stage.branch.total
    fitted: NormalEquations | None = None
    held = HeldRows()
    gain = np.asarray(stage.branch.gain, np.float64)
    dead = np.abs(gain) <= _DEAD_GAIN * np.abs(gain).max(initial=1e-30)
    inverse_gain = np.where(dead, 0.0, 1 / np.where(dead, 1.0, gain))  # nothing passes a dead scale, so nothing is asked of it
    seen = 0
    teacher = teacher_run.advance([total], [total])
    student = student_run.advance([stage.consumer.tensor, total], [stage.consumer.tensor])
    for batch, (target,), (x, current) in zip(batches, teacher, student, strict=True):
        x = x.reshape(-1, x.shape[-1])
        error = ((target - current) * inverse_gain).astype(np.float32).reshape(len(x), -1)
        if fitted is None:
            fitted = NormalEquations(x.shape[1], error.shape[1])
        per_row = len(x) // len(batch)
        judge = np.repeat((seen + np.arange(len(batch))) % _CHECK_EVERY == 0, per_row)
        seen += len(batch)
        real = batch.real_rows(len(x))
        weight = row_weight(batch) if row_weight else None
        if weight is not None and weight.size != len(x):
            weight = None  # of this sublayer only the rows that the output reads are computed
        for sums, chosen in ((fitted, real & ~judge), (held, real & judge)):
            if chosen.any():
                sums.add(x[chosen], error[chosen], None if weight is None else weight[chosen])
    assert fitted is not None
    fitted.flush()
    return fitted, held


def _solve(view: GraphView, stage: _Stage, fitted: NormalEquations, held: HeldRows, method: Method) -> tuple[_NewConstants, SiteFit]:
    name = stage.site.name
    if fitted.energy <= 1e-12 * max(float(np.trace(fitted.gram)), 1e-30):
        return {}, SiteFit(name, False, 1.0, "nothing to correct")
    try:
        # With few rows for the columns an intercept would be noise.
        enough = fitted.rows >= 10 * len(fitted.gram)
        fit = fitted.solve(RIDGE, intercept=enough) if method == "refit" else _scales(view, stage, fitted)
    except np.linalg.LinAlgError as error:
        return {}, SiteFit(name, False, 1.0, str(error))
    held_error = held.error(fit, np.square(stage.branch.gain))
    judged = fit.fitted_error if held_error is None else held_error
    if not judged < 1.0:
        return {}, SiteFit(name, False, judged, "the fit would not lower the error on rows kept out of it")
    return _new_constants(view, stage, fit), SiteFit(name, True, judged)


def _scales(view: GraphView, stage: _Stage, fitted: NormalEquations) -> Fit:
    leaf = stage.consumer.leaf
    weight = view.value(view.nodes[stage.node].inputs[leaf.slot])
    assert weight is not None
    rows = weight if leaf.axis == 0 else weight.T
    # Every unit of a site has equally many positions, in order.
    width = len(leaf.labels) // stage.site.units
    return solve_scales(fitted, rows, np.arange(len(rows)) // width, RIDGE)


def _new_constants(view: GraphView, stage: _Stage, fit: Fit) -> _NewConstants:
    leaf = stage.consumer.leaf
    weight = view.value(view.nodes[stage.node].inputs[leaf.slot])
    assert weight is not None
    change = fit.weights if leaf.axis == 0 else fit.weights.T
    constants = {(stage.node, leaf.slot): (weight + change).astype(weight.dtype)}
    if stage.branch.bias is not None and fit.bias.any():
        index, slot = stage.branch.bias
        bias = view.value(view.nodes[index].inputs[slot])
        assert bias is not None
        step = (fit.bias * stage.branch.bias_gain).reshape(bias.shape)
        constants[index, slot] = (bias + step).astype(bias.dtype)
    return constants
