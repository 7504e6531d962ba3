"""Adjoints of convolutional operators against torch autograd, with dynamic and fixed image sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from onnxprune.errors import InputError
from onnxprune.graph.autodiff import GRADIENT, TARGET, WEIGHT, MissingGradient, Tap, gradient_model
from onnxprune.graph.model import Model
from onnxprune.runtime.session import open_session, run
from tests.graph.convnet import BLOCKS, SIDE, build

RNG = np.random.default_rng(5)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32) * 0.4


def one(op: str, *operands: np.ndarray | None, opset: int = 18, channels: int = 4, **attributes: Any) -> onnx.ModelProto:
    """x [batch, channels, height, width] through one operator, everything as dynamic as can be, flattened by a sum."""
    names = [f"c{slot}" if operand is not None else "" for slot, operand in enumerate(operands)]
    nodes = [helper.make_node(op, ["x", *names], ["y"], name="it", **attributes)]
    constants = [numpy_helper.from_array(operand, name) for operand, name in zip(operands, names, strict=True) if operand is not None]
    shape = ["batch", channels, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def mask_gradient(model: onnx.ModelProto, x: np.ndarray, tensor: str, output: str, target: np.ndarray, size: int) -> np.ndarray:
    """Sum over places of activation times adjoint, [batch, channels], for half the squared distance of the output to ``target``."""
    tap = Tap("t", tensor, 1, np.arange(size), size)
    session = open_session(gradient_model(Model.from_proto(model), [tap], output, "identity", samples={"x": x}))
    feeds = {"x": x, TARGET: target, WEIGHT: np.ones(target.shape[:-1], np.float32)}
    return np.asarray(run(session, feeds, [GRADIENT + "t"])[0])


def compare(model: onnx.ModelProto, function: Any, sides: tuple[int, int] = (9, 7), channels: int = 4) -> None:
    x = RNG.standard_normal((3, channels, *sides)).astype(np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    y = function(leaf)
    target = RNG.standard_normal(y.shape).astype(np.float32)
    (0.5 * (y - torch.from_numpy(target)) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    expected = (leaf.grad.numpy() * x).sum(axis=(2, 3))
    found = mask_gradient(model, x, "x", "y", target, channels)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "pad", "dilation", "group"), [(1, 0, 1, 1), (3, 1, 1, 1), (3, 2, 2, 2), (5, 0, 1, 4), (2, 1, 1, 1)])
def test_conv(kernel: int, pad: int, dilation: int, group: int, stride: int) -> None:
    w, b = weight(8, 4 // group, kernel, kernel), weight(8)
    model = one("Conv", w, b, strides=[stride] * 2, pads=[pad] * 4, dilations=[dilation] * 2, group=group, kernel_shape=[kernel] * 2)
    compare(model, lambda x: F.conv2d(x, torch.from_numpy(w), torch.from_numpy(b), stride, pad, dilation, group))


def test_conv_with_uneven_padding_and_strides() -> None:
    w = weight(3, 4, 3, 2)
    model = one("Conv", w, strides=[2, 1], pads=[0, 1, 2, 0], kernel_shape=[3, 2])
    compare(model, lambda x: F.conv2d(F.pad(x, (1, 0, 0, 2)), torch.from_numpy(w), stride=(2, 1)))


def test_conv_that_pads_itself() -> None:
    w = weight(3, 4, 3, 3)
    model = one("Conv", w, auto_pad="SAME_UPPER", kernel_shape=[3, 3])
    compare(model, lambda x: F.conv2d(x, torch.from_numpy(w), padding=1))


@pytest.mark.parametrize(("stride", "pad", "group"), [(1, 0, 1), (2, 1, 2), (2, 0, 4)])
def test_conv_transpose(stride: int, pad: int, group: int) -> None:
    w = weight(4, 2, 3, 3)
    model = one("ConvTranspose", w, strides=[stride] * 2, pads=[pad] * 4, group=group, output_padding=[stride - 1] * 2)
    compare(model, lambda x: F.conv_transpose2d(x, torch.from_numpy(w), None, stride, pad, stride - 1, group))


def test_batch_normalization() -> None:
    scale, shift, mean, variance = weight(4), weight(4), weight(4), np.abs(weight(4)) + 0.1
    model = one("BatchNormalization", scale, shift, mean, variance)
    tensors = [torch.from_numpy(array) for array in (mean, variance, scale, shift)]
    compare(model, lambda x: F.batch_norm(x, *tensors))


def test_padding_that_shifts_and_cuts() -> None:
    """RWKV sees the token before by a row of zeros in front and one row less behind."""
    pads = np.array([0, 0, 1, 0, 0, 0, -1, 2])
    compare(one("Pad", pads), lambda x: F.pad(x, (0, 2, 1, -1)))
    with_axes = one("Pad", np.array([1, -1]), None, np.array([2]), opset=18)
    compare(with_axes, lambda x: F.pad(x, (0, 0, 1, -1)))


@pytest.mark.parametrize("opset", [11, 18])
def test_instance_normalization(opset: int) -> None:
    scale, shift = weight(4), weight(4)
    model = one("InstanceNormalization", scale, shift, opset=opset, epsilon=0.1)
    compare(model, lambda x: F.instance_norm(x, weight=torch.from_numpy(scale), bias=torch.from_numpy(shift), eps=0.1))


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize(("kernel", "stride", "pad", "ceil"), [(2, 2, 0, 0), (3, 2, 1, 0), (3, 1, 1, 0), (3, 2, 0, 1), (5, 2, 2, 0)])
def test_max_pool(kernel: int, stride: int, pad: int, ceil: int, opset: int) -> None:
    model = one("MaxPool", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, ceil_mode=ceil, opset=opset)
    compare(model, lambda x: F.max_pool2d(x, kernel, stride, pad, ceil_mode=bool(ceil)))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_average_pool(kernel: int, stride: int, pad: int, count: int) -> None:
    model = one("AveragePool", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, count_include_pad=count)
    compare(model, lambda x: F.avg_pool2d(x, kernel, stride, pad, count_include_pad=bool(count)))


def test_average_pool_with_ceil_mode_that_changes_nothing() -> None:
    model = one("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    with pytest.raises(MissingGradient, match="over the edge"):
        compare(model, lambda x: F.avg_pool2d(x, 2), (8, 6))
    for axis, size in ((2, 8), (3, 6)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    compare(model, lambda x: F.avg_pool2d(x, 2), (8, 6))


def test_average_pool_by_a_window_larger_than_the_image() -> None:
    model = one("AveragePool", kernel_shape=[20, 20], strides=[20, 20], ceil_mode=1)
    for axis, size in ((2, 8), (3, 6)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    compare(model, lambda x: F.avg_pool2d(x, 20, ceil_mode=True), (8, 6))


def test_global_pools() -> None:
    compare(one("GlobalAveragePool"), lambda x: x.mean((2, 3), keepdim=True))
    compare(one("GlobalMaxPool"), lambda x: x.amax((2, 3), keepdim=True))


def test_nearest_neighbours_by_whole_factors() -> None:
    scales = np.array([1, 1, 2, 3], np.float32)
    for mode, rounding in (("half_pixel", "round_prefer_floor"), ("asymmetric", "floor")):
        model = one("Resize", None, scales, mode="nearest", coordinate_transformation_mode=mode, nearest_mode=rounding)
        compare(model, lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"))


@pytest.mark.parametrize("scales", [(2.0, 3.0), (0.5, 1.7), (1.0, 1.5)])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_interpolation_by_any_factor(mode: str, scales: tuple[float, float]) -> None:
    where = "asymmetric" if mode == "nearest" else "half_pixel"
    model = one(
        "Resize",
        None,
        np.array([1, 1, *scales], np.float32),
        mode=mode,
        coordinate_transformation_mode=where,
        nearest_mode="floor",
        cubic_coeff_a=-0.75,
    )
    name = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}[mode]
    further = {} if mode == "nearest" else {"align_corners": False}
    compare(model, lambda x: F.interpolate(x, scale_factor=scales, mode=name, recompute_scale_factor=False, **further))


def test_interpolation_to_sizes_that_the_graph_computes() -> None:
    sizes = np.array([2, 3], np.int64)
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "factors"], ["sizes"]),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear", coordinate_transformation_mode="align_corners"),
    ]
    model = one("Resize", None, None, np.array([1, 1, *sizes]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer[0].name = "factors"
    compare(model, lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=True), (5, 4))


def test_what_is_no_interpolation_of_places_has_no_gradient() -> None:
    scales = np.array([1, 2, 1, 1], np.float32)
    with pytest.raises(MissingGradient, match="only places of an image"):
        compare(one("Resize", None, scales, mode="nearest"), lambda x: x.repeat_interleave(2, 1))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_places_to_channels_and_back(mode: str) -> None:
    def column_last(x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        return x.reshape(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, 2 * height, 2 * width)

    def column_first(x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(x, 2)

    compare(one("DepthToSpace", blocksize=2, mode=mode, channels=8), column_last if mode == "DCR" else column_first, channels=8)
    if mode == "CRD":
        gather = torch.arange(16).reshape(4, 4).T.reshape(-1)
        compare(one("SpaceToDepth", blocksize=2), lambda x: F.pixel_unshuffle(x, 2)[:, gather], (8, 6))


def test_activations_of_mobile_nets() -> None:
    low, high = np.float32(0.0), np.float32(0.5)
    compare(one("Clip", np.array(low), np.array(high)), lambda x: x.clamp(0.0, 0.5))
    compare(one("HardSwish"), F.hardswish)
    compare(one("HardSigmoid", alpha=1 / 6), F.hardsigmoid)


@pytest.mark.parametrize("block", BLOCKS)
def test_mask_gradients_of_whole_nets_against_differences(block: str) -> None:
    """The derivative by a mask on the stem's channels, in the graph and by moving that mask."""
    model = build([block])
    stem = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    x = RNG.standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)
    output = model.graph.output[0].name
    target = np.zeros((2, 5), np.float32)
    found = mask_gradient(model, x, stem, output, target, 8)
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for node in moved.graph.node:
        node.input[:] = ["masked" if name == stem else name for name in node.input]
    place = next(index for index, node in enumerate(moved.graph.node) if stem in node.output)
    moved.graph.node.insert(place + 1, helper.make_node("Mul", [stem, "mask"], ["masked"]))
    moved.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [8, 1, 1]))
    session = open_session(Model.from_proto(moved), optimize=False)

    def loss(mask: np.ndarray) -> np.ndarray:
        (y,) = run(session, {"x": x, "mask": mask.reshape(8, 1, 1).astype(np.float32)})
        return np.asarray(0.5 * np.square(y, dtype=np.float64).sum(axis=1))

    step = 1e-2
    expected = np.stack([(loss(1 + step * unit) - loss(1 - step * unit)) / (2 * step) for unit in np.eye(8)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.03 * np.abs(expected).max())


def test_what_is_not_covered_names_the_node() -> None:
    model = one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    with pytest.raises(InputError, match="ceil_mode"):
        mask_gradient(model, np.zeros((2, 4, 9, 7), np.float32), "x", "y", np.zeros((2, 4, 4, 3), np.float32), 4)
