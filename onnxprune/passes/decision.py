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
from onnxprune.passes.aim import Outcome
from onnxprune.passes.polish import Polished
from onnxprune.passes.premises import Premises
from onnxprune.passes.scope import Study
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Student
from onnxprune.search.costs import CostTable
from onnxprune.search.plan import Plan, recipe_dict
from onnxprune.search.target import Target


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan and everything it was decided from. ``already_met``: the finished file meets the target without pruning."""

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
    trail: tuple[dict[str, Any], ...]
    shipping: Shipping
    refusals: tuple[Refusal, ...]
    polished: Polished | None = None


def write_plan(premises: Premises, target: Target, outcome: Outcome, refusals: tuple[Refusal, ...]) -> Plan:
    """The plan that makes the student reached out of the file as given, and ships it."""
    from onnxprune import __version__

    study, settings, shipping, reached = premises.study, premises.settings, outcome.shipping, outcome.reached
    student, source = reached.student, study.given.source
    return Plan(
        version=__version__,
        input_sha256=source.sha256 if source else "",
        passes=settings.passes,
        rewrites=shipping.steps,
        kept={site: tuple(int(unit) for unit in units) for site, units in student.kept.items()},
        units={site.name: site.units for site in study.sites},
        target=str(target),
        predicted={reached.table.unit: reached.predicted},
        recipe={
            **recipe_dict(premises.bench.recipe),
            "loss": settings.loss,
            "calibration_sha256": premises.calibration.sha256,
            **({"protect_classes": True} if settings.protect_classes else {}),
        },
        objective={"output": premises.objective.output, "link": premises.objective.link, "why": premises.objective.why},
        refusals=refusals,
        caches=cuts_of(study.anatomy, student.kept),
        int8=shipping.final_form(student),
        vocabularies=study.words.vocabularies,
        vocab_map=study.words.place,
        tokens=shipping.tokens_of(student),
        example=dict(premises.example),
        changes=student.changes,
        bases=study.bases,
        streams={item.stream: item.basis for item in study.streams.narrowings} if study.streams else {},
        layers=study.shallow.substitutes if study.shallow else {},
    )


def summary(sites: Sequence[Site], plan: Plan) -> list[dict[str, Any]]:
    """Kept and total units of every site, for tables and reports."""
    return [{"site": site.name, "kind": site.kind, "units": site.units, "kept": len(plan.kept[site.name])} for site in sites]
