"""Which tokens matter on calibration rows, for policies that decide it once for all samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.stream import stream
from onnxprune.graph.model import Model
from onnxprune.graph.profile import take_profile
from onnxprune.graph.token_axis import TokenAxis, token_axis
from onnxprune.graph.token_cut import spelled_out
from onnxprune.graph.token_plan import CannotCut
from onnxprune.graph.token_probe import with_probes
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import RuntimeOptions

_ROWS = 64
_BATCH = 8


@dataclass(frozen=True)
class Probed:
    """Of one batch, in the order of the graph: mean attention over heads [B, N, N] of a Softmax, and norms [B, N] at the places."""

    attentions: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    order: tuple[tuple[str, str], ...]


def probe(model: Model, data: CalibrationData, options: RuntimeOptions) -> tuple[TokenAxis, Iterator[Probed]]:
    """Attention and norms of a canonical model that ``study_tokens`` does not refuse, on the first rows of ``data``."""
    plain = spelled_out(model)
    axis = token_axis(GraphView(plain), take_profile(plain))
    assert isinstance(axis, TokenAxis)
    return axis, _batches(plain, axis, data.take(slice(0, _ROWS)), options)


def _batches(plain: Model, axis: TokenAxis, data: CalibrationData, options: RuntimeOptions) -> Iterator[Probed]:
    probed, probes = with_probes(plain, axis)
    names = probed.output_names[-len(probes) :]
    for batch, found in stream(probed, data, names, options=options, rows=_BATCH):
        parts: dict[str, dict[str, np.ndarray]] = {"attention": {}, "norm": {}}
        for (kind, name), output in zip(probes, names, strict=True):
            parts[kind][name] = found[output][batch.valid]
        yield Probed(parts["attention"], parts["norm"], tuple(probes))


def roll_out(axis: TokenAxis, probed: Probed) -> dict[str, np.ndarray]:
    """What each token at each place adds to what the outputs read, float [B, N] by place.

    From the outputs down, attention is followed with the residual beside it, R <- R (A + I) / 2 (Abnar and Zuidema, 2020), and weighed by
    the norm of the token (Patch Slimming; Tang et al., 2022).
    """
    rows, tokens = next(iter(probed.norms.values())).shape
    reads = np.full((rows, tokens), 1 / tokens)
    if not axis.pools:
        reads = np.tile(np.arange(tokens) < axis.leading, (rows, 1)) / max(axis.leading, 1)
    scores = {}
    for kind, name in reversed(probed.order):
        if kind == "norm":
            scores[name] = reads * probed.norms[name]
        else:
            reads = (reads + np.einsum("bi,bij->bj", reads, probed.attentions[name])) / 2
    return scores


def rank_positions(model: Model, axis: TokenAxis, data: CalibrationData, options: RuntimeOptions) -> dict[str, np.ndarray]:
    """Positions of tokens by place, those that stay first, int64 [N]; leading ones in front.

    Positions that nothing behind a place reads are in the order of the place before.

    Raises:
        CannotCut: there are not as many tokens in every sample.
    """
    if axis.count is None:
        raise CannotCut("the same positions cannot stay in every sample: the number of tokens is not fixed")
    plain, batches = probe(model, data, options)
    total = {place.tensor: np.zeros(axis.count) for place in plain.places}
    for probed in batches:
        for name, scores in roll_out(plain, probed).items():
            total[name] += scores.sum(axis=0)
    before = np.zeros(axis.count)
    ranks = {}
    for place in plain.places:
        scores = total[place.tensor]
        scores[: axis.leading] = np.inf
        ranks[place.tensor] = np.lexsort((np.arange(axis.count), -before, -scores))
        before = scores if (scores[axis.leading :] > 0).any() else before
    return ranks


def nested(ranks: Sequence[np.ndarray], keep: Sequence[int]) -> list[tuple[int, ...]]:
    """Of each ranking the first ``keep``, rising; what stays behind a later place stays behind those in front of it."""
    above: set[int] = set()
    found = []
    for rank, count in zip(reversed(ranks), reversed(keep), strict=True):
        others = [int(position) for position in rank if int(position) not in above]
        above |= set(others[: max(count - len(above), 0)])
        found.append(tuple(sorted(above)))
    return found[::-1]
