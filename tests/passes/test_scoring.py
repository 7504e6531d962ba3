"""Scores measured on a student that has lost units already."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from onnxprune.calibration import Batch
from onnxprune.calibration.objective import Targets, choose_objective
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.instrument import MASK, mask_feeds, masked_model, with_outputs
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from onnxprune.importance import local
from onnxprune.passes.scoring import local_scores, mask_gradients, student_labels
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests import zoo
from tests.graph.pruning import anatomy_of

OPTIONS = RuntimeOptions()
NAME = "bert-sdpa-do18"


@cache
def anatomy() -> Anatomy:
    return anatomy_of(load(zoo.path(NAME)))


def kept() -> dict[str, np.ndarray]:
    some = {site.name: np.arange(site.order % 2, site.units, 2) for site in anatomy().sites}
    return {**some, "layer.1.heads": np.zeros(0, np.int64)}


def batches() -> list[Batch]:
    feeds = zoo.feeds(NAME, batch=6, seq=9)
    mask = feeds["attention_mask"].astype(bool)
    return [
        Batch({name: array[rows] for name, array in feeds.items()}, np.arange(6)[rows], np.ones(3, bool), mask[rows], None)
        for rows in (slice(0, 3), slice(3, 6))
    ]


def test_labels_of_a_student_number_the_units_that_are_left() -> None:
    site = anatomy().site("layer.0.heads")
    labels = np.array([0, 0, 1, 1, -1, 2, 2, 3])
    consumer = replace(site.consumers[0], labels=labels)
    place = (consumer.tensor, consumer.axis)
    site = replace(site, group=replace(site.group, places={place: labels}))
    assert student_labels(site, {site.name: np.array([1, 3])}, consumer, [site]).tolist() == [0, 0, -1, 1]
    assert student_labels(site, {}, consumer, [site]).tolist() == labels.tolist()
    # Another site has cut the position that this one does not label.
    group = replace(site.group, places={place: np.where(labels < 0, 0, -1)})
    other = replace(site, name="other", units=1, group=group)
    assert student_labels(site, {"other": np.zeros(0, np.int64)}, consumer, [site, other]).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_mask_gradients_of_a_student_are_differences_of_its_loss() -> None:
    student = slice_model(anatomy(), kept())
    objective = choose_objective(anatomy())
    data = batches()
    targets = Targets(objective, data, "sampled", 0)
    dense = open_session(anatomy().model)
    for batch in data:
        targets.add(run(dense, batch.feeds, [objective.tensor])[0])
    found = list(mask_gradients(student, kept(), anatomy().sites, objective, targets, 1, OPTIONS))
    assert set(found[0]) == {name for name, units in kept().items() if len(units)}
    session = open_session(masked_model(anatomy()))

    def loss(number: int, site: str, unit: int, value: float) -> np.ndarray:
        masks = mask_feeds(anatomy().sites, kept())
        masks[MASK + site][unit] = value
        scores = run(session, {**data[number].feeds, **masks}, [objective.tensor])[0].astype(np.float64)
        log = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return np.asarray(-(targets.feeds(number, 1)["onnxprune.target"] * log).sum(-1))

    for number in range(2):
        for site in ("layer.0.heads", "layer.0.ffn", "layer.2.heads", "layer.2.ffn"):
            for position in (0, len(kept()[site]) - 1):
                unit, step = int(kept()[site][position]), 0.05
                expected = (loss(number, site, unit, 1 + step) - loss(number, site, unit, 1 - step)) / (2 * step)
                np.testing.assert_allclose(found[number][site][:, position], expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "variance", "energy", "obs"])
def test_local_scores_come_from_the_students_real_tokens(criterion: str) -> None:
    student = slice_model(anatomy(), kept())
    data = batches()
    scores = local_scores(student, kept(), anatomy().sites, criterion, data, OPTIONS)
    assert {site: len(values) for site, values in scores.items()} == {site: len(units) for site, units in kept().items()}
    for name in ("layer.0.heads", "layer.2.ffn"):
        site = anatomy().site(name)
        consumer = site.consumers[0]
        dense = anatomy().view.value(consumer.leaf.tensor)
        assert dense is not None
        rows = (dense if consumer.leaf.axis == 0 else dense.T)[np.isin(consumer.labels, kept()[name])]
        session = open_session(with_outputs(student, [consumer.tensor]))
        read = [(run(session, b.feeds, [consumer.tensor])[0], b.token_mask) for b in data]
        # Of the last block only the first token's row is computed.
        x = np.concatenate([found[mask] if found.shape[1] > 1 else found[:, 0] for found, mask in read]).astype(np.float64)
        gram = x.T @ x / len(x)
        labels = np.repeat(np.arange(len(kept()[name])), len(rows) // len(kept()[name]))
        count = len(kept()[name])
        read = {"magnitude": (), "variance": (gram - np.outer(x.mean(axis=0), x.mean(axis=0)),)}.get(criterion, (gram,))
        expected = getattr(local, criterion)(rows, *read, labels, count)
        np.testing.assert_allclose(scores[name], expected, rtol=1e-3)
