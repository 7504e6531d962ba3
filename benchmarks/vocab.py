"""The vocab pass on a sentence encoder: size before and after, equality on the corpus, and what text outside it loses.

    python -m benchmarks.vocab --models FOLDER

The corpus is the calibration rows of the text task. ``corpus`` compares every output on them bit for bit; ``outside`` gives 1 - cosine on
test rows with words that the corpus lacks, for several choices of the row that such words read. Results go to
``benchmarks/results/vocab.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import onnxprune
from benchmarks.main_job import RESULTS
from benchmarks.tasks import EMBEDDING, Task, cosines, outputs, task
from onnxprune.graph.canonical import canonicalise, with_fresh_shapes
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.graph.vocabulary import Vocabulary, WordTables, cut_vocabulary, word_tables
from onnxprune.search.plan import load_plan

UNKNOWN = 100
"""``[UNK]`` of the encoder's tokenizer."""


def sizes(chosen: Task, folder: Path) -> dict[str, Any]:
    """Files by passes: bytes, share of the word table before, rows kept, and whether the same graph with all rows gives the same bits."""
    given = load(chosen.model_path)
    table = max((array for array in given.weights.values() if array.ndim == 2), key=len)
    before = chosen.model_path.stat().st_size
    found: dict[str, Any] = {"bytes": before, "table_bytes": table.nbytes, "table_share": table.nbytes / before}
    canonical, _ = canonicalise(given)
    whole = with_fresh_shapes(canonical).save(folder / "whole.onnx")
    as_given, reference = outputs(chosen.model_path, chosen.calib), outputs(whole, chosen.calib)
    for place in ("graph", "file"):
        target = folder / f"{place}.onnx"
        options: dict[str, Any] = {"passes": "vocab", "target_params": "100%", "vocab_map": place, "finishing": False}
        result = onnxprune.prune(
            chosen.model_path, calib=chosen.calib_path, output=target, run_dir=folder / place, bench_seconds=0, **options
        )
        words = result.plan.vocabularies[0]
        rows = dict(chosen.calib) if place == "graph" else words.mapped(chosen.calib)
        same = outputs(target, rows)
        found[place] = {
            "bytes": target.stat().st_size,
            "share": target.stat().st_size / before,
            "rows": words.rows,
            "kept": len(words.kept),
            "identical_on_corpus": bool(np.array_equal(same, reference)),
            "largest_difference_to_file_as_given": float(np.abs(same - as_given).max()),
            "unseen_expected": result.record["vocabulary"]["tables"][0]["unseen"],
        }
        print(place, json.dumps(found[place]), flush=True)
    target = folder / "int8.onnx"
    onnxprune.prune(chosen.model_path, calib=chosen.calib_path, output=target, bench_seconds=0, passes="vocab,int8", max_drop=0.2)
    found["with int8"] = {"bytes": target.stat().st_size, "share": target.stat().st_size / before}
    print("with int8", json.dumps(found["with int8"]), flush=True)
    return found


def outside(chosen: Task, folder: Path) -> dict[str, Any]:
    """1 - cosine on test rows with words the corpus lacks, by what these read."""
    canonical, _ = canonicalise(load(chosen.model_path))
    view = GraphView(canonical)
    (group,), _ = word_tables(view)
    nearest = load_plan(folder / "graph" / "plan.json").vocabularies[0]
    table = view.value(group.tables[0])
    assert table is not None
    mask = chosen.test["attention_mask"] > 0
    lacking = mask & ~np.isin(chosen.test["input_ids"], nearest.kept)
    found: dict[str, Any] = {"tokens": float(lacking.sum() / mask.sum()), "rows": float(lacking.any(1).mean())}
    variants = {"nearest direction": nearest.reads} | _others(table, nearest)
    for name, reads in variants.items():
        model = _built(canonical, group, reads).save(folder / "variant.onnx")
        found[name] = float((1 - cosines(model, chosen))[lacking.any(1)].mean())
        print(name, found[name], flush=True)
    return found


def _others(table: np.ndarray, nearest: Vocabulary) -> Mapping[str, np.ndarray]:
    """Other choices: the unknown token's row, and the row at the least distance."""
    kept = nearest.kept
    distance = (table[kept] ** 2).sum(1) - 2 * table @ table[kept].T
    unknown = np.full(len(table), UNKNOWN, np.int32)
    unknown[kept] = kept
    return {"unknown token": unknown, "least distance": kept[distance.argmin(1)]}


def _built(model: Model, group: WordTables, reads: np.ndarray) -> Model:
    return cut_vocabulary(model, [Vocabulary(group.inputs, group.lookups, reads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    chosen = task(EMBEDDING, args.models)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"corpus": sizes(chosen, folder), "outside": outside(chosen, folder)}
    (RESULTS / "vocab.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
