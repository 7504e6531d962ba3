"""Which rows and columns of a grid of patches become one, for the policy that leaves a grid.

Merging along one side of the grid and, at other depths, along the other is CAIT's (Wang et al., 2023), which halves each once and is
trained to live with it. Here calibration rows say which neighbouring lines are alike and get little attention, so that background goes
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.token_cut import spelled_out
from onnxprune.graph.token_plan import CannotCut
from onnxprune.graph.view import GraphView
from onnxprune.passes.token_predictor import attention_to_come
from onnxprune.passes.token_ranks import probe
from onnxprune.runtime.session import RuntimeOptions


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
            patches = np.add.reduceat(patches, np.cumsum(lines) - lines, axis=axis) / lines.reshape(shape)
        return patches


def grid_of(view: GraphView, profile: Profile, patches: int) -> Grid | None:
    """The grid of so many patches: that of a convolution, or else a square; None if there is none."""
    for node in view.nodes:
        shape = profile.shape(node.outputs[0]) if node.op == "Conv" else None
        if shape is not None and len(shape) == 4 and shape[2] * shape[3] == patches:
            return Grid(np.ones(shape[2], np.int64), np.ones(shape[3], np.int64))
    side = round(patches**0.5)
    return Grid(np.ones(side, np.int64), np.ones(side, np.int64)) if side * side == patches else None


@dataclass(frozen=True, eq=False)
class Patches:
    """The first patches of calibration rows at one place: features [S, H, W, C], and the attention they get behind it [S, H, W]."""

    features: np.ndarray
    attention: np.ndarray


def patches_by_place(model: Model, data: CalibrationData, options: RuntimeOptions) -> tuple[Grid, dict[str, Patches]]:
    """The grid of a canonical model that ``study_tokens`` does not refuse, and patches of the first rows of ``data``.

    Raises:
        CannotCut: the tokens are no grid.
    """
    axis, batches = probe(model, data, options)
    plain = spelled_out(model)
    grid = None if axis.count is None else grid_of(GraphView(plain), take_profile(plain), axis.count - axis.leading)
    if grid is None:
        raise CannotCut("rows of a grid cannot merge: the tokens are no grid of patches")
    shape = (-1, len(grid.heights), len(grid.widths))
    features: dict[str, list[np.ndarray]] = {}
    attention: dict[str, list[np.ndarray]] = {}
    for probed in batches:
        to_come = attention_to_come(axis, probed)
        for place, found in probed.features.items():
            patches = found[:, axis.leading :]
            received = to_come[place][:, axis.leading :] if place in to_come else np.ones(patches.shape[:2])
            features.setdefault(place, []).append(patches.reshape(*shape, patches.shape[2]))
            attention.setdefault(place, []).append(received.reshape(shape))
    return grid, {place: Patches(np.concatenate(features[place]), np.concatenate(attention[place])) for place in features}


def fewer(grid: Grid, patches: Patches, most: int) -> Grid:
    """Merge neighbouring lines, always those that lose least for each token they save, until at most ``most`` tokens are left.

    What is lost is what a mean loses of the unit features it stands for, each as often as it is attended: the growth of their squared
    distance from it.
    """
    unit = patches.features / np.maximum(np.linalg.norm(patches.features, axis=3, keepdims=True), 1e-12)
    while grid.count > most:
        means = grid.means(unit)
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


def joins_of(grids: Sequence[Grid], leading: int) -> list[tuple[int, ...]]:
    """From each grid to the next one: the number of the token that every token becomes part of, the leading ones in front."""
    found = []
    for before, after in pairwise(grids):
        first = np.unique(before.numbers(), return_index=True)[1]
        joins = after.numbers()[first] + leading
        found.append((*range(leading), *(int(number) for number in joins)))
    return found
