"""The main job on the two trained tasks: are targets met, is the prediction right, what does accuracy do?

    python -m benchmarks.main_job --models FOLDER            # both tasks, everything
    python -m benchmarks.main_job --task vision --part latency

``latency``: relative targets, predicted and measured in pairs, and the speed-up of halving heads and FFN over the finished original.
``accuracy``: accuracy on all test rows at shares of the multiply-adds, without labels. Results go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import onnxprune
from benchmarks.tasks import NAMES, Task, hits, task
from onnxprune.benchmark import benchmark
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from onnxprune.passes.apply import finish
from onnxprune.request import request_feeds

RESULTS = Path(__file__).parent / "results"
LATENCY_TARGETS = ("65%", "50%", "35%")
MAC_TARGETS = ("50%", "30%")


def latency(chosen: Task, seconds: float) -> list[dict[str, Any]]:
    """Every relative target: asked, predicted and measured share of the file as given."""
    rows = []
    for target in LATENCY_TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            result = onnxprune.prune(
                chosen.model_path,
                calib=chosen.calib_path,
                target_latency=target,
                output=Path(folder) / "pruned.onnx",
                bench_seconds=seconds,
            )
            assert result.benchmark is not None
            assert result.output is not None
            pruned, finished = result.benchmark.variants["pruned"], result.benchmark.variants["finished original"]
            goal = result.record["target"]
            share = 1 / pruned.speedup.median
            rows.append(
                {
                    "target": target,
                    "predicted": goal["predicted"] / goal["given"],
                    "first_prediction_error": _first_error(result.record),
                    "measured": share,
                    "interval": [1 / pruned.speedup.high, 1 / pruned.speedup.low],
                    "miss": share / (float(target[:-1]) / 100) - 1,
                    "finished_share": 1 / finished.speedup.median,
                    "accuracy": float(hits(result.output, chosen.test).mean()),
                    "noise_floor": [result.benchmark.noise_floor.low, result.benchmark.noise_floor.high],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _first_error(record: dict[str, Any]) -> float | None:
    """How far the table was off before it was re-anchored."""
    for step in record["search"]:
        if step["measured"] is not None:
            return float(step["predicted"] / step["measured"] - 1)
    return None


def halving(chosen: Task, seconds: float) -> dict[str, Any]:
    """Every site cut to half of its units: speed over the finished original."""
    given = load(chosen.model_path)
    canonical, profile = canonicalise(given)
    anatomy = study(canonical, profile)
    half = slice_model(anatomy, {site.name: np.arange(site.units // 2) for site in anatomy.sites})
    data = load_calibration(chosen.calib_path, given)
    variants = {"finished original": finish(canonical, ["residual-sum"]), "half": finish(half, ["residual-sum"]), "file as given": given}
    result = benchmark(variants, request_feeds(given, data, {}), max_seconds=seconds, memory=False)
    speedup = result.variants["half"].speedup
    row = {"speedup_over_finished": speedup.median, "interval": [speedup.low, speedup.high]}
    print(json.dumps(row), flush=True)
    return row


def accuracy(chosen: Task, seeds: int) -> list[dict[str, Any]]:
    """Accuracy on all test rows at shares of the multiply-adds, label-free."""
    dense = hits(chosen.model_path, chosen.test)
    rows = []
    for target in MAC_TARGETS:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                result = onnxprune.prune(
                    chosen.model_path,
                    calib=chosen.calib_path,
                    target_macs=target,
                    output=Path(folder) / "pruned.onnx",
                    bench_seconds=0,
                    seed=seed,
                )
                assert result.output is not None
                right = hits(result.output, chosen.test)
            paired = right.astype(float) - dense
            rows.append(
                {
                    "target": target,
                    "seed": seed,
                    "accuracy": float(right.mean()),
                    "dense": float(dense.mean()),
                    "difference": float(paired.mean()),
                    "standard_error": float(paired.std() / np.sqrt(len(paired))),
                    "rows": len(paired),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=NAMES, action="append", help="only this task (repeatable)")
    parser.add_argument("--part", choices=("latency", "accuracy", "halving"), action="append", help="only this part (repeatable)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="most time of one benchmark")
    args = parser.parse_args()
    parts = args.part or ["latency", "accuracy", "halving"]
    RESULTS.mkdir(exist_ok=True)
    for name in args.task or NAMES:
        chosen = task(name, args.models)
        file = RESULTS / f"main_job_{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if "halving" in parts:
            found["halving"] = halving(chosen, args.seconds)
        if "latency" in parts:
            found["latency"] = latency(chosen, args.seconds)
        if "accuracy" in parts:
            found["accuracy"] = accuracy(chosen, args.seeds)
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
