"""Do the errors of sites add up? The divergence of cutting every site alone against that of cutting all of them together.

    python -m benchmarks.additivity --models FOLDER

The search counts on it: one knapsack compares heads and neurons of all layers by what each would cost alone. The units are those that the
default recipe keeps at a share of the multiply-adds; every cut is re-fitted; divergence is that of calibration rows that took no part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks.tasks import EMBEDDING, NAMES, task
from onnxprune.calibration.objective import choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.passes.choice import choose
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.workbench import Recipe, dense_student, set_up
from onnxprune.request import request_feeds
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search.costs import counted_costs
from onnxprune.verification import Yardstick

RESULTS = Path(__file__).parent / "results" / "additivity.json"
SHARES = (0.8, 0.6, 0.4)
ROWS = 512
JUDGES = 512


def of_task(name: str, models: Path | None) -> list[dict[str, float]]:
    chosen = task(name, models)
    given = load(chosen.model_path)
    data = load_calibration(chosen.calib_path, given, samples=ROWS + JUDGES)
    rows, judges = data.take(slice(0, ROWS)), data.take(slice(ROWS, None))
    model, profile = canonicalise(given)
    anatomy = study(model, profile)
    sites = tuple(site for site in anatomy.sites if site.kind in ("heads", "ffn"))
    objective, options = choose_objective(anatomy), RuntimeOptions(threads=1)
    request = request_feeds(given, data, {})
    bench = set_up(anatomy, sites, objective, rows, request, "sampled", options, Recipe(), None)
    yardstick = Yardstick(given, judges, objective, options)
    dense = dense_student(anatomy, sites)
    scores = score(bench, dense, 1)
    table = counted_costs(anatomy, sites, "macs", request)
    found = []
    for share in SHARES:
        kept = choose(bench, dense, scores, table, table.fixed + share * (table.full - table.fixed))
        assert kept is not None
        narrowed = [site for site in sites if len(kept[site.name]) < site.units]
        alone = [yardstick(cut(bench, {**dense.kept, site.name: kept[site.name]}).model) for site in narrowed]
        guessed = [float(scores.saliency[site.name][np.setdiff1d(np.arange(site.units), kept[site.name])].sum()) / 2 for site in narrowed]
        found.append(
            {
                "share": share,
                "sites": len(narrowed),
                "kl_together": yardstick(cut(bench, kept).model),
                "sum_of_kl_alone": float(np.sum(alone)),
                "predicted": float(np.sum(guessed)),
                "rank_correlation_of_sites": float(spearmanr(guessed, alone).statistic),
            }
        )
        print(name, json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in args.task or (*NAMES, EMBEDDING):
        found[name] = of_task(name, args.models)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
