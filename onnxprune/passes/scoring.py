"""Scores of the units that are still there, measured on the current student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from onnxprune.calibration.data import Batch
from onnxprune.calibration.objective import Objective, Targets
from onnxprune.calibration.prefix import Prefix
from onnxprune.calibration.statistics import SecondMoment, Statistics
from onnxprune.calibration.sweep import sweep
from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Consumer, Site
from onnxprune.graph.autodiff import Tap, gradient_model
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept
from onnxprune.graph.storage import release
from onnxprune.graph.view import GraphView
from onnxprune.importance.registry import CRITERIA
from onnxprune.runtime.session import RuntimeOptions, open_session, run

GRAD = "onnxprune.grad."


def student_labels(site: Site, kept: Kept, consumer: Consumer, sites: Sequence[Site]) -> np.ndarray:
    """Labels of the axis that ``consumer`` reads after slicing: the position of each unit among the kept ones.

    Other ``sites`` may have cut the same axis (a concatenation).
    """
    stays = np.ones(len(consumer.labels), bool)
    for other in sites:
        labels = other.group.places.get((consumer.tensor, consumer.axis))
        if labels is not None and other.name in kept:
            stays &= np.isin(labels, [-1, *kept[other.name]])
    number = np.full(site.units + 1, -1)
    units = np.asarray(kept.get(site.name, np.arange(site.units)), np.int64)
    number[units] = np.arange(len(units))
    return np.asarray(number[consumer.labels][stays])


def still_read(student: Model, kept: Kept, sites: Sequence[Site]) -> list[Site]:
    """Sites of which units are left that somebody reads: not queries and keys of an attention without values, nor depth without heads."""
    computed = GraphView(student).producer
    return [site for site in sites if len(kept[site.name]) and any(consumer.tensor in computed for consumer in site.consumers)]


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
    """Per-sample mask gradients of the kept units, batch by batch: site -> float32 [samples, kept units].

    Sites that nothing reads any more are left out. A paged student is walked piece by piece: all batches of the last sites come first, and
    a batch comes once for each group of sites.
    """
    alive = still_read(student, kept, sites)
    if not alive:
        return
    computed = GraphView(student).producer
    student, reads = _own_reads(student, alive)
    taps = [
        _tap(site, kept, position, consumer, tensor, sites)
        for site in alive
        for position, (consumer, tensor) in enumerate(_distinct(site, reads))
        if consumer.tensor in computed
    ]
    if student.paged:
        yield from _swept(student, taps, objective, targets, draw, options, progress)
        return
    samples = cut_feeds(student, targets.batches[0].feeds)
    session = open_session(gradient_model(student, taps, objective.tensor, objective.link, samples=samples), options)
    for number, batch in enumerate(targets.batches):
        values = run(session, {**cut_feeds(student, batch.feeds), **targets.feeds(number, draw)}, [GRAD + tap.name for tap in taps])
        found: dict[str, np.ndarray] = {}
        for tap, value in zip(taps, values, strict=True):
            name = _site_of(tap)
            found[name] = found[name] + value[batch.valid] if name in found else value[batch.valid]
        yield found
        if progress:
            progress(number + 1, len(targets.batches))


def _swept(
    student: Model,
    taps: Sequence[Tap],
    objective: Objective,
    targets: Targets,
    draw: int,
    options: RuntimeOptions,
    progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Gradients of a site come together once the last of its taps is there."""
    waiting: dict[str, dict[str, list[np.ndarray]]] = {}
    number_of = Counter(_site_of(tap) for tap in taps)
    total = 0
    for left, found in sweep(student, taps, objective, targets, draw, options):
        total = total or left + 1
        for name, values in found.items():
            waiting.setdefault(name.rsplit("#", 1)[0], {})[name] = values
        ready = [site for site, parts in waiting.items() if len(parts) == number_of[site]]
        complete = {site: list(waiting.pop(site).values()) for site in ready}
        for number, batch in enumerate(targets.batches if complete else ()):
            yield {site: np.sum([part[number][batch.valid] for part in parts], axis=0) for site, parts in complete.items()}
        if progress:
            progress(total - left, total)


def _site_of(tap: Tap) -> str:
    return tap.name.rsplit("#", 1)[0]


def fisher_sums(gradients: Iterable[dict[str, np.ndarray]]) -> Statistics:
    """Sums of squared per-sample mask gradients, by site: the statistics of the diagonal Fisher, mergeable over shards."""
    sums = Statistics()
    for batch in gradients:
        for site, values in batch.items():
            sums.add(site, np.square(values, dtype=np.float64).sum(axis=0), len(values))
    return sums


def gathered(gradients: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All samples of all batches: site -> [samples, kept units]."""
    parts: dict[str, list[np.ndarray]] = {}
    for batch in gradients:
        for site, values in batch.items():
            parts.setdefault(site, []).append(values)
    return {site: np.concatenate(values) for site, values in parts.items()}


def _tap(site: Site, kept: Kept, position: int, consumer: Consumer, tensor: str, sites: Sequence[Site]) -> Tap:
    labels = student_labels(site, kept, consumer, sites)
    return Tap(f"{site.name}#{position}", tensor, consumer.axis, labels, len(kept[site.name]))


def _distinct(site: Site, reads: Mapping[tuple[str, str], str]) -> Iterable[tuple[Consumer, str]]:
    """Consumers by distinct activation, with the activation: two matrices that read one tensor share a tap."""
    found = {reads.get((consumer.leaf.node.name, consumer.tensor), consumer.tensor): consumer for consumer in site.consumers}
    return [(consumer, tensor) for tensor, consumer in found.items()]


def _own_reads(student: Model, sites: Sequence[Site]) -> tuple[Model, dict[tuple[str, str], str]]:
    """The model with an Identity in front of readers of channels that others read as well, and its output by (reader, tensor).

    A mask acts where a site is read. What a residual stream carries on to other readers, of this site or not, must not count there again.
    """
    readers = GraphView(student).consumers
    wanted = {
        (consumer.leaf.node.name, consumer.tensor)
        for site in sites
        if site.kind == "channels"
        for consumer in site.consumers
        if len(readers.get(consumer.tensor, ())) > 1
    }
    if not wanted:
        return student, {}
    proto = student.copy_proto()
    nodes: list[onnx.NodeProto] = []
    names: dict[tuple[str, str], str] = {}
    for node in [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]:
        for slot, tensor in enumerate(node.input):
            if (node.name, tensor) in wanted:
                name = f"{tensor}~{node.name}"
                if (node.name, tensor) not in names:
                    nodes.append(helper.make_node("Identity", [tensor], [name], name=f"{name}.read"))
                names[node.name, tensor] = name
                node.input[slot] = name
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return student.with_proto(proto), names


def moments_read(
    student: Model, sites: Sequence[Site], kept: Kept, batches: Sequence[Batch], options: RuntimeOptions
) -> dict[str, SecondMoment]:
    """Moments of the real tokens x [1, kept positions] that the consumer of each site reads, by site; not of those that nothing reads."""
    alive = still_read(student, kept, sites)
    tensors = [site.consumers[0].tensor for site in alive]
    moments: dict[str, SecondMoment] = {}
    session = open_session(with_outputs(student, tensors, keep=False), options)
    for batch in batches:
        for site, value in zip(alive, run(session, cut_feeds(student, batch.feeds), tensors), strict=True):
            x = _rows_read(site, batch, value)
            moments.setdefault(site.name, SecondMoment(x.shape[1])).add(x)
    return moments


def _rows_read(site: Site, batch: Batch, value: np.ndarray) -> np.ndarray:
    """What the consumer of a site reads at real tokens, [rows, kept positions]."""
    x = np.moveaxis(value, site.consumers[0].axis, -1)
    x = x.reshape(-1, x.shape[-1])
    return np.asarray(x[batch.real_rows(len(x))])


def _moment_by_moment(
    student: Model, sites: Sequence[Site], kept: Kept, batches: Sequence[Batch], options: RuntimeOptions
) -> Iterator[tuple[Site, SecondMoment]]:
    """What :func:`moments_read` gives, one at a time in the order of the graph: together they would be larger than the weights."""
    prefix = Prefix(student, batches, options)
    for site in sorted(still_read(student, kept, sites), key=lambda site: site.order):
        tensor = site.consumers[0].tensor
        parts = [_rows_read(site, batch, value) for batch, (value,) in zip(batches, prefix.advance([tensor], [tensor]), strict=True)]
        moment = SecondMoment(parts[0].shape[1])
        for part in parts:
            moment.add(part)
        yield site, moment


def local_scores(
    student: Model,
    kept: Kept,
    sites: Sequence[Site],
    criterion: str,
    batches: Sequence[Batch],
    options: RuntimeOptions,
) -> dict[str, np.ndarray]:
    """Scores that need no gradient, in the unit of the criterion."""
    needs, formula = CRITERIA[criterion].needs, CRITERIA[criterion].score
    assert formula is not None
    view = GraphView(student)
    by_name = {node.name: node for node in view.nodes}
    alive = still_read(student, kept, sites)
    moments: Iterable[tuple[Site, SecondMoment | None]]
    if needs == "weights" or not alive:
        moments = [(site, None) for site in alive]
    elif student.paged:
        moments = _moment_by_moment(student, sites, kept, batches, options)
    else:
        found = moments_read(student, sites, kept, batches, options)
        moments = [(site, found[site.name]) for site in alive]
    scores = {site.name: np.zeros(len(kept[site.name])) for site in sites}
    for site, moment in moments:
        count = len(kept[site.name])
        consumer = site.consumers[0]
        weight = view.value(by_name[consumer.leaf.node.name].inputs[consumer.leaf.slot])
        if weight is None:
            raise InputError(f"importance {criterion!r} needs a matrix that reads {site.name}; use fisher")
        if weight.ndim != 2 and criterion == "obs":
            raise InputError(f"importance 'obs' needs a plain matrix to read {site.name}, not {weight.ndim} dimensions; use energy")
        rows = np.moveaxis(weight, consumer.leaf.axis, 0).reshape(weight.shape[consumer.leaf.axis], -1)
        labels = student_labels(site, kept, consumer, sites)
        read = () if moment is None else (moment.covariance if needs == "covariance" else moment.mean,)
        scores[site.name] = formula(rows, *read, labels, count)
        if student.paged:
            release([weight])
    return scores
