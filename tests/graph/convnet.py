"""Convolutional nets built node by node: the blocks of well-known families, small."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.graph.net import Net

SIDE = 8


class ConvNet(Net):
    """A graph of images ``x`` [batch, 3, 8, 8]; ``width`` knows the channels of every tensor that a block made."""

    def __init__(self, opset: int = 18, seed: int = 0, side: int | str = SIDE) -> None:
        super().__init__(opset, seed)
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, side, side])]
        self.width = {"x": 3}

    def sized(self, tensor: str, width: int) -> str:
        self.width[tensor] = width
        return tensor

    def conv(self, x: str, out: int, kernel: int = 1, stride: int = 1, group: int = 1, bias: bool = True, dilation: int = 1) -> str:
        """Convolution that keeps the side at stride 1."""
        pad = dilation * (kernel - 1) // 2
        operands = [x, self.weight(out, self.width[x] // group, kernel, kernel, scale=(self.width[x] // group * kernel**2) ** -0.5)]
        operands += [self.weight(out, scale=0.3)] if bias else []
        made = self(
            "Conv", *operands, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=group, dilations=[dilation] * 2
        )
        return self.sized(made, out)

    def up(self, x: str, out: int, group: int = 1) -> str:
        """Transposed convolution that doubles the side."""
        operands = [x, self.weight(self.width[x], out // group, 2, 2, scale=self.width[x] ** -0.5), self.weight(out, scale=0.3)]
        return self.sized(self("ConvTranspose", *operands, kernel_shape=[2, 2], strides=[2, 2], group=group), out)

    def norm(self, x: str) -> str:
        width = self.width[x]
        scale, shift, mean = (self.constant(self.rng.uniform(0.5, 1.5, width).astype(np.float32)) for _ in range(3))
        return self.sized(self("BatchNormalization", x, scale, shift, mean, self.constant(np.full(width, 0.7, np.float32))), width)

    def act(self, x: str, op: str = "Relu") -> str:
        return self.sized(self(op, x), self.width[x])

    def add(self, a: str, b: str) -> str:
        return self.sized(self("Add", a, b), self.width[a])

    def same(self, op: str, x: str, **attributes: object) -> str:
        """An operator that keeps the channels."""
        return self.sized(self(op, x, **attributes), self.width[x])

    # blocks

    def basic(self, x: str, out: int) -> str:
        """Two convolutions and a shortcut (ResNet)."""
        y = self.act(self.norm(self.conv(x, out, 3, bias=False)))
        y = self.norm(self.conv(y, out, 3, bias=False))
        shortcut = x if self.width[x] == out else self.norm(self.conv(x, out, bias=False))
        return self.act(self.add(y, shortcut))

    def inverted(self, x: str, squeeze: bool = True) -> str:
        """Expand, depthwise, squeeze and excite, project (MobileNetV3)."""
        width = self.width[x]
        y = self.act(self.norm(self.conv(x, 2 * width, bias=False)), "HardSwish")
        y = self.act(self.norm(self.conv(y, 2 * width, 3, group=2 * width, bias=False)), "Relu")
        if squeeze:
            gate = self.act(self.conv(self.same("GlobalAveragePool", y), width))
            gate = self.act(self.conv(gate, 2 * width), "HardSigmoid")
            y = self.sized(self("Mul", y, gate), 2 * width)
        return self.add(x, self.norm(self.conv(y, width, bias=False)))

    def grouped(self, x: str, groups: int = 4) -> str:
        """A bottleneck with a convolution of several groups (ResNeXt)."""
        y = self.act(self.conv(x, 4 * groups))
        y = self.act(self.norm(self.conv(y, 8 * groups, 3, group=groups)))
        return self.add(x, self.conv(y, self.width[x]))

    def dense(self, x: str, growth: int = 4) -> str:
        """The input and two new parts side by side (DenseNet)."""
        for _ in range(2):
            y = self.conv(self.act(self.norm(x)), growth, 3)
            x = self.sized(self("Concat", x, y, axis=1), self.width[x] + growth)
        return self.conv(x, 8)

    def halves(self, x: str) -> str:
        """Split, work on one half, join (CSP)."""
        y = self.act(self.conv(x, 12))
        kept, worked = self("Split", y, self.ints(4, 8), outputs=2, axis=1)
        self.sized(kept, 4)
        worked = self.act(self.conv(self.sized(worked, 8), 6, 3))
        return self.conv(self.sized(self("Concat", kept, worked, axis=1), 10), 8)

    def shuffled(self, x: str, groups: int = 2) -> str:
        """Grouped convolutions with a channel shuffle in between (ShuffleNet)."""
        y = self.act(self.conv(x, 8, group=1))
        split = self("Reshape", y, self.ints(0, groups, 8 // groups, SIDE, SIDE))
        y = self.sized(self("Reshape", self("Transpose", split, perm=[0, 2, 1, 3, 4]), self.ints(0, 8, SIDE, SIDE)), 8)
        y = self.act(self.conv(y, 8, 3, group=groups))
        return self.conv(y, 8)

    def bent(self, x: str) -> str:
        """Down by space to depth, up by depth to space, by a transposed convolution and by interpolation."""
        y = self.act(self.conv(x, 4))
        y = self.sized(self("SpaceToDepth", y, blocksize=2), 16)
        y = self.act(self.conv(y, 8))
        z = self.sized(self("DepthToSpace", y, blocksize=2, mode="CRD"), 2)
        up = self.act(self.up(y, 6))
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        wide = self.sized(self("Resize", y, "", scales, mode="nearest"), 8)
        joined = self.sized(self("Concat", z, up, wide, axis=1), 16)
        return self.conv(self.same("AveragePool", joined, kernel_shape=[3, 3], pads=[1] * 4), 8)

    def pooled(self, x: str) -> str:
        y = self.act(self.conv(x, 8, 3))
        return self.conv(self.same("MaxPool", y, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4), 8)

    def done_with(self, x: str, flat: bool, classes: int = 5) -> onnx.ModelProto:
        """A classifier on the mean over places, or (``flat``) on every channel at every place."""
        if flat:
            x = self.act(self.conv(x, 6))
            y = self("Flatten", self("MaxPool", x, kernel_shape=[4, 4], strides=[4, 4]))
            wide = self.width[x] * 4
        else:
            x = self.act(self.conv(x, 10))
            y, wide = self("Flatten", self("GlobalAveragePool", x)), self.width[x]
        logits = self("Gemm", y, self.weight(classes, wide), self.weight(classes), transB=1)
        return self.done(logits, **{logits: ["batch", classes]})


BLOCKS = ("basic", "inverted", "grouped", "dense", "halves", "shuffled", "bent", "pooled")


def build(blocks: list[str], flat: bool = False, seed: int = 0, opset: int = 18) -> onnx.ModelProto:
    """A stem of eight channels, the blocks, a classifier."""
    net = ConvNet(opset, seed)
    x = net.act(net.norm(net.conv("x", 8, 3, bias=False)))
    for name in blocks:
        x = net.basic(x, 8) if name == "basic" else getattr(net, name)(x)
    return net.done_with(x, flat)
