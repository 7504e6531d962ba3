"""What each ingredient of the default recipe is worth, and what the recipes of others are: what is left at a share of the multiply-adds.

    python -m benchmarks.ablation --models FOLDER --task text --macs 30%
    python -m benchmarks.ablation --table             # the tables of docs/accuracy.md from the results

No clock is involved, so that a busy machine gives the same figures. All test rows; a run that is in the results is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxprune
from benchmarks.accuracy import quality
from benchmarks.tasks import EMBEDDING, NAMES, Task, task

FILE = Path(__file__).parent / "results" / "ablation.json"

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one round": {"rounds": 1},
    "eight rounds": {"rounds": 8},
    "importance fisher": {"importance": "fisher"},
    "importance magnitude": {"importance": "magnitude"},
    "one scale per unit instead of the re-fit": {"compensation": "scale"},
    "no compensation": {"compensation": "none"},
    "all layers alike": {"uniform": True},
    "true labels": {"loss": "labels"},
    "256 rows": {"samples": 256},
    "with polish": {"passes": "heads,ffn,polish"},
    "with qk and vo": {"passes": "heads,ffn,qk,vo"},
    "with qk, vo and polish": {"passes": "heads,ffn,qk,vo,polish"},
}
"""The default recipe with one thing changed."""

BASELINES: dict[str, dict[str, Any]] = {
    "magnitude, layers alike, re-fit": {"importance": "magnitude", "uniform": True},
    "Fisher at once, a scale per unit": {"importance": "fisher", "rounds": 1, "compensation": "scale"},
    "Fisher at once, re-fit": {"importance": "fisher", "rounds": 1},
    "OBS error of the layer alone, re-fit": {"importance": "obs", "rounds": 1},
}
"""What others do, by the parts of this project: the second is the method of Kwon et al. (2022) without its rearrangement."""

RECIPES = VARIANTS | BASELINES
COMPARED = ("default", "with qk and vo", "importance fisher", *BASELINES)


def run(chosen: Task, macs: str, options: dict[str, Any]) -> dict[str, float]:
    """One model and what it still knows."""
    with tempfile.TemporaryDirectory() as folder:
        result = onnxprune.prune(
            chosen.model_path, calib=chosen.calib_path, target_macs=macs, output=Path(folder) / "small.onnx", bench_seconds=0, **options
        )
        assert result.output is not None
        return quality(chosen, result.output)


def table(macs: str, recipes: Iterable[str]) -> str:
    """A line a recipe that was measured, a column a task."""
    found = [row for row in json.loads(FILE.read_text()) if row["macs"] == macs and row["variant"] in recipes]
    names = [name for name in (*NAMES, EMBEDDING) if any(row["task"] == name for row in found)]
    lines = [f"| {macs} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for variant in recipes:
        rows = {row["task"]: row for row in found if row["variant"] == variant}
        if rows:
            lines.append(f"| {variant} | {' | '.join(told(rows[name]) if name in rows else '' for name in names)} |")
    return "\n".join(lines)


def told(row: dict[str, Any]) -> str:
    if row["task"] == EMBEDDING:
        return f"{row['cosine']:.3f}, {row['rank_correlation']:.3f}"
    return f"{100 * row['accuracy']:.2f} %, {row['kl']:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    parser.add_argument("--macs", default="30%", help="share of the multiply-adds that stays")
    parser.add_argument("--variant", choices=RECIPES, action="append", help="only this recipe (repeatable)")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the tables")
    args = parser.parse_args()
    if args.table:
        shares = sorted({row["macs"] for row in json.loads(FILE.read_text())}, reverse=True)
        print("\n\n".join(table(macs, recipes) for recipes in (VARIANTS, COMPARED) for macs in shares))
        return
    for name in args.task or (*NAMES, EMBEDDING):
        chosen = task(name, args.models)
        for variant in args.variant or RECIPES:
            found = json.loads(FILE.read_text()) if FILE.is_file() else []
            key = {"task": name, "macs": args.macs, "variant": variant}
            if (variant == "true labels" and name == EMBEDDING) or any(key.items() <= row.items() for row in found):
                continue
            row = {**key, **run(chosen, args.macs, RECIPES[variant])}
            print(json.dumps(row), flush=True)
            FILE.write_text(json.dumps([*found, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
