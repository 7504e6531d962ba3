"""Every importance criterion on the two trained tasks: what is left at 50 % and 30 % of the multiply-adds that can be pruned.

    python -m benchmarks.importance --models FOLDER     # runs that are in the results are not repeated
    python -m benchmarks.importance --table             # the table of docs/methods.md from the results

Nothing but the criterion changes: heads and ffn, four rounds, re-fit, no labels. Accuracy, divergence from the dense model, and agreement
with it on the class that suffers most are those of test rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnxprune
from benchmarks.tasks import NAMES, Task, outputs, task
from onnxprune.importance.registry import CRITERIA

RESULTS = Path(__file__).parent / "results" / "importance.json"
SHARES = (0.5, 0.3)


def measure(chosen: Task, dense: np.ndarray, criterion: str, share: float, samples: int) -> dict[str, Any]:
    """One run, judged on as many test rows as ``dense`` [rows, classes] has."""
    known = onnxprune.inspect(chosen.model_path, calib=chosen.calib_path)
    # Other kinds of sites (directions inside heads) share these multiply-adds, and are not pruned here.
    prunable = sum(site["macs"] for site in known["sites"] if site["kind"] in ("heads", "ffn"))
    budget = known["macs"] - (1 - share) * prunable
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = onnxprune.prune(
            chosen.model_path,
            calib=chosen.calib_path,
            target_macs=f"{budget:.0f}",
            importance=criterion,
            samples=samples,
            output=Path(folder) / "pruned.onnx",
            bench_seconds=0,
        )
        seconds = time.process_time() - started
        assert result.output is not None
        rows = first(chosen.test, len(dense))
        found = outputs(result.output, rows)
    right, before = found.argmax(1) == rows["labels"], dense.argmax(1)
    p, q = log_softmax(dense), log_softmax(found)
    return {
        "share": share,
        "accuracy": float(right.mean()),
        "dense": float((before == rows["labels"]).mean()),
        "kl": float((np.exp(p) * (p - q)).sum(1).mean()),
        "agreement": float((before == found.argmax(1)).mean()),
        "worst_class_agreement": min(float((found.argmax(1) == before)[before == name].mean()) for name in np.unique(before)),
        "cpu_s": round(seconds, 1),
        "rows": len(dense),
        "samples": samples,
    }


def first(rows: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: array[:count] for name, array in rows.items()}


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each criterion; accuracy and KL for each task and share."""
    columns = [f"{name}/{share:.0%}" for name in NAMES for share in SHARES if any(key.startswith(f"{name}/{share:.0%}/") for key in found)]
    lines = ["| | " + " | ".join(column.replace("/", ", ") for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for criterion in CRITERIA:
        cells = []
        for column in columns:
            row = found.get(f"{column}/{criterion}")
            cells.append(f"{100 * row['accuracy']:.1f} %, {row['kl']:.2g}" if row else "")
        lines.append(f"| `{criterion}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=NAMES, action="append", help="only this task (repeatable)")
    parser.add_argument("--importance", choices=list(CRITERIA), action="append", help="only this criterion (repeatable)")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2000, help="most test rows")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in () if args.table else args.task or NAMES:
        chosen = task(name, args.models)
        dense = outputs(chosen.model_path, first(chosen.test, args.rows))
        for share in SHARES:
            for criterion in args.importance or CRITERIA:
                key = f"{name}/{share:.0%}/{criterion}"
                if key not in found:
                    found[key] = measure(chosen, dense, criterion, share, args.samples)
                    print(key, json.dumps(found[key]), flush=True)
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
