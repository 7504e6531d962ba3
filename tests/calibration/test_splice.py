"""Rows made of two samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.splice import joined, reworded, spliced


def texts(rows: int, width: int, seed: int, left: bool) -> CalibrationData:
    """Ids that tell their row and column, with padding (id 0) on one side."""
    lengths = np.random.default_rng(seed).integers(1, width + 1, rows)
    columns = np.arange(width)[None]
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    ids = np.where(mask, 1000 * (1 + np.arange(rows)[:, None]) + columns, 0)
    axes = {"input_ids": 1, "attention_mask": 1}
    return CalibrationData({"input_ids": ids, "attention_mask": mask.astype(np.int64)}, None, "test", mask, axes)


@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_a_text_goes_on_as_another_where_both_have_a_token(rows: int, width: int, seed: int, left: bool) -> None:
    data = texts(rows, width, seed, left)
    made = spliced(data, 20, np.random.default_rng(seed))
    assert made is not None
    assert len(made) == 20
    assert made.token_mask is not None
    ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"]
    assert np.array_equal(mask > 0, made.token_mask)
    assert np.array_equal(ids > 0, made.token_mask)
    for row in range(20):
        real = ids[row][ids[row] > 0]
        columns, sources = real % 1000, real // 1000
        assert np.array_equal(columns, np.flatnonzero(ids[row]))
        assert np.array_equal(columns, np.arange(columns[0], columns[0] + len(columns)))
        assert len(np.unique(sources)) <= 2
        assert (np.diff(sources) != 0).sum() <= 1


@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_words_inside_a_text_are_those_of_others_at_their_place(rows: int, width: int, seed: int, left: bool) -> None:
    data = texts(rows, width, seed, left)
    made = reworded(data, {"input_ids"}, np.random.default_rng(seed))
    assert made is not None
    assert made.token_mask is data.token_mask
    assert np.array_equal(made.inputs["attention_mask"], data.inputs["attention_mask"])
    ids, before = made.inputs["input_ids"], data.inputs["input_ids"]
    assert np.array_equal(ids > 0, before > 0)
    assert np.array_equal(ids % 1000, before % 1000)
    assert set(ids.ravel().tolist()) <= set(before.ravel().tolist())
    for one, other in zip(ids, before, strict=True):
        real = np.flatnonzero(other)
        assert np.array_equal(one[real[[0, -1]]], other[real[[0, -1]]])


def test_about_a_quarter_of_the_words_change_in_some_texts_hardly_any() -> None:
    data = texts(400, 40, 0, False)
    made = reworded(data, {"input_ids"}, np.random.default_rng(0))
    assert made is not None
    changed = made.inputs["input_ids"] != data.inputs["input_ids"]
    shares = changed.sum(axis=1) / data.inputs["attention_mask"].sum(axis=1)
    assert 0.1 < shares.mean() < 0.25
    assert (shares < 0.05).mean() > 0.1


def test_images_have_no_words() -> None:
    data = CalibrationData({"pixels": np.zeros((3, 3, 16, 16), np.float32)}, None, "test")
    assert reworded(data, set(), np.random.default_rng(0)) is None
    assert reworded(data, {"pixels"}, np.random.default_rng(0)) is None


@given(st.integers(2, 6), st.integers(2, 12), st.integers(0, 99), st.booleans())
def test_positions_go_on_and_types_stay_what_they_are(rows: int, width: int, seed: int, left: bool) -> None:
    """Counted from 2 on, as RoBERTa does; of padded texts from the first real token."""
    data = texts(rows, width, seed, left)
    mask = data.inputs["attention_mask"]
    extra = {"position_ids": np.where(mask, 1 + mask.cumsum(axis=1), 1), "token_type_ids": np.arange(width)[None] * mask // width}
    data = replace(data, inputs={**data.inputs, **extra})
    words = reworded(data, {"input_ids"}, np.random.default_rng(seed))
    assert words is not None
    for name in extra:
        assert words.inputs[name] is data.inputs[name]
    made = spliced(data, 20, np.random.default_rng(seed))
    assert made is not None
    there = made.inputs["attention_mask"]
    assert np.array_equal(made.inputs["position_ids"] * there, (1 + there.cumsum(axis=1)) * there)


def is_box(where: np.ndarray) -> bool:
    rows, columns = np.nonzero(where)
    return bool(where[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all())


def test_an_image_shows_a_box_of_another() -> None:
    data = CalibrationData({"pixels": np.repeat(np.arange(1.0, 7.0, dtype=np.float32), 3 * 16 * 16).reshape(6, 3, 16, 16)}, None, "test")
    made = spliced(data, 30, np.random.default_rng(0))
    assert made is not None
    mixed = 0
    for image in made.inputs["pixels"]:
        assert np.array_equal(image[0], image[1])
        values = np.unique(image)
        assert len(values) <= 2
        if len(values) == 2:
            mixed += 1
            assert any(is_box(image[0] == value) for value in values)
    assert mixed > 20


def test_ids_without_a_mask_are_texts() -> None:
    data = CalibrationData({"input_ids": np.arange(40).reshape(4, 10)}, None, "test")
    made = spliced(data, 8, np.random.default_rng(0))
    assert made is not None
    assert made.token_mask is None
    assert any(len(np.unique(row // 10)) == 2 for row in made.inputs["input_ids"])


@pytest.mark.parametrize("inputs", [{"table": np.zeros((5, 7), np.float32)}, {"one": np.zeros((1, 3, 16, 16), np.float32)}])
def test_other_inputs_are_left_alone(inputs: dict[str, np.ndarray]) -> None:
    assert spliced(CalibrationData(inputs, None, "test"), 8, np.random.default_rng(0)) is None


def test_joined_rows_have_no_labels() -> None:
    data = texts(4, 6, 0, False)
    more = spliced(data, 3, np.random.default_rng(0))
    both = joined(data, more)
    assert len(both) == 7
    assert both.labels is None
    assert both.token_mask is not None
    assert both.token_mask.shape == (7, 6)
    assert len(joined(data, None)) == 4
