"""What each ingredient of the default recipe is worth: accuracy and divergence at a share of the multiply-adds, one ingredient changed.

    python -m benchmarks.ablation --models FOLDER --task text --macs 30%

No clock is involved, so that a busy machine gives the same figures. All test rows; a run that is in the results is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import onnxprune
from benchmarks.accuracy import quality
from benchmarks.tasks import EMBEDDING, NAMES, Task, task

RESULTS = Path(__file__).parent / "results"

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
}


def run(chosen: Task, macs: str, options: dict[str, Any]) -> dict[str, float]:
    """One model and what it still knows."""
    with tempfile.TemporaryDirectory() as folder:
        result = onnxprune.prune(
            chosen.model_path, calib=chosen.calib_path, target_macs=macs, output=Path(folder) / "small.onnx", bench_seconds=0, **options
        )
        assert result.output is not None
        return quality(chosen, result.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    parser.add_argument("--macs", default="30%", help="share of the multiply-adds that stays")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="only this variant (repeatable)")
    args = parser.parse_args()
    file = RESULTS / "ablation.json"
    for name in args.task or (*NAMES, EMBEDDING):
        chosen = task(name, args.models)
        for variant in args.variant or VARIANTS:
            found = json.loads(file.read_text()) if file.is_file() else []
            key = {"task": name, "macs": args.macs, "variant": variant}
            if (variant == "true labels" and name == EMBEDDING) or any(key.items() <= row.items() for row in found):
                continue
            row = {**key, **run(chosen, args.macs, VARIANTS[variant])}
            print(json.dumps(row), flush=True)
            file.write_text(json.dumps([*found, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
