"""``onnxprune prune``: decide, apply, verify, benchmark, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.cli.options import (
    Command,
    beside,
    examples,
    external_data_option,
    file_option,
    json_option,
    model_argument,
    noise_options,
    option,
    settings_options,
)


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune model.onnx --passes heads,ffn --target-latency 5ms --calib data.npz -o small.onnx",
        "onnxprune model.onnx --target-latency --max-drop 0.5% --calib data.npz",
        "onnxprune model.onnx --target-latency 60% --input-shape input_ids:1x128 --threads 4",
        "onnxprune model.onnx --target-params 50% --keep 'layer\\.0\\.' --calib data.npz",
        "onnxprune model.onnx --passes heads,ffn,int8 --target-latency 25% --calib data.npz",
        "onnxprune model.onnx --passes int8 --calib data.npz      # as far as a 1% loss allows",
        "onnxprune model.onnx --preset fastformers --target-latency 30% --calib data.npz",
        "onnxprune model.onnx --target-latency 60% --json > run.json",
    ),
)
@model_argument
@settings_options
@file_option("-o", "--out", heading="What to write", help="Pruned model. Default: MODEL with the ending .pruned.onnx.")
@file_option(
    "--run-dir",
    heading="What to write",
    metavar="DIR",
    help="Folder for run.json, plan.json, costs.json and report.html. Default: OUT with the ending .run.",
)
@external_data_option
@option("--dry-run", heading="What to write", is_flag=True, help="Decide, write the run directory, but no model.")
@option("--keep-best", heading="What to write", is_flag=True, help="Write the model even if --max-drop fails (the exit code stays 4).")
@option("--write-unpruned", heading="What to write", is_flag=True, help="Write a copy even if the target is met without pruning.")
@option("--no-bench", heading="What to write", is_flag=True, help="Skip the final paired benchmark.")
@json_option
@noise_options
def prune(
    model: Path, out: Path | None, run_dir: Path | None, no_bench: bool, as_json: bool, verbose: int, quiet: bool, **options: Any
) -> None:
    """Make MODEL smaller and faster, verify it, benchmark it, and write a report."""
    from onnxprune.api import prune as run
    from onnxprune.cli.screen import Screen, command_line
    from onnxprune.report.tables import run_tables

    screen = Screen(as_json, verbose, quiet)
    target = out or beside(model, ".pruned.onnx")
    folder = run_dir or beside(target, ".run")
    options["input_shapes"] = dict(options["input_shapes"])
    with screen.showing_record(run_tables, folder), screen.progress() as progress:
        result = run(
            model, output=target, run_dir=folder, progress=progress, command=command_line(), bench_seconds=0 if no_bench else 30, **options
        )
    screen.show(*run_tables(result.record, folder))
    screen.result({**result.record, "run_dir": str(folder)})
