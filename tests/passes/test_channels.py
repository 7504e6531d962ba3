"""The channels pass from the model to the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.errors import NothingPrunable
from onnxprune.graph.macs import total_macs
from onnxprune.graph.model import load
from onnxprune.graph.profile import shapes_of
from onnxprune.options import settings
from onnxprune.passes.scope import understand
from tests.graph.convnet import SIDE, build
from tests.graph.net import Net


def images(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asarray(rng.standard_normal((rows, 3, SIDE // 2, SIDE // 2)).repeat(2, 2).repeat(2, 3), np.float32)


def test_a_net_is_pruned_to_a_share_of_its_multiply_adds(tmp_path: Path) -> None:
    given = tmp_path / "net.onnx"
    onnx.save(build(["basic", "inverted", "dense"]), given)
    result = onnxprune.prune(
        given,
        passes=["channels"],
        calib={"x": images(96)},
        target_macs="50%",
        rounds=2,
        max_drop=0.9,
        output=tmp_path / "small.onnx",
        bench_seconds=0,
    )
    before, after = (total_macs(model, shapes_of(model, {"x": images(1)})) for model in (load(given), load(tmp_path / "small.onnx")))
    assert 0.4 * before < after <= 0.5 * before
    assert result.record["verification"]["masked_equals_sliced"]["passed"]
    assert any(fit["applied"] for fit in result.record["compensation"])
    assert {site["kind"] for site in result.record["sites"]} == {"channels"}
    assert all(site["kept"] >= 1 for site in result.record["sites"])


def test_default_passes_point_to_channels() -> None:
    with pytest.raises(NothingPrunable, match="it does have channels sites: add them to --passes"):
        understand(load(build(["basic"])), settings(target_macs="50%"))


def test_a_transformer_has_no_channels_and_says_so() -> None:
    net = Net()
    model = load(net.done(net.add("x", net.ffn("x"))))
    with pytest.raises(NothingPrunable, match=r"none of it is channels of convolutions that can be cut; it does have ffn sites"):
        understand(model, settings(passes=["channels"], target_macs="50%"))
