"""Pieces of bounded weight compute what the whole graph computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from onnxprune.graph import paged
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model, load
from onnxprune.graph.paged import open_model, run_batches, segments
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests import zoo

NAMES = ["bert-sdpa-do18", "gpt2-eager-ts17", "vit-sdpa-do23"]
LIMIT = 16384


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PIECE_BYTES", LIMIT)


def model(name: str) -> Model:
    return replace(load(zoo.path(name)), paged=True)


def weight_bytes(view: GraphView, nodes: tuple[int, ...]) -> int:
    read = {name for index in nodes for name in view.nodes[index].inputs}
    return sum(array.nbytes for name, array in view.model.weights.items() if name in read)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_hold_every_node_once_and_little_weight(name: str) -> None:
    view = GraphView(model(name))
    parts = segments(view, view.model.output_names)
    counts = Counter(index for part in parts for index in part.nodes)
    assert len(parts) > 3
    assert set(counts) == view.ancestors(view.model.output_names)
    assert set(counts.values()) == {1}
    assert parts[-1].live == tuple(sorted(view.model.output_names))
    heaviest = max(weight_bytes(view, (node.index,)) for node in view.nodes)
    assert all(weight_bytes(view, part.nodes) <= max(LIMIT, heaviest) for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_compute_what_one_session_computes(name: str) -> None:
    whole = load(zoo.path(name))
    inside = next(node.outputs[0] for node in GraphView(whole).nodes if node.op == "MatMul")
    wanted = [*whole.output_names, inside]
    batches = [zoo.feeds(name, seed=seed) for seed in range(3)]
    session = open_session(with_outputs(whole, [inside]))
    for expected, found in zip([run(session, feeds, wanted) for feeds in batches], run_batches(model(name), batches, wanted), strict=True):
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_a_paged_model_runs_like_a_session() -> None:
    feeds = zoo.feeds(NAMES[0])
    (expected,) = run(open_session(load(zoo.path(NAMES[0]))), feeds)
    (found,) = run(open_model(model(NAMES[0])), feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_outputs_of_the_last_piece_come_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(session, feeds, outputs):  # type: ignore[no-untyped-def]
        runs.append(outputs)
        return run(session, feeds, outputs)

    monkeypatch.setattr(paged, "run", counted)
    known = model(NAMES[0])
    pieces = len(segments(GraphView(known), known.output_names))
    results = run_batches(known, [zoo.feeds(NAMES[0], seed=seed) for seed in range(3)], known.output_names)
    next(results)
    assert len(runs) == 3 * (pieces - 1) + 1


def test_no_batches_give_no_results() -> None:
    assert list(run_batches(model(NAMES[0]), [], ["logits"])) == []
