"""Outputs with a row for each token: what left is read as it was where it left, what merged as the token that it became part of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.errors import Refusal
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import synthetic_feeds, take_profile
from onnxprune.graph.token_axis import TokenAxis, token_axis
from onnxprune.graph.token_cut import cut_tokens, spelled_out, study_tokens
from onnxprune.graph.token_plan import POLICIES, CannotCut, Policy
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests.architectures import exports
from tests.graph.test_tokens import TWO_BLOCKS, _named, images, plan_of, prepared, random_weights, with_hidden_keys

ROWS_FOR_ALL = [("roberta", "do18-sdpa"), ("modernbert", "do23-eager"), ("whisper-encoder", "ts17-sdpa"), ("dinov3", "do18-sdpa")]


def close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize(("name", "variant"), ROWS_FOR_ALL)
def test_nothing_changes_while_all_tokens_stay(name: str, variant: str) -> None:
    model, _, axis = prepared(name, variant)
    assert axis.returned
    feeds = synthetic_feeds(model)
    want, done = run(open_session(model), feeds), []
    for policy in POLICIES:
        try:
            close(run(open_session(cut_tokens(model, plan_of(axis, 1.0, policy))), feeds), want)
        except CannotCut:
            continue
        done.append(policy)
        fewer = run(open_session(cut_tokens(model, plan_of(axis, 0.5, policy))), feeds)
        assert [array.shape for array in fewer] == [array.shape for array in want]
    assert {"drop", "threshold"} <= set(done)
    assert "package" not in done
    assert name != "whisper-encoder" or {"merge", "drop-merge", "static"} <= set(done)


def with_states_that_stay(model: Model, axis: TokenAxis) -> Model:
    """An input ``left.i`` [B, N] for each place: tokens that come back as they were there."""
    emitter = Emitter(model, take_profile(model), prefix="test")
    for node in emitter.view.nodes:
        emitter.nodes.append(node.proto)
        if axis.returned in node.outputs:
            now = node.proto.output[0] = emitter.fresh("now")
            for number, place in enumerate(axis.places):
                output = axis.returned if number == len(axis.places) - 1 else None
                now = emitter.op("Where", emitter.unsqueeze(f"left.{number}", 2), place.tensor, now, output=output)
    proto = emitter.proto
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(emitter.nodes)
    for number in range(len(axis.places)):
        proto.graph.input.append(onnx.helper.make_tensor_value_info(f"left.{number}", onnx.TensorProto.BOOL, ["b", "n"]))
    return emitter.model.with_proto(proto)


def texts(model: Model, lengths: tuple[int, ...], longest: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    ids = rng.integers(5, 30, mask.shape)
    feeds = {"input_ids": np.where(mask, ids, 1), "attention_mask": mask, "token_type_ids": 0 * mask}
    return {name: array for name, array in feeds.items() if name in model.input_names}


@pytest.mark.parametrize("policy", ["drop", "threshold"])
@pytest.mark.parametrize(("name", "variant"), [("roberta", "do18-sdpa"), ("dinov3", "do18-sdpa")])
def test_dropped_tokens_come_back_as_they_were(name: str, variant: str, policy: Policy) -> None:
    """Against all tokens, with those that left hidden from attention, and their features from where they left in front of the head."""
    model, profile, axis = prepared(name, variant)
    feeds = texts(model, (17, 24, 9), 24) if name == "roberta" else images(model)
    whole = with_hidden_keys(with_states_that_stay(model, axis), profile, axis)
    session = open_session(whole)
    real = feeds["attention_mask"] > 0 if "attention_mask" in feeds else np.ones((3, axis.count or 0), bool)
    there = real.copy()
    hidden, left = ([np.zeros(real.shape, kind) for _ in axis.places] for kind in (np.float32, bool))
    for number, place in enumerate(axis.places):
        inputs = {**feeds, **_named(hidden), **{f"left.{i}": array for i, array in enumerate(left)}}
        maps = dict(zip([item.name for item in session.get_outputs()], run(session, inputs), strict=True))[place.softmax.outputs[0]]
        maps = maps.reshape(len(real), -1, *maps.shape[-2:])
        for row in range(len(real)):
            queries = np.arange(real.shape[1]) < axis.leading if axis.leading else there[row]
            score = maps[row][:, queries].mean((0, 1))
            first = axis.leading
            if policy == "threshold":
                keep = int((score[first:] >= 0.99 * score[there[row]].mean())[there[row, first:]].sum())
            else:
                keep = int(np.ceil(0.6 * (real[row].sum() - first)))
            score[~there[row]] = -1
            gone = np.argsort(-score[first:])[keep:] + first
            left[number][row, gone] = there[row, gone]
            there[row, gone] = False
        assert left[number].any() or (number and policy == "drop")
        for later in range(number, len(axis.places)):
            hidden[later] = np.where(there, 0, -1e4).astype(np.float32)
    inputs = {**feeds, **_named(hidden), **{f"left.{i}": array for i, array in enumerate(left)}}
    (want,), (got,) = run(session, inputs)[:1], run(open_session(cut_tokens(model, plan_of(axis, 0.6, policy))), feeds)[:1]
    np.testing.assert_allclose(got[real], want[real], atol=1e-4 * np.abs(want).max())


def heads(folder: Path) -> list[Path]:
    """Small random networks with a label for each token, with a start and an end of an answer, and with hidden states beside a pooler."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, BertModel

    from onnxprune.export.extra import quiet
    from onnxprune.export.network import Network
    from tests.architectures.entry import randomise

    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        num_labels=2,
    )
    torch.manual_seed(0)
    paths = []
    for kind, outputs in (
        (BertForTokenClassification, ["logits"]),
        (BertForQuestionAnswering, ["start_logits", "end_logits"]),
        (BertModel, ["last_hidden_state", "pooler_output"]),
    ):
        names = ["input_ids", "attention_mask"]
        inside: Any = kind(config)
        randomise(inside)
        network = Network(inside, tuple(names), tuple(outputs)).eval()
        inputs = (torch.randint(5, 30, (2, 9)), torch.ones(2, 9, dtype=torch.int64))
        axes = {name: {0: "batch", 1: "tokens"} for name in [*names, *outputs] if name != "pooler_output"}
        paths.append(folder / f"{kind.__name__}.onnx")
        options: dict[str, Any] = {"input_names": names, "output_names": outputs, "opset_version": 17, "dynamic_axes": axes}
        with quiet():
            torch.onnx.export(network, inputs, str(paths[-1]), dynamo=False, **options)
    return paths


def test_labels_answers_and_hidden_states_are_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    lengths = (9, 24, 17)
    for path in heads(tmp_path):
        model = canonicalise(load(path))[0]
        axis = study_tokens(model)
        assert isinstance(axis, TokenAxis)
        assert axis.leading == ("pooler_output" in model.output_names)
        feeds = texts(model, lengths, 24)
        dense = run(open_session(model), feeds)
        for policy in ("drop", "threshold"):
            session = open_session(cut_tokens(model, plan_of(axis, 0.5, policy)))
            together = run(session, feeds)
            for row, length in enumerate(lengths):
                alone = run(session, {key: value[row : row + 1, :length] for key, value in feeds.items()})
                for name, want, got, before in zip(model.output_names, alone, together, dense, strict=True):
                    here = got[row : row + 1, :length] if name != "pooler_output" else got[row : row + 1]
                    np.testing.assert_allclose(here, want, atol=1e-4 * np.abs(want).max(), err_msg=f"{path.stem} {policy}")
                    assert np.abs(got - before).max() > 1e-3 * np.abs(before).max()
        feeds = texts(model, (24, 24), 24)
        close(run(open_session(cut_tokens(model, plan_of(axis, 1.0))), feeds), run(open_session(model), feeds))


def test_a_grid_behind_the_last_block_is_whole_again(tmp_path: Path) -> None:
    """Patches become an image, by a convolution."""
    import torch
    from transformers import ViTConfig, ViTForMaskedImageModeling

    from onnxprune.export.extra import quiet
    from onnxprune.export.network import Network

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    inside: Any = ViTForMaskedImageModeling(ViTConfig(image_size=16, patch_size=4, encoder_stride=4, **sizes))
    network, pixels = Network(inside, ("pixel_values",), ("reconstruction",)).eval(), torch.randn(2, 3, 16, 16)
    with quiet():
        torch.onnx.export(
            network,
            (pixels,),
            str(tmp_path / "m.onnx"),
            dynamo=False,
            input_names=["pixel_values"],
            output_names=["image"],
            opset_version=17,
        )
    model = canonicalise(load(tmp_path / "m.onnx"))[0]
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    assert (axis.leading, axis.count, len(axis.places)) == (1, 17, 1)
    feeds = {"pixel_values": pixels.numpy()}
    dense = run(open_session(model), feeds)
    close(run(open_session(cut_tokens(model, plan_of(axis, 1.0))), feeds), dense)
    (fewer,) = run(open_session(cut_tokens(model, plan_of(axis, 0.5, "merge"))), feeds)
    assert fewer.shape == dense[0].shape
    assert np.abs(fewer - dense[0]).max() > 1e-3 * np.abs(dense[0]).max()


def two_blocks_with_rows() -> Model:
    """The last sum is read by a head for each token, without a mean."""
    text = TWO_BLOCKS.replace("  m = ReduceMean <keepdims = 0> (h1, one)\n", "").replace("MatMul (m, w)", "MatMul (h1, w)")
    proto = onnx.parser.parse_model(text.replace("float[b, 3] y", "float[b, n, 3] y"))
    for name, array in random_weights().items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    given = [value for value in proto.graph.input if value.name == "x"]
    del proto.graph.input[:]
    proto.graph.input.extend(given)
    return canonicalise(load(proto))[0]


@pytest.mark.parametrize("policy", ["merge", "drop-merge"])
def test_merged_tokens_come_back_as_what_they_became(policy: Policy) -> None:
    """Eight tokens, or nine of which one belongs to no pair; written down once more in numpy."""
    model = two_blocks_with_rows()
    plain = spelled_out(model)
    axis = token_axis(GraphView(plain), take_profile(plain))
    assert isinstance(axis, TokenAxis)
    assert len(axis.places) == 1
    session = open_session(cut_tokens(model, plan_of(axis, 0.6, policy)))
    for seed, count in enumerate((8, 9)):
        x = np.random.default_rng(seed).standard_normal((2, count, 6)).astype(np.float32)
        want = np.stack([_merged_by_hand(row, 0.6, drop=policy == "drop-merge") for row in x])
        np.testing.assert_allclose(run(session, {"x": x})[0], want, rtol=1e-3, atol=1e-5)


def _merged_by_hand(x: np.ndarray, share: float, drop: bool) -> np.ndarray:
    q, k, v, w = random_weights().values()
    count = len(x)

    def block(h: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.exp((h @ q) @ (h @ k).T) * sizes
        attention = scores / scores.sum(1, keepdims=True)
        return h + attention @ (h @ v), attention

    h, attention = block(x, np.ones(count))
    stay = int(np.ceil(count * (1 + share) / 2)) if drop else count
    order = np.argsort(-attention.mean(0), kind="stable")[:stay] if drop else np.arange(count)
    groups = [[int(token)] for token in order]
    there = h[order]
    unit = there / np.linalg.norm(there, axis=1, keepdims=True)
    likeness = unit[::2] @ unit[1::2].T
    joins = stay - max(int(np.ceil(count * share)), stay // 2)
    for pair in np.argsort(-likeness.max(1))[:joins]:
        groups[2 * likeness[pair].argmax() + 1] += groups[2 * pair]
        groups[2 * pair] = []
    groups = [group for group in groups if group]
    merged, _ = block(np.stack([h[group].mean(0) for group in groups]), np.array([len(group) for group in groups]))
    back = h.copy()
    for group, features in zip(groups, merged, strict=True):
        back[group] = features
    return back @ w


@pytest.mark.parametrize(("policy", "repeats"), [("merge", 2), ("drop-merge", 8)])
def test_tokens_that_are_the_same_lose_nothing_by_becoming_one(policy: Policy, repeats: int) -> None:
    model = two_blocks_with_rows()
    axis = study_tokens(model)
    assert isinstance(axis, TokenAxis)
    x = np.repeat(np.random.default_rng(1).standard_normal((2, 8 // repeats, 6)).astype(np.float32), repeats, axis=1)
    (want,), (got,) = run(open_session(model), {"x": x}), run(open_session(cut_tokens(model, plan_of(axis, 0.75, policy))), {"x": x})
    gone = 1 if policy == "drop-merge" else 0  # what left has not been through the last block
    assert (np.abs(got - want).max(2) > 1e-4).sum() <= 2 * gone


def test_which_tokens_leave_must_not_tell_of_later_ones() -> None:
    found = study_tokens(canonicalise(load(exports.path("gpt2", "do18-sdpa")))[0])
    assert isinstance(found, Refusal)
    assert found.code == "OP703"
    assert "later ones" in found.reason
