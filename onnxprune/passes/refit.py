"""Compensation: every map that reads a pruned axis is re-fitted, bottom-up, on the activations of the already pruned and re-fitted prefix.

Teacher (dense) and student run side by side, one sublayer at a time. At each sublayer the student's residual stream must come as near as
possible to the teacher's, so drift inherited from below is corrected as well. Only the boundary between two sublayers is in memory, and
each model runs through its graph exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from onnxprune.calibration.data import Batch
from onnxprune.calibration.prefix import Prefix
from onnxprune.compensate.ridge import Fit, HeldRows, NormalEquations
from onnxprune.compensate.scale import solve_scales
from onnxprune.graph.anatomy import Anatomy, Consumer, Site
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.slicing import Kept, kept_positions
from onnxprune.graph.storage import stored
from onnxprune.graph.view import GraphView, Node
from onnxprune.passes.readers import Constants, Patches, Reader, reader_of
from onnxprune.passes.refit_shared import RowWeight, fit_shared, nearer, shared_matrix
from onnxprune.passes.scoring import student_labels
from onnxprune.runtime.session import RuntimeOptions

Method = Literal["refit", "scale"]
Changes = dict[tuple[str, int], np.ndarray]
"""New constants by (node name, input slot): all that a re-fit does to a graph."""

RIDGE = 1e-2
"""Ridge relative to the mean diagonal of the Gram matrix; the value that held up in every published and measured setting we know."""

_RIDGES = (RIDGE, 3e-2, 1e-1)
"""Where rows are few for the columns, such as those of a class token, the rows kept out of a fit choose one of these."""

_ENOUGH = 10
"""Rows for each column with which a fit needs no choice of the ridge, and may have an intercept."""

_ROWS_PER_INPUT = 12
"""Places are drawn from images until a convolution has this many rows for each of its inputs."""

_ACTIVATION_BYTES = 1 << 30

_JUDGING_BATCHES = 8
"""One batch in this many does not enter the fit of shared matrices but judges it."""

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
    """``stays`` are the positions of the target's channels that the student keeps, None if it keeps all."""

    site: Site
    reader: Reader
    stays: np.ndarray | None


def refit(
    anatomy: Anatomy,
    student: Model,
    batches: Sequence[Batch],
    options: RuntimeOptions,
    *,
    kept: Kept | None = None,
    row_weight: RowWeight | None = None,
    method: Method = "refit",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, Changes, tuple[SiteFit, ...]]:
    """Re-fit all sites of ``student``, a slice of ``anatomy.model`` with the dense weights.

    Args:
        batches: calibration batches; rows and tokens that are not valid are left out of the sums.
        kept: units that ``student`` keeps; channels are re-fitted only if it names some.
        method: ``refit`` solves for the weights and the bias, ``scale`` for one factor per unit.
        row_weight: weights [rows * tokens] of the flattened rows of a batch; None weighs all alike.
        progress: called with (sublayers done, sublayers in all).

    Returns:
        The re-fitted student, the constants that changed by (node name, input slot), and what happened at each site. A fit that does not
        lower the error on held-back rows is not applied.
    """
    changes: Changes = {}
    shared: list[SiteFit] = []
    if method == "refit":
        student, shared = _refit_shared(anatomy, student, kept or {}, batches, options, row_weight, changes)
    stages, skipped = _stages(anatomy, student, kept or {}, {report.site for report in shared})
    batches = _affordable(student, stages, batches)
    teacher_run = Prefix(anatomy.model, batches, options)
    student_run = Prefix(student, batches, options)
    reports = [*shared, *skipped]
    for done, stage in enumerate(stages):
        # BLAS threads spin while they wait: on a busy machine two of them took ten times the CPU time of one.
        with threadpool_limits(options.threads or None):
            fitted, held = _accumulate(stage, teacher_run, student_run, batches, row_weight)
            new, report = _solve(student_run.view, stage, fitted, held, method)
        if new:
            new = stored(new) if student.paged else new
            student = replace_constants(student, new, "~refit")
            student_run.replace(student)
            changes.update({(student_run.view.nodes[index].name, slot): array for (index, slot), array in new.items()})
        reports.append(report)
        if progress:
            progress(done + 1, len(stages))
    return student, changes, tuple(reports)


def _refit_shared(
    anatomy: Anatomy,
    student: Model,
    kept: Kept,
    batches: Sequence[Batch],
    options: RuntimeOptions,
    row_weight: RowWeight | None,
    changes: Changes,
) -> tuple[Model, list[SiteFit]]:
    """The student with matrices re-fitted that are read in several places; ``changes`` grows. Batches kept out of the fit judge it."""
    view = GraphView(student)
    node_of = {node.name: node for node in view.nodes}
    uses: dict[str, list[Reader]] = {}
    for site in anatomy.sites:
        if site.kind in ("heads", "ffn") and shared_matrix(site) and 0 < len(kept.get(site.name, ())) < site.units:
            found = [_reader(anatomy, site, consumer, view, node_of, kept) for consumer in site.consumers]
            if all(isinstance(reader, Reader) for reader in found):
                uses[site.name] = [reader for reader in found if isinstance(reader, Reader)]
    if not uses:
        return student, []
    judges = batches[::_JUDGING_BATCHES]
    fitted = [batch for number, batch in enumerate(batches) if number % _JUDGING_BATCHES] or judges
    with threadpool_limits(options.threads or None):
        constants, errors = fit_shared(anatomy, student, uses, kept, fitted, options, RIDGE, row_weight)
    last = max((reader.target for readers in uses.values() for reader in readers), key=lambda name: view.producer[name].index)
    reports = []
    for name, new in constants.items():
        better = nearer(anatomy, student, new, last, judges, options)
        if better:
            new = stored(new) if student.paged else new
            student = replace_constants(student, new, "~refit")
            changes.update({(view.nodes[index].name, slot): array for (index, slot), array in new.items()})
        reports.append(SiteFit(name, better, errors[name], "" if better else "the fit would not lower the error on rows kept out of it"))
    return student, reports


def _stages(anatomy: Anatomy, student: Model, kept: Kept, done: Collection[str]) -> tuple[list[_Stage], list[SiteFit]]:
    """Readers to fit, in the order in which their targets are computed, and the sites that have none; sites that are ``done`` aside."""
    view = GraphView(student)
    node_of = {node.name: node for node in view.nodes}
    positions = kept_positions(anatomy, kept)
    channels = any(site.kind == "channels" and len(kept.get(site.name, ())) < site.units for site in anatomy.sites if site.name in kept)
    stages: dict[tuple[int, int], _Stage] = {}
    skipped = []
    for site in sorted(anatomy.sites, key=lambda site: site.order):
        if site.name in done or site.kind == "qk" or (site.kind == "channels" and not channels):
            continue  # two activations meet over the depth of queries and keys: there is no matrix to fit
        for consumer in site.consumers:
            found = student_reader(anatomy, site, consumer, view, node_of, kept)
            if isinstance(found, str):
                skipped.append(SiteFit(site.name, False, 1.0, found))
            else:
                rank = len(anatomy.profile.shape(found.target) or ())
                cut = positions.get((found.target, found.channels % rank)) if rank else None
                stages.setdefault((found.node.index, found.slot), _Stage(site, found, None if cut is None else np.flatnonzero(cut)))
            if site.kind != "channels":
                break
    return sorted(stages.values(), key=lambda stage: view.producer[stage.reader.target].index), skipped


def followed(anatomy: Anatomy, student: Model, kept: Kept) -> list[str]:
    """The tensors in which a student can follow its teacher: what the re-fit of each site comes nearer to, in the teacher's shape."""
    stages, _ = _stages(anatomy, student, kept, ())
    return list(dict.fromkeys(stage.reader.target for stage in stages if stage.stays is None))


def student_reader(
    anatomy: Anatomy, site: Site, consumer: Consumer, view: GraphView, node_of: Mapping[str, Node], kept: Kept
) -> Reader | str:
    """What reads a site in a student, or why it cannot be fitted. ``view`` is the student's, ``node_of`` its nodes by name."""
    if len(site.consumers) > 1 and site.kind != "channels":
        return "several matrices read this axis"
    return _reader(anatomy, site, consumer, view, node_of, kept)


def _reader(anatomy: Anatomy, site: Site, consumer: Consumer, view: GraphView, node_of: Mapping[str, Node], kept: Kept) -> Reader | str:
    node = node_of.get(consumer.leaf.node.name)
    if node is None:
        return "nothing is left to fit"
    if not leads_with_samples(anatomy, consumer.tensor):
        return "its first axis is not the batch, so padding cannot be told apart"
    weight = view.value(node.inputs[consumer.leaf.slot])
    if weight is None:
        return "its consumer is not a plain matrix product"
    labels = student_labels(site, kept, consumer, anatomy.sites)
    if len(labels) != weight.shape[consumer.leaf.axis]:  # every unit has equally many positions, in order
        labels = np.arange(weight.shape[consumer.leaf.axis]) // (len(consumer.labels) // site.units)
    rank = len(anatomy.profile.shape(consumer.tensor) or ())
    return reader_of(view, consumer, node, rank, labels, chain=site.kind == "channels")


def _affordable(student: Model, stages: Sequence[_Stage], batches: Sequence[Batch]) -> Sequence[Batch]:
    """As many batches as let the activations between two layers of images fit in memory: places are drawn anyway."""
    if not any(isinstance(stage.reader, Patches) for stage in stages):
        return batches
    largest = max(int(np.prod(shape)) for shape in shapes_of(student, batches[0].feeds).values())
    return batches[: max(1, _ACTIVATION_BYTES // (2 * 4 * largest))]


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
    row_weight: RowWeight | None,
) -> tuple[NormalEquations, HeldRows]:
    """Sums for the fit, and the rows kept out of it to judge it."""
    reader = stage.reader
    fitted: NormalEquations | None = None
    held = HeldRows()
    rng = np.random.default_rng(0)
    places = -(-_ROWS_PER_INPUT * reader.inputs // sum(len(batch) for batch in batches))
    seen = 0
    teacher = teacher_run.advance([reader.target], [reader.target])
    student = student_run.advance([reader.tensor, reader.target], [reader.tensor])
    for batch, (target,), (read, current) in zip(batches, teacher, student, strict=True):
        wanted = target if stage.stays is None else np.take(target, stage.stays, axis=reader.channels)
        x, error = reader.pairs(read, wanted - current, places, rng)
        if fitted is None:
            fitted = NormalEquations(x.shape[1], error.shape[1])
        per_row = len(x) // len(batch)
        judge = np.repeat((seen + np.arange(len(batch))) % _CHECK_EVERY == 0, per_row)
        seen += len(batch)
        real = batch.real_rows(len(x))
        weight = row_weight(batch, read.shape) if row_weight else None
        if weight is not None and weight.size != len(x):
            weight = None  # of this sublayer only the rows that the output reads are computed, or some places of an image
        for sums, chosen in ((fitted, real & ~judge), (held, real & judge)):
            if chosen.any():
                sums.add(x[chosen], error[chosen], None if weight is None else weight[chosen])
    assert fitted is not None
    fitted.flush()
    return fitted, held


def _solve(view: GraphView, stage: _Stage, fitted: NormalEquations, held: HeldRows, method: Method) -> tuple[Constants, SiteFit]:
    name = stage.site.name
    if fitted.energy <= 1e-12 * max(float(np.trace(fitted.gram)), 1e-30):
        return {}, SiteFit(name, False, 1.0, "nothing to correct")
    # With few rows for the columns an intercept would be noise; without a bias it has no place.
    enough = fitted.rows >= _ENOUGH * len(fitted.gram)
    intercept = enough and stage.reader.branch.bias is not None
    best: tuple[float, Fit] | None = None
    failed = ""
    for ridge in _RIDGES[:1] if enough or method == "scale" else _RIDGES:
        try:
            fit = fitted.solve(ridge, intercept=intercept) if method == "refit" else _scales(view, stage, fitted)
        except np.linalg.LinAlgError as error:
            failed = str(error)
            continue
        held_error = held.error(fit, np.square(stage.reader.branch.gain))
        judged = fit.fitted_error if held_error is None else held_error
        if best is None or judged < best[0] or np.isnan(best[0]):
            best = judged, fit
    if best is None:
        return {}, SiteFit(name, False, 1.0, failed)
    judged, fit = best
    if not judged < 1.0:
        return {}, SiteFit(name, False, judged, "the fit would not lower the error on rows kept out of it")
    return stage.reader.changed(view, fit), SiteFit(name, True, judged)


def _scales(view: GraphView, stage: _Stage, fitted: NormalEquations) -> Fit:
    reader = stage.reader
    weight = view.value(view.nodes[reader.node.index].inputs[reader.slot])
    assert weight is not None
    # What other sites may keep here gets one scale together.
    units = reader.units()
    return solve_scales(fitted, reader.matrix(weight), np.where(units < 0, units.max() + 1, units), RIDGE)
