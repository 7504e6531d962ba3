"""A matrix that several layers share is re-fitted from all its uses, stays one, and only where the model gets better."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.calibration import Batch, load_calibration
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.graph.view import GraphView
from onnxprune.passes import refit as module
from onnxprune.passes.refit import refit
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of
from tests.graph.test_shared_layers import model

OPTIONS = RuntimeOptions()
KEPT = {"layer.0.ffn": np.arange(FFN - 2), "layer.0.heads": np.array([0, 2])}


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return anatomy_of(model(Net(), shared=True))


def batches(anatomy: Anatomy, rows: int, seed: int) -> list[Batch]:
    mixed = np.random.default_rng(9).standard_normal((4, WIDTH))
    x = np.random.default_rng(seed).standard_normal((rows, 6, 4)) @ mixed
    return list(load_calibration({"x": x.astype(np.float32)}, anatomy.model).batches(16, trim=False))


def error(anatomy: Anatomy, student: Model) -> float:
    """Squared error of the output on fresh rows, relative to its size."""
    wanted, found = (
        np.concatenate([run(open_session(each), batch.feeds)[0] for batch in batches(anatomy, 64, seed=1)])
        for each in (anatomy.model, student)
    )
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize(("kept", "most"), [(KEPT, 1.0), ({"layer.0.ffn": KEPT["layer.0.ffn"]}, 0.9)], ids=["both", "ffn"])
def test_a_shared_matrix_is_fitted_from_all_its_uses_and_stays_one(anatomy: Anatomy, kept: Kept, most: float) -> None:
    """Three random heads have little in common with each other; neurons have more."""
    student = slice_model(anatomy, kept)
    fitted, changes, reports = refit(anatomy, student, batches(anatomy, 256, seed=0), OPTIONS, kept=kept)
    assert {report.site for report in reports if report.applied} == set(kept)
    assert error(anatomy, fitted) < most * error(anatomy, student)
    assert len(changes) == 2 * len(kept)
    assert fitted.parameters == student.parameters
    places = {(node.name, slot): node.inputs[slot] for node in GraphView(fitted).nodes for slot in range(len(node.inputs))}
    assert len({places[change] for change in changes}) == len(kept)


def test_a_fit_that_does_not_bring_the_model_nearer_is_left(anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nearer", lambda *_: False)
    student = slice_model(anatomy, KEPT)
    fitted, changes, reports = refit(anatomy, student, batches(anatomy, 64, seed=0), OPTIONS, kept=KEPT)
    assert fitted is student
    assert changes == {}
    assert [("would not lower" in report.reason) for report in reports] == [True, True]


def test_one_scale_for_each_unit_is_not_offered_for_shared_matrices(anatomy: Anatomy) -> None:
    student = slice_model(anatomy, KEPT)
    _, changes, reports = refit(anatomy, student, batches(anatomy, 64, seed=0), OPTIONS, kept=KEPT, method="scale")
    assert changes == {}
    assert {report.reason for report in reports} == {"several matrices read this axis"}
