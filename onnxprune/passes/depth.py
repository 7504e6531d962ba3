"""``qk`` and ``vo``: the rank inside attention heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.calibration.prefix import Prefix
from onnxprune.compensate.balance import balanced
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.depth import DEPTHS, Depth, depths_of
from onnxprune.graph.turning import Bases, turned
from onnxprune.passes.base import WidthPass
from onnxprune.passes.scope import Study
from onnxprune.runtime.session import RuntimeOptions

_BATCH_ROWS = 8

QK = WidthPass(
    name="qk",
    kind="qk",
    summary="reduce the depth in which queries meet keys",
    detail=(
        "Queries and keys of a head are turned into the basis in which few directions carry their product on the data, which changes "
        "nothing, and directions that carry little go. All heads of a layer keep equally many; the softmax scale stays that of the "
        "full depth."
    ),
)
VO = WidthPass(
    name="vo",
    kind="vo",
    summary="reduce the depth of values inside attention heads",
    detail=(
        "Values and rows of the output projection are turned into the basis in which few directions carry what a head adds to the stream "
        "on the data, which changes nothing, and directions that carry little go. All heads of a layer keep equally many."
    ),
)


def with_turned_heads(study_: Study, calibration: CalibrationData, options: RuntimeOptions) -> Study:
    """The study with the heads of its ``qk`` and ``vo`` sites turned into the bases that ``calibration`` asks for."""
    if not any(site.kind in DEPTHS for site in study_.sites):
        return study_
    bases = choose_bases(study_.anatomy, study_.sites, list(calibration.batches(_BATCH_ROWS, trim=True)), options)
    anatomy = turned(study_.anatomy, bases)
    return replace(study_, anatomy=anatomy, sites=tuple(anatomy.site(site.name) for site in study_.sites), bases=bases)


def choose_bases(anatomy: Anatomy, sites: Collection[Site], batches: Sequence[Batch], options: RuntimeOptions) -> Bases:
    """A basis for every one of ``sites`` that is of kind ``qk`` or ``vo``: float32 [bases, depth, depth].

    Scores that grow by the same amount for all keys change nothing, so keys count by their spread within their sample.
    """
    wanted = {site.name for site in sites}
    depths = [depth for depth in depths_of(anatomy) if depth.site.name in wanted]
    made = {name: node.index for name, node in anatomy.view.producer.items()}
    read = {depth.site.name: _measured(depth) for depth in depths}
    order = sorted(depths, key=lambda depth: max(made[tensor] for tensor in read[depth.site.name]))
    prefix = Prefix(anatomy.model, batches, options)
    bases: dict[str, np.ndarray] = {}
    for depth in order:
        tensors = read[depth.site.name]
        sums = [np.zeros((depth.bases, depth.site.units, depth.site.units)) for _ in range(2)]
        if depth.site.kind == "vo":
            sums[1] = _of_weight(anatomy, depth)
        for batch, values in zip(batches, prefix.advance(tensors, tensors), strict=True):
            if depth.site.kind == "qk":
                sums[0] += _moments(depth, 0, _rows(batch, values[0], centred=False))
                sums[1] += _moments(depth, 1, _rows(batch, values[1], centred=True))
            else:
                sums[0] += _moments(depth, 1, _rows(batch, values[0], centred=False))
        bases[depth.site.name] = np.stack([balanced(left, right) for left, right in zip(*sums, strict=True)]).astype(np.float32)
    return bases


def _measured(depth: Depth) -> list[str]:
    """Queries and keys; of values what the output projection reads, their averages by attention."""
    return [depth.left.plain.tensor, depth.right.plain.tensor] if depth.site.kind == "qk" else [depth.right.plain.tensor]


def _rows(batch: Batch, value: np.ndarray, *, centred: bool) -> np.ndarray:
    """Real rows [rows, columns] of an activation, less the mean of their sample if ``centred``."""
    rows = value.reshape(-1, value.shape[-1])
    real = batch.real_rows(len(rows))
    if not centred:
        return np.asarray(rows[real])
    samples = value.shape[0] if value.ndim > 2 else len(batch)
    grouped = rows.reshape(samples, -1, rows.shape[-1])
    weight = real.reshape(samples, -1, 1).astype(rows.dtype)
    mean = (grouped * weight).sum(axis=1, keepdims=True) / np.maximum(weight.sum(axis=1, keepdims=True), 1)
    return np.asarray(((grouped - mean) * weight).reshape(rows.shape))


def _moments(depth: Depth, side: int, rows: np.ndarray) -> np.ndarray:
    """Sums of x'x over the blocks of a side, by basis: float64 [bases, depth, depth]."""
    part = (depth.left, depth.right)[side]
    result = np.zeros((depth.bases, depth.site.units, depth.site.units))
    for owner, places in zip(part.owner, part.plain.columns, strict=True):
        x = rows[:, places]
        result[owner] += (x.T @ x).astype(np.float64)
    return result


def _of_weight(anatomy: Anatomy, depth: Depth) -> np.ndarray:
    """What each direction of the values weighs in the output: sums of w w' over the blocks of the output projection."""
    (use,) = depth.right.plain.constants
    weight = anatomy.view.value(anatomy.view.nodes[use.index].inputs[use.slot])
    assert weight is not None
    return _moments(depth, 1, np.moveaxis(weight, use.axis or 0, -1))
