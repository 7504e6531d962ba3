"""A score of tokens that looks ahead: from its features at a place, how much attention a token will get behind it.

What DynamicViT (Rao et al., 2021) trains a small network for is fitted here by least squares on calibration rows: one vector for each
place, whose product with the unit features of a token is its score. That needs no attention map, and tells of more than one block.
"""

from __future__ import annotations

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.compensate.ridge import HeldRows, NormalEquations
from onnxprune.graph.model import Model
from onnxprune.graph.token_axis import TokenAxis
from onnxprune.passes.token_ranks import Probed, probe
from onnxprune.runtime.session import RuntimeOptions

_ROWS = 256
_HELD = 4
"""One row of so many is kept out of the fit, to choose the ridge."""

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_FLOOR = 0.05
"""Share of the mean attention below which it hardly matters how little a token gets: targets are logarithms."""


def fit_predictors(model: Model, data: CalibrationData, options: RuntimeOptions) -> dict[str, tuple[float, ...]]:
    """Weights [C] on unit features by place; none for a place with no attention behind it.

    Args:
        model: a canonical model that :func:`~onnxprune.graph.token_cut.study_tokens` does not refuse.
    """
    axis, batches = probe(model, data, options, _ROWS)
    sums: dict[str, NormalEquations] = {}
    held: dict[str, HeldRows] = {}
    for probed in batches:
        for place, target in attention_to_come(axis, probed).items():
            features = probed.features[place]
            width = features.shape[2]
            for row, there in enumerate(probed.real):
                tokens = np.flatnonzero(there)[axis.leading :]
                mean = target[row, tokens].mean() if len(tokens) else 0.0
                if not mean:
                    continue
                x = features[row, tokens] / np.linalg.norm(features[row, tokens], axis=1, keepdims=True)
                wanted = np.log(target[row, tokens] / mean + _FLOOR)[:, None]
                judges = held.setdefault(place, HeldRows())
                rows = judges if row % _HELD == _HELD - 1 else sums.setdefault(place, NormalEquations(width, 1))
                rows.add(x, wanted.astype(np.float32))
    return {place: _solved(equations, held[place]) for place, equations in sums.items()}


def attention_to_come(axis: TokenAxis, probed: Probed) -> dict[str, np.ndarray]:
    """Attention that each token gets in all maps behind a place, from the tokens that are read, float [B, N] by place."""
    total: np.ndarray | None = None
    found = {}
    for kind, name in reversed(probed.order):
        if kind == "features":
            if total is not None:
                found[name] = total
            continue
        maps = probed.attentions[name]
        queries = np.arange(maps.shape[1]) < axis.leading if axis.leading else probed.real
        received = np.einsum("bqk,bq->bk", maps, np.broadcast_to(queries, maps.shape[:2]).astype(maps.dtype))
        total = received if total is None else total + received
    return found


def _solved(equations: NormalEquations, held: HeldRows) -> tuple[float, ...]:
    equations.flush()
    fits = [equations.solve(ridge) for ridge in _RIDGES]
    best = min(fits, key=lambda fit: held.error(fit) or fit.fitted_error)
    return tuple(float(f"{weight:.5g}") for weight in best.weights[:, 0])
