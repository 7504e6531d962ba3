"""Gradual pruning: score the current student, cut to the next budget, re-fit; repeat.

Scores measured once on the dense model mislead at high compression. Each round measures them again on the pruned and re-fitted student,
with labels drawn from the dense teacher, and cuts the prunable cost by the same factor, so k rounds end at the budget asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.calibration.data import Batch
from onnxprune.graph.anatomy import Site
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.importance.local import in_proportion
from onnxprune.importance.registry import CRITERIA, Criterion
from onnxprune.passes.choice import Taste
from onnxprune.passes.curvature import curvature_scores, obstacle
from onnxprune.passes.leave_one_out import growth_without
from onnxprune.passes.refit import Changes, SiteFit, refit
from onnxprune.passes.refit_shared import RowWeight
from onnxprune.passes.scoring import fisher_sums, gathered, local_scores, mask_gradients, still_read
from onnxprune.passes.workbench import Scores, Student, Workbench, dense_student
from onnxprune.search.costs import CostTable

log = logging.getLogger(__name__)

CLASS_ROW_SHARE = 0.3
"""In a re-fit of a model that reads its first token only, that row weighs this share of all rows of its sample together.

More helps where class rows are many for the width (a small ViT: KL -40 % against equal weights, at 1.0 -45 %), and hurts where they are few
(a text model: +8 %, at 1.0 +29 %)."""


_ROUND_SHARE = 0.7
"""A round leaves at most this share of what can be removed, unless that takes more rounds than asked for."""


def score(bench: Workbench, student: Student, draw: int) -> Scores:
    """Measure the importance of the units of ``student``. ``draw`` selects the random targets of this round."""
    criterion = CRITERIA[bench.recipe.importance]
    if criterion.needs == "curvature":
        return _by_curvature(bench, student, draw)
    if criterion.needs == "measured":
        return _by_leaving_out(bench, student, draw)
    if criterion.needs in ("gradients", "classes"):
        return _by_gradients(bench, student, draw, criterion)
    found = local_scores(student.model, student.kept, bench.sites, criterion.name, bench.batches, bench.options)
    if criterion.comparable:
        return Scores(found)
    read = still_read(student.model, student.kept, bench.sites)
    return Scores(found | {site.name: in_proportion(found[site.name], site.parameters_per_unit) for site in read})


def _by_gradients(bench: Workbench, student: Student, draw: int, criterion: Criterion) -> Scores:
    if criterion.name == "fisher":
        return Scores(_by_fisher(bench, student, bench.sites, draw))
    assert criterion.score is not None
    classes = (bench.targets.classes(),) if criterion.needs == "classes" else ()
    gradients = gathered(_gradients(bench, student, bench.sites, draw))
    scores = {site.name: np.zeros(len(student.kept[site.name])) for site in bench.sites}
    scores |= {site: criterion.score(values, *classes) for site, values in gradients.items()}
    return Scores(scores, gradients if criterion.name == "block-fisher" else None)


def _by_leaving_out(bench: Workbench, student: Student, draw: int) -> Scores:
    """Heads one by one; of other sites, which have too many units for that, mask gradients tell, in the same unit."""
    heads = [site for site in bench.sites if site.kind == "heads"]
    other = [site for site in bench.sites if site.kind != "heads"]
    scores = _by_fisher(bench, student, other, draw) if other else {}
    progress = bench.report("leave one out")
    scores |= growth_without(bench.anatomy, student.model, student.kept, heads, bench.objective, bench.targets, bench.options, progress)
    return Scores({site.name: scores[site.name] for site in bench.sites})


def _by_curvature(bench: Workbench, student: Student, draw: int) -> Scores:
    """Where one matrix reads a site, by curvature; elsewhere by mask gradients, whose Fisher counts in the same unit."""
    other = [site for site in bench.sites if obstacle(bench.anatomy, site)]
    plain = [site for site in bench.sites if site not in other]
    scores = _by_fisher(bench, student, other, draw) if other else {}
    if plain:
        progress = bench.report("curvature")
        scores |= curvature_scores(
            bench.anatomy, student.model, student.kept, plain, bench.objective, bench.targets, draw, bench.options, progress
        )
    return Scores({site.name: scores[site.name] for site in bench.sites})


def _by_fisher(bench: Workbench, student: Student, sites: Sequence[Site], draw: int) -> dict[str, np.ndarray]:
    sums = fisher_sums(_gradients(bench, student, sites, draw))
    return {site.name: sums.mean(site.name) if site.name in sums else np.zeros(len(student.kept[site.name])) for site in sites}


def _gradients(bench: Workbench, student: Student, sites: Sequence[Site], draw: int) -> Iterator[dict[str, np.ndarray]]:
    progress = bench.report("mask gradients")
    return mask_gradients(student.model, student.kept, sites, bench.objective, bench.targets, draw, bench.options, progress)


def cut(bench: Workbench, kept: Kept) -> Student:
    """Slice the dense model to ``kept`` and compensate it."""
    model = slice_model(bench.anatomy, kept)
    changes: Changes = {}
    fits: tuple[SiteFit, ...] = ()
    if bench.recipe.compensation != "none" and model is not bench.anatomy.model:
        model, changes, fits = refit(
            bench.anatomy,
            model,
            bench.batches,
            bench.options,
            kept=kept,
            method="scale" if bench.recipe.compensation == "scale" else "refit",
            row_weight=_class_row(bench) if bench.objective.first_token else None,
            progress=bench.report("re-fit"),
        )
    return Student({name: np.asarray(units) for name, units in kept.items()}, model, changes, fits)


def _class_row(bench: Workbench) -> RowWeight:
    # Of the last site only the rows that the output reads may be computed; the first one has them all.
    shape = bench.anatomy.profile.shape(bench.sites[0].consumers[0].tensor)

    def weigh(batch: Batch, read: tuple[int, ...]) -> np.ndarray | None:
        if batch.token_mask is not None:
            real = batch.token_mask
        elif len(read) == 3:
            real = np.ones(read[:2], bool)
        elif shape is not None and len(shape) == 3:
            real = np.ones((len(batch), shape[1]), bool)
        else:
            return None
        weight = np.ones(real.shape, np.float32)
        weight[:, 0] = CLASS_ROW_SHARE * real.sum(axis=1)
        return weight.reshape(-1)

    return weigh


@dataclass(frozen=True, eq=False)
class Descent:
    """``student`` is the result; ``before`` and ``scores``, of before the last cut, allow another last cut without scoring again.

    ``taste`` is how the last cut was chosen, ``rounds`` how many it took.
    """

    student: Student
    before: Student
    scores: Scores
    taste: Taste = field(default_factory=Taste)
    rounds: int = 0


def rounds_to(table: CostTable, budget: float, most: int, cost: float) -> int:
    """Rounds that lead from ``cost`` to ``budget``: at most ``most``, fewer where none would remove three tenths of what can be."""
    share = (budget - table.fixed) / max(cost - table.fixed, 1e-30)
    return min(most, max(1, math.ceil(math.log(max(share, 1e-9)) / math.log(_ROUND_SHARE))))


def descend(
    bench: Workbench,
    table: CostTable,
    budget: float,
    rounds: int,
    *,
    start: Student | None = None,
    first: Scores | None = None,
    error: Callable[[Model], float] | None = None,
    shape: CostTable | None = None,
) -> Descent | None:
    """Rounds down to ``budget``; none if that needs nothing removed, None if the budget cannot be met.

    Saliencies of single units add up to less than their site is worth, and measured costs of small parts are noisy: the choice that looks
    best on paper often is not. Where there are others of the same cost (one that empties no site, one by another table's proportions),
    each is cut and re-fitted, and the model decides.

    Args:
        rounds: most rounds; fewer where none would remove three tenths of what can be.
        start: where to begin, the dense model if None; only units that it keeps can stay.
        first: scores of ``start``, if they are known.
        error: of a student against the original, on rows that judge; None trusts saliencies.
        shape: another table of the same sites, for a choice by its proportions.
    """
    student = start or dense_student(bench.anatomy, bench.sites)
    cost = table.predict(student.counts)
    if cost <= budget:
        return Descent(student, student, Scores({}))
    prunable = cost - table.fixed
    if not prunable:
        return None
    share = (budget - table.fixed) / prunable
    if share <= 0 and budget < table.floor:
        return None
    rounds = rounds_to(table, budget, rounds, cost)
    tastes = [Taste()]
    if error is not None and table.unit == "ms":
        tastes += [Taste(spare=True)] + ([Taste(spare=True, shape=shape)] if shape is not None else [])
    before, scores, taste = student, Scores({}), tastes[0]
    for number in range(1, rounds + 1):
        goal = table.fixed + prunable * max(share, 1e-9) ** (number / rounds) if number < rounds else budget
        before, scores = student, first if number == 1 and first is not None else score(bench, student, number)
        found = _best_cut(bench, before, scores, table, max(goal, table.floor), tastes, error)
        if found is None:
            return None
        student, taste = found
        log.info("round %d: cost %.4g of %.4g %s", number, table.predict(student.counts), table.full, table.unit)
    return Descent(student, before, scores, taste, rounds)


def _best_cut(
    bench: Workbench,
    student: Student,
    scores: Scores,
    table: CostTable,
    budget: float,
    tastes: Sequence[Taste],
    error: Callable[[Model], float] | None,
) -> tuple[Student, Taste] | None:
    """The cut of least error among those that differ; the first where there is no judge."""
    found: dict[tuple[int, ...], tuple[dict[str, np.ndarray], Taste]] = {}
    for taste in tastes:
        kept = taste.choose(bench, student, scores, table, budget)
        if kept is not None:
            found.setdefault(tuple(len(units) for units in kept.values()), (kept, taste))
    if not found:
        return None
    cuts = [(cut(bench, kept), taste) for kept, taste in found.values()]
    if len(cuts) == 1 or error is None:
        return cuts[0]
    errors = [error(candidate.model) for candidate, _ in cuts]
    log.info("errors of %d choices: %s", len(cuts), ", ".join(f"{value:.3g}" for value in errors))
    return cuts[int(np.argmin(errors))]
