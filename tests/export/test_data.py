"""Texts and images of a user as calibration data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxprune
from onnxprune.errors import InputError
from onnxprune.export.data import Source, collect
from onnxprune.export.folder import open_folder
from onnxprune.export.network import load_network
from onnxprune.export.rows import read_rows
from onnxprune.export.tasks import choose_task
from tests.export import folders

Folder = Callable[[str], Path]


def arrays(folder: Path, path: Path, **options: Any) -> dict[str, np.ndarray]:
    found = open_folder(folder)
    task = choose_task(found)
    network, signature = load_network(found, task)
    return collect(Source(path, **options), found, task, signature, network.model.config)


# --- reading -----------------------------------------------------------------------------------------------------------------------


def test_lines_columns_and_objects_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one cat\n\n  \ntwo dogs\r\n")
    (tmp_path / "a.csv").write_text('id,text,kind\n1,"one, cat",x\n2,,y\n3,"two\ndogs",z\n')
    (tmp_path / "a.jsonl").write_text('{"text": "one cat", "kind": 4}\n\n{"text": "two dogs", "kind": "b"}\n')
    assert [row.texts for row in read_rows(tmp_path / "a.txt")] == [("one cat",), ("two dogs",)]
    rows = read_rows(tmp_path / "a.csv", label_column="kind")
    assert [(row.texts, row.label) for row in rows] == [(("one, cat",), "x"), (("two\ndogs",), "z")]
    assert [row.label for row in read_rows(tmp_path / "a.jsonl", ["text"], "kind")] == ["4", "b"]
    (tmp_path / "b.jsonl").write_text('"one cat"\n"two dogs"\n')
    assert len(read_rows(tmp_path / "b.jsonl")) == 2


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "id,txt\n1,cat\n", {}, r"line 2 has no column 'text'; did you mean 'txt'\?; there are 'id', 'txt'"),
        ("a.jsonl", '{"text": "cat"}\n{"text": \n', {}, "line 2 is not JSON"),
        ("a.jsonl", '{"text": 3}\n', {}, "column 'text' holds int"),
        ("a.jsonl", "[1]\n", {}, "line 1 holds list"),
        ("a.txt", "\n \n", {}, "holds no texts"),
        ("a.txt", "cat\n", {"label_column": "x"}, "has no columns"),
        ("a.parquet", "", {}, r"not understood as texts; wanted \.txt, \.csv, \.jsonl"),
        ("a.csv", "a,b\n1,2\n", {"columns": ["a", "b", "a"]}, "--column is given 3 times"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name, **options)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00cat")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_rows(tmp_path / "a.txt")


# --- texts -------------------------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_tokenizer_makes_padded_on_the_right(model: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\nthe old dog sleeps\n")
    found = arrays(model("classifier"), tmp_path / "a.txt")
    start, end, tokens = 2, 3, {word: index + 4 for index, word in enumerate(folders.WORDS)}
    words = [[start, *(tokens[word] for word in text.split()), end] for text in ("the cat", "the old dog sleeps")]
    assert found["input_ids"].tolist() == [words[0] + [0, 0], words[1]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert not found["token_type_ids"].any()
    assert {array.dtype for array in found.values()} == {np.dtype(np.int64)}


def test_two_columns_are_a_pair(model: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\nthe cat,sleeps\n")
    found = arrays(model("classifier"), tmp_path / "a.csv", columns=("q", "a"))
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_length_is_limited_by_the_tokenizer_or_by_hand(model: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(["cat"] * 60))
    folder = model("classifier")
    assert arrays(folder, tmp_path / "a.txt")["input_ids"].shape == (1, 24)
    assert arrays(folder, tmp_path / "a.txt", max_length=9)["input_ids"].shape == (1, 9)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    assert arrays(folder, tmp_path / "a.txt")["input_ids"].shape == (1, 12)
    with pytest.raises(InputError, match="--max-length 41 is out of range; the network takes 1 to 40 tokens"):
        arrays(folder, tmp_path / "a.txt", max_length=41)


def test_samples_are_chosen_from_the_whole_file(model: Folder, tmp_path: Path) -> None:
    folder = model("classifier")
    path = tmp_path / "sorted.csv"
    path.write_text("text,mood\n" + "".join(f"cat,{name}\n" for name in folders.CLASSES for _ in range(30)))
    found = arrays(folder, path, label_column="mood", samples=30)
    assert len(found["labels"]) == 30
    assert set(found["labels"].tolist()) == {0, 1, 2}
    assert np.array_equal(found["labels"], arrays(folder, path, label_column="mood", samples=30)["labels"])


def test_labels_are_numbers_or_names_of_the_model(model: Folder, tmp_path: Path) -> None:
    folder = model("classifier")
    (tmp_path / "a.csv").write_text("text,mood\ncat,odd\ndog,1\ntree,calm\n")
    assert arrays(folder, tmp_path / "a.csv", label_column="mood")["labels"].tolist() == [2, 1, 0]
    for wrong, message in (("louder", "did you mean 'loud'"), ("3", r"no class of the model \(0 to 2, or calm, loud, odd\)")):
        (tmp_path / "b.csv").write_text(f"text,mood\ncat,odd\ndog,{wrong}\n")
        with pytest.raises(InputError, match=rf"b\.csv line 3: the label '{wrong}' is no class of the model.*") as caught:
            arrays(folder, tmp_path / "b.csv", label_column="mood")
        assert caught.match(message)


def test_labels_per_row_need_a_classifier(model: Folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--task token-classification has not"):
        arrays(model("tokens"), folders.write_csv(tmp_path / "a.csv"), label_column="mood")


def test_a_tokenizer_that_is_missing_or_of_another_model_is_named(model: Folder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n")
    folder = model("classifier")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["cat"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"makes token 5000; the network knows {folders.VOCABULARY}"):
        arrays(folder, tmp_path / "a.txt")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer in"):
        arrays(folder, tmp_path / "a.txt")


# --- images ------------------------------------------------------------------------------------------------------------------------


def test_images_are_scaled_as_the_folder_says(model: Folder, tmp_path: Path) -> None:
    from PIL import Image

    place = tmp_path / "images"
    place.mkdir()
    Image.new("RGB", (40, 30), (255, 102, 0)).save(place / "a.png")
    Image.new("L", (9, 9), 51).save(place / "b.jpg")
    found = arrays(model("vit"), place)
    assert set(found) == {"pixel_values"}  # no subfolders, no labels
    assert found["pixel_values"].dtype == np.float32
    levels = np.array([[1, 0.4, 0], [0.2, 0.2, 0.2]])
    wanted = (levels - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    np.testing.assert_allclose(found["pixel_values"][:, :, 8, 8], wanted, atol=0.03)
    assert found["pixel_values"].shape == (2, 3, folders.IMAGE, folders.IMAGE)


def test_subfolders_are_classes_or_there_is_a_warning(model: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, place = model("vit"), folders.write_images(tmp_path / "images", 6)
    assert arrays(folder, place)["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    (place / "odd").rename(place / "2")
    assert sorted(arrays(folder, place)["labels"].tolist()) == [0, 0, 1, 1, 2, 2]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"odd"', '"odd/even"'))
    (place / "2").rename(place / "odd_even")
    assert sorted(arrays(folder, place)["labels"].tolist()) == [0, 0, 1, 1, 2, 2]
    assert not caplog.records
    (place / "odd_even").rename(place / "strange")
    assert "labels" not in arrays(folder, place)
    assert "the folder 'strange' is no class of the model (0 to 2, or calm, loud, odd/even)" in caplog.text


def test_damaged_images_and_missing_settings_are_named(model: Folder, tmp_path: Path) -> None:
    folder, place = model("vit"), folders.write_images(tmp_path / "images", 3)
    (place / "calm" / "000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000\.png is not a readable image"):
        arrays(folder, place)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        arrays(folder, place)
    with pytest.raises(InputError, match="no images in"):
        arrays(model("vit"), folder)


def test_texts_and_images_are_not_mixed_up(model: Folder, tmp_path: Path) -> None:
    images, texts = folders.write_images(tmp_path / "images", 3), folders.write_csv(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"is a folder, but the network reads text"):
        arrays(model("classifier"), images)
    with pytest.raises(InputError, match=r"is a file, but the network reads images"):
        arrays(model("vit"), texts)
    with pytest.raises(InputError, match="are for texts"):
        arrays(model("vit"), images, label_column="mood")
    with pytest.raises(InputError, match="does not exist"):
        arrays(model("vit"), tmp_path / "nothing")


def test_without_pillow_the_way_out_is_named(model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folders.write_images(tmp_path / "images", 3)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="pip install pillow"):
        arrays(model("vit"), place)


def test_options_without_data_are_refused(model: Folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--calib-from, which is not given"):
        onnxprune.export_model(model("classifier"), tmp_path / "m.onnx", label_column="mood")
    with pytest.raises(InputError, match="--samples 0 is too small"):
        onnxprune.export_model(model("classifier"), tmp_path / "m.onnx", calib_from=tmp_path / "a.txt", samples=0)
