"""Which output is preserved, by which loss, and what its targets are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.calibration import Batch
from onnxprune.calibration.data import IGNORED_LABEL, CalibrationData
from onnxprune.calibration.objective import Objective, Targets, check_loss, choose_objective
from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from tests import zoo
from tests.graph.net import WIDTH, Net
from tests.graph.pruning import anatomy_of


@cache
def zoo_anatomy(name: str) -> Anatomy:
    return anatomy_of(load(zoo.path(name)))


@pytest.mark.parametrize("export", zoo.EXPORTS)
@pytest.mark.parametrize(
    ("architecture", "link", "token_level", "first_token"),
    [
        ("bert", "softmax", False, True),
        ("vit", "softmax", False, True),
        ("minilm", "identity", True, False),
        ("gpt2", "softmax", True, False),
        ("llama", "softmax", True, False),
    ],
)
def test_real_exports_get_the_loss_of_their_task(export: str, architecture: str, link: str, token_level: bool, first_token: bool) -> None:
    anatomy = zoo_anatomy(f"{architecture}-sdpa-{export}")
    objective = choose_objective(anatomy)
    assert objective.output == objective.tensor == zoo.OUTPUTS[architecture]
    assert (objective.link, objective.token_level, objective.first_token) == (link, token_level, first_token)
    shape = anatomy.profile.shape(objective.output)
    assert shape is not None
    assert objective.width == shape[-1]
    assert objective.why.startswith("the only output")


def two_outputs(first: str, second: str) -> Anatomy:
    net = Net()
    y = net.add("x", net.ffn("x"))
    model = net.done(net("Relu", y), net("MatMul", y, net.weight(WIDTH, WIDTH)))
    for node, name in zip(model.graph.node[-2:], (first, second), strict=True):
        node.output[0] = name
    for value, name in zip(model.graph.output, (first, second), strict=True):
        value.name = name
    return anatomy_of(model)


@pytest.mark.parametrize(
    ("names", "chosen", "link"),
    [
        (("last_hidden_state", "logits"), "logits", "softmax"),
        (("a", "sentence_embedding"), "sentence_embedding", "identity"),
        (("a", "b"), "a", "identity"),
    ],
)
def test_one_of_several_outputs_is_chosen_by_name(names: tuple[str, str], chosen: str, link: str) -> None:
    objective = choose_objective(two_outputs(*names))
    assert (objective.output, objective.link) == (chosen, link)
    assert "2 outputs" in objective.why


def test_the_user_may_choose_and_a_typing_error_is_answered() -> None:
    anatomy = two_outputs("first", "second")
    assert choose_objective(anatomy, "second").why.startswith("chosen by --output")
    with pytest.raises(InputError, match=r"no output 'secnd' \(did you mean 'second'\?\); it has first, second"):
        choose_objective(anatomy, "secnd")


def test_integer_labels_decide_what_the_name_leaves_open() -> None:
    anatomy = two_outputs("a", "b")
    assert choose_objective(anatomy, "a").link == "identity"
    assert choose_objective(anatomy, "a", labels=np.zeros(3, np.int64)).link == "softmax"
    assert choose_objective(anatomy, "a", labels=np.zeros(3, np.float32)).link == "identity"
    assert choose_objective(anatomy, "b").link == "softmax"


def test_a_final_softmax_is_seen_through() -> None:
    net = Net()
    scores = net.add("x", net.ffn("x"))
    objective = choose_objective(anatomy_of(net.done(net("Softmax", scores, axis=-1))))
    assert (objective.link, objective.tensor) == ("softmax", scores)
    assert objective.output != scores


def objective(link: str = "softmax", width: int = 4, token_level: bool = False) -> Objective:
    return Objective("y", "y", link, width, token_level, False, "because")  # type: ignore[arg-type]


def batch(rows: int, valid: int | None = None, mask: np.ndarray | None = None, labels: np.ndarray | None = None) -> Batch:
    return Batch({}, np.arange(rows), np.arange(rows) < (rows if valid is None else valid), mask, labels)


def targets(objective_: Objective, batches: list[Batch], outputs: list[np.ndarray], source: str = "sampled", seed: int = 0) -> Targets:
    result = Targets(objective_, batches, source, seed)  # type: ignore[arg-type]
    for output in outputs:
        result.add(output)
    return result


def test_sampled_labels_follow_the_dense_models_distribution() -> None:
    scores = np.log(np.tile([0.5, 0.3, 0.15, 0.05], (20_000, 1))).astype(np.float32)
    feeds = targets(objective(), [batch(20_000)], [scores]).feeds(0, 1)
    target = feeds["onnxprune.target"]
    assert np.array_equal(target.sum(axis=-1), np.ones(20_000))
    np.testing.assert_allclose(target.mean(axis=0), [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_draws_differ_by_round_and_batch_and_repeat_by_seed() -> None:
    scores = np.zeros((64, 4), np.float32)
    made = targets(objective(), [batch(64)] * 2, [scores] * 2)
    first = made.feeds(0, 1)["onnxprune.target"]
    assert np.array_equal(first, targets(objective(), [batch(64)] * 2, [scores] * 2).feeds(0, 1)["onnxprune.target"])
    for other in (made.feeds(0, 2), made.feeds(1, 1), targets(objective(), [batch(64)], [scores], seed=1).feeds(0, 1)):
        assert not np.array_equal(first, other["onnxprune.target"])


def test_vectors_are_displaced_by_their_own_spread() -> None:
    rng = np.random.default_rng(0)
    outputs = [(3 + 2 * rng.standard_normal((500, 8))).astype(np.float32) for _ in range(2)]
    made = targets(objective("identity", 8), [batch(500)] * 2, outputs)
    assert made.spread == pytest.approx(2.0, rel=0.05)
    moved = made.feeds(1, 1)["onnxprune.target"] - outputs[1]
    assert moved.std() == pytest.approx(2.0, rel=0.05)
    assert abs(moved.mean()) < 0.1


def test_filler_rows_and_padding_have_no_weight() -> None:
    scores = np.zeros((3, 5, 4), np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    weight = targets(objective(token_level=True), [batch(3, 2, mask)], [scores]).feeds(0, 1)["onnxprune.weight"]
    assert np.array_equal(weight, mask.astype(np.float32))
    weight = targets(objective(), [batch(3, 2)], [scores[:, 0]]).feeds(0, 1)["onnxprune.weight"]
    assert weight.tolist() == [1, 1, 0]


def test_labels_as_the_loss_ignore_what_is_marked() -> None:
    labels = np.array([2, IGNORED_LABEL, 0])
    feeds = targets(objective(), [batch(3, labels=labels)], [np.zeros((3, 4), np.float32)], "labels").feeds(0, 5)
    assert feeds["onnxprune.weight"].tolist() == [1, 0, 1]
    assert feeds["onnxprune.target"].argmax(-1)[[0, 2]].tolist() == [2, 0]


def test_labels_as_the_loss_must_be_there_and_fit() -> None:
    rows = {"x": np.zeros((4, 2), np.float32)}
    check_loss(objective(), CalibrationData(rows, None, "data"), "sampled")
    check_loss(objective(), CalibrationData(rows, np.array([0, 1, 2, 3]), "data"), "labels")
    with pytest.raises(InputError, match="needs a 'labels' array in data"):
        check_loss(objective(), CalibrationData(rows, None, "data"), "labels")
    with pytest.raises(InputError, match="taken for a vector"):
        check_loss(objective("identity"), CalibrationData(rows, np.zeros(4, np.int64), "data"), "labels")
    with pytest.raises(InputError):
        check_loss(objective(), CalibrationData(rows, np.array([0, 1, 2, 4]), "data"), "labels")


def test_an_echo_of_an_input_and_an_early_layer_are_not_what_is_preserved() -> None:
    model = load(zoo.path("minilm-sdpa-do18"))
    first = study(*canonicalise(model)).sites[0].consumers[0].output
    proto = model.copy_proto()
    proto.graph.node.append(helper.make_node("Identity", ["attention_mask"], ["echo"], name="echo"))
    final = proto.graph.output.pop()
    proto.graph.output.append(helper.make_tensor_value_info("echo", TensorProto.INT64, ["batch", "seq"]))
    proto.graph.output.append(helper.make_tensor_value_info(first, TensorProto.FLOAT, None))
    proto.graph.output.append(final)
    found = choose_objective(study(*canonicalise(model.with_proto(proto))))
    assert found.output == "last_hidden_state"
    assert "not looked at: echo" in found.why
