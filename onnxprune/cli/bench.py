"""``onnxprune bench``: paired benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.cli.options import (
    Command,
    calib_option,
    examples,
    json_option,
    noise_options,
    option,
    runtime_options,
    seed_option,
    shape_option,
)


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune bench model.onnx small.onnx --calib data.npz",
        "onnxprune bench model.onnx small.onnx --input-shape input_ids:1x128 --threads 4",
        "onnxprune bench a.onnx b.onnx c.onnx --seconds 120 --json",
    ),
)
@click.argument("models", type=click.Path(path_type=Path), metavar="A B ...", nargs=-1, required=True)
@calib_option
@option("--seconds", heading="Where to run", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Most time to measure.")
@seed_option
@runtime_options
@shape_option
@json_option
@noise_options
def bench(models: tuple[Path, ...], input_shapes: Any, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Time models in turns on the same request, and compare their outputs on the data of --calib; A is the reference of both."""
    from onnxprune.api import bench as run
    from onnxprune.cli.screen import Screen
    from onnxprune.report.tables import benchmark_note, benchmark_table

    screen = Screen(as_json, verbose, quiet)
    with screen.progress() as progress:
        progress("benchmark", 0, 1)
        result = run(models, input_shapes=dict(input_shapes), **options).as_dict()
    screen.print(benchmark_table(result), benchmark_note(result))
    screen.result({"schema": "onnxprune.bench/1", **result})
