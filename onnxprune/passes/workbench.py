"""What every round of a search works with, and what it hands on: the workbench, students, scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.calibration.objective import LossSource, Objective, Targets
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.paged import run_batches
from onnxprune.graph.profile import shapes_of
from onnxprune.passes.refit import Changes, SiteFit
from onnxprune.runtime.session import RuntimeOptions

_BATCH_ROWS = 8
_OUTPUT_BYTES = 64_000_000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How to decide.

    ``align``: FFN widths are multiples of this when the cost is measured time (channels of 8); ``uniform``: equal numbers of units in all
    layers.
    """

    importance: str = "kfac"
    compensation: str = "refit"
    rounds: int = 4
    align: int = 16
    seed: int = 0
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class Workbench:
    """What every round works with; nothing in it changes."""

    anatomy: Anatomy
    sites: tuple[Site, ...]
    objective: Objective
    batches: Sequence[Batch]
    targets: Targets
    options: RuntimeOptions
    recipe: Recipe
    progress: Progress | None = None

    def report(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


def set_up(
    anatomy: Anatomy,
    sites: tuple[Site, ...],
    objective: Objective,
    data: CalibrationData,
    request: Mapping[str, np.ndarray],
    loss: LossSource,
    options: RuntimeOptions,
    recipe: Recipe,
    progress: Progress | None,
) -> Workbench:
    """A workbench with batches of ``data`` and what the dense model says about them.

    A batch has fewer rows when a row's output is large, a score for every word of a vocabulary at every token; ``request`` tells.
    """
    tensor = objective.tensor
    per_row = 4 * int(np.prod(shapes_of(anatomy.model, request).get(tensor, (1,))[1:], dtype=np.int64))
    rows = int(np.clip(_OUTPUT_BYTES // max(per_row, 1), 1, _BATCH_ROWS))
    batches = list(data.batches(rows, trim=True))
    dense = with_outputs(anatomy.model, [tensor], keep=False)
    targets = Targets(objective, batches, loss, recipe.seed)
    for number, (values,) in enumerate(run_batches(dense, [batch.feeds for batch in batches], [tensor], options)):
        targets.add(values)
        if progress:
            progress("dense outputs", number + 1, len(batches))
    return Workbench(anatomy, sites, objective, batches, targets, options, recipe, progress)


@dataclass(frozen=True, eq=False)
class Student:
    """A pruned model on its way: which units it keeps, and its compensated graph (not finished)."""

    kept: dict[str, np.ndarray]
    model: Model
    changes: Changes = field(default_factory=dict)
    fits: tuple[SiteFit, ...] = field(default=())

    @property
    def counts(self) -> dict[str, int]:
        return {site: len(units) for site, units in self.kept.items()}


@dataclass(frozen=True, eq=False)
class Scores:
    """Saliency of every kept unit of a student; ``gradients`` only when the criterion rearranges."""

    saliency: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray] | None = None


def dense_student(anatomy: Anatomy, sites: Sequence[Site]) -> Student:
    """The unpruned model."""
    return Student({site.name: np.arange(site.units) for site in sites}, anatomy.model)
