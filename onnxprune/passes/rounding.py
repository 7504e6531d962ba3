"""Second-order rounding of the weights that are shipped in int8: what one row's rounding loses, later rows make up for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node
from onnxprune.passes.int8 import weight_of
from onnxprune.quantize.form import Int8Form
from onnxprune.quantize.rounding import round_columns, scales
from onnxprune.runtime.session import RuntimeOptions, open_session, run

_ROWS = 256
_BATCH = 8
_GRAM_BYTES = 256_000_000


def round_weights(model: Model, form: Int8Form, rows: CalibrationData, options: RuntimeOptions) -> dict[str, np.ndarray]:
    """Integers for the products of ``form``, by second-order column updates (GPTQ, Frantar et al., arXiv 2210.17323).

    Args:
        model: the float model with its final weights.
        rows: calibration rows; at most 256 are run, once per so many tensors as have their Gram matrices in memory together.

    Returns:
        node name -> int8 [n_in, n_out]. Weights that several products read are left out: there is one integer matrix for all.
        So are those whose input is infinite or NaN on some row: they are rounded to nearest.
    """
    view = GraphView(model)
    chosen = set(form.products)
    readers: dict[str, list[Node]] = {}
    for node in view.nodes:
        if node.name in chosen and len(view.consumers[node.inputs[1]]) == 1:
            readers.setdefault(node.inputs[0], []).append(node)
    widths = {tensor: len(weight_of(nodes[0], view)) for tensor, nodes in readers.items()}
    integers: dict[str, np.ndarray] = {}
    for tensors in _portions(widths):
        for tensor, gram in _grams(model, tensors, rows.take(slice(0, _ROWS)), options).items():
            if not np.isfinite(gram).all():
                continue
            factor = np.asarray(form.factors.get(tensor, np.ones(len(gram))), np.float64)
            for node in readers[tensor]:
                weight = weight_of(node, view) * factor[:, None]
                integers[node.name] = round_columns(weight, gram / np.outer(factor, factor), scales(weight, form.per_channel))
    return integers


def _portions(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Tensors in order, as many at a time as have Gram matrices of 256 MB."""
    portion: list[str] = []
    size = 0
    for tensor, width in widths.items():
        need = 8 * width * width
        if portion and size + need > _GRAM_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(tensor)
        size += need
    if portion:
        yield portion


def _grams(model: Model, tensors: Sequence[str], rows: CalibrationData, options: RuntimeOptions) -> dict[str, np.ndarray]:
    """X'X of each tensor over the rows that count, float64 [n, n]."""
    session = open_session(with_outputs(model, list(tensors), keep=False), options)
    sums: dict[str, np.ndarray] = {}
    for batch in rows.batches(_BATCH, trim=True):
        for tensor, value in zip(tensors, run(session, cut_feeds(model, batch.feeds), tensors), strict=True):
            x = value.reshape(-1, value.shape[-1])
            x = x[batch.real_rows(len(x))]
            gram = (x.T @ x).astype(np.float64)
            sums[tensor] = sums[tensor] + gram if tensor in sums else gram
    return sums
