"""A graph that is not the network is never written, and a network that does not fit is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onnxprune
from onnxprune.errors import GateError, InputError, OnnxPruneError
from onnxprune.export import exporters
from onnxprune.export.folder import open_folder
from onnxprune.export.network import load_network
from onnxprune.export.parity import compare
from onnxprune.export.signature import Case, made_up, proof_cases
from onnxprune.export.tasks import TASKS, choose_task
from onnxprune.graph.model import Model
from tests.cli.cases import contents
from tests.export import folders

Folder = Callable[[str], Path]


def swap(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Model]) -> None:
    """Other functions under the names of exporters."""
    table = {name: (functions.get(name, function), opset) for name, (function, opset) in exporters.EXPORTERS.items()}
    monkeypatch.setattr(exporters, "EXPORTERS", table)


def slightly_wrong(*words: Any) -> Model:
    """A graph with one weight matrix one per cent too large."""
    model = exporters.export_torchscript(*words)
    name = next(name for name in model.weights if "intermediate" in name or "MatMul" in name)
    return replace(model, weights={**model.weights, name: model.weights[name] * np.float32(1.01)})


def failing(*words: Any) -> Model:
    raise RuntimeError("Failed to export the model.\nNext steps: ...") from ValueError("operator aten::unheard_of is not known\nat ...")


def test_a_graph_that_differs_is_not_written(model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model("classifier")
    (tmp_path / "model.onnx").write_text("an older file")
    data, before = folders.write_csv(tmp_path / "train.csv"), contents(tmp_path)
    swap(monkeypatch, torchscript=slightly_wrong)
    with pytest.raises(GateError, match=r"torchscript: logits differs by .* nothing was written") as caught:
        onnxprune.export_model(folder, tmp_path / "model.onnx", exporter="torchscript", calib_from=data)
    assert contents(tmp_path) == {**before, "train.csv": contents(tmp_path)["train.csv"]}
    assert caught.value.record is not None
    parity = caught.value.record["attempts"][0]["parity"]
    assert not parity["holds"]
    assert max(case["relative_error"] for case in parity["cases"]) > 1e-4


@pytest.mark.parametrize("wrong", [slightly_wrong, failing])
def test_one_exporter_that_fails_leaves_the_other(model: Folder, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Model]) -> None:
    swap(monkeypatch, dynamo=wrong)
    result = onnxprune.export_model(model("classifier"))
    assert (result.exporter, result.race) == ("torchscript", None)
    assert [attempt.usable for attempt in result.attempts] == [False, True]
    assert result.attempts[0].failure
    assert "\n" not in result.attempts[0].failure


def test_all_exporters_failing_is_an_input_error_with_their_reasons(model: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    swap(monkeypatch, dynamo=failing, torchscript=failing)
    with pytest.raises(InputError, match=r"dynamo: operator aten::unheard_of is not known; torchscript: operator"):
        onnxprune.export_model(model("classifier"))


def test_inputs_merged_by_an_exporter_are_noticed(model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def aliased(network: Any, feeds: Any) -> tuple[torch.Tensor, ...]:
        return (torch.ones(2, 16, dtype=torch.int64),) * len(network.names)

    monkeypatch.setattr(exporters, "tensors", aliased)
    with pytest.raises(OnnxPruneError, match="nothing was written"):
        onnxprune.export_model(model("classifier"), tmp_path / "model.onnx", exporter="dynamo")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("kind", ["classifier", "vit", "llama"])
def test_made_up_inputs_are_distinct_and_proofs_vary_what_is_dynamic(model: Folder, kind: str) -> None:
    folder = open_folder(model(kind))
    _, signature = load_network(folder, choose_task(folder), cache=kind == "llama")
    feeds = made_up(signature, Case(2, 4, 3))
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(feeds.values(), 2))
    cases = proof_cases(signature)
    assert {1, 2, 3} == {case.batch for case in cases}
    if kind != "vit":
        assert len({case.tokens for case in cases}) >= 3
        masks = [made_up(signature, case)["attention_mask"] for case in cases]
        assert any((mask == 0).any() for mask in masks)
        assert all(mask.any(axis=1).all() for mask in masks)
    if kind == "llama":
        assert {0, 3, 6, 9} == {case.past for case in cases}


def test_a_graph_that_ignores_the_mask_is_noticed(model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case without padding agrees, those with padding do not."""

    class Blind(torch.nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.inner, self.names, self.model = network, network.names, network.model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> Any:
            return self.inner(ids, torch.ones_like(mask) + 0 * mask, types)

    made: list[Model] = []

    def blind(network: Any, *words: Any) -> Model:
        made.append(exporters.export_torchscript(Blind(network).eval(), *words))  # type: ignore[arg-type]
        return made[0]

    swap(monkeypatch, torchscript=blind)
    with pytest.raises(GateError) as caught:
        onnxprune.export_model(model("classifier"), exporter="torchscript")
    assert caught.value.record is not None
    cases = caught.value.record["attempts"][0]["parity"]["cases"]
    assert [case["relative_error"] > 1e-4 for case in cases] == [case["padded"] for case in cases]


def test_parity_of_shapes_and_numbers(model: Folder) -> None:
    result = onnxprune.export_model(model("vit"), exporter="torchscript")
    from onnxprune.export.parity import Proof
    from onnxprune.runtime.session import open_session, run

    feeds = {"pixel_values": np.ones((2, 3, folders.IMAGE, folders.IMAGE), np.float32)}
    (right,) = run(open_session(result.model), feeds)
    changes = [right, right + np.float32(5e-5) * np.abs(right).max(), right[:1], np.full_like(right, np.nan)]
    found = compare(result.model, [Proof(Case(2), feeds, [expected]) for expected in changes])
    assert found.errors[0] == 0
    assert found.errors[1] == pytest.approx(5e-5, rel=0.1)
    assert found.errors[2] == float("inf")
    assert not found.errors[3] <= 1e-4
    assert not found.holds


# --- networks that do not fit ------------------------------------------------------------------------------------------------------


def test_a_head_that_was_never_trained_is_refused(model: Folder) -> None:
    with pytest.raises(InputError, match=r"no weights for .*classifier.* it was saved as BertModel and does not fit"):
        onnxprune.export_model(model("encoder"), task="sequence-classification")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classifier", {"cache": True}, "--task sequence-classification has none"),
        ("classifier", {"exporter": "torchscript", "opset": 20}, "TorchScript writes opset 17"),
        ("classifier", {"opset": 12}, "--opset 12 is too old"),
        ("classifier", {"exporter": "tf"}, "unknown exporter 'tf'; known: auto, dynamo, torchscript"),
        ("vit", {"task": "embedding"}, "reads images; --task embedding is for text"),
        ("classifier", {"task": "image-classification"}, "transformers cannot load"),
    ],
)
def test_options_that_contradict_the_folder(model: Folder, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        onnxprune.export_model(model(kind), **options)


def test_code_in_the_folder_is_never_run(model: Folder, tmp_path: Path) -> None:
    folder = model("classifier")
    (folder / "modeling_own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForSequenceClassification": "modeling_own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="brings its own code, which is not run"):
        onnxprune.export_model(folder)
    assert not (tmp_path / "ran").exists()


def test_files_of_the_folder_are_never_overwritten(model: Folder) -> None:
    folder = model("classifier")
    with pytest.raises(InputError, match="is an input file of this run"):
        onnxprune.export_model(folder, folder / "model.safetensors")


def test_half_precision_weights_become_float32(model: Folder) -> None:
    from transformers import BertForSequenceClassification

    folder = model("classifier")
    BertForSequenceClassification.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    result = onnxprune.export_model(folder, exporter="torchscript")
    assert result.parity.holds
    assert {array.dtype for array in result.model.weights.values() if array.dtype.kind == "f"} == {np.dtype(np.float32)}


def test_positions_behind_a_padding_index_are_not_counted(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    sizes = {**folders.TEXT, "max_position_embeddings": 42, "pad_token_id": 1, "type_vocab_size": 1}
    RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path)
    _, signature = load_network(open_folder(tmp_path), TASKS["encoder"])
    assert (signature.positions, signature.pad, signature.names) == (40, 1, ("input_ids", "attention_mask"))
    assert onnxprune.export_model(tmp_path, exporter="torchscript").parity.holds


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_embeddings_are_pooled_as_the_folder_says_and_have_length_one(model: Folder, mode: str) -> None:
    folder = model("embedding")
    folders.save_pooling(folder, mode)
    result = onnxprune.export_model(folder, exporter="torchscript")
    states = onnxprune.export_model(folder, task="encoder", exporter="torchscript")
    from onnxprune.runtime.session import open_session, run

    _, signature = load_network(open_folder(folder), TASKS["encoder"])
    feeds = made_up(signature, Case(3, 8, padded=True))
    (hidden,) = run(open_session(states.model), feeds)
    mask = feeds["attention_mask"][:, :, None]
    pooled = hidden[:, 0] if mode == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    (found,) = run(open_session(result.model), feeds)
    np.testing.assert_allclose(found, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-5)
