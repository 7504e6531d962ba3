"""Channels of convolutional nets: groups are found, masks equal slices, the rest is refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.slicing import slice_model
from tests.graph.convnet import BLOCKS, SIDE, ConvNet, build
from tests.graph.pruning import Comparison, anatomy_of

IMAGES = {"x": np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)}


def some(sites: tuple[Site, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Any number of any units that a site may keep."""
    sizes = {site.name: int(rng.integers(site.least, site.units + 1)) for site in sites}
    return {site.name: np.sort(rng.choice(site.units, sizes[site.name], replace=False)) for site in sites}


def units(anatomy: Anatomy) -> dict[str, int]:
    return {site.name: site.units for site in anatomy.sites}


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_cut_to_what_the_mask_says(block: str) -> None:
    anatomy = anatomy_of(build([block], flat=block in ("basic", "dense")))
    assert anatomy.refusals == ()
    assert {site.kind for site in anatomy.sites} == {"channels"}
    compare = Comparison(anatomy, IMAGES)
    compare.check({site.name: np.array([site.units - 1]) for site in anatomy.sites})
    for site in anatomy.sites:
        compare.check({site.name: np.arange(1, site.units)})


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4), st.booleans(), st.integers(0, 2**31))
def test_any_net_of_blocks_is_cut_to_what_the_mask_says(blocks: list[str], flat: bool, seed: int) -> None:
    anatomy = anatomy_of(build(blocks, flat, seed))
    compare = Comparison(anatomy, IMAGES)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        compare.check(some(anatomy.sites, rng))


def test_a_residual_stage_is_one_site_with_every_reader() -> None:
    anatomy = anatomy_of(build(["basic", "basic"]))
    assert units(anatomy) == {"conv.0.channels": 8, "conv.1.channels": 8, "conv.3.channels": 8, "conv.5.channels": 10}
    assert len(anatomy.site("conv.0.channels").consumers) == 3


def test_every_part_of_a_concatenation_is_a_site_of_its_own() -> None:
    anatomy = anatomy_of(build(["dense"]))
    assert units(anatomy) == {
        "conv.0.channels": 8,
        "conv.1.channels": 4,
        "conv.2.channels": 4,
        "conv.3.channels": 8,
        "conv.4.channels": 10,
    }


def test_parts_of_a_split_are_told_by_a_letter() -> None:
    assert {"conv.1.channels": 8, "conv.1b.channels": 4}.items() <= units(anatomy_of(build(["halves"]))).items()


def test_units_of_a_grouped_convolution_are_whole_groups() -> None:
    anatomy = anatomy_of(build(["grouped"]))
    assert anatomy.site("conv.1.channels").units == 4
    sliced = slice_model(anatomy, {"conv.1.channels": np.array([0, 3])})
    (node,) = [node for node in sliced.proto.graph.node if any(item.name == "group" and item.i > 1 for item in node.attribute)]
    assert next(item.i for item in node.attribute if item.name == "group") == 2


def test_a_site_keeps_a_channel() -> None:
    anatomy = anatomy_of(build(["basic"]))
    with pytest.raises(InputError, match=r"conv\.1\.channels must keep at least one"):
        slice_model(anatomy, {"conv.1.channels": np.zeros(0, np.int64)})


def patches() -> onnx.ModelProto:
    """A patch embedding in front of a layer normalisation, as vision transformers begin."""
    net = ConvNet()
    x = net.conv("x", 8, 3)
    tokens = net("Transpose", net("Reshape", x, net.ints(0, 8, SIDE * SIDE)), perm=[0, 2, 1])
    normed = net("LayerNormalization", tokens, net.weight(8), net.weight(8), axis=-1)
    y = net("Add", tokens, net("MatMul", net("Relu", net("MatMul", normed, net.weight(8, 16))), net.weight(16, 8)))
    return net.done(y, **{y: ["batch", SIDE * SIDE, 8]})


def test_the_width_of_a_normalised_stream_is_refused() -> None:
    anatomy = anatomy_of(patches())
    assert units(anatomy) == {"layer.0.ffn": 16}
    (refusal,) = anatomy.refusals
    assert refusal.code == "OP301"
    assert "normalises" in refusal.reason
    assert refusal.site.startswith("Conv")


def test_channels_at_the_boundary_are_refused() -> None:
    net = ConvNet()
    y = net.conv(net.act(net.conv("x", 6, 3)), 4)
    anatomy = anatomy_of(net.done(y, **{y: ["batch", 4, SIDE, SIDE]}))
    assert units(anatomy) == {"conv.0.channels": 6}
    assert [refusal.code for refusal in anatomy.refusals] == ["OP301"]
    assert f"graph output {y}" in anatomy.refusals[0].reason


def test_channels_of_an_attention_are_refused() -> None:
    net = ConvNet()
    q, k = (net("Reshape", net.conv("x", 6), net.ints(0, 6, SIDE * SIDE)) for _ in range(2))
    y = net("MatMul", net("Transpose", q, perm=[0, 2, 1]), k)
    anatomy = anatomy_of(net.done(y, **{y: ["batch", SIDE * SIDE, SIDE * SIDE]}))
    assert anatomy.sites == ()
    assert [refusal.code for refusal in anatomy.refusals] == ["OP302"]


def test_a_group_normalisation_is_cut_by_groups_where_it_is_spelled_out_and_blocks_where_it_is_not() -> None:
    def model(fused: bool) -> onnx.ModelProto:
        net = ConvNet(opset=21)
        x = net.conv("x", 8, 3)
        if fused:
            x = net.sized(net("GroupNormalization", x, net.weight(8), net.weight(8), num_groups=4), 8)
        else:
            flat = net("Reshape", x, net.ints(0, 4, -1))
            one, zero = (net.constant(np.full(4, value, np.float32)) for value in (1, 0))
            normed = net("InstanceNormalization", flat, one, zero)
            x = net.sized(net("Mul", net("Reshape", normed, net.ints(0, 8, SIDE, SIDE)), net.weight(8, 1, 1)), 8)
        return net.done_with(net.conv(net.act(x), 4), flat=False)

    spelled, fused = anatomy_of(model(False)), anatomy_of(model(True))
    assert spelled.site("conv.0.channels").units == 4
    Comparison(spelled, IMAGES).check({"conv.0.channels": np.array([1, 2])})
    assert "conv.0.channels" not in units(fused)
    assert "GroupNormalization" in fused.refusals[0].reason


def test_a_quantized_convolution_is_refused() -> None:
    net = ConvNet()
    weight = net("DequantizeLinear", net.constant(net.rng.integers(-9, 9, (6, 3, 3, 3)).astype(np.int8)), net.constant(np.float32(0.1)))
    x = net.sized(net("Conv", "x", weight, kernel_shape=[3, 3], pads=[1] * 4), 6)
    anatomy = anatomy_of(net.done_with(net.act(x), flat=True))
    assert [refusal.code for refusal in anatomy.refusals] == ["OP304"]
    assert "DequantizeLinear" in anatomy.refusals[0].reason
