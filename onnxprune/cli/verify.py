"""``onnxprune verify``: compare two models on data."""

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
    output_name_option,
    runtime_options,
    seed_option,
)


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune verify model.onnx small.onnx --calib test.npz",
        "onnxprune verify model.onnx small.onnx --calib test.npz --max-drop 1%   # exit code 4 if more is lost",
        "onnxprune verify model.onnx small.onnx --calib test.npz --json",
    ),
)
@click.argument("original", type=click.Path(path_type=Path), metavar="A")
@click.argument("model", type=click.Path(path_type=Path), metavar="B")
@calib_option
@option("--samples", heading="Data", type=click.IntRange(min=1), help="Most rows to compare on. Default: all.")
@output_name_option
@option("--max-drop", heading="What to reach", metavar="1%", help="Largest loss of B; more fails with exit code 4.")
@seed_option
@runtime_options
@json_option
@noise_options
def verify(original: Path, model: Path, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Compare model B with the original A on the same samples: accuracy, agreement, divergence."""
    from onnxprune.api import verify as run
    from onnxprune.cli.screen import Screen
    from onnxprune.report.tables import quality_table

    screen = Screen(as_json, verbose, quiet)
    with screen.showing_record(lambda record: [quality_table(record)]):
        result = run(original, model, **options)
    screen.print(quality_table(result.as_dict()))
    screen.result({"schema": "onnxprune.verify/1", **result.as_dict()})
