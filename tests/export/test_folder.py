"""What is looked at before anything is loaded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnxprune.errors import InputError
from onnxprune.export.folder import open_folder
from onnxprune.export.pooling import read_pooling
from onnxprune.export.tasks import TASKS, choose_task
from tests.export.folders import save_pooling


def fill(folder: Path, weights: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **config}))
    if weights:
        (folder / weights).touch()
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_weights_that_could_run_code_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"only {name}; .* run code .*save_pretrained"):
        open_folder(fill(tmp_path, name))


def test_safetensors_are_taken_beside_other_weights(tmp_path: Path) -> None:
    (fill(tmp_path) / "pytorch_model.bin").touch()
    assert open_folder(tmp_path).path == tmp_path


def test_every_part_of_split_weights_must_be_there(tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"1 files that are not there, such as b\.safetensors"):
        open_folder(folder)
    (folder / "b.safetensors").touch()
    assert open_folder(folder).path == folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "are quantized; export the float model"),
        ({"is_encoder_decoder": True, "model_type": "t5"}, r"encoder-decoder model \(t5\)"),
    ],
)
def test_models_that_cannot_be_exported_are_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_folder(fill(tmp_path, **config))


def test_adapters_missing_files_and_hub_names_are_refused(tmp_path: Path) -> None:
    (fill(tmp_path / "lora") / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter; merge it"):
        open_folder(tmp_path / "lora")
    with pytest.raises(InputError, match="no weights in"):
        open_folder(fill(tmp_path / "bare", ""))
    with pytest.raises(InputError, match=r"no config\.json in"):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="downloads nothing"):
        open_folder("somebody/some-model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "encoder"),
        ("RobertaForSequenceClassification", "sequence-classification"),
        ("DistilBertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("ViTForImageClassification", "image-classification"),
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
    ],
)
def test_the_class_saved_tells_the_task(tmp_path: Path, architecture: str, task: str) -> None:
    assert choose_task(open_folder(fill(tmp_path, architectures=[architecture]))).name == task


def test_an_encoder_of_sentence_transformers_is_an_embedding(tmp_path: Path) -> None:
    save_pooling(fill(tmp_path), "mean")
    assert choose_task(open_folder(tmp_path)).name == "embedding"
    assert choose_task(open_folder(tmp_path), "encoder").name == "encoder"


def test_a_class_that_tells_no_task_asks_for_one(tmp_path: Path) -> None:
    folder = open_folder(fill(tmp_path, architectures=["BertForMaskedLM"]))
    with pytest.raises(InputError, match="BertForMaskedLM, which tells no task; say it with --task: encoder"):
        choose_task(folder)
    with pytest.raises(InputError, match="did you mean 'embedding'"):
        choose_task(folder, "embeding")
    assert all(choose_task(folder, name).name == name for name in TASKS)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_pooling_is_read_in_both_forms(tmp_path: Path, mode: str) -> None:
    save_pooling(fill(tmp_path), mode)
    assert read_pooling(open_folder(tmp_path)) == mode
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    assert read_pooling(open_folder(tmp_path)) == mode


def test_pooling_is_the_mean_where_nothing_is_said(tmp_path: Path) -> None:
    assert read_pooling(open_folder(fill(tmp_path))) == "mean"


def test_other_poolings_and_later_layers_are_refused(tmp_path: Path) -> None:
    save_pooling(fill(tmp_path), "max")
    with pytest.raises(InputError, match="pooling by pooling_mode_max_tokens; mean and cls are known"):
        read_pooling(open_folder(tmp_path))
    save_pooling(tmp_path, "mean", ("Dense", "Normalize"))
    with pytest.raises(InputError, match="a module Dense, which is not exported"):
        read_pooling(open_folder(tmp_path))


def test_a_network_in_a_subfolder_is_found(tmp_path: Path) -> None:
    inner = fill(tmp_path / "0_Transformer")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = open_folder(tmp_path)
    assert (found.root, found.path) == (tmp_path, inner)
    assert inner / "config.json" in found.files()
