"""int8: how fast, how accurate, at what memory, and whether deciding it together with pruning pays.

    python -m benchmarks.int8 --models FOLDER                      # all tasks, everything
    python -m benchmarks.int8 --task text --part forms

``forms``: onnxruntime's stock dynamic quantization against ours, dynamic and static, on the unpruned model and after half of the
multiply-adds went; speed-up over the file as given in pairs, KL or cosine, accuracy, size.
``mixed``: what leaving the most sensitive products in float saves and costs, against full int8 without smoothing.
``orders``: a quarter of the time by the joint decision, by pruning and then quantizing, and by quantizing and then pruning.
``memory``: peak memory of static calibration for few and for many samples.
Results go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnxprune
from benchmarks.main_job import RESULTS
from benchmarks.tasks import EMBEDDING, NAMES, Task, centroid_hits, hits, task
from onnxprune.benchmark import benchmark
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Objective, choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise, with_fresh_shapes
from onnxprune.graph.model import Model, load
from onnxprune.passes.apply import finish
from onnxprune.passes.base import finishing, ordered
from onnxprune.passes.int8 import Scheme, tailor
from onnxprune.passes.precision import measure_groups, most_sensitive
from onnxprune.request import request_feeds
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import Yardstick, compare

OPTIONS = RuntimeOptions()
FIRST_SHARE = 0.5
"""Share of the time that pruning alone is first asked to leave for int8."""

SEQUENCE = "prune, then int8"

FLOAT_SHARES = (0, 1, 2, 3, 4, 6, 8, 12)


class Bench:
    """One task, loaded and understood."""

    def __init__(self, chosen: Task, seconds: float) -> None:
        self.task, self.seconds = chosen, seconds
        self.given = load(chosen.model_path)
        self.calib: CalibrationData = load_calibration(chosen.calib_path, self.given)
        self.test: CalibrationData = load_calibration(chosen.test_path, self.given)
        canonical, profile = canonicalise(self.given)
        self.anatomy: Anatomy = study(canonical, profile)
        self.objective: Objective = choose_objective(self.anatomy, labels=self.test.labels if chosen.name in NAMES else None)
        self.request = request_feeds(self.given, self.calib, {})

    def right(self, model: Path) -> np.ndarray:
        return hits(model, self.task.test) if self.task.name in NAMES else centroid_hits(model, self.task)

    def judge(self, variants: Mapping[str, Path | Model]) -> dict[str, Any]:
        """Speed-up over the first variant in one paired run; accuracy, divergence and size of each."""
        timed = benchmark(variants, self.request, max_seconds=self.seconds, memory=False)
        first, *_ = variants
        rows: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            dense: np.ndarray | None = None
            for number, (name, source) in enumerate(variants.items()):
                path = source.save(Path(folder) / f"{number}.onnx") if isinstance(source, Model) else source
                right = self.right(path)
                dense = right if dense is None else dense
                found = timed.variants[name]
                rows[name] = {
                    "speedup": found.speedup.median,
                    "interval": [found.speedup.low, found.speedup.high],
                    "bytes": found.bytes,
                    "accuracy": float(right.mean()),
                    "points": 100 * float((right.astype(float) - dense).mean()),
                }
                if name != first:
                    against = compare(self.given, load(path), self.test, self.objective, OPTIONS)
                    rows[name] |= {"kl": against.kl.value} if against.kl else {"cosine": against.cosine.value if against.cosine else None}
                print(name, json.dumps(rows[name]), flush=True)
        return rows

    def prune(self, folder: str, name: str, model: Path | None = None, **options: Any) -> Path:
        target = Path(folder) / f"{name}.onnx"
        result = onnxprune.prune(model or self.task.model_path, calib=self.task.calib_path, output=target, bench_seconds=0, **options)
        assert result.output is not None
        return result.output


def stock(model: Model) -> Model:
    """onnxruntime's ``quantize_dynamic`` as well as one can call it: int8 weights, products only, stale shapes cleared by hand."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        with_fresh_shapes(model).save(before)
        quantize_dynamic(before, after, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
        return load(after)


def forms(bench: Bench) -> dict[str, Any]:
    """Unpruned, and after halving the multiply-adds."""
    with tempfile.TemporaryDirectory() as folder:
        pruned = bench.prune(folder, "pruned", passes=("heads", "ffn"), target_macs="50%")
        # A generous limit: here the loss is what is measured.
        alone = {f"int8 {kind}": bench.prune(folder, kind, passes=("int8",), int8=kind, max_drop=0.2) for kind in ("dynamic", "static")}
        after = {
            f"pruned + int8 {kind}": bench.prune(folder, f"pruned-{kind}", pruned, passes=("int8",), int8=kind, max_drop=0.2)
            for kind in ("dynamic", "static")
        }
        finished = finish(bench.anatomy.model, finishing("cpu"))
        return bench.judge(
            {
                "file as given": bench.task.model_path,
                "finished original": finished,
                "stock int8": stock(bench.given),
                **alone,
                "pruned": pruned,
                **after,
            }
        )


def mixed(bench: Bench) -> list[dict[str, Any]]:
    """Full int8 against int8 with the most sensitive groups in float, with and without smoothing."""
    model, scheme = bench.anatomy.model, Scheme("dynamic", True)
    steps = ordered((*finishing("cpu"), "int8"))
    yardstick = Yardstick(model, bench.calib.take(slice(0, 64)), bench.objective, OPTIONS)
    groups = measure_groups(bench.anatomy, bench.anatomy.sites, scheme, yardstick, bench.calib, bench.request, OPTIONS)
    smoothed = {group.tensor for group in groups if group.smoothed}
    variants: dict[str, Path | Model] = {"finished original": finish(model, finishing("cpu"))}
    for some in ((), smoothed):
        for count in FLOAT_SHARES if some or not smoothed else (0,):
            floats = most_sensitive(groups, count)
            form = tailor(model, scheme, bench.calib, OPTIONS, floats=floats, smoothed=some)
            variants[f"{count} of {len(groups)} groups in float{', smoothed' if some else ''}"] = finish(model, steps, form)
    timed = benchmark(variants, bench.request, max_seconds=bench.seconds, memory=False)
    judge = Yardstick(bench.given, bench.test.take(slice(0, 1000)), bench.objective, OPTIONS)
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        assert isinstance(variant, Model)
        rows.append({"variant": name, "speedup": timed.variants[name].speedup.median, "error": judge(variant)})
        saved = 1 - 1 / rows[-1]["speedup"]
        full = rows[1] if len(rows) > 1 else None
        rows[-1]["share_of_gain"] = saved / (1 - 1 / full["speedup"]) if full else 0.0
        rows[-1]["share_of_error"] = rows[-1]["error"] / full["error"] if full else 0.0
        print(json.dumps(rows[-1]), flush=True)
    return rows


def orders(bench: Bench, target: float = 0.25) -> dict[str, Any]:
    """The same latency by three ways. A sequence does not aim, so pruning before int8 is tried at three widths around the target."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Path | Model] = {"file as given": bench.task.model_path}
        both = {"passes": ("heads", "ffn", "int8"), "target_latency": f"{100 * target:g}%", "keep_best": True}
        found["joint"] = bench.prune(folder, "joint", **both)
        # Weights that are integers already cannot be re-fitted.
        found["int8, then prune"] = bench.prune(folder, "frozen", **both, compensation="none")
        share = FIRST_SHARE
        for factor in (1.0, 0.94, 1.06):
            wanted = f"{100 * factor * share:.3g}%"
            pruned = bench.prune(folder, f"float {wanted}", passes=("heads", "ffn"), target_latency=wanted, keep_best=True)
            last = bench.prune(folder, f"last {wanted}", pruned, passes=("int8",), max_drop=0.5)
            if factor == 1.0:
                timed = benchmark({"given": bench.task.model_path, "last": last}, bench.request, max_seconds=20, memory=False)
                share *= target * timed.variants["last"].speedup.median
            found[f"{SEQUENCE} (to {wanted})"] = last
        rows = bench.judge(found)
        rows[f"{SEQUENCE}, as fast as joint"] = at_speed([row for name, row in rows.items() if SEQUENCE in name], rows["joint"]["speedup"])
        return rows


def at_speed(rows: Sequence[Mapping[str, Any]], speedup: float) -> dict[str, Any]:
    """Divergence at ``speedup``: its logarithm over the time, interpolated between rows; beyond them, the outermost row as it is."""
    ordered_rows = sorted(rows, key=lambda row: -row["speedup"])
    times, logs = [1 / row["speedup"] for row in ordered_rows], [np.log(row["kl"]) for row in ordered_rows]
    reached = float(np.clip(1 / speedup, times[0], times[-1]))
    return {"speedup": 1 / reached, "kl": float(np.exp(np.interp(reached, times, logs)))}


_MEMORY = """
import json, os, sys, threading, time
from onnxprune.calibration.activations import summarise
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.integer import int8_products
from onnxprune.graph.model import load
from onnxprune.graph.view import GraphView
from onnxprune.quantize.ranges import range_of

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

model = load(sys.argv[1])
data = load_calibration(sys.argv[2], model)
canonical, _ = canonicalise(model)
tensors = list(dict.fromkeys(node.inputs[0] for node in int8_products(GraphView(canonical))))
summarise(canonical, tensors, data.take(slice(0, 16)))
before, seen, done = resident(), [], threading.Event()
watcher = threading.Thread(target=lambda: [seen.append(resident()) or time.sleep(0.002) for _ in iter(lambda: not done.is_set(), False)])
watcher.start()
found = summarise(canonical, tensors, data.take(slice(0, int(sys.argv[3]))))
[range_of(activation.histogram, method) for activation in found.values() for method in ("minmax", "percentile", "entropy", "mse")]
done.set()
watcher.join()
print(json.dumps({"before_mb": before, "peak_mb": max(seen)}))
"""


def memory(bench: Bench) -> dict[str, Any]:
    """Resident memory of a process before it finds all static ranges, by all methods, and at its peak while it does (Linux)."""
    rows: dict[str, Any] = {}
    for samples in (128, 2048):
        command = [sys.executable, "-c", _MEMORY, str(bench.task.model_path), str(bench.task.calib_path), str(samples)]
        rows[str(samples)] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(samples, rows[str(samples)], flush=True)
    return rows


PARTS = {"forms": forms, "mixed": mixed, "orders": orders, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="only this part (repeatable)")
    parser.add_argument("--seconds", type=float, default=60, help="most time of one benchmark")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in args.task or (*NAMES, EMBEDDING):
        bench = Bench(task(name, args.models), args.seconds)
        file = RESULTS / f"int8_{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        for part in args.part or tuple(PARTS):
            print(f"{name}: {part}", flush=True)
            found[part] = PARTS[part](bench)  # type: ignore[operator]
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
