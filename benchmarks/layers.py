"""What whole sublayers are worth: divergence and time of a task with one of them, or one block, replaced by each of its substitutes.

::

    python -m benchmarks.layers --models FOLDER --task text

Substitutes are fitted on calibration rows, divergence is that of test rows, time the paired share of the finished model's.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.tasks import EMBEDDING, NAMES, task
from onnxprune.calibration.objective import choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.layers import find_sublayers, substitute
from onnxprune.graph.model import load
from onnxprune.passes.apply import finish
from onnxprune.passes.base import finishing
from onnxprune.passes.int8 import timed
from onnxprune.passes.layers import fitted, site_names
from onnxprune.runtime.measure import clock_for, ratio, time_sessions
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import Yardstick

RESULTS = Path(__file__).parent / "results" / "layers.json"
OPTIONS = RuntimeOptions(threads=1)


def of_task(name: str, models: Path | None, rows: int) -> list[dict[str, Any]]:
    chosen = task(name, models)
    given = load(chosen.model_path)
    data = load_calibration(str(chosen.calib_path), given, samples=rows)
    held = load_calibration(str(chosen.test_path), given, samples=rows)
    model, profile = canonicalise(given)
    anatomy = study(model, profile)
    sublayers = find_sublayers(anatomy.view, profile)
    error = Yardstick(model, held, choose_objective(anatomy, None, data.labels), OPTIONS)
    substitutes = fitted(model, model, sublayers, data, OPTIONS)
    feeds = {name: array[:1] for name, array in data.inputs.items()}
    rewrites = finishing("cpu")
    whole = timed(finish(model, rewrites), feeds, OPTIONS)
    found = []
    for members in [*((each,) for each in sublayers), *itertools.pairwise(sublayers)]:
        row: dict[str, Any] = {"sublayers": [site_names(each, anatomy)[0] for each in members]}
        for kind in substitutes[members[0].name]:
            small = substitute(model, sublayers, {each.name: substitutes[each.name][kind] for each in members})
            calls = {"whole": whole, "small": timed(finish(small, rewrites), feeds, OPTIONS)}
            timings = time_sessions(calls, clock=clock_for(OPTIONS), rounds=41, max_seconds=1.5)
            row[kind] = {"divergence": error(small), "time": ratio(timings, "small", "whole").median}
        found.append(row)
        print(name, json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    parser.add_argument("--rows", type=int, default=256, help="rows to fit on, and rows to judge on")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in args.task or NAMES:
        found[name] = of_task(name, args.models, args.rows)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
