"""The one request that latency is measured on: a real row, or that row in the shape asked for."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import InputError
from onnxprune.graph.model import load
from onnxprune.graph.profile import shapes_of
from onnxprune.request import examples, made_up, request_feeds
from tests import zoo
from tests.calibration.models import image_model, text_model
from tests.passes.cases import BERT, VIT, calibration


def test_without_shapes_it_is_the_first_row() -> None:
    data = calibration(BERT)
    request = request_feeds(load(zoo.path(BERT)), data, {})
    assert set(request) == set(data.inputs)
    for name, array in data.inputs.items():
        np.testing.assert_array_equal(request[name], array[:1])
        assert request[name].flags.c_contiguous


def test_a_row_is_repeated_and_cut_to_the_shape() -> None:
    data = calibration(BERT)
    names = list(data.inputs)
    longer = request_feeds(load(zoo.path(BERT)), data, {name: (2, 30) for name in names})
    shorter = request_feeds(load(zoo.path(BERT)), data, {name: (1, 5) for name in names})
    for name, array in data.inputs.items():
        row = array[0]
        np.testing.assert_array_equal(longer[name], np.tile(np.concatenate([row, row, row[:6]]), (2, 1)))
        np.testing.assert_array_equal(shorter[name], row[None, :5])


def test_a_size_holds_for_every_input_that_shares_the_dimension() -> None:
    request = request_feeds(load(zoo.path(BERT)), calibration(BERT), {"input_ids": (3, 20)})
    assert {array.shape for array in request.values()} == {(3, 20)}
    shapes_of(load(zoo.path(BERT)), request)


def test_dimensions_of_other_names_stay() -> None:
    model = text_model(other_length="other")
    data = CalibrationData({"input_ids": np.ones((4, 6), np.int64), "attention_mask": np.ones((4, 6), np.int64)}, None, "numbers")
    request = request_feeds(model, data, {"input_ids": (2, 9)})
    assert request["input_ids"].shape == (2, 9)
    assert request["attention_mask"].shape == (2, 6)


def test_a_model_of_fixed_batch_gets_requests_of_that_batch() -> None:
    pixels = np.arange(9, dtype=np.float32).reshape(3, 3)
    two = request_feeds(image_model(2), CalibrationData({"pixels": pixels}, None, "numbers", fixed_rows=2), {})
    np.testing.assert_array_equal(two["pixels"], pixels[:2])
    four = request_feeds(image_model(4), CalibrationData({"pixels": pixels}, None, "numbers", fixed_rows=4), {})
    assert four["pixels"].shape == (4, 3)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model, data = load(zoo.path(BERT)), calibration(BERT)
    with pytest.raises(InputError, match="--input-shape names 'ids'; the inputs are input_ids, attention_mask, token_type_ids"):
        request_feeds(model, data, {"ids": (1, 4)})
    with pytest.raises(InputError, match="--input-shape input_ids has 3 dimensions; the input has 2"):
        request_feeds(model, data, {"input_ids": (1, 4, 4)})
    image = CalibrationData({"pixels": np.zeros((2, 3), np.float32)}, None, "numbers")
    with pytest.raises(InputError, match="--input-shape pixels asks for 5 along axis 1; the model fixes it at 3"):
        request_feeds(image_model(), image, {"pixels": (1, 5)})


@pytest.mark.parametrize("name", [BERT, VIT])
def test_a_made_up_row_runs(name: str) -> None:
    model = load(zoo.path(name))
    data = made_up(model)
    assert len(data) == 1
    shapes_of(model, dict(data.inputs))


def test_examples_are_a_few_real_rows() -> None:
    data = calibration(BERT)
    for name, array in examples(data).items():
        assert 1 < len(array) < len(data)
        np.testing.assert_array_equal(array, data.inputs[name][: len(array)])
