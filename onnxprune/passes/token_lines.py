"""Which rows and columns of a grid of patches become one, for the policy that leaves a grid.

Merging along one side of the grid and, at other depths, along the other is CAIT's (Wang et al., 2023), which halves each once and is
trained to live with it. Here calibration rows say which neighbouring lines are alike and get little attention, so that background goes
first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.token_axis import TokenAxis, token_axis
from onnxprune.graph.token_cut import spelled_out
from onnxprune.graph.token_plan import CannotCut
from onnxprune.graph.view import GraphView
from onnxprune.passes.token_predictor import attention_to_come
from onnxprune.passes.token_ranks import probe
from onnxprune.runtime.session import RuntimeOptions

_ROWS = 32
"""Calibration rows that are looked at: their features at all places are in memory at once."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid of patches whose rows and columns stand for some of the first ones each: int64 [rows], [columns]."""

    heights: np.ndarray
    widths: np.ndarray

    @property
    def count(self) -> int:
        return len(self.heights) * len(self.widths)

    def joined(self, horizontal: bool, line: int) -> Grid:
        """With row (or column) ``line`` and the next one as one."""
        lines = self.widths if horizontal else self.heights
        merged = np.concatenate([lines[:line], [lines[line] + lines[line + 1]], lines[line + 2 :]])
        return replace(self, widths=merged) if horizontal else replace(self, heights=merged)

    def numbers(self) -> np.ndarray:
        """Of every first patch, the number of the one that it is part of, int64 [patches]."""
        rows, columns = (np.repeat(np.arange(len(lines)), lines) for lines in (self.heights, self.widths))
        return np.asarray((rows[:, None] * len(self.widths) + columns).reshape(-1))

    def means(self, patches: np.ndarray) -> np.ndarray:
        """Of features of the first patches [S, H, W, C], those of the grid [S, rows, columns, C]."""
        for axis, lines in ((1, self.heights), (2, self.widths)):
            shape = [1] * 4
            shape[axis] = -1
            patches = np.add.reduceat(patches, np.cumsum(lines) - lines, axis=axis) / lines.reshape(shape).astype(patches.dtype)
        return patches


def grid_of(view: GraphView, profile: Profile, count: int) -> Grid | None:
    """The grid that a convolution makes and whose places, row by row, are the last of ``count`` tokens; None if there is none."""
    for node in reversed(view.nodes):
        shape = profile.shape(node.outputs[0]) if node.op == "Conv" else None
        if shape is None or len(shape) != 4 or profile.dim(node.outputs[0], 2) is None or profile.dim(node.outputs[0], 3) is None:
            continue
        places = np.broadcast_to(np.arange(shape[2] * shape[3]).reshape(1, 1, *shape[2:]), shape)
        if _row_by_row(view, profile, node.outputs[0], places, count):
            return Grid(np.ones(shape[2], np.int64), np.ones(shape[3], np.int64))
    return None


def _row_by_row(view: GraphView, profile: Profile, tensor: str, places: np.ndarray, count: int) -> bool:
    """Whether an image, with these numbers of its places, becomes tokens in their order, behind all others of ``count``."""
    patches = int(places.max()) + 1
    while places.ndim != 3 or places.shape[1] != count:
        found = [node for node, _ in view.consumers.get(tensor, ()) if node.op in _MOVES or node.op in ("Add", "Concat")]
        shape = profile.shape(found[0].outputs[0]) if len(found) == 1 else None
        if shape is None:
            return False
        node = found[0]
        if node.op == "Transpose":
            places = places.transpose(node.attrs.get("perm") or list(reversed(range(places.ndim))))
        elif node.op in _MOVES:
            places = places.reshape(shape)
        elif node.op == "Concat":
            if places.ndim != 3 or node.attrs["axis"] % 3 != 1:
                return False
            before = sum((profile.shape(name) or (0, 0))[1] for name in node.inputs[: node.inputs.index(tensor)])
            rest = np.full((shape[0], shape[1] - before - places.shape[1], shape[2]), -1)
            places = np.concatenate([np.full((shape[0], before, shape[2]), -1), places, rest], axis=1)
        if places.shape != shape:
            return False
        tensor = node.outputs[0]
    return np.array_equal(places[0, :, 0], [*[-1] * (count - patches), *range(patches)])


_MOVES = frozenset("Reshape Flatten Squeeze Unsqueeze Transpose Identity Cast".split())


@dataclass(frozen=True, eq=False)
class Patches:
    """Of calibration rows at one place: unit features [S, H, W, C] of the first patches, and the attention they get behind it [S, H, W]."""

    unit: np.ndarray
    attention: np.ndarray


def patches_by_place(model: Model, data: CalibrationData, options: RuntimeOptions) -> tuple[Grid, dict[str, Patches]]:
    """The grid of a canonical model that ``study_tokens`` does not refuse, and patches of the first rows of ``data``.

    Raises:
        CannotCut: the tokens are no grid, or some of its patches always stay.
    """
    plain = spelled_out(model)
    view, profile = GraphView(plain), take_profile(plain)
    axis = token_axis(view, profile)
    grid = grid_of(view, profile, axis.count) if isinstance(axis, TokenAxis) and axis.count else None
    if not isinstance(axis, TokenAxis) or grid is None or axis.count is None or axis.count - grid.count < axis.leading:
        raise CannotCut("lines of a grid cannot merge: the tokens are not the places of a convolution, row by row")
    others = axis.count - grid.count
    shape = (-1, len(grid.heights), len(grid.widths))
    unit: dict[str, list[np.ndarray]] = {}
    attention: dict[str, list[np.ndarray]] = {}
    for probed in probe(model, data, options, _ROWS)[1]:
        to_come = attention_to_come(axis, probed)
        for place, found in probed.features.items():
            patches = found[:, others:]
            received = to_come[place][:, others:] if place in to_come else np.ones(patches.shape[:2])
            lengths = np.maximum(np.linalg.norm(patches, axis=2, keepdims=True), 1e-12)
            unit.setdefault(place, []).append((patches / lengths).reshape(*shape, patches.shape[2]))
            attention.setdefault(place, []).append(received.reshape(shape))
    return grid, {place: Patches(np.concatenate(unit.pop(place)), np.concatenate(attention[place])) for place in list(unit)}


def fewer(grid: Grid, patches: Patches, most: int) -> Grid:
    """Merge neighbouring lines, always those that lose least for each token they save, until at most ``most`` patches are left.

    What is lost is what a mean loses of the unit features it stands for, each as often as it is attended: the growth of their squared
    distance from it.
    """
    while grid.count > most:
        means = grid.means(patches.unit)
        masses = grid.means(patches.attention[..., None])[..., 0] * np.outer(grid.heights, grid.widths)
        options = [
            (lost, horizontal, line)
            for horizontal, across in ((False, len(grid.widths)), (True, len(grid.heights)))
            for line, lost in enumerate(_losses(means, masses, horizontal) / across)
        ]
        if not options:
            return grid
        _, horizontal, line = min(options)
        grid = grid.joined(horizontal, line)
    return grid


def _losses(means: np.ndarray, masses: np.ndarray, horizontal: bool) -> np.ndarray:
    """What merging each line with the next one loses.

    Args:
        means: [S, rows, columns, C]; ``masses``: their weights, [S, rows, columns].
    """
    if horizontal:
        means, masses = means.swapaxes(1, 2), masses.swapaxes(1, 2)
    one, other = masses[:, :-1], masses[:, 1:]
    weight = one * other / np.maximum(one + other, 1e-30)
    return np.asarray(np.einsum("srwc,srw->r", np.square(means[:, :-1] - means[:, 1:]), weight) / len(means))


def joins_of(grid: Grid, others: int) -> tuple[int, ...]:
    """Of all first tokens, the number of the one that each is part of: ``others`` in front by themselves, then the patches."""
    return (*range(others), *(int(number) + others for number in grid.numbers()))
