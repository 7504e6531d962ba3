"""Cost of mask gradients: thread CPU time of gradient runs over that of plain forwards on the same rows, interleaved.

python -m benchmarks.gradients --models FOLDER
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from benchmarks.main_job import RESULTS
from benchmarks.tasks import NAMES, task
from onnxprune.calibration.objective import Targets, choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import study
from onnxprune.graph.autodiff import Tap, gradient_model
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.runtime.measure import ratio, time_sessions
from onnxprune.runtime.session import open_session, run

ROWS, BATCH = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=NAMES, action="append", help="only this task (repeatable)")
    args = parser.parse_args()
    rows = []
    for name in args.task or NAMES:
        chosen = task(name, args.models)
        given = load(chosen.model_path)
        canonical, profile = canonicalise(given)
        anatomy = study(canonical, profile)
        objective = choose_objective(anatomy)
        data = load_calibration(chosen.calib_path, given).take(slice(0, ROWS))
        batches = list(data.batches(BATCH, trim=False))
        targets = Targets(objective, batches, "sampled", 0)
        forward = open_session(given)
        for batch in batches:
            targets.add(run(forward, batch.feeds, [objective.output])[0])
        taps = [
            Tap(site.name, site.consumers[0].tensor, site.consumers[0].axis, site.consumers[0].labels, site.units) for site in anatomy.sites
        ]
        backward = open_session(gradient_model(canonical, taps, objective.tensor, objective.link, profile))
        feeds = [{**batch.feeds, **targets.feeds(number, 0)} for number, batch in enumerate(batches)]

        def all_rows(session: object, inputs: list[dict]) -> None:
            for item in inputs:
                run(session, item)  # type: ignore[arg-type]

        calls = {
            "forward": partial(all_rows, forward, [dict(batch.feeds) for batch in batches]),
            "gradients": partial(all_rows, backward, feeds),
        }
        measured = ratio(time_sessions(calls, rounds=15, max_seconds=90), "gradients", "forward")
        rows.append({"task": name, "gradients_over_forward": measured.median, "interval": [measured.low, measured.high], "rows": ROWS})
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gradients.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
