"""Lists of token ids, and the special ones that the files beside a model name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration.vocabulary import read_ids, special_ids
from onnxprune.errors import InputError


@pytest.mark.parametrize(("name", "content"), [("ids.txt", "7 3,\n3 12"), ("ids.json", "[12, 3, 7]")])
def test_lists_of_ids_in_text_and_json(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    np.testing.assert_array_equal(read_ids(tmp_path / name), [3, 7, 12])


def test_all_arrays_of_an_npz_count(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", a=np.array([[5, 1]]), b=np.array([9], np.int32))
    np.testing.assert_array_equal(read_ids(tmp_path / "ids.npz"), [1, 5, 9])


@pytest.mark.parametrize(
    ("name", "content"),
    [("ids.txt", "one two"), ("ids.txt", ""), ("ids.txt", "4 -1"), ("ids.json", "{"), ("ids.json", '{"a": 1}'), ("ids.json", "[1.5]")],
)
def test_what_is_no_list_of_ids_is_refused_with_what_was_wanted(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"no list of ids.*wanted whole numbers"):
        read_ids(tmp_path / name)


def test_a_missing_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="list of ids not found"):
        read_ids(tmp_path / "ids.txt")


WORDPIECE = {
    "model": {"type": "WordPiece", "vocab": {"[UNK]": 4, "a": 9}, "unk_token": "[UNK]"},
    "added_tokens": [{"id": 1, "content": "[MASK]"}],
}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["<s>", 0.0], ["<pad>", 0.0], ["x", -1.0]], "unk_id": 2}, "added_tokens": []}


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"tokenizer.json": WORDPIECE}, {4, 1}),
        ({"tokenizer.json": UNIGRAM, "special_tokens_map.json": {"pad_token": {"content": "<pad>"}}}, {1, 2}),
        ({"config.json": {"pad_token_id": 3, "eos_token_id": [5, 6], "decoder": {"bos_token_id": 8}, "vocab_size": 99}}, {3, 5, 6, 8}),
        ({"vocab.txt": "[PAD]\nword\n[CLS]\n", "tokenizer_config.json": {"cls_token": "[CLS]", "pad_token": "[PAD]"}}, {0, 2}),
        ({"config.json": [1], "tokenizer.json": "damaged"}, set()),
        ({}, set()),
    ],
)
def test_special_ids_of_the_files_beside_a_model(tmp_path: Path, files: dict[str, Any], ids: set[int]) -> None:
    (tmp_path / "onnx").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content if name == "vocab.txt" else json.dumps(content))
    assert special_ids(tmp_path / "model.onnx") == ids
    assert special_ids(tmp_path / "onnx" / "model.onnx") == ids


def test_a_model_without_a_file_has_no_special_ids() -> None:
    assert special_ids(None) == frozenset()
