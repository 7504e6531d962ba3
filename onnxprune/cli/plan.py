"""``onnxprune plan``: decide only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.cli.options import Command, beside, examples, file_option, json_option, model_argument, noise_options, settings_options


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune plan model.onnx --target-latency 60% --calib data.npz -o plan.json",
        "onnxprune plan model.onnx --passes heads,ffn,int8 --target-latency 25% --calib data.npz -o plan.json",
        "onnxprune plan model.onnx --target-macs 50% --exclude ffn --calib data.npz -o plan.json",
        "onnxprune apply model.onnx plan.json -o small.onnx",
    ),
)
@model_argument
@settings_options
@file_option("-o", "--out", heading="What to write", help="Plan. Default: MODEL with the ending .plan.json.")
@file_option("--run-dir", heading="What to write", metavar="DIR", help="Also leave a run directory here.")
@json_option
@noise_options
def plan(model: Path, out: Path | None, run_dir: Path | None, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Decide what goes, write it to a file, and write no model."""
    from onnxprune.api import prune as run
    from onnxprune.cli.screen import Screen, command_line
    from onnxprune.graph.model import load
    from onnxprune.outputs import input_files, plan_output
    from onnxprune.report.tables import run_tables, written

    screen = Screen(as_json, verbose, quiet)
    target = plan_output(out or beside(model, ".plan.json"), input_files(load(model), options["calib"], keep_ids=options["keep_ids"]))
    options["input_shapes"] = dict(options["input_shapes"])
    with screen.progress() as progress:
        result = run(model, dry_run=True, run_dir=run_dir, progress=progress, command=command_line(), **options)
    result.plan.save(target)
    screen.show(*run_tables(result.record, run_dir), written("plan", target))
    screen.result(result.plan.as_dict())
