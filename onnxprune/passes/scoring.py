"""Scores of the units that are still there, measured on the current student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnxprune.calibration.data import Batch
from onnxprune.calibration.objective import Objective, Targets
from onnxprune.calibration.statistics import Statistics
from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Consumer, Site
from onnxprune.graph.autodiff import Tap, gradient_model
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept
from onnxprune.graph.view import GraphView
from onnxprune.importance import local
from onnxprune.runtime.session import RuntimeOptions, open_session, run

GRAD = "onnxprune.grad."


def student_labels(site: Site, kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels of an axis after slicing: the position of each unit among the kept ones."""
    number = np.full(site.units + 1, -2)
    number[-1] = -1
    number[kept] = np.arange(len(kept))
    mapped: np.ndarray = number[labels]
    return np.asarray(mapped[mapped != -2])


def mask_gradients(
    student: Model,
    kept: Kept,
    sites: Sequence[Site],
    objective: Objective,
    targets: Targets,
    draw: int,
    options: RuntimeOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Per-sample mask gradients of the kept units, batch by batch: site -> float32 [samples, kept units]."""
    taps = [
        _tap(site, kept[site.name], position, consumer)
        for site in sites
        if len(kept[site.name])
        for position, consumer in enumerate(_distinct(site))
    ]
    samples = cut_feeds(student, targets.batches[0].feeds)
    session = open_session(gradient_model(student, taps, objective.tensor, objective.link, samples=samples), options)
    for number, batch in enumerate(targets.batches):
        values = run(session, {**cut_feeds(student, batch.feeds), **targets.feeds(number, draw)}, [GRAD + tap.name for tap in taps])
        found: dict[str, np.ndarray] = {}
        for tap, value in zip(taps, values, strict=True):
            name = tap.name.rsplit("#", 1)[0]
            found[name] = found[name] + value[batch.valid] if name in found else value[batch.valid]
        yield found
        if progress:
            progress(number + 1, len(targets.batches))


def fisher_sums(gradients: Iterable[dict[str, np.ndarray]]) -> Statistics:
    """Sums of squared per-sample mask gradients, by site: the statistics of the diagonal Fisher, mergeable over shards."""
    sums = Statistics()
    for batch in gradients:
        for site, values in batch.items():
            sums.add(site, np.square(values, dtype=np.float64).sum(axis=0), len(values))
    return sums


def _tap(site: Site, kept: np.ndarray, position: int, consumer: Consumer) -> Tap:
    labels = student_labels(site, kept, consumer.labels)
    return Tap(f"{site.name}#{position}", consumer.tensor, consumer.axis, labels, len(kept))


def _distinct(site: Site):  # type: ignore[no-untyped-def]
    """Consumers by distinct activation: two matrices that read one tensor share a tap."""
    return {consumer.tensor: consumer for consumer in site.consumers}.values()


def gram_matrices(
    student: Model, sites: Sequence[Site], kept: Kept, batches: Sequence[Batch], options: RuntimeOptions
) -> dict[str, np.ndarray]:
    """Mean of x'x over the real tokens x [1, kept positions] that the consumer of each site reads: site -> float64 square matrix."""
    alive = [site for site in sites if len(kept[site.name])]
    tensors = [site.consumers[0].tensor for site in alive]
    session = open_session(with_outputs(student, tensors, keep=False), options)
    sums: dict[str, np.ndarray] = {}
    rows = dict.fromkeys((site.name for site in alive), 0)
    for batch in batches:
        for site, value in zip(alive, run(session, cut_feeds(student, batch.feeds), tensors), strict=True):
            x = np.moveaxis(value, site.consumers[0].axis, -1)
            x = x.reshape(-1, x.shape[-1])
            x = x[batch.real_rows(len(x))]
            gram = (x.T @ x).astype(np.float64)
            sums[site.name] = sums[site.name] + gram if site.name in sums else gram
            rows[site.name] += len(x)
    return {name: gram / max(rows[name], 1) for name, gram in sums.items()}


def local_scores(
    student: Model,
    kept: Kept,
    sites: Sequence[Site],
    criterion: str,
    batches: Sequence[Batch],
    options: RuntimeOptions,
) -> dict[str, np.ndarray]:
    """Scores that need no gradient: magnitude, energy, obs."""
    view = GraphView(student)
    by_name = {node.name: node for node in view.nodes}
    grams: Mapping[str, np.ndarray] = {} if criterion == "magnitude" else gram_matrices(student, sites, kept, batches, options)
    scores = {}
    for site in sites:
        count = len(kept[site.name])
        if not count:
            scores[site.name] = np.zeros(0)
            continue
        consumer = site.consumers[0]
        weight = view.value(by_name[consumer.leaf.node.name].inputs[consumer.leaf.slot])
        assert weight is not None
        if weight.ndim != 2:
            raise InputError(f"importance {criterion!r} needs a plain matrix to read {site.name}, not {weight.ndim} dimensions; use fisher")
        rows = weight if consumer.leaf.axis == 0 else weight.T
        labels = student_labels(site, kept[site.name], consumer.labels)
        if criterion == "magnitude":
            scores[site.name] = local.magnitude(rows, labels, count)
        elif criterion == "energy":
            scores[site.name] = local.energy(rows, grams[site.name], labels, count)
        else:
            scores[site.name] = local.obs(rows, grams[site.name], labels, count)
    return scores
