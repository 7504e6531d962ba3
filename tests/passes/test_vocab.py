"""The vocab pass from data to file: which rows stay, that the data give the same bits, and that a plan replays it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

import onnxprune
from onnxprune.errors import InputError, NothingPrunable
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import open_session, run
from tests.graph.net import WIDTH, Net
from tests.passes.cases import brief_benchmarks

ROWS, SEEN, SPECIAL = 6000, 40, 5990
UNPRUNED: dict[str, Any] = {"target_params": "100%", "finishing": False, "bench_seconds": 0}
"""Only what vocab removes, without asking the clock."""


def encoder(other: bool = False, tied: bool = False) -> Model:
    """Words [batch, 6] to states; ``other``: a mask is made of the ids; ``tied``: scores of words follow, by the same table."""
    net = Net()
    net.inputs.clear()
    ids = net.input("input_ids", ["batch", "seq"], TensorProto.INT64)
    table = net.weight(ROWS, WIDTH, scale=1.0)
    state = net("Gather", table, ids)
    for _ in range(2):
        state = net.add(state, net.attention(state))
        state = net.add(state, net.ffn(state, width=32))
    if other:
        state = net(
            "Mul", state, net("Unsqueeze", net("Cast", net("Not", net("Equal", ids, net.ints(0))), to=TensorProto.FLOAT), net.ints(2))
        )
    if tied:
        scores = net("MatMul", state, net("Transpose", table, perm=[1, 0]))
        return load(net.done(scores, **{scores: ["batch", "seq", ROWS]}))
    return load(net.done(state))


def rows(count: int = 64) -> dict[str, np.ndarray]:
    """Ids below :data:`SEEN` times 100, every one of which occurs."""
    ids = np.resize(np.random.default_rng(0).permutation(SEEN) * 100, count * 6)
    return {"input_ids": ids.reshape(count, 6)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoder().save(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": SPECIAL}))
    return tmp_path


def table_rows(path: Path) -> int:
    model = load(path)
    return max(len(array) for name in model.initializer_names if (array := model.initializer(name)) is not None and array.ndim == 2)


def test_rows_of_the_data_the_list_and_the_special_ids_stay(folder: Path) -> None:
    (folder / "more.txt").write_text("1 2 100")
    result = onnxprune.prune(
        folder / "model.onnx",
        calib=rows(),
        output=folder / "out.onnx",
        run_dir=folder / "run",
        passes="vocab",
        keep_ids=folder / "more.txt",
        **UNPRUNED,
    )
    words = result.plan.vocabularies[0]
    np.testing.assert_array_equal(words.kept, sorted([*range(0, 100 * SEEN, 100), 1, 2, SPECIAL]))
    assert table_rows(folder / "out.onnx") == SEEN + 3
    maps = json.loads((folder / "out.vocab.json").read_text())
    assert maps == json.loads((folder / "run" / "vocab.json").read_text())
    assert maps["applied_by"] == "graph"
    assert [maps["vocabularies"][0]["kept"][row] for row in maps["vocabularies"][0]["map"]] == words.reads.tolist()
    assert f"{SEEN + 3} of 6,000 rows of word tables stay" in result.plan.explain()
    assert f"{SEEN + 3} of 6,000 word rows kept" in (folder / "run" / "report.html").read_text()
    table = result.record["vocabulary"]["tables"][0]
    assert table["saved_bytes"] == (ROWS - SEEN - 3) * WIDTH * 4
    assert table["unseen"] == 0


def test_the_data_give_the_same_bits_and_all_other_ids_are_taken(folder: Path) -> None:
    onnxprune.prune(folder / "model.onnx", calib=rows(), output=folder / "out.onnx", passes="vocab", **UNPRUNED)
    before, after = open_session(str(folder / "model.onnx")), open_session(str(folder / "out.onnx"))
    np.testing.assert_array_equal(run(before, rows())[0], run(after, rows())[0])
    assert np.isfinite(run(after, {"input_ids": np.arange(ROWS).reshape(-1, 6)})[0]).all()


def test_mapped_by_the_tokenizer_the_model_takes_rows(folder: Path) -> None:
    result = onnxprune.prune(folder / "model.onnx", calib=rows(), output=folder / "out.onnx", passes="vocab", vocab_map="file", **UNPRUNED)
    maps = json.loads((folder / "out.vocab.json").read_text())
    assert maps["applied_by"] == "tokenizer"
    mapped = {"input_ids": np.array(maps["vocabularies"][0]["map"])[rows()["input_ids"]]}
    before, after = open_session(str(folder / "model.onnx")), open_session(str(folder / "out.onnx"))
    np.testing.assert_array_equal(run(before, rows())[0], run(after, mapped)[0])
    assert result.model is not None
    assert not any(node.name.startswith("vocabulary.map") for node in result.model.proto.graph.node)


@pytest.mark.parametrize("place", ["graph", "file"])
def test_a_plan_replays_the_same_bytes_without_data(folder: Path, place: Any) -> None:
    onnxprune.prune(
        folder / "model.onnx", calib=rows(), output=folder / "out.onnx", run_dir=folder / "run", passes="vocab", vocab_map=place, **UNPRUNED
    )
    onnxprune.apply(folder / "model.onnx", folder / "run" / "plan.json", output=folder / "again.onnx")
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()
    assert (folder / "again.vocab.json").read_text() == (folder / "out.vocab.json").read_text()


def test_words_go_together_with_neurons_and_integers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    monkeypatch.setattr("onnxprune.passes.int8.FASTER", 0.0)
    monkeypatch.setattr("onnxprune.graph.tables.SMALLEST_BYTES", 512)
    result = onnxprune.prune(
        folder / "model.onnx",
        calib=rows(),
        output=folder / "out.onnx",
        passes="ffn,vocab,int8",
        target_macs="85%",
        rounds=1,
        importance="magnitude",
        compensation="none",
        int8="dynamic",
        vocab_map="file",
        bench_seconds=0,
    )
    assert sum(result.plan.removed.values()) > 0
    assert result.plan.int8 is not None
    assert len(result.plan.int8.tables) == 1
    model = load(folder / "out.onnx")
    tables = [
        array for name in model.initializer_names if (array := model.initializer(name)) is not None and array.shape == (SEEN + 1, WIDTH)
    ]
    assert [array.dtype for array in tables] == [np.int8]


def test_the_size_that_words_take_counts_towards_a_target(folder: Path) -> None:
    options = {**UNPRUNED, "target_params": None, "target_size": "20%"}
    result = onnxprune.prune(folder / "model.onnx", calib=rows(), output=folder / "out.onnx", passes="vocab", **options)
    before, after = ((folder / name).stat().st_size for name in ("model.onnx", "out.onnx"))
    assert result.record["target"]["given"] == pytest.approx(before, rel=0.05)
    assert after <= 0.2 * before
    assert result.already_met


def test_a_mask_made_of_ids_keeps_the_map_in_the_graph(folder: Path) -> None:
    encoder(other=True).save(folder / "model.onnx")
    result = onnxprune.prune(folder / "model.onnx", calib=rows(), output=folder / "out.onnx", passes="vocab", vocab_map="file", **UNPRUNED)
    assert [refusal.code for refusal in result.plan.refusals] == ["OP505"]
    before, after = open_session(str(folder / "model.onnx")), open_session(str(folder / "out.onnx"))
    np.testing.assert_array_equal(run(before, rows())[0], run(after, rows())[0])


def test_a_tied_table_stays_and_says_why() -> None:
    with pytest.raises(NothingPrunable, match=r"nothing to prune for vocab:\n  OP503 .*output layer"):
        onnxprune.prune(encoder(tied=True), calib=rows(), passes="vocab", **UNPRUNED)


@pytest.mark.parametrize("ids", [np.arange(ROWS).reshape(-1, 6), np.tile(np.arange(6), (64, 1))])
def test_where_all_rows_occur_or_ids_are_places_nothing_goes(ids: np.ndarray) -> None:
    with pytest.raises(NothingPrunable, match="OP506"):
        onnxprune.prune(encoder(), calib={"input_ids": ids}, passes="vocab", **UNPRUNED)


def test_random_data_say_nothing_about_words(folder: Path) -> None:
    with pytest.raises(InputError, match="which ids occur"):
        onnxprune.prune(folder / "model.onnx", calib="random", passes="vocab", **UNPRUNED)
    (folder / "ids.json").write_text("[1, 2, 3]")
    result = onnxprune.prune(folder / "model.onnx", calib="random", passes="vocab", keep_ids=folder / "ids.json", **UNPRUNED)
    np.testing.assert_array_equal(result.plan.vocabularies[0].kept, [1, 2, 3, SPECIAL])


def test_ids_outside_the_table_are_an_error(folder: Path) -> None:
    (folder / "ids.txt").write_text(str(ROWS))
    with pytest.raises(InputError, match=r"names id 6000, but the table of input_ids has 6000 rows"):
        onnxprune.prune(folder / "model.onnx", calib=rows(), passes="vocab", keep_ids=folder / "ids.txt", **UNPRUNED)


@pytest.mark.parametrize("options", [{"keep_ids": "ids.txt"}, {"vocab_map": "file"}])
def test_options_of_vocab_need_the_pass(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="vocab is not among the passes"):
        onnxprune.prune(encoder(), calib=rows(), passes="heads", **options)
