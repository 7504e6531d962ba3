"""Residual streams: a narrowed model computes what the wide one does with its stream projected, and what cannot be turned is refused."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.compensate.principal import principal_basis
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.hidden import Narrowing, narrow
from onnxprune.graph.instrument import projected_model
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import Profile
from onnxprune.graph.stream import find_streams
from onnxprune.graph.stream_parts import Stream
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.architectures import ARCHITECTURES, exports, feeds
from tests.graph.net import DEPTH, Net
from tests.graph.pruning import TOLERANCE

VARIANT = "ts17-eager"
TURNED = {"clip": 2, "dinov2-swiglu": 1, "phi": 1, "qwen3-cache": 1, "t5": 2, "whisper-encoder": 1}
"""Architecture -> streams that can be turned."""


def streams_of(file: Path) -> tuple[Model, Profile, tuple[Stream, ...], tuple[Refusal, ...]]:
    model, profile = canonicalise(load(file))
    return model, profile, *find_streams(GraphView(model), profile)


def random_narrowing(stream: Stream, width: int, rng: np.random.Generator) -> Narrowing:
    rows = rng.standard_normal((2 * stream.width, stream.width))
    return Narrowing(stream.name, principal_basis(rows.T @ rows, width, centred=stream.centred))


def outputs(model: Model, given: Mapping[str, np.ndarray], *, optimize: bool = False) -> list[np.ndarray]:
    return run(open_session(model, optimize=optimize), {name: given[name] for name in model.input_names})


def close(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
    return all(a.shape == b.shape and np.abs(a - b).max() <= TOLERANCE * np.abs(b).max() for a, b in zip(got, want, strict=True))


def check(file: Path, given: Mapping[str, np.ndarray], expected: int, cases: int) -> None:
    """Random bases of random widths, and one of the full width, which changes nothing."""
    model, profile, streams, _ = streams_of(file)
    assert len(streams) == expected
    rng = np.random.default_rng(zlib.crc32(file.stem.encode()))
    dense = outputs(model, given)
    for number in range(cases):
        widths = [stream.width if number == 0 else int(rng.integers(4, stream.width)) for stream in streams]
        chosen = [random_narrowing(stream, width, rng) for stream, width in zip(streams, widths, strict=True)]
        small, _ = narrow(model, profile, chosen)
        onnx.checker.check_model(small.to_proto(), full_check=False)
        got = outputs(small, given, optimize=number == 1)
        assert close(got, outputs(projected_model(model, profile, chosen), given)), widths
        assert close(got, dense) == (number == 0), widths


@pytest.mark.parametrize("name", ["vit-sdpa-do18", "gpt2-eager-ts17", "llama-sdpa-do23"])
def test_narrowed_models_compute_what_projected_streams_say(name: str) -> None:
    check(zoo.path(name), zoo.feeds(name, batch=2, seq=5), expected=1, cases=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNED)
def test_streams_of_many_architectures_are_found_and_narrowed(name: str) -> None:
    check(exports.path(name, VARIANT), feeds(ARCHITECTURES[name]), expected=TURNED[name], cases=2)


def test_narrowed_models_run_at_other_shapes() -> None:
    name = "llama-sdpa-do18"
    model, profile, (stream,), _ = streams_of(zoo.path(name))
    chosen = [random_narrowing(stream, stream.width // 2, np.random.default_rng(1))]
    small, wide = narrow(model, profile, chosen)[0], projected_model(model, profile, chosen)
    for batch, seq in ((1, 1), (3, 17)):
        given = zoo.feeds(name, batch, seq)
        assert close(outputs(small, given), outputs(wide, given))


def test_every_matrix_that_touches_the_stream_gets_smaller() -> None:
    model, profile, (stream,), _ = streams_of(zoo.path("vit-sdpa-do18"))
    small, _ = narrow(model, profile, [random_narrowing(stream, stream.width // 2, np.random.default_rng(0))])
    assert not stream.bridges
    sizes = [
        sum(array.size for array in (item.initializer(name) for name in item.initializer_names) if array is not None and array.ndim > 1)
        for item in (model, small)
    ]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


@pytest.mark.parametrize("name", ["bert-sdpa-ts17", "minilm-eager-do23"])
def test_a_post_norm_network_is_refused(name: str) -> None:
    *_, streams, refusals = streams_of(zoo.path(name))
    assert not streams
    assert [refusal.code for refusal in refusals] == ["OP602"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "scales is read elsewhere as well"),  # a norm on every branch, before it is added
        ("mixtral", "4 places read or write the stream"),
        ("modernbert", "reads the sum itself, with the mean that norms remove"),
        ("resnet-basic", "no sum in this graph is read by two norms"),
    ],
)
def test_what_no_rotation_passes_is_refused_by_name(name: str, reason: str) -> None:
    *_, streams, refusals = streams_of(exports.path(name, VARIANT))
    assert not streams
    assert refusals[0].code == "OP603"
    assert reason in refusals[0].reason


def test_queries_normalised_head_by_head_are_no_stream() -> None:
    """StableLM has a norm for each head of one projection; no branch is added to what they read."""
    net = Net(23)
    heads = net("Split", net.heads(net.linear("x")), net.ints(1, 1, 1), axis=1, outputs=3)
    parts = [net("Mul", net("RMSNormalization", head, net.weight(DEPTH), axis=-1), net("Softmax", head)) for head in heads]
    model, profile = canonicalise(load(net.done(net("Concat", *parts, axis=1))))
    streams, refusals = find_streams(GraphView(model), profile)
    assert not streams
    assert [refusal.site for refusal in refusals] == ["stream"]


def test_a_basis_for_another_file_is_refused() -> None:
    model, profile, (stream,), _ = streams_of(zoo.path("vit-sdpa-do18"))
    with pytest.raises(InputError, match="made for another file"):
        narrow(model, profile, [Narrowing(stream.name, np.eye(stream.width + 1, dtype=np.float32))])
