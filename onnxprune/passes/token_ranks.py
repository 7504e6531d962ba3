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
    """Of one batch, in the order of the graph: mean attention over heads [B, N, N] of a Softmax, and features [B, N, C] at the places."""

    attentions: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    order: tuple[tuple[str, str], ...]

    @property
    def real(self) -> np.ndarray:
        """Tokens that are not padding, bool [B, N]: a key that nobody sees is."""
        return np.asarray(np.max([maps.max(axis=1) for maps in self.attentions.values()], axis=0) > 0)


def probe(model: Model, data: CalibrationData, options: RuntimeOptions, rows: int = _ROWS) -> tuple[TokenAxis, Iterator[Probed]]:
    """Attention and features of a canonical model that ``study_tokens`` does not refuse, on the first rows of ``data``."""
    plain = spelled_out(model)
    axis = token_axis(GraphView(plain), take_profile(plain))
    assert isinstance(axis, TokenAxis)
    return axis, _batches(plain, axis, data.take(slice(0, rows)), options)


def _batches(plain: Model, axis: TokenAxis, data: CalibrationData, options: RuntimeOptions) -> Iterator[Probed]:
    probed, probes = with_probes(plain, axis)
    names = probed.output_names[-len(probes) :]
    for batch, found in stream(probed, data, names, options=options, rows=_BATCH):
        parts: dict[str, dict[str, np.ndarray]] = {"attention": {}, "features": {}}
        for (kind, name), output in zip(probes, names, strict=True):
            parts[kind][name] = found[output][batch.valid]
        yield Probed(parts["attention"], parts["features"], tuple(probes))


def roll_out(axis: TokenAxis, probed: Probed) -> dict[str, np.ndarray]:
    """What each token at each place adds to what the outputs read, float [B, N] by place.

    From the outputs down, attention is followed with the residual beside it, R <- R (A + I) / 2 (Abnar and Zuidema, 2020), and weighed by
    the norm of the token (Patch Slimming; Tang et al., 2022).
    """
    rows, tokens, _ = next(iter(probed.features.values())).shape
    reads = np.full((rows, tokens), 1 / tokens)
    if axis.leading and not axis.pools and axis.returned is None:
        reads = np.tile(np.arange(tokens) < axis.leading, (rows, 1)) / axis.leading
    scores = {}
    for kind, name in reversed(probed.order):
        if kind == "features":
            scores[name] = reads * np.linalg.norm(probed.features[name], axis=2)
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


def attention_received(model: Model, data: CalibrationData, options: RuntimeOptions) -> list[dict[str, np.ndarray]]:
    """Mean attention that each real token of a row gets in front of each place, float [real tokens] by place, for every row.

    From the leading tokens, if there are any, else from all real ones, as the cut graph scores them.
    """
    axis, batches = probe(model, data, options)
    rows = []
    for probed in batches:
        for row, there in enumerate(probed.real):
            queries = slice(0, axis.leading) if axis.leading else there
            rows.append({place.tensor: probed.attentions[place.softmax.name][row, queries][:, there].mean(axis=0) for place in axis.places})
    return rows


def thresholds(rows: Sequence[dict[str, np.ndarray]], shares: Sequence[tuple[str, float]], leading: int) -> list[float]:
    """Attention that tokens must get at each place, as a multiple of the mean over those of their row that are still there.

    Args:
        rows: as :func:`attention_received` gives them.
        shares: (place, mean share of all tokens of a row that is to stay), in order.

    What the keys that stay get without those that left is taken to be in proportion to what they get with them: exact where queries have
    not changed since.
    """
    there = [np.ones(len(next(iter(row.values()))), bool) for row in rows]
    found = []
    for place, share in shares:
        scores = [row[place] / row[place][stay].mean() for row, stay in zip(rows, there, strict=True)]
        free = [np.flatnonzero(stay[leading:]) + leading for stay in there]
        values = np.concatenate([score[index] for score, index in zip(scores, free, strict=True)])
        weights = np.concatenate([np.full(len(index), 1 / (len(stay) - leading)) for index, stay in zip(free, there, strict=True)])
        order = np.argsort(-values)
        keep = int(np.searchsorted(np.cumsum(weights[order]), share * len(rows) - 1e-6)) + 1
        ranked = values[order]
        found.append(float(ranked[keep - 1] + ranked[keep]) / 2 if keep < len(ranked) else 0.0)
        for score, stay in zip(scores, there, strict=True):
            stay[leading:] &= score[leading:] >= found[-1]
    return found
