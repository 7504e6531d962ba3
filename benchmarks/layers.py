"""What whole sublayers are worth: divergence and time of a task with one of them replaced by nothing, a constant or a linear map.

::

    python -m benchmarks.layers --models FOLDER --task text

The map is fitted by least squares on calibration rows, divergence is that of the test rows. ``blocks`` replaces runs of two sublayers.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tasks import EMBEDDING, NAMES, task
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.calibration.stream import stream
from onnxprune.compensate.ridge import NormalEquations
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.layers import Sublayer, Substitute, find_sublayers, substitute
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.runtime.measure import ratio, time_sessions
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.verification import Yardstick

KINDS = ("nothing", "constant", "map")
_RIDGE = 1e-4


def fitted(model: Model, sublayers: Sequence[Sublayer], data: CalibrationData, options: RuntimeOptions) -> dict[str, dict[str, Substitute]]:
    """Substitutes by sublayer and kind, from the real rows of ``data``."""
    sums = {each.name: NormalEquations(each.width, each.width) for each in sublayers}
    watched = list(dict.fromkeys(name for each in sublayers for name in (each.start, each.end)))
    for batch, values in stream(with_outputs(model, watched, keep=False), data, watched, options=options, rows=16):
        for each in sublayers:
            x, y = (values[name].reshape(-1, each.width) for name in (each.start, each.end))
            real = batch.real_rows(len(x))
            sums[each.name].add(x[real], y[real])
    found = {}
    for name, equations in sums.items():
        equations.flush()
        fit = equations.solve(_RIDGE)
        mean = Substitute(bias=equations.cross[-1] / equations.gram[-1, -1])
        found[name] = dict(zip(KINDS, (Substitute(), mean, Substitute((fit.weights,), fit.bias)), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), default="text")
    parser.add_argument("--rows", type=int, default=256, help="rows to fit on, and rows to judge on")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    chosen = parser.parse_args()
    subject = task(chosen.task, chosen.models)
    given = load(subject.model_path)
    data = load_calibration(str(subject.calib_path), given, samples=chosen.rows)
    held = load_calibration(str(subject.test_path), given, samples=chosen.rows)
    options = RuntimeOptions(threads=1)
    model, profile = canonicalise(given)
    sublayers = find_sublayers(GraphView(model), profile)
    error = Yardstick(model, held, choose_objective(study(model, profile), None, data.labels), options)
    substitutes = fitted(model, sublayers, data, options)
    feeds = {name: array[:1] for name, array in data.inputs.items()}
    dense = open_session(model, options)
    runs = [(each,) for each in sublayers] + list(itertools.pairwise(sublayers))
    figures = []
    for members in runs:
        row: dict[str, str | float] = {"sublayers": " ".join(each.name for each in members)}
        for kind in KINDS:
            small = substitute(model, sublayers, {each.name: substitutes[each.name][kind] for each in members})
            session = open_session(small, options)
            calls = {"dense": lambda: run(dense, feeds), "small": lambda session=session: run(session, feeds)}
            timings = time_sessions(calls, seed=0, rounds=41, tolerance=0.01, max_seconds=1.0)
            row |= {f"{kind} error": error(small), f"{kind} time": ratio(timings, "small", "dense").median}
        figures.append(row)
        cells = (f"{kind} {row[f'{kind} error']:.4f} at {row[f'{kind} time']:.3f}" for kind in KINDS)
        print(f"{row['sublayers']}: {', '.join(cells)}", flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps({"task": chosen.task, "rows": chosen.rows, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
