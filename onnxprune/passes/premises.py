"""What a search starts from: the study, rows with their parts, the workbench, the clock. Nothing in it changes on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Objective, check_labels_of, check_loss, choose_objective
from onnxprune.errors import InputError
from onnxprune.graph.autodiff import NoGradient
from onnxprune.passes.depth import with_turned_heads
from onnxprune.passes.meter import Meter
from onnxprune.passes.rounds import score
from onnxprune.passes.rows import judging_rows, split
from onnxprune.passes.scope import Settings, Study, leading_to
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Progress, Scores, Student, Workbench, dense_student, set_up
from onnxprune.request import examples, request_feeds
from onnxprune.runtime.session import Feeds
from onnxprune.search.costs import GRANULARITY
from onnxprune.verification import Comparison, Yardstick, compare

log = logging.getLogger(__name__)

MOST_DROP = 0.01
"""What may be lost where neither a target nor a limit was given."""


@dataclass(frozen=True, eq=False)
class Premises:
    """``calibration`` rows decide, ``judges`` choose between models, ``held_back`` rows report. ``dense`` is the unpruned student."""

    study: Study
    settings: Settings
    objective: Objective
    calibration: CalibrationData
    judges: CalibrationData
    held_back: CalibrationData
    request: Feeds
    example: Mapping[str, tuple[int, ...]]
    bench: Workbench
    dense: Student

    @property
    def meter(self) -> Meter:
        return Meter(self.study, self.bench, self.request, self.settings)

    @property
    def limit(self) -> float:
        """What may be lost where no target says how far to go."""
        return self.settings.max_drop if self.settings.max_drop is not None else MOST_DROP

    @cached_property
    def yardstick(self) -> Yardstick:
        """Divergence from the file as given, on the rows that judge."""
        return Yardstick(self.study.given, self.judges, self.objective, self.settings.runtime)

    @cached_property
    def first_scores(self) -> Scores:
        """Scores of the dense model."""
        return score(self.bench, self.dense, 1)

    def judge(self, shipping: Shipping, student: Student, rows: CalibrationData) -> Comparison:
        """A student as it would be shipped against the file as given."""
        settings = self.settings
        return compare(self.study.given, shipping.ship(student), rows, self.objective, settings.runtime, settings.recipe.seed)

    def without_gradients(self, missing: NoGradient) -> Premises:
        """With the nearest relative of the default criterion that needs none, which is said; other criteria were asked for by name.

        Raises:
            NoGradient: another criterion.
            InputError: classes were to be protected, which takes gradients.
        """
        if self.bench.recipe.importance != "kfac":
            raise missing
        if self.settings.protect_classes:
            raise InputError(f"{missing.found}; --protect-classes needs gradients: leave it out")
        leaves = [site.consumers[0].leaf for site in self.bench.sites]
        plain = all((value := self.study.anatomy.view.value(leaf.tensor)) is not None and value.ndim == 2 for leaf in leaves)
        substitute = "obs" if plain else "energy"
        log.warning("%s; units are scored by %s instead, which knows the layer and not the loss", missing.found, substitute)
        return replace(self, bench=replace(self.bench, recipe=replace(self.bench.recipe, importance=substitute)))


def prepare(study_: Study, data: CalibrationData, settings: Settings, progress: Progress | None) -> Premises:
    """Check what was asked for against the model and the data, part the rows, run the dense model once.

    Raises:
        InputError: they do not go together.
        NothingPrunable: the output to be preserved depends on no site.
    """
    if study_.tokens and settings.target.quantity != "latency":
        asked = {"macs": "multiply-adds", "params": "parameters", "size": "bytes"}[settings.target.quantity]
        raise InputError(f"fewer tokens save time, not {asked}: give --target-latency, or no target and --max-drop")
    objective = choose_objective(study_.anatomy, settings.output, data.labels, settings.purpose)
    check_loss(objective, data, settings.loss)
    check_labels_of(objective, data)
    calibration, others = split(data, settings)
    study_ = with_turned_heads(leading_to(study_, objective), calibration, settings.runtime)
    # What is chosen by looking at some rows must be reported on others.
    middle = judging_rows(study_, settings, len(others))
    request = request_feeds(study_.given, data, settings.input_shapes)
    align = GRANULARITY.get(settings.runtime.short_provider, settings.recipe.align)
    recipe = replace(settings.recipe, align=align)
    bench = set_up(study_.anatomy, study_.sites, objective, calibration, request, settings.loss, settings.runtime, recipe, progress)
    judges = others.take(slice(0, middle))
    if settings.protect_classes:
        bench.targets.classes()
        itself = compare(study_.given, study_.given, judges, objective, settings.runtime, settings.recipe.seed)
        if itself.worst_class is None:
            raise InputError(f"--protect-classes: of {len(judges)} rows that judge no class has five; give more calibration rows")
    return Premises(
        study=study_,
        settings=settings,
        objective=objective,
        calibration=calibration,
        judges=judges,
        held_back=others.take(slice(middle, None)),
        request=request,
        example={name: tuple(array.shape) for name, array in examples(data).items()},
        bench=bench,
        dense=dense_student(study_.anatomy, study_.sites),
    )
