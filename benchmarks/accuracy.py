"""What is left of a model at a share of its time: accuracy and divergence over measured latency, without labels.

    python -m benchmarks.accuracy --models FOLDER                  # all tasks, shares and seeds
    python -m benchmarks.accuracy --task vision --passes heads,ffn,polish --seeds 1
    python -m benchmarks.accuracy --draw                           # the picture and the tables of the results so far (needs matplotlib)

Shares are of the *finished* original, which is faster than the file as given: what pruning itself gains, in one paired, interleaved run. Of
2,048 calibration rows 768 decide and 256 choose between candidates; accuracy is that of all test rows. Results are kept run by run in
``benchmarks/results/accuracy_TASK.json``; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import spearmanr

import onnxprune
from benchmarks.tasks import EMBEDDING, NAMES, Task, cosines, hits, outputs, task
from onnxprune.errors import TargetError

RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS.parents[1] / "docs" / "images" / "accuracy.png"
SHARES = (0.5, 0.33, 0.25, 0.15)
PIPELINES = ("heads,ffn", "heads,ffn,polish", "heads,ffn,polish,int8")
ROWS = 768
MEASURES = {False: (("accuracy", "accuracy"), ("kl", "KL")), True: (("cosine", "cosine"), ("rank_correlation", "rank correlation"))}
"""What is told of classifiers, and of vectors."""


def finished_share(chosen: Task, seconds: float) -> float:
    """What of the time of the file as given its finished copy takes."""
    result = onnxprune.prune(
        chosen.model_path, calib=chosen.calib_path, target_params="100%", write_unpruned=True, samples=64, bench_seconds=seconds
    )
    assert result.benchmark is not None
    return 1 / result.benchmark.variants["finished copy"].speedup.median


def run(chosen: Task, passes: str, share: float, of_given: float, seed: int, seconds: float) -> dict[str, Any]:
    """One model: what it takes of the finished original's time, and what it still knows; of a missed target the best model there is."""
    with tempfile.TemporaryDirectory() as folder:
        output, left = Path(folder) / "small.onnx", Path(folder) / "run"
        with contextlib.suppress(TargetError):
            onnxprune.prune(
                chosen.model_path,
                calib=chosen.calib_path,
                passes=passes,
                target_latency=f"{100 * share * of_given:.2f}%",
                samples=ROWS,
                seed=seed,
                output=output,
                run_dir=left,
                bench_seconds=seconds,
                keep_best=True,
            )
        if not output.is_file():
            return {"passes": passes, "share": share, "seed": seed, "refused": True}
        record = json.loads((left / "run.json").read_text())
        variants = record["benchmark"]["variants"]
        finished, pruned = variants["finished original"]["speedup"], list(variants.values())[-1]["speedup"]
        return {
            "passes": passes,
            "share": share,
            "seed": seed,
            "measured": finished["median"] / pruned["median"],
            "interval": [finished["median"] / pruned["high"], finished["median"] / pruned["low"]],
            "wall_s": record["wall_s"],
            "polish": record["polish"],
            **quality(chosen, output),
        }


def quality(chosen: Task, model: Path) -> dict[str, float]:
    """Accuracy and divergence on all test rows; of vectors cosine and rank correlation of similarities."""
    if chosen.name == EMBEDDING:
        known, found = outputs(chosen.model_path, chosen.test), outputs(model, chosen.test)
        pairs = np.random.default_rng(0).integers(0, len(known), (20_000, 2))
        similar = [np.einsum("rw,rw->r", vectors[pairs[:, 0]], vectors[pairs[:, 1]]) for vectors in (known, found)]
        return {"cosine": float(cosines(model, chosen).mean()), "rank_correlation": float(spearmanr(*similar).statistic)}
    known, found = (outputs(path, chosen.test).astype(np.float64) for path in (chosen.model_path, model))
    logs = [log_softmax(scores, axis=1) for scores in (known, found)]
    return {
        "accuracy": float(hits(model, chosen.test).mean()),
        "dense": float(hits(chosen.model_path, chosen.test).mean()),
        "kl": float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()),
    }


def measure(chosen: Task, pipelines: list[str], shares: list[float], seeds: int, seconds: float) -> None:
    """Every run that is not there yet, kept as it ends."""
    file = RESULTS / f"accuracy_{chosen.name}.json"
    found = json.loads(file.read_text()) if file.is_file() else {"finished_share": finished_share(chosen, seconds), "runs": []}
    done = {(row["passes"], row["share"], row["seed"]) for row in found["runs"]}
    for seed in range(seeds):
        for passes in pipelines:
            for share in shares:
                if (passes, share, seed) not in done:
                    row = run(chosen, passes, share, found["finished_share"], seed, seconds)
                    print(chosen.name, json.dumps(row), flush=True)
                    found["runs"].append(row)
                    file.write_text(json.dumps(found, indent=1) + "\n")


def known() -> dict[str, dict[str, Any]]:
    """All results so far, by task; runs whose target could not be met are left out."""
    files = {name: RESULTS / f"accuracy_{name}.json" for name in (*NAMES, EMBEDDING)}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    return {name: {**content, "runs": [row for row in content["runs"] if "measured" in row]} for name, content in found.items()}


def draw() -> None:
    """Accuracy and divergence (for vectors cosine and rank correlation) over measured latency; lines are means over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = known()
    figure, axes = pyplot.subplots(2, len(found), figsize=(4.2 * len(found), 6.2), squeeze=False)
    for column, (name, content) in enumerate(found.items()):
        for axis, (measure_, label) in zip(axes[:, column], MEASURES[name == EMBEDDING], strict=True):
            for passes, rows in by_pipeline(content["runs"]).items():
                (points,) = axis.plot([100 * row["measured"] for row in rows], [row[measure_] for row in rows], "o", alpha=0.5, ms=4)
                axis.plot(
                    *np.transpose([mean(group, measure_) for group in by_share(rows).values()]), "-", color=points.get_color(), label=passes
                )
            if measure_ == "accuracy":
                axis.axhline(content["runs"][0]["dense"], color="grey", lw=0.8, ls="--", label="dense")
                axis.legend(fontsize=7)
            if measure_ == "kl":
                axis.set_yscale("log")
            axis.set(title=name, xlabel="% of the finished original's latency", ylabel=label)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})


def by_pipeline(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {passes: [row for row in runs if row["passes"] == passes] for passes in dict.fromkeys(row["passes"] for row in runs)}


def by_share(runs: list[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    return {share: [row for row in runs if row["share"] == share] for share in sorted({row["share"] for row in runs}, reverse=True)}


def mean(rows: list[dict[str, Any]], measure_: str) -> tuple[float, float]:
    """Percent of the latency, and the measure, over seeds."""
    return 100 * float(np.mean([row["measured"] for row in rows])), float(np.mean([row[measure_] for row in rows]))


def table() -> str:
    """One line a pipeline and share: measured latency and quality, means over seeds with their range."""
    lines = []
    for name, content in known().items():
        (first, first_label), (second, second_label) = MEASURES[name == EMBEDDING]
        dense = f", dense {100 * content['runs'][0]['dense']:.2f} %" if name != EMBEDDING else ""
        lines += [
            f"### {name}{dense}",
            "",
            f"| passes | asked | measured | {first_label} | {second_label} | seeds |",
            "|---|---|---|---|---|---|",
        ]
        for passes, runs in by_pipeline(content["runs"]).items():
            for share, rows in by_share(runs).items():
                shown = [told(rows, measure_) for measure_ in (first, second)]
                lines.append(f"| {passes} | {100 * share:.0f} % | {mean(rows, first)[0]:.1f} % | {shown[0]} | {shown[1]} | {len(rows)} |")
        lines.append("")
    return "\n".join(lines)


def told(rows: list[dict[str, Any]], measure_: str) -> str:
    values = [row[measure_] for row in rows]
    middle, low, high = float(np.mean(values)), min(values), max(values)
    if measure_ == "accuracy":
        return f"{100 * middle:.2f} %" + (f" ({100 * low:.1f} to {100 * high:.1f})" if len(rows) > 1 else "")
    return f"{middle:.2g}" if measure_ == "kl" else f"{middle:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    parser.add_argument("--passes", action="append", help=f"only this pipeline (repeatable; default: {' and '.join(PIPELINES)})")
    parser.add_argument("--share", type=float, action="append", help="only this share of the finished original's time (repeatable)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="most time of one benchmark")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw the picture and print the tables")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in () if args.draw else args.task or (*NAMES, EMBEDDING):
        measure(task(name, args.models), args.passes or list(PIPELINES), args.share or list(SHARES), args.seeds, args.seconds)
    if args.draw:
        draw()
        print(table())


if __name__ == "__main__":
    main()
