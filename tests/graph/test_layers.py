"""Sublayers: which branches of a network are found, and that a substitute computes what it says while the branch is gone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.layers import Sublayer, Substitute, find_sublayers, substitute
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import synthetic_feeds
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import WIDTH, Net


def known(source: str | onnx.ModelProto) -> tuple[Model, tuple[Sublayer, ...]]:
    model, profile = canonicalise(load(source))
    return model, find_sublayers(GraphView(model), profile)


def outputs(model: Model, names: tuple[str, ...] = ()) -> list[np.ndarray]:
    """Graph outputs, and then the tensors ``names``."""
    proto = model.copy_proto()
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return run(open_session(model.with_proto(proto), optimize=False), synthetic_feeds(model))


def norm(net: Net, x: str) -> str:
    scale, shift = net.weight(WIDTH, scale=1.0), net.weight(WIDTH, scale=0.3)
    return str(net("LayerNormalization", x, scale, shift, axis=-1))


def pre_norm(blocks: int = 1) -> onnx.ModelProto:
    net = Net()
    x = "x"
    for _ in range(blocks):
        x = net.add(x, net.attention(norm(net, x)))
        x = net.add(x, net.ffn(norm(net, x)))
    return net.done(net("Identity", x))


def random_substitutes(sublayers: tuple[Sublayer, ...]) -> dict[str, Substitute]:
    """Nothing, a constant, a matrix and a product of two matrices, in turn."""
    rng = np.random.default_rng(0)

    def made(width: int, kind: int) -> Substitute:
        shapes = [(), (), ((width, width),), ((width, 2), (2, width))][kind]
        factors = tuple(rng.standard_normal(shape) * width**-0.5 for shape in shapes)
        return Substitute(factors, rng.standard_normal(width) if kind else None)

    return {each.name: made(each.width, position % 4) for position, each in enumerate(sublayers)}


def masked(model: Model, sublayers: tuple[Sublayer, ...], chosen: dict[str, Substitute]) -> Model:
    """The dense graph in which every chosen branch is still computed, times zero, plus its substitute."""
    proto = model.copy_proto()
    nodes = list(proto.graph.node)
    added: dict[int, list[onnx.NodeProto]] = {}
    for each in (each for each in sublayers if each.name in chosen):
        stand_in, current = chosen[each.name], each.start
        constants = {"zero": np.zeros(()), "bias": np.zeros(each.width) if stand_in.bias is None else stand_in.bias}
        constants |= {f"factor{number}": factor for number, factor in enumerate(stand_in.factors)}
        for key, array in constants.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, each.dtype), f"{each.name}.{key}"))
        new = [onnx.helper.make_node("Mul", [each.end, f"{each.name}.zero"], [f"{each.name}.off"])]
        for number in range(len(stand_in.factors)):
            new.append(onnx.helper.make_node("MatMul", [current, f"{each.name}.factor{number}"], [f"{each.name}.{number}"]))
            current = f"{each.name}.{number}"
        parts = [f"{each.name}.off", f"{each.name}.bias", *([current] if stand_in.factors else [])]
        new.append(onnx.helper.make_node("Sum", parts, [f"{each.name}.sum"]))
        join = nodes[each.join.index]
        join.input[list(join.input).index(each.end)] = f"{each.name}.sum"
        added[each.join.index] = new
    ordered = [node for index, old in enumerate(nodes) for node in (*added.get(index, ()), old)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return model.with_proto(proto)


@pytest.mark.parametrize("name", ["bert-eager-ts17", "vit-sdpa-do23", "gpt2-sdpa-ts17", "llama-eager-do23"])
def test_a_substituted_model_equals_the_dense_one_with_its_branches_times_zero(name: str) -> None:
    model, sublayers = known(str(zoo.path(name)))
    assert len(sublayers) >= 4
    chosen = random_substitutes(sublayers)
    small = substitute(model, sublayers, chosen)
    for got, want in zip(outputs(small), outputs(masked(model, sublayers, chosen)), strict=True):
        assert np.abs(got - want).max() <= 1e-4 * max(np.abs(want).max(), 1)
    assert not {each.end for each in sublayers} & set(GraphView(small).producer)


def test_branches_that_normalise_first_start_behind_their_norm() -> None:
    model, sublayers = known(pre_norm(2))
    makers = [GraphView(model).producer[each.start].op for each in sublayers]
    assert makers == ["LayerNormalization"] * 4
    assert len({each.stream for each in sublayers}) == 4


def test_branches_whose_sum_is_normalised_start_at_the_norm_before_them() -> None:
    net = Net()
    x = norm(net, "x")
    for _ in range(2):
        x = norm(net, net.add(x, net.attention(x)))
        x = norm(net, net.add(x, net.ffn(x)))
    _, sublayers = known(net.done(x))
    assert len(sublayers) == 4
    assert all(each.start == each.stream for each in sublayers)


def test_a_linear_branch_is_replaced_by_its_own_map_without_any_change() -> None:
    net = Net()
    model, (sublayer,) = known(net.done(net("Tanh", net.add("x", net.linear(net.linear(norm(net, "x")))))))
    before, start, end = outputs(model, (sublayer.start, sublayer.end))
    rows = np.concatenate([start.reshape(-1, WIDTH), np.ones((start[..., 0].size, 1))], axis=1)
    found = np.linalg.lstsq(rows, end.reshape(-1, WIDTH), rcond=None)[0]
    small = substitute(model, (sublayer,), {sublayer.name: Substitute((found[:-1],), found[-1])})
    (after,) = outputs(small)
    assert np.abs(before - after).max() < 1e-4
    assert sum(node.op_type in ("MatMul", "Gemm") for node in small.proto.graph.node) == 1


def test_without_all_branches_the_stream_leaves_as_it_came() -> None:
    model, sublayers = known(pre_norm(2))
    bare = substitute(model, sublayers, {each.name: Substitute() for each in sublayers})
    (got,) = outputs(bare)
    assert np.array_equal(got, synthetic_feeds(model)["x"])
    assert {node.op_type for node in bare.proto.graph.node} == {"Identity"}


def test_sums_inside_of_a_branch_are_no_sublayers() -> None:
    net = Net()
    y = norm(net, "x")
    gate = net.add(net("Mul", y, net.weight(WIDTH)), net("Mul", net("Tanh", y), net.weight(WIDTH)))
    _, sublayers = known(net.done(net("Identity", net.add("x", net.linear(gate)))))
    assert [each.stream for each in sublayers] == ["x"]


def test_a_branch_that_reads_another_feature_stays() -> None:
    net = Net()
    other = net.input("other", ["batch", "seq", WIDTH])
    _, sublayers = known(net.done(net("Identity", net.add("x", net.linear(net("Mul", norm(net, "x"), other))))))
    assert not sublayers


def test_a_branch_of_which_an_output_tells_stays() -> None:
    net = Net()
    hidden = net.linear(norm(net, "x"))
    _, sublayers = known(net.done(net("Identity", net.add("x", net.linear(net("Tanh", hidden)))), hidden))
    assert not sublayers
