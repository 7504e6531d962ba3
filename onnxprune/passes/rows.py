"""Which calibration rows do what: decide, judge between models, or take no part until the report."""

from __future__ import annotations

from onnxprune.calibration.data import CalibrationData
from onnxprune.passes.meter import UNITS
from onnxprune.passes.scope import Settings, Study

HELD_BACK = 1024
JUDGES = 256
"""Most rows that judge choices, of those held back."""


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
