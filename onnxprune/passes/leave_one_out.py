"""Scores that are measured: how much the divergence from the dense model grows when one unit goes and nothing makes up for it.

OPTIN (Khaki and Plataniotis, ICLR 2024) ranks units so, by features of later layers as well. One forward over the rows for every unit: for
heads that is a few dozen, for neurons it would be tens of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxprune.calibration.data import Batch
from onnxprune.calibration.objective import Objective, Targets
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.paged import run_batches
from onnxprune.graph.slicing import Kept
from onnxprune.graph.view import GraphView
from onnxprune.passes.scoring import student_labels
from onnxprune.runtime.session import RuntimeOptions

_ROWS = 128
"""Rows on which a unit is left out; rows beyond these are not looked at."""


def growth_without(
    anatomy: Anatomy,
    student: Model,
    kept: Kept,
    sites: Sequence[Site],
    objective: Objective,
    targets: Targets,
    options: RuntimeOptions,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """How much each kept unit of ``sites`` is missed: site -> float64 [kept units], not negative.

    In the unit of the Fisher scores: twice the divergence of a sample, for vectors squared distance times the variance of the outputs.
    """
    numbers = _spread_out(targets.batches)
    dense = _outputs(anatomy.model, objective, targets, numbers, options)
    view = GraphView(student)
    now = _divergence(dense, _outputs(student, objective, targets, numbers, options), objective, targets, numbers)
    scores = {site.name: np.zeros(len(kept[site.name])) for site in sites}
    total, done = sum(map(len, scores.values())), 0
    for site in sites:
        for unit in range(len(kept[site.name])):
            silent = _silenced(anatomy, student, view, site, kept, unit)
            found = _divergence(dense, _outputs(silent, objective, targets, numbers, options), objective, targets, numbers)
            scores[site.name][unit] = max(2 * (found - now), 0.0)
            done += 1
            if progress:
                progress(done, total)
    return scores


def _spread_out(batches: Sequence[Batch]) -> list[int]:
    """Batches of at most so many rows; they come in order of length, so they are taken at equal distances."""
    wanted = max(_ROWS // len(batches[0]), 1)
    places = np.linspace(0, len(batches) - 1, min(wanted, len(batches)))
    return sorted({round(float(place)) for place in places})


def _silenced(anatomy: Anatomy, student: Model, view: GraphView, site: Site, kept: Kept, unit: int) -> Model:
    """The student with the rows that read one unit at zero."""
    by_name = {node.name: node for node in view.nodes}
    changes: dict[tuple[int, int], np.ndarray] = {}
    for consumer in site.consumers:
        node, leaf = by_name[consumer.leaf.node.name], consumer.leaf
        weight = view.value(node.inputs[leaf.slot])
        assert weight is not None
        changed = np.array(weight)
        np.moveaxis(changed, leaf.axis, 0)[student_labels(site, kept, consumer, anatomy.sites) == unit] = 0
        changes[node.index, leaf.slot] = changed
    return replace_constants(student, changes, "~silent")


def _outputs(model: Model, objective: Objective, targets: Targets, numbers: Sequence[int], options: RuntimeOptions) -> list[np.ndarray]:
    feeds = [cut_feeds(model, targets.batches[number].feeds) for number in numbers]
    found = run_batches(with_outputs(model, [objective.tensor], keep=False), feeds, [objective.tensor], options)
    return [values.astype(np.float64) for (values,) in found]


def _divergence(
    dense: Sequence[np.ndarray], found: Sequence[np.ndarray], objective: Objective, targets: Targets, numbers: Sequence[int]
) -> float:
    """Mean over samples of the loss that the student has beyond what the dense model has."""
    total, samples = 0.0, 0
    for number, before, after in zip(numbers, dense, found, strict=True):
        if objective.link == "softmax":
            log_p, log_q = _log_softmax(before), _log_softmax(after)
            each = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        else:
            each = targets.spread**2 * np.square(after - before).sum(axis=-1) / 2
        total += float((each * targets.feeds(number, 0)["onnxprune.weight"]).sum())
        samples += int(targets.batches[number].valid.sum())
    return total / samples


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
