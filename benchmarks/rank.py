"""Inside attention heads: half of the depth by turning heads into their principal directions, against cutting directions as they are.

    python -m benchmarks.rank --models FOLDER

Both keep the directions that mask gradients (Fisher) favour, nothing is re-fitted; divergence is that of all test rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.tasks import NAMES, task
from onnxprune.calibration.objective import choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.depth import with_depths
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.turning import turned
from onnxprune.passes.depth import choose_bases
from onnxprune.passes.rounds import score
from onnxprune.passes.workbench import Recipe, dense_student, set_up
from onnxprune.request import request_feeds
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import Yardstick

RESULTS = Path(__file__).parent / "results" / "rank.json"
SHARES = (0.75, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models")
    parser.add_argument("--task", choices=NAMES, action="append", help="only this task (repeatable)")
    parser.add_argument("--rows", type=int, default=512, help="calibration rows")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in args.task or NAMES:
        chosen = task(name, args.models)
        given = load(chosen.model_path)
        data = load_calibration(chosen.calib_path, given, samples=args.rows)
        model, profile = canonicalise(given)
        plain = study(model, profile)
        objective = choose_objective(plain)
        options = RuntimeOptions(threads=1)
        yardstick = Yardstick(given, load_calibration(chosen.test_path, given), objective, options)
        request = request_feeds(given, data, {})

        def cut(anatomy: Anatomy, kind: str, share: float) -> float:
            sites = tuple(site for site in anatomy.sites if site.kind == kind)
            bench = set_up(anatomy, sites, objective, data, request, "sampled", options, Recipe(importance="fisher"), None)  # noqa: B023
            saliency = score(bench, dense_student(anatomy, sites), 1).saliency
            kept = {site.name: np.sort(np.argsort(-saliency[site.name])[: round(share * site.units)]) for site in sites}
            return yardstick(slice_model(anatomy, kept))  # noqa: B023

        rows = []
        for kind in ("qk", "vo"):
            anatomy = with_depths(plain, {kind})
            sites = [site for site in anatomy.sites if site.kind == kind]
            principal = turned(anatomy, choose_bases(anatomy, sites, list(data.batches(8, trim=True)), options))
            for share in SHARES:
                as_is, by_rank = cut(anatomy, kind, share), cut(principal, kind, share)
                rows.append({"kind": kind, "kept": share, "kl_sliced": as_is, "kl_turned": by_rank, "ratio": as_is / by_rank})
                print(name, json.dumps(rows[-1]), flush=True)
        found[name] = rows
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
