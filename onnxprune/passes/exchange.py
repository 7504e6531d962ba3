"""What saliency is worth in divergence, near a goal: by that tokens, int8 and pruning are counted alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.graph.slicing import Kept
from onnxprune.passes.choice import choose
from onnxprune.passes.premises import Premises
from onnxprune.passes.rounds import cut
from onnxprune.passes.workbench import Scores, Student
from onnxprune.search.costs import CostTable

_SHARE = 0.8
"""The trial keeps no more than this of what can be removed, or nothing could be read off it."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """``rate`` is the divergence per unit of saliency in ``trial``, a model narrowed to the region of the goal in one cut."""

    scores: Scores
    trial: Student
    rate: float

    def divergence(self, kept: Kept) -> float:
        """What the dense model should lose if only ``kept`` stays."""
        return self.rate * _removed(self.scores, kept)


def exchange(premises: Premises, table: CostTable, goal: float) -> Exchange:
    """Make the trial, and see what it loses on the rows that judge."""
    scores = premises.first_scores
    budget = min(goal, table.fixed + _SHARE * (table.full - table.fixed))
    kept = choose(premises.bench, premises.dense, scores, table, max(budget, table.floor))
    assert kept is not None
    trial = cut(premises.bench, kept)
    return Exchange(scores, trial, premises.yardstick(trial.model) / max(_removed(scores, kept), 1e-30))


def _removed(scores: Scores, kept: Kept) -> float:
    """Saliency of what ``kept`` leaves out."""
    return float(sum(values[np.setdiff1d(np.arange(len(values)), kept[site])].sum() for site, values in scores.saliency.items()))
