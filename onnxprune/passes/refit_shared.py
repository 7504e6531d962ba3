"""Re-fit of a matrix that several layers share (ALBERT), from all its uses at once.

One matrix cannot repair the drift of every layer below it as well: what one use inherits another has made, and a fit to the sum of both
overshoots (measured: it was worse than none). So each use is taken by itself, on the teacher's own activations: what is kept should make
up, at the output of the product, for what the removed positions contributed. The sums of all uses give one fit, and the model decides
whether it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune.calibration.data import Batch
from onnxprune.calibration.prefix import Prefix
from onnxprune.compensate.ridge import NormalEquations
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.paged import run_batches
from onnxprune.graph.slicing import Kept
from onnxprune.graph.view import GraphView
from onnxprune.passes.readers import Constants, Reader
from onnxprune.runtime.session import RuntimeOptions

RowWeight = Callable[[Batch, tuple[int, ...]], np.ndarray | None]
"""Of a batch, and the shape of what a matrix reads there: weights of its flattened rows."""


def shared_matrix(site: Site) -> bool:
    """Whether one matrix reads the axis of a site in several places, at the same positions."""
    first, *others = site.consumers
    return bool(others) and all(
        (other.leaf.tensor, other.leaf.axis, other.labels.tobytes()) == (first.leaf.tensor, first.leaf.axis, first.labels.tobytes())
        for other in others
    )


def fit_shared(
    anatomy: Anatomy,
    student: Model,
    uses: Mapping[str, Sequence[Reader]],
    kept: Kept,
    batches: Sequence[Batch],
    options: RuntimeOptions,
    ridge: float,
    row_weight: RowWeight | None,
) -> tuple[dict[str, Constants], dict[str, float]]:
    """New constants for every shared site, and the error that they leave at the products, relative to none.

    Args:
        uses: readers of ``student`` by site, one for each place where the matrix is used.
        kept: units that stay, by site.
    """
    view = GraphView(student)
    sites = {site.name: site for site in anatomy.sites if site.name in uses}
    sums: dict[str, NormalEquations] = {}
    places = [(consumer, site) for site in sites.values() for consumer in site.consumers]
    teacher = Prefix(anatomy.model, batches, options)
    for consumer, site in sorted(places, key=lambda place: place[0].leaf.node.index):
        reader = uses[site.name][0]
        stays = np.isin(consumer.labels, [-1, *kept[site.name]])
        weight = anatomy.view.value(consumer.leaf.tensor)
        assert weight is not None
        gone = reader.matrix(weight)[~stays]
        for batch, (read,) in zip(batches, teacher.advance([consumer.tensor], [consumer.tensor]), strict=True):
            rows = reader.rows(read)
            real = batch.real_rows(len(rows))
            weights = row_weight(batch, read.shape) if row_weight else None
            weights = None if weights is None or weights.size != len(rows) else weights[real]
            equations = sums.setdefault(site.name, NormalEquations(int(stays.sum()), gone.shape[1]))
            equations.add(rows[real][:, stays], rows[real][:, ~stays] @ gone, weights)
    found: dict[str, Constants] = {}
    errors: dict[str, float] = {}
    for name, equations in sums.items():
        equations.flush()
        biases = {None if (at := reader.branch.bias) is None else view.nodes[at[0]].inputs[at[1]] for reader in uses[name]}
        fit = equations.solve(ridge, intercept=len(biases) == 1 and None not in biases and equations.rows >= 10 * len(equations.gram))
        changed = uses[name][0].changed(view, fit)
        by_name = {view.nodes[index].inputs[slot]: array for (index, slot), array in changed.items()}
        everywhere = [(reader.node.index, reader.slot) for reader in uses[name]]
        everywhere += [reader.branch.bias for reader in uses[name] if reader.branch.bias is not None]
        sources = {place: view.nodes[place[0]].inputs[place[1]] for place in everywhere}
        found[name] = {place: by_name[source] for place, source in sources.items() if source in by_name}
        errors[name] = fit.fitted_error
    return found, errors


def nearer(anatomy: Anatomy, student: Model, changes: Constants, target: str, batches: Sequence[Batch], options: RuntimeOptions) -> bool:
    """Whether a student with ``changes`` comes nearer to the teacher at the activation ``target`` than without."""
    models = anatomy.model, student, replace_constants(student, changes, "~shared")
    outputs = []
    for model in models:
        feeds = [cut_feeds(model, batch.feeds) for batch in batches]
        outputs.append([values for (values,) in run_batches(with_outputs(model, [target], keep=False), feeds, [target], options)])
    errors = [0.0, 0.0]
    for number, batch in enumerate(batches):
        wanted = outputs[0][number].reshape(-1, outputs[0][number].shape[-1])
        real = batch.real_rows(len(wanted))
        for place in (0, 1):
            errors[place] += float(np.square(outputs[place + 1][number].reshape(wanted.shape) - wanted, dtype=np.float64)[real].sum())
    return errors[1] < errors[0]
