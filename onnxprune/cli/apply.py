"""``onnxprune apply``: replay a plan."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune.cli.options import Command, beside, examples, external_data_option, file_option, json_option, model_argument, noise_options


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune apply model.onnx plan.json -o small.onnx",
        "onnxprune apply model.onnx small.run/plan.json -o again.onnx    # the same bytes as small.onnx",
    ),
)
@model_argument
@click.argument("plan", type=click.Path(path_type=Path), metavar="PLAN")
@file_option("-o", "--out", heading="What to write", help="Pruned model. Default: MODEL with the ending .pruned.onnx.")
@external_data_option
@json_option
@noise_options
def apply(model: Path, plan: Path, out: Path | None, external_data: bool | None, as_json: bool, verbose: int, quiet: bool) -> None:
    """Apply PLAN to the MODEL it was made for. Needs no data; the same plan gives the same bytes."""
    from onnxprune.api import apply as run
    from onnxprune.cli.screen import Screen
    from onnxprune.report.tables import plan_tables, written
    from onnxprune.search.plan import load_plan

    screen = Screen(as_json, verbose, quiet)
    decided = load_plan(plan)
    target = out or beside(model, ".pruned.onnx")
    result = run(model, decided, output=target, external_data=external_data)
    screen.show(*plan_tables(decided), written("model", target))
    screen.result({"output": str(target), "parameters": result.parameters, "plan_sha256": decided.sha256, "removed": decided.removed})
