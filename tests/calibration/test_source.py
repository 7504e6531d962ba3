"""Every kind of calibration source, and every way in which it can be wrong."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration import check_labels, load_calibration
from onnxprune.errors import InputError
from tests.calibration.models import image_model, text_arrays, text_model

PIXELS = np.arange(36, dtype=np.float32).reshape(12, 3)
LABELS = np.arange(12) % 3


class Reader:
    """A reader in the style of onnxruntime's CalibrationDataReader."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self._items = iter(items)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._items, None)


def parts() -> list[dict[str, Any]]:
    return [{"pixels": PIXELS[start : start + 5], "labels": LABELS[start : start + 5]} for start in (0, 5, 10)]


def sources(folder: Path) -> Iterator[tuple[str, Any]]:
    np.savez(folder / "all.npz", pixels=PIXELS, labels=LABELS)
    shards = folder / "shards"
    shards.mkdir()
    for number, part in enumerate(parts()):
        np.savez(shards / f"{number:03}.npz", **part)
    (folder / "script.py").write_text(f"import numpy as np\ndef rows():\n    return str({str(folder / 'all.npz')!r})\n")
    yield "npz", folder / "all.npz"
    yield "npz as text", str(folder / "all.npz")
    yield "shards", shards
    yield "dict", {"pixels": PIXELS, "labels": LABELS}
    yield "lists", {"pixels": PIXELS.tolist(), "labels": LABELS.tolist()}
    yield "reader", Reader(parts())
    yield "batches", parts()
    yield "generator", (part for part in parts())
    yield "single samples", [{"pixels": row, "labels": label} for row, label in zip(PIXELS, LABELS, strict=True)]
    yield "function", f"{folder / 'script.py'}:rows"


def test_all_kinds_of_source_give_the_same_data(tmp_path: Path) -> None:
    kinds = dict(sources(tmp_path))
    for kind, source in kinds.items():
        model = image_model()
        if kind == "lists":
            source["pixels"] = np.array(source["pixels"], np.float32)
        data = load_calibration(source, model)
        np.testing.assert_array_equal(data.inputs["pixels"], PIXELS, err_msg=kind)
        assert data.labels is not None, kind
        np.testing.assert_array_equal(data.labels, LABELS, err_msg=kind)
        assert data.labels.dtype == np.int64
    assert len(kinds) == 10


def test_samples_of_a_file_are_a_repeatable_choice(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", pixels=PIXELS)
    chosen = [load_calibration(tmp_path / "c.npz", image_model(), samples=8, seed=seed).inputs["pixels"][:, 0] for seed in (0, 0, 1)]
    assert len(chosen[0]) == 8
    assert (np.diff(chosen[0]) > 0).all()
    assert chosen[0].tolist() == chosen[1].tolist() != chosen[2].tolist()


def test_streams_stop_at_the_rows_wanted() -> None:
    def endless() -> Iterator[dict[str, np.ndarray]]:
        yield from parts()
        raise AssertionError("read too far")

    data = load_calibration(endless(), image_model(), samples=11)
    np.testing.assert_array_equal(data.inputs["pixels"], PIXELS[:11])


def test_fewer_rows_than_asked_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="onnxprune")
    assert len(load_calibration({"pixels": PIXELS}, image_model(), samples=99)) == 12
    assert "12 calibration rows, fewer than the 99" in caplog.text


def test_random_data_only_on_request_and_valid_for_the_model(caplog: pytest.LogCaptureFixture) -> None:
    data = load_calibration("random", text_model(), input_shapes={"input_ids": [1, 9]})
    assert {name: array.shape for name, array in data.inputs.items()} == {"input_ids": (64, 9), "attention_mask": (64, 9)}
    assert set(np.unique(data.inputs["input_ids"])) == {0, 1}
    assert data.inputs["attention_mask"].all()
    assert data.origin == "random"
    assert not caplog.records
    again = load_calibration("random", text_model(), input_shapes={"input_ids": [1, 9]})
    other = load_calibration("random", text_model(), input_shapes={"input_ids": [1, 9]}, seed=1)
    assert again.sha256 == data.sha256 != other.sha256
    load_calibration("random", text_model())
    assert "set it with --input-shape" in caplog.text


@pytest.mark.parametrize(
    ("shapes", "message"), [({"input_id": [1, 9]}, "did you mean 'input_ids'"), ({"input_ids": [9]}, "has 1 dimensions")]
)
def test_shapes_of_random_data_are_checked(shapes: dict[str, list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_calibration("random", text_model(), input_shapes=shapes)


def test_different_lengths_are_padded_with_zeros_and_ignored_labels() -> None:
    short, long = text_arrays(6, 8), text_arrays(6, 12, seed=1)
    labelled = [{**part, "labels": np.ones_like(part["input_ids"])} for part in (short, long)]
    data = load_calibration(labelled, text_model())
    assert data.inputs["input_ids"].shape == (12, 12)
    assert not data.inputs["attention_mask"][:6, 8:].any()
    assert not data.inputs["input_ids"][:6, 8:].any()
    assert data.labels is not None
    assert (data.labels[:6, 8:] == -100).all()
    assert (data.labels[:6, :8] == 1).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_integer_widths_are_cast(dtype: type) -> None:
    data = load_calibration({name: array.astype(dtype) for name, array in text_arrays().items()}, text_model())
    assert {array.dtype for array in data.inputs.values()} == {np.dtype(np.int64)}
    np.testing.assert_array_equal(data.inputs["input_ids"], text_arrays()["input_ids"])


def test_double_becomes_float_and_bool_masks_become_integers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load_calibration({"pixels": PIXELS.astype(np.float64)}, image_model()).inputs["pixels"].dtype == np.float32
    assert "'pixels' cast from float64 to float32" in caplog.text
    arrays = text_arrays()
    data = load_calibration({**arrays, "attention_mask": arrays["attention_mask"].astype(bool)}, text_model())
    np.testing.assert_array_equal(data.inputs["attention_mask"], arrays["attention_mask"])


def bad_row(value: float) -> np.ndarray:
    array = PIXELS.copy()
    array[7, 1] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixel": PIXELS}, r"has no array 'pixels' \(did you mean 'pixel'\?\)"),
        ({}, "has no array 'pixels'; found none"),
        ({"pixels": PIXELS, "label": LABELS}, r"'label' that is no input of the model \(did you mean 'labels'\?\)"),
        ({"pixels": PIXELS.astype(int)}, "'pixels' is int64, the model wants float32"),
        ({"pixels": PIXELS.astype(str)}, "rectangular array of numbers"),
        ({"pixels": [[1.0], [1.0, 2.0]]}, "cannot be read as an array"),
        ({"pixels": PIXELS[..., None]}, r"shape \[12, 3, 1\]; the model wants float32\[batch, 3\]"),
        ({"pixels": PIXELS[:, :2]}, "fixes axis 1 to 3"),
        ({"pixels": PIXELS[:0]}, "is empty"),
        ({"pixels": bad_row(np.nan)}, "NaN or infinity, first in row 7"),
        ({"pixels": bad_row(-np.inf)}, "first in row 7"),
        ({"pixels": np.where(PIXELS == 22, 1e39, PIXELS.astype(np.float64))}, "first in row 7"),
        ({"pixels": PIXELS[:1]}, "1 calibration row found; at least 8"),
        ({"pixels": PIXELS[:7]}, "7 calibration rows found; at least 8"),
        ({"pixels": PIXELS, "labels": LABELS[:11]}, r"'labels' has shape \[11\]; wanted \[12\]"),
        ({"pixels": PIXELS, "labels": np.full(12, np.nan)}, "'labels' holds NaN"),
    ],
)
def test_wrong_arrays_are_refused_with_a_reason(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_calibration(arrays, image_model())


def test_inputs_of_different_length_are_refused() -> None:
    arrays = text_arrays()
    with pytest.raises(InputError, match="different numbers of rows \\(input_ids: 10, attention_mask: 9\\)"):
        load_calibration({**arrays, "attention_mask": arrays["attention_mask"][:9]}, text_model())


def test_integers_that_do_not_fit_are_refused() -> None:
    model = text_model()
    model.proto.graph.input[0].type.tensor_type.elem_type = 6  # int32
    arrays = text_arrays()
    arrays["input_ids"][3, 0] = 2**40
    with pytest.raises(InputError, match="'input_ids' is int64, the model wants int32"):
        load_calibration(arrays, model)


def test_a_row_without_any_token_is_refused() -> None:
    arrays = text_arrays()
    arrays["attention_mask"][4] = 0
    with pytest.raises(InputError, match="hides every token of row 4"):
        load_calibration(arrays, text_model())


def test_rows_are_counted_across_shards(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", pixels=PIXELS)
    np.savez(tmp_path / "1.npz", pixels=bad_row(np.nan))
    with pytest.raises(InputError, match=r"1\.npz: 'pixels' holds NaN or infinity, first in row 19"):
        load_calibration(tmp_path, image_model())


def test_labels_in_some_shards_only_are_refused() -> None:
    with pytest.raises(InputError, match="part 1 has no 'labels'"):
        load_calibration([{"pixels": PIXELS, "labels": LABELS}, {"pixels": PIXELS}], image_model())


def test_few_rows_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    load_calibration({"pixels": PIXELS}, image_model())
    assert "only 12 calibration rows" in caplog.text
    caplog.clear()
    load_calibration({"pixels": np.ones((64, 3), np.float32)}, image_model())
    assert not caplog.records


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", pixels=PIXELS)
    with pytest.raises(InputError, match=r"not found: .*clib\.npz \(did you mean 'calib\.npz'\?\)"):
        load_calibration(tmp_path / "clib.npz", image_model())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.npz files"):
        load_calibration(tmp_path / "empty", image_model())


def test_corrupt_and_foreign_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", pixels=PIXELS)
    raw = (tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bad.npz"
    for content in (b"", b"text, not a zip", raw[: len(raw) // 2], raw[:40] + bytes(40) + raw[80:], raw[:170] + b"\xff" + raw[171:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.npz"):
            load_calibration(path, image_model())
    np.save(tmp_path / "single.npy", PIXELS)
    with pytest.raises(InputError, match="holds a single array"):
        load_calibration(tmp_path / "single.npy", image_model())


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", pixels=np.array([{"a": 1}] * 12, dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"pixels": PIXELS}))
    for name in ("objects.npz", "pickle.npz"):
        with pytest.raises(InputError, match="never loaded"):
            load_calibration(tmp_path / name, image_model())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def row(): pass", r"no function 'rows' \(did you mean 'row'\?\); it defines row"),
        ("def rows(): return 1 / 0", "rows failed: ZeroDivisionError"),
        ("import nothing_of_that_name", "failed: ModuleNotFoundError"),
        ("def rows(): return 5", "of type int is not understood"),
        ("def rows(): return [1, 2]", "item 0 is int; wanted a dict"),
    ],
)
def test_user_scripts_that_fail_say_where(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "script.py").write_text(code)
    with pytest.raises(InputError, match=message):
        load_calibration(f"{tmp_path / 'script.py'}:rows", image_model())


def test_a_missing_script_and_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="script not found"):
        load_calibration(f"{tmp_path / 'no.py'}:rows", image_model())
    with pytest.raises(InputError, match="--samples 0"):
        load_calibration("random", image_model(), samples=0)


def test_inputs_without_one_batch_axis_are_refused() -> None:
    model = text_model(batch=4)
    model.proto.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(InputError, match="different fixed sizes on axis 0"):
        load_calibration(text_arrays(), model)
    del model.proto.graph.input[1].type.tensor_type.shape.dim[:]
    with pytest.raises(InputError, match="'attention_mask' of the model is a scalar"):
        load_calibration(text_arrays(), model)


def test_a_float_mask_that_is_added_is_no_token_mask() -> None:
    model = text_model()
    model.proto.graph.input[1].type.tensor_type.elem_type = 1
    arrays = text_arrays()
    additive = np.where(arrays["attention_mask"] == 1, 0.0, -1e4).astype(np.float32)
    assert load_calibration({**arrays, "attention_mask": additive}, model).token_mask is None
    multiplied = load_calibration({**arrays, "attention_mask": arrays["attention_mask"].astype(np.float32)}, model)
    np.testing.assert_array_equal(multiplied.token_mask, arrays["attention_mask"] == 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no 'labels'"),
        (np.array([0, 3, 1]), "label 3 of row 1 is outside 0..2"),
        (np.array([[0, 1], [2, -1]]), "label -1 of row 1 is outside"),
        (np.array([0.5, 1.0]), "needs integers"),
        (np.array([-100, -100]), "nothing can be scored"),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_refused(labels: np.ndarray | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_labels(labels, 3)


def test_ignored_labels_pass() -> None:
    assert check_labels(np.array([[0, -100], [2, 1]], np.int32), 3).dtype == np.int64
