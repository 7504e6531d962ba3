"""What a search decided: the plan, and everything it was decided from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Objective
from onnxprune.errors import Refusal
from onnxprune.graph.anatomy import Site
from onnxprune.graph.slicing import cuts_of
from onnxprune.passes.meter import UNITS
from onnxprune.passes.polish import Polished
from onnxprune.passes.scope import Settings, Study
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Recipe, Student
from onnxprune.search.costs import CostTable
from onnxprune.search.plan import Plan, recipe_dict

HELD_BACK = 1024
JUDGES = 256
"""Most rows that judge choices, of those held back."""


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan and everything it was decided from. ``met`` is None when the target was met by the finished file without pruning."""

    study: Study
    objective: Objective
    plan: Plan
    table: CostTable
    calibration: CalibrationData
    held_back: CalibrationData
    request: Mapping[str, np.ndarray]
    given_cost: float
    finished_cost: float
    goal: float | None
    predicted: float
    measured: float
    already_met: bool
    student: Student
    fits: tuple[Any, ...]
    trail: tuple[dict[str, Any], ...]
    shipping: Shipping
    refusals: tuple[Refusal, ...]
    polished: Polished | None = None


def split(data: CalibrationData, settings: Settings) -> tuple[CalibrationData, CalibrationData]:
    """Rows that decide and rows that judge: at most ``samples`` and 1,024; at least a quarter is held back."""
    rows = min(settings.samples, int(len(data) * 0.75))
    held = min(len(data) - rows, HELD_BACK)
    return data.split(rows, held, settings.recipe.seed)


def judging_rows(study: Study, settings: Settings, held: int) -> int:
    """How many of ``held`` rows choose between models, and so take no part in what is reported."""
    if settings.target.auto or settings.protect_classes:
        return held // 2
    if study.layers:
        return min(held // 2, JUDGES)
    judged = study.integers or study.polish or UNITS[settings.target.quantity] == "ms"
    return max(min(held // 4, JUDGES), 1) if judged and held > 1 else 0


def write_plan(
    study: Study,
    settings: Settings,
    recipe: Recipe,
    objective: Objective,
    data: CalibrationData,
    shipping: Shipping,
    student: Student,
    predicted: Mapping[str, float],
    example: Mapping[str, tuple[int, ...]],
    refusals: tuple[Refusal, ...],
) -> Plan:
    """The plan that makes ``student`` out of the file as given, and ships it. ``predicted`` are costs by unit."""
    from onnxprune import __version__

    source = study.given.source
    return Plan(
        version=__version__,
        input_sha256=source.sha256 if source else "",
        passes=settings.passes,
        rewrites=shipping.steps,
        kept={site: tuple(int(unit) for unit in units) for site, units in student.kept.items()},
        units={site.name: site.units for site in study.sites},
        target=str(settings.target),
        predicted=dict(predicted),
        recipe={
            **recipe_dict(recipe),
            "loss": settings.loss,
            "calibration_sha256": data.sha256,
            **({"protect_classes": True} if settings.protect_classes else {}),
        },
        objective={"output": objective.output, "link": objective.link, "why": objective.why},
        refusals=refusals,
        caches=cuts_of(study.anatomy, student.kept),
        int8=shipping.final_form(student),
        vocabularies=study.words.vocabularies,
        vocab_map=study.words.place,
        tokens=shipping.tokens_of(student),
        example=dict(example),
        changes=student.changes,
        bases=study.bases,
        streams={item.stream: item.basis for item in study.streams.narrowings} if study.streams else {},
        layers=study.shallow.substitutes if study.shallow else {},
    )


def summary(sites: Sequence[Site], plan: Plan) -> list[dict[str, Any]]:
    """Kept and total units of every site, for tables and reports."""
    return [{"site": site.name, "kind": site.kind, "units": site.units, "kept": len(plan.kept[site.name])} for site in sites]
