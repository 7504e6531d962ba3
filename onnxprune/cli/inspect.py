"""``onnxprune inspect``: what can be pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.cli.options import Command, calib_option, examples, json_option, model_argument, noise_options, option, shape_option


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune inspect model.onnx",
        "onnxprune inspect model.onnx --time              # and what each costs in milliseconds here",
        "onnxprune inspect model.onnx --why layer.3       # the sites of one layer in full: what is cut, who reads it, what is tied to it",
        "onnxprune inspect model.onnx --why /head/MatMul  # why this node is part of no site",
        "onnxprune inspect model.onnx --input-shape input_ids:1x384 --json",
    ),
)
@model_argument
@option(
    "--why",
    heading="What to prune",
    metavar="NAME",
    help="Explain a refusal code, a site, a node or a tensor, or all that a part of a name finds: what is cut there, or why nothing is.",
)
@option("--time", heading="What to prune", is_flag=True, help="Also measure the share of time of each site, as a search would (seconds).")
@calib_option
@shape_option
@json_option
@noise_options
def inspect(
    model: Path, why: str | None, time: bool, calib: str | None, input_shapes: Any, as_json: bool, verbose: int, quiet: bool
) -> None:
    """List what can be pruned in MODEL with its parameters and multiply-adds, and what cannot and why."""
    from onnxprune.api import inspect as run
    from onnxprune.cli.screen import Screen
    from onnxprune.report.tables import inspect_tables, why_tables

    screen = Screen(as_json, verbose, quiet)
    found = run(model, calib=calib, input_shapes=dict(input_shapes), time=time, why=why)
    screen.print(*(inspect_tables(found) if why is None else why_tables(found)))
    screen.result(found)
