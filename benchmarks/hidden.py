"""What the width of the residual stream is worth: divergence, accuracy and time of the vision task by share of the width kept.

::

    python -m benchmarks.hidden --models FOLDER --keep 75% 50%
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.tasks import task
from onnxprune.calibration.objective import choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.options import parse_share
from onnxprune.passes import hidden
from onnxprune.runtime.measure import ratio, time_sessions
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.verification import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models")
    parser.add_argument("--keep", nargs="+", default=["75%", "50%"], help="shares of the width")
    parser.add_argument("--rows", type=int, default=512, help="calibration rows")
    chosen = parser.parse_args()
    vision = task("vision", chosen.models)
    given = load(vision.model_path)
    data = load_calibration(str(vision.calib_path), given, samples=chosen.rows)
    held = load_calibration(str(vision.test_path), given)
    options = RuntimeOptions(threads=1)
    model, profile = canonicalise(given)
    objective = choose_objective(study(model, profile), None, data.labels)
    feeds = {name: array[:1] for name, array in data.inputs.items()}
    dense = open_session(model, options)
    for word in chosen.keep:
        share = parse_share(word, "--keep")
        assert share
        found = hidden.narrow_streams(model, profile, data, objective, share, options)
        if not found.narrowings:
            print(word, *found.refusals)
            continue
        judged = compare(given, found.model, held, objective, options)
        narrow = open_session(found.model, options)
        calls = {"given": lambda: run(dense, feeds), "narrow": lambda narrow=narrow: run(narrow, feeds)}
        timings = time_sessions(calls, seed=0, rounds=121, tolerance=0.004, max_seconds=20.0)
        widths = ", ".join(f"{item.before} -> {item.after}" for item in found.narrowings)
        measures = {"kl": judged.kl, "agreement": judged.agreement, "before": judged.accuracy_before, "after": judged.accuracy_after}
        figures = ", ".join(f"{name} {value.value:.4f}" for name, value in measures.items() if value is not None)
        time = ratio(timings, "narrow", "given").median
        print(f"{word}: {widths}, {figures}, parameters {found.model.parameters / model.parameters:.3f}, time {time:.3f}")


if __name__ == "__main__":
    main()
