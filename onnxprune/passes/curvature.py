"""Scores that know both the loss and the compensation: structured elimination under the curvature of the loss at a site's output.

The loss feels a change D of the matrix that reads a site by about trace(G D' H D) / 2, with H the second moment of what the matrix reads
and G that of the loss's gradient at what it makes: the Kronecker-factored Fisher of Martens and Grosse (ICML 2015). Fisher scores of masks
know no compensation, and reconstruction errors (ZipLM, OSSCAR) do not know what the loss thinks of them. Under both factors the errors of
all sites are in one unit, so that one knapsack compares them; van der Ouderaa et al. (The LLM Surgeon, ICLR 2024) choose so between
weights of language models.

Tokens of one sample are not independent: where a mean over tokens is read, all feel the same gradient, and what they err by in common adds
up while the rest cancels out ("reduce" and "expand" of Eschenhagen et al., NeurIPS 2023, are the two extremes). So both moments are taken
apart, into what the tokens of a sample have in common and what is each one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from onnxprune.calibration.objective import Objective, Targets
from onnxprune.calibration.statistics import SampleMoment
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.autodiff import ADJOINT, adjoint_model
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept
from onnxprune.graph.view import GraphView
from onnxprune.importance.elimination import eliminate
from onnxprune.passes.readers import Reader
from onnxprune.passes.refit import RIDGE, student_reader
from onnxprune.passes.scoring import still_read
from onnxprune.runtime.session import RuntimeOptions, open_session, run

_ROUNDING = 1e-6
"""Variation of what is read below this share of its second moment is rounding."""


def obstacle(anatomy: Anatomy, site: Site) -> str | None:
    """Why a site cannot be scored by curvature; None if it can."""
    if anatomy.model.paged:
        return "the model is too large to hold the gradients of all sites at once"
    found = _reader(anatomy, site, anatomy.view, {})
    return found if isinstance(found, str) else None


def curvature_scores(
    anatomy: Anatomy,
    student: Model,
    kept: Kept,
    sites: Sequence[Site],
    objective: Objective,
    targets: Targets,
    draw: int,
    options: RuntimeOptions,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Saliency of every kept unit: site -> float64 [kept units], in units of the loss (twice the divergence of a sample, to second order).

    Args:
        student: the sliced and re-fitted model; its sites must have no :func:`obstacle`.
        draw: selects the random targets.
        progress: called with (batches done, batches in all).
    """
    view = GraphView(student)
    scores = {site.name: np.zeros(len(kept[site.name])) for site in sites}
    found: dict[str, Reader] = {}
    for site in still_read(student, kept, sites):
        reader = _reader(anatomy, site, view, kept)
        assert isinstance(reader, Reader)
        found[site.name] = reader
    if not found:
        return scores
    inputs, gradients, samples = _moments(anatomy, student, found, objective, targets, draw, options, progress)
    with threadpool_limits(options.threads or None):
        for name, reader in found.items():
            weight = view.value(reader.node.inputs[reader.slot])
            assert weight is not None
            if name in gradients:
                factors = _factors(inputs.pop(name), gradients.pop(name), samples, centred=reader.branch.bias is not None)
                if factors is None:
                    continue
                gram, metric = factors
                matrix = reader.matrix(weight).astype(np.float64) @ _root(metric)
                scores[name] = eliminate(gram, matrix, reader.units(), len(kept[name]), RIDGE).saliency
    return scores


def _reader(anatomy: Anatomy, site: Site, view: GraphView, kept: Kept) -> Reader | str:
    if site.kind == "channels":
        return "channels are read by several convolutions"
    if site.kind == "qk":
        return "two activations meet over this axis"
    if len(site.consumers) != 1:
        return "several matrices read this axis"
    reader = student_reader(anatomy, site, site.consumers[0], view, {node.name: node for node in view.nodes}, kept)
    if isinstance(reader, Reader) and len(set(np.unique(reader.units(), return_counts=True)[1])) > 1:
        return "its units are not of one size"
    return reader


def _moments(
    anatomy: Anatomy,
    student: Model,
    readers: Mapping[str, Reader],
    objective: Objective,
    targets: Targets,
    draw: int,
    options: RuntimeOptions,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, SampleMoment], dict[str, SampleMoment], int]:
    """Of what each matrix reads and of the gradients at what it makes, over real rows; and the number of samples."""
    batches = targets.batches
    read = [reader.tensor for reader in readers.values()]
    model, felt = adjoint_model(
        student,
        [reader.target for reader in readers.values()],
        read,
        objective.tensor,
        objective.link,
        samples=cut_feeds(student, batches[0].feeds),
    )
    session = open_session(model, options)
    names = list(dict.fromkeys([*read, *(ADJOINT + tensor for tensor in sorted(felt))]))
    inputs: dict[str, SampleMoment] = {}
    gradients: dict[str, SampleMoment] = {}
    together = {name: _sample_by_sample(anatomy, reader) for name, reader in readers.items()}
    for number, batch in enumerate(batches):
        values = dict(zip(names, run(session, {**cut_feeds(student, batch.feeds), **targets.feeds(number, draw)}, names), strict=True))
        for name, reader in readers.items():
            found = {"read": reader.rows(values[reader.tensor])}
            if ADJOINT + reader.target in values:
                found["felt"] = reader.gradients(values[ADJOINT + reader.target])
            for what, rows in found.items():
                moments = inputs if what == "read" else gradients
                known = moments.setdefault(name, SampleMoment(rows.shape[1], summed=what == "felt"))
                # Rows in another order are taken for samples of their own.
                known.add(rows, batch.real_rows(len(rows)), len(batch) if together[name] else len(rows))
        if progress:
            progress(number + 1, len(batches))
    return inputs, gradients, sum(int(batch.valid.sum()) for batch in batches)


def _sample_by_sample(anatomy: Anatomy, reader: Reader) -> bool:
    """Whether the tokens of a sample follow each other in the rows that a matrix reads; not where the first axis is that of tokens."""
    samples, shape = anatomy.profile.shape(anatomy.model.input_names[0]), anatomy.profile.shape(reader.target)
    moved = reader.branch.order is not None and reader.branch.order[0] != 0
    return bool(samples and shape and samples[0] == shape[0]) and not moved


def _factors(read: SampleMoment, felt: SampleMoment, samples: int, *, centred: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """H and G of one sample: one product in place of two, that of common parts and that of tokens' own, whose traces it keeps.

    Args:
        read: of what a matrix reads.
        felt: of gradients at what it makes.
        centred: whether a bias follows the mean of what goes.

    Returns:
        or None if nothing varies, or nothing is felt.
    """
    common = felt.summed / samples
    own = (felt.all.mean - felt.common) * (felt.rows / samples)
    gram, rest = read.common, read.all.mean
    least = _ROUNDING * float(np.trace(rest))
    rest -= gram
    if centred:
        mean = read.all.total / max(read.rows, 1)
        gram -= np.outer(mean, mean)
    reads = np.array([np.trace(gram), np.trace(rest)])
    reads[reads < least] = 0.0
    feels = np.maximum([np.trace(common), np.trace(own)], 0.0)
    if not feels @ reads > 0:
        return None
    metric = (common * reads[0] + own * reads[1]) / (feels @ reads)
    gram *= feels[0]
    rest *= feels[1]
    gram += rest
    return gram, metric


def _root(moment: np.ndarray) -> np.ndarray:
    """A matrix whose product with its transpose is ``moment``, [n, n]."""
    values, vectors = np.linalg.eigh(moment)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))
