"""From a folder to a pruned model: export, compare, write data, prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import onnxprune
from onnxprune.export import exporters
from onnxprune.export.job import ExportResult
from tests.export import folders

Folder = Callable[[str], Path]
QUICK: dict[str, Any] = {"target_macs": "55%", "rounds": 1, "importance": "magnitude", "finishing": False, "bench_seconds": 0}


def round_trip(folder: Path, data: Path, **options: Any) -> tuple[ExportResult, onnxprune.PruneResult]:
    output = folder.parent / "model.onnx"
    result = onnxprune.export_model(folder, output, calib_from=data, **options)
    assert result.parity.worst <= 1e-4
    assert (result.output, result.calibration) == (output, folder.parent / "model.calib.npz")
    return result, onnxprune.prune(output, **QUICK)


def text_file(folder: Path) -> Path:
    path = folder / "texts.txt"
    path.write_text("\n".join(folders.texts()))
    return path


def test_a_classifier_with_labels(model: Folder, tmp_path: Path) -> None:
    data = folders.write_csv(tmp_path / "train.csv")
    result, pruned = round_trip(model("classifier"), data, label_column="mood", exporter="torchscript")
    assert result.task == "sequence-classification"
    assert result.model.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert pruned.comparison is not None
    assert pruned.comparison.accuracy_after is not None  # labels were there to judge by
    assert pruned.record["output"]["parameters"] < result.model.parameters


def test_an_embedding_with_both_exporters(model: Folder, tmp_path: Path) -> None:
    result, pruned = round_trip(model("embedding"), text_file(tmp_path))
    assert [attempt.usable for attempt in result.attempts] == [True, True]
    assert result.race is not None
    assert set(result.race.milliseconds) == {"dynamo", "torchscript"}
    assert result.exporter == result.race.winner
    assert result.model.output_names == ("sentence_embedding",)
    assert pruned.comparison is not None
    assert pruned.comparison.cosine is not None  # judged as a vector, not as classes


def test_an_image_classifier_with_folders_as_labels(model: Folder, tmp_path: Path) -> None:
    result, pruned = round_trip(model("vit"), folders.write_images(tmp_path / "images"), exporter="torchscript")
    assert result.calibration_shapes == {"pixel_values": (24, 3, folders.IMAGE, folders.IMAGE), "labels": (24,)}
    assert pruned.comparison is not None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
def test_a_decoder(model: Folder, tmp_path: Path, kind: str, cache: bool) -> None:
    result, pruned = round_trip(model(kind), text_file(tmp_path), exporter="torchscript", cache=cache)
    assert result.task == "causal-lm"
    heads = 4 if kind == "gpt2" else 2
    past = [name for name in result.model.input_names if name.startswith("past_key_values.")]
    assert past == [f"past_key_values.{layer}.{word}" for layer in range(2) for word in ("key", "value")] * cache
    assert [name for name in result.model.output_names if name != "logits"] == [name.replace("past_key_values", "present") for name in past]
    if cache:
        assert result.calibration_shapes["past_key_values.0.key"] == (60, heads, 0, 8)
    assert sum(len(kept) for kept in pruned.plan.kept.values()) < sum(pruned.plan.units.values())


def test_a_pruned_decoder_goes_on_from_its_own_cache(model: Folder, tmp_path: Path) -> None:
    """Tokens one by one through the cache give the logits of all tokens at once."""
    _, pruned = round_trip(model("llama"), text_file(tmp_path), exporter="torchscript", cache=True)
    assert pruned.model is not None
    session = onnxruntime.InferenceSession(pruned.model.to_proto().SerializeToString())
    ids = np.random.default_rng(0).integers(4, folders.VOCABULARY, (2, 6))
    caches = session.get_inputs()[2:]
    names = [item.name for item in caches]

    def step(tokens: np.ndarray, past: list[np.ndarray]) -> list[np.ndarray]:
        mask = np.ones((2, past[0].shape[2] + tokens.shape[1]), np.int64)
        feeds = {"input_ids": tokens, "attention_mask": mask, **dict(zip(names, past, strict=True))}
        return list(session.run(None, feeds))

    # Heads that went are not in the cache either.
    empty = [np.zeros((2, item.shape[1], 0, 8), np.float32) for item in caches]
    whole, *_ = step(ids, empty)
    past, parts = empty, []
    for token in range(6):
        logits, *past = step(ids[:, token : token + 1], past)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "task", "outputs"),
    [
        ("tokens", "token-classification", ("logits",)),
        ("answers", "question-answering", ("start_logits", "end_logits")),
        ("encoder", "encoder", ("last_hidden_state",)),
    ],
)
def test_tasks_of_every_token(model: Folder, kind: str, task: str, outputs: tuple[str, ...]) -> None:
    result = onnxprune.export_model(model(kind), exporter="torchscript")
    assert (result.task, result.model.output_names, result.output) == (task, outputs, None)
    assert result.parity.holds
    session = onnxruntime.InferenceSession(result.model.to_proto().SerializeToString())
    assert all(output.shape[:2] == ["batch", "tokens"] for output in session.get_outputs())


def test_the_size_of_images_is_that_of_the_vision_half(model: Folder) -> None:
    result = onnxprune.export_model(model("siglip"), exporter="torchscript")
    assert result.parity.holds
    assert result.task == "image-classification"


def test_experts_are_written_in_the_form_that_exporters_know(model: Folder) -> None:
    result = onnxprune.export_model(model("experts"), exporter="torchscript")
    assert result.parity.holds
    assert result.task == "causal-lm"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "vit", "gpt2", "llama", "llama-cache"])
def test_dynamo_and_a_later_opset(model: Folder, tmp_path: Path, kind: str) -> None:
    base, _, cache = kind.partition("-")
    result = onnxprune.export_model(model(base), tmp_path / "model.onnx", exporter="dynamo", opset=20, cache=bool(cache))
    assert result.parity.worst <= 1e-4
    assert onnxprune.load(tmp_path / "model.onnx").opset() == 20
    assert str(Path(onnxprune.__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


@pytest.mark.slow
def test_weights_too_large_for_one_file_take_another(model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters, "LARGE_BYTES", 0)
    result = onnxprune.export_model(model("vit"), tmp_path / "model.onnx", exporter="dynamo", external_data=True)
    assert (tmp_path / "model.onnx.data").stat().st_size > 10_000
    feeds = {"pixel_values": np.ones((1, 3, folders.IMAGE, folders.IMAGE), np.float32)}
    (from_file,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, feeds)
    alone = onnxprune.export_model(model("vit"), exporter="dynamo").model  # its temporary files are gone
    (from_memory,) = onnxruntime.InferenceSession(alone.to_proto().SerializeToString()).run(None, feeds)
    np.testing.assert_array_equal(from_file, from_memory)
    assert result.model.parameters == alone.parameters


def test_the_same_folder_gives_the_same_bytes(model: Folder, tmp_path: Path) -> None:
    folder, data = model("classifier"), text_file(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        onnxprune.export_model(folder, tmp_path / name, exporter="torchscript", calib_from=data, samples=20)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    first, second = np.load(tmp_path / "a.calib.npz"), np.load(tmp_path / "b.calib.npz")
    assert all(np.array_equal(first[name], second[name]) for name in first.files)
