"""Axis rules of convolutional networks: axis 1 holds channels, the axes after it are places of an image.

A window slides over places, so no rule mentions them where an operator mixes them: whatever would be cut there stops the tracer. In a
convolution of several groups a unit is a whole group, which is one channel where the convolution is depthwise.
"""

from __future__ import annotations

import numpy as np

from onnxprune.graph.axis_links import Barrier, Link, Shapes, Tie, rule
from onnxprune.graph.view import Node


def _same(rank: int, axes: range | None = None) -> list[Link]:
    return [Tie(0, axis, -1, axis) for axis in axes or range(rank)]


def _blocks(groups: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair (input channel, output channel) of the same group."""
    of_input, of_output = inputs // groups, outputs // groups
    first = np.repeat(np.arange(inputs), of_output)
    second = np.tile(np.arange(outputs).reshape(groups, 1, of_output), (1, of_input, 1)).reshape(-1)
    return first, second


@rule("Conv")
def _conv(node: Node, s: Shapes) -> list[Link]:
    """Weights [out, in / groups, window]: the rows are output channels in every form."""
    groups = int(node.attrs.get("group", 1))
    result: list[Link] = [Tie(0, 0, -1, 0), Tie(1, 0, -1, 1)]
    if s.name(2):
        result.append(Tie(2, 0, -1, 1))
    if groups == 1:
        return [*result, Tie(0, 1, 1, 1, contracts=True)]
    return [*result, Tie(0, 1, -1, 1, *_blocks(groups, s.of(0)[1], s.of(-1)[1]))]


@rule("ConvTranspose")
def _conv_transpose(node: Node, s: Shapes) -> list[Link]:
    """Weights [in, out / groups, window]."""
    groups = int(node.attrs.get("group", 1))
    result: list[Link] = [Tie(0, 0, -1, 0)]
    if s.name(2):
        result.append(Tie(2, 0, -1, 1))
    if groups == 1:
        return [*result, Tie(1, 1, -1, 1), Tie(0, 1, 1, 0, contracts=True)]
    return [*result, Tie(0, 1, 1, 0), Tie(0, 1, -1, 1, *_blocks(groups, s.of(0)[1], s.of(-1)[1]))]


@rule("BatchNormalization")
def _batch_norm(node: Node, s: Shapes) -> list[Link]:
    if any(node.outputs[1:]):
        return []  # a training graph: it updates statistics
    return [*_same(s.rank(0)), *(Tie(slot, 0, -1, 1) for slot in range(1, 5))]


@rule("InstanceNormalization")
def _instance_norm(node: Node, s: Shapes) -> list[Link]:
    """Every channel of every sample is normalised by itself."""
    return [*_same(2), Tie(1, 0, -1, 1), Tie(2, 0, -1, 1)]


@rule("GroupNormalization", "LRN")
@rule("GroupNorm", domain="com.microsoft")
def _mixed_channels(node: Node, s: Shapes) -> list[Link]:
    reason = f"{node.op} normalises over neighbouring channels"
    channels = s.rank(0) - 1 if node.attrs.get("channels_last", 0) else 1
    return [Tie(0, 0, -1, 0), Barrier(0, channels, reason), Barrier(-1, channels, reason)]


@rule("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
def _pool(node: Node, s: Shapes) -> list[Link]:
    return [] if any(node.outputs[1:]) else _same(2)


@rule("Resize", "Upsample")
def _resize(node: Node, s: Shapes) -> list[Link]:
    if node.attrs.get("axes") is not None and {axis % s.rank(0) for axis in node.attrs["axes"]} & {0, 1}:
        return []
    same = [axis for axis, (before, after) in enumerate(zip(s.of(0), s.of(-1), strict=True)) if before == after]
    return [Tie(0, axis, -1, axis) for axis in same if axis < 2]


@rule("DepthToSpace")
def _depth_to_space(node: Node, s: Shapes) -> list[Link]:
    area, channels = int(node.attrs["blocksize"]) ** 2, s.of(-1)[1]
    column_first = node.attrs.get("mode", b"DCR") == b"CRD"
    index = np.repeat(np.arange(channels), area) if column_first else np.tile(np.arange(channels), area)
    return [Tie(0, 0, -1, 0), Tie(0, 1, -1, 1, np.arange(channels * area), index)]


@rule("SpaceToDepth")
def _space_to_depth(node: Node, s: Shapes) -> list[Link]:
    area, channels = int(node.attrs["blocksize"]) ** 2, s.of(0)[1]
    return [Tie(0, 0, -1, 0), Tie(0, 1, -1, 1, np.tile(np.arange(channels), area), np.arange(channels * area))]
