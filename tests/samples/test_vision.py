"""The embedded sample is what its README says: a trained model with rows that fit its input."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.tasks import ROOT, Task, hits, task


@pytest.fixture(scope="module")
def vision() -> Task:
    return task("vision")


def test_rows_fit_the_graph_input_and_lie_in_the_unit_interval(vision: Task) -> None:
    value = onnx.load(vision.model_path).graph.input[0]
    fixed = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    for rows, count in ((vision.calib, 1024), (vision.test, 2000)):
        pixels = rows[value.name]
        assert (pixels.dtype, list(pixels.shape)) == (np.float32, [count, *fixed])
        assert (pixels.min(), pixels.max()) == (0.0, 1.0)
        assert set(rows) == {value.name, "labels"}
        assert set(rows["labels"]) == set(range(10))


def test_no_calibration_row_is_a_test_row(vision: Task) -> None:
    calib = {row.tobytes() for row in vision.calib["pixel_values"]}
    assert not calib & {row.tobytes() for row in vision.test["pixel_values"]}


def test_the_model_is_trained(vision: Task) -> None:
    first = {name: array[:500] for name, array in vision.test.items()}
    assert hits(vision.model_path, first).mean() > 0.83


def test_the_model_names_no_local_file() -> None:
    model = (ROOT / "samples" / "vision" / "model.onnx").read_bytes()
    assert b"site-packages" not in model
    assert str(Path.home()).encode() not in model


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'audio'; there are text, vision"):
        task("audio")
