"""Re-fitting convolutions: patches are what a convolution multiplies, and every reader of pruned channels comes nearer to the original."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.calibration import Batch
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.graph.view import GraphView
from onnxprune.passes.readers import Patches, reader_of
from onnxprune.passes.refit import refit
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests.graph.convnet import BLOCKS, SIDE, ConvNet, build
from tests.graph.pruning import anatomy_of

OPTIONS = RuntimeOptions()


def images(count: int, seed: int) -> list[Batch]:
    """Batches of 16 smooth images."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, SIDE // 2, SIDE // 2)).repeat(2, 2).repeat(2, 3)
    x = (coarse + 0.3 * rng.standard_normal((count, 3, SIDE, SIDE))).astype(np.float32)
    return [
        Batch({"x": x[start : start + 16]}, np.arange(start, start + 16), np.ones(16, bool), None, None) for start in range(0, count, 16)
    ]


def error(anatomy: Anatomy, model: object, batches: list[Batch]) -> float:
    dense, pruned = (open_session(each) for each in (anatomy.model, model))  # type: ignore[arg-type]
    return float(sum(np.square(run(dense, b.feeds)[0] - run(pruned, b.feeds)[0]).sum() for b in batches))


def most(anatomy: Anatomy, share: float) -> Kept:
    rng = np.random.default_rng(4)
    return {site.name: np.sort(rng.choice(site.units, max(round(share * site.units), 1), replace=False)) for site in anatomy.sites}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_kind_of_net_comes_nearer_to_the_original(block: str) -> None:
    anatomy = anatomy_of(build([block], flat=block == "basic"))
    kept = most(anatomy, 0.75)
    student = slice_model(anatomy, kept)
    model, _, reports = refit(anatomy, student, images(256, 0), OPTIONS, kept=kept)
    assert any(report.applied for report in reports)
    assert all(report.error < 1 for report in reports if report.applied)
    fresh = images(64, 1)
    assert error(anatomy, model, fresh) < 0.6 * error(anatomy, student, fresh)


def test_a_matrix_that_reads_channels_is_fitted_to_the_neurons_that_stay() -> None:
    """A stream of channels without a norm of its rows (LeViT), which the matrices of a feed-forward block read and write."""
    net = ConvNet()
    patches = net("Reshape", net.conv("x", 12, 2, 2), net.ints(0, 12, -1))
    tokens = net("Transpose", patches, perm=[0, 2, 1])
    stream = net.add(net.sized(tokens, 12), net.ffn(tokens, "Relu", 20))
    pooled = net("ReduceMean", stream, net.ints(1), keepdims=0)
    anatomy = anatomy_of(net.done(net("MatMul", pooled, net.weight(12, 5))))
    kept = most(anatomy, 0.75)
    assert {site.kind: site.units for site in anatomy.sites} == {"channels": 12, "ffn": 20}
    student = slice_model(anatomy, kept)
    model, changes, reports = refit(anatomy, student, images(256, 0), OPTIONS, kept=kept)
    assert sum(report.applied for report in reports) >= 2
    assert {array.shape for array in changes.values()} >= {(9, 15)}
    fresh = images(64, 1)
    assert error(anatomy, model, fresh) < 0.6 * error(anatomy, student, fresh)


@pytest.mark.parametrize(("stride", "pad", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 0, 1)])
def test_patches_times_the_weight_are_what_the_convolution_makes(stride: int, pad: int, dilation: int) -> None:
    net = ConvNet()
    x = net.act(net.conv("x", 6, 3))
    operands = net.weight(5, 6, 3, 3), net.weight(5)
    y = net("Conv", x, *operands, kernel_shape=[3, 3], strides=[stride] * 2, pads=[pad] * 4, dilations=[dilation] * 2)
    check_patches(net, y)


@pytest.mark.parametrize(("stride", "pad", "extra"), [(1, 0, 0), (2, 1, 1), (3, 1, 0)])
def test_patches_times_the_weight_are_what_the_transposed_convolution_makes(stride: int, pad: int, extra: int) -> None:
    net = ConvNet()
    x = net.act(net.conv("x", 6, 3))
    operands = net.weight(6, 5, 3, 3), net.weight(5)
    y = net("ConvTranspose", x, *operands, kernel_shape=[3, 3], strides=[stride] * 2, pads=[pad] * 4, output_padding=[extra] * 2)
    check_patches(net, y)


def check_patches(net: ConvNet, y: str) -> None:
    z = net("GlobalAveragePool", y)
    anatomy = anatomy_of(net.done(z, **{z: []}))
    (site,) = anatomy.sites
    (consumer,) = site.consumers
    view = GraphView(anatomy.model)
    reader = reader_of(view, consumer, consumer.leaf.node, 4, consumer.labels, chain=True)
    assert isinstance(reader, Patches)
    session = open_session(with_outputs(anatomy.model, [consumer.tensor, y]), optimize=False)
    read, made = run(session, images(16, 2)[0].feeds, [consumer.tensor, y])
    rows, wanted = reader.pairs(read, made, 10**6, np.random.default_rng(0))
    weight, bias = (view.value(name) for name in consumer.leaf.node.inputs[1:])
    assert weight is not None
    assert bias is not None
    np.testing.assert_allclose(rows @ reader.matrix(weight) + bias, wanted, atol=1e-4)
    assert rows.shape[1] == reader.inputs == len(reader.units())
    few, _ = reader.pairs(read, made, 3, np.random.default_rng(0))
    assert len(few) == 3 * 16


def test_a_convolution_that_drops_nothing_useful_is_recovered_exactly() -> None:
    """Half of the channels copy the other half: the kept ones can do the work of all, and the fit finds out."""
    net = ConvNet()
    weight = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    x = net.act(net.sized(net("Conv", "x", net.constant(weight.repeat(2, 0)), kernel_shape=[3, 3], pads=[1] * 4), 8))
    y = net.act(net.conv(x, 6, 3))
    anatomy = anatomy_of(net.done_with(y, flat=False))
    kept = {"conv.0.channels": np.array([0, 2, 4, 6])}
    student = slice_model(anatomy, kept)
    model, changes, reports = refit(anatomy, student, images(256, 0), OPTIONS, kept=kept)
    fresh = images(64, 1)
    assert error(anatomy, model, fresh) < 1e-2 * error(anatomy, student, fresh)
    assert changes
    assert reports[0].site == "conv.0.channels"


def test_channels_that_nobody_cut_are_left_alone() -> None:
    anatomy = anatomy_of(build(["basic"]))
    assert refit(anatomy, anatomy.model, images(32, 0), OPTIONS, kept={})[1:] == ({}, ())


def test_one_factor_per_unit_is_fitted_as_well() -> None:
    anatomy = anatomy_of(build(["dense"]))
    kept = most(anatomy, 0.75)
    student = slice_model(anatomy, kept)
    model, _, _ = refit(anatomy, student, images(256, 0), OPTIONS, kept=kept, method="scale")
    fresh = images(64, 1)
    assert error(anatomy, model, fresh) < error(anatomy, student, fresh)


def test_batch_norms_behind_convolutions_are_folded() -> None:
    model: onnx.ModelProto = build(["basic"])
    assert "BatchNormalization" in {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in {node.op for node in anatomy_of(model).view.nodes}
