"""``onnxprune family``: several sizes of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.cli.options import (
    Command,
    beside,
    deciding_options,
    examples,
    external_data_option,
    file_option,
    json_option,
    model_argument,
    noise_options,
    option,
)


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune family model.onnx --targets 80%,50%,30% --calib data.npz -o sizes",
        "onnxprune family model.onnx --targets 70%,40% --of macs --calib data.npz -o sizes",
        "onnxprune family model.onnx --targets 5ms,3ms --input-shape input_ids:1x128 --calib data.npz -o sizes --json",
    ),
)
@model_argument
@option("--targets", heading="What to reach", required=True, metavar="80%,50%,30%", help="What the models are to reach, one each.")
@option(
    "--of",
    "quantity",
    heading="What to reach",
    type=click.Choice(["latency", "macs", "params", "size"]),
    default="latency",
    show_default=True,
    help="What --targets counts.",
)
@deciding_options
@file_option("-o", "--out", heading="What to write", metavar="DIR", help="Folder for the models. Default: MODEL with the ending .family.")
@external_data_option
@option("--no-bench", heading="What to write", is_flag=True, help="Skip the paired benchmark of all models.")
@json_option
@noise_options
def family(model: Path, out: Path | None, no_bench: bool, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Prune MODEL to several targets in one run: models whose kept units are nested, and family.json about them all."""
    from onnxprune.cli.screen import Screen, command_line
    from onnxprune.nested import family as run
    from onnxprune.report.tables import benchmark_note, family_table

    screen = Screen(as_json, verbose, quiet)
    options["input_shapes"] = dict(options["input_shapes"])
    with screen.progress() as progress:
        found = run(
            model,
            output=out or beside(model, ".family"),
            progress=progress,
            command=command_line(),
            bench_seconds=0 if no_bench else 60,
            **options,
        )
    note = [benchmark_note(found.manifest["benchmark"])] if found.benchmark else []
    screen.show(family_table(found.manifest, found.folder), *note)
    screen.result(found.manifest)
