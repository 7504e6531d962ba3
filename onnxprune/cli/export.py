"""``onnxprune export``: a transformers model folder to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.cli.options import Command, examples, external_data_option, file_option, json_option, noise_options, option, seed_option

# Spelled out here because help imports nothing beyond click; a test compares them with the tasks there are.
TASKS = (
    "auto", "encoder", "sequence-classification", "token-classification", "question-answering", "embedding", "image-classification",
    "causal-lm",
)  # fmt: skip


@click.command(
    cls=Command,
    epilog=examples(
        "onnxprune export my-bert -o model.onnx",
        "onnxprune export my-bert -o model.onnx --calib-from train.csv --column text --label-column label",
        "onnxprune export my-minilm --task embedding -o embed.onnx --calib-from sentences.txt",
        "onnxprune export my-vit -o vit.onnx --calib-from images/    # subfolders named as classes give labels",
        "onnxprune export my-llama --cache -o decoder.onnx",
        "onnxprune model.onnx --target-latency 60%                   # finds model.calib.npz beside it",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@option(
    "--task",
    heading="What to write",
    type=click.Choice(TASKS),
    default="auto",
    show_default=True,
    metavar="TASK",
    help=f"What the graph computes: {', '.join(TASKS)}; auto reads it off config.json.",
)
@option(
    "--cache",
    heading="What to write",
    is_flag=True,
    help="For causal-lm: keys and values of earlier tokens as inputs and outputs.",
)
@option(
    "--exporter",
    heading="How to decide",
    type=click.Choice(("auto", "dynamo", "torchscript")),
    default="auto",
    show_default=True,
    help="auto runs both and takes the graph that onnxruntime runs faster here.",
)
@option("--opset", heading="What to write", type=int, metavar="N", help="Opset of the dynamo exporter, which it asks for. Default: 18.")
@file_option("-o", "--out", heading="What to write", help="ONNX file. Default: DIR with the ending .onnx.")
@file_option(
    "--calib-from",
    heading="Data",
    metavar="PATH",
    help="Texts (.txt, .csv, .jsonl) or a folder of images, written as calibration data beside OUT with the ending .calib.npz.",
)
@option("--column", "columns", heading="Data", multiple=True, metavar="NAME", help="Column of texts; twice for pairs. Default: text.")
@option("--label-column", heading="Data", metavar="NAME", help="Column of classes, by number or by name.")
@option(
    "--samples",
    heading="Data",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Most rows, chosen at random.",
)
@option("--max-length", heading="Data", type=click.IntRange(min=1), metavar="N", help="Most tokens of a row. Default: of DIR, at most 512.")
@seed_option
@external_data_option
@json_option
@noise_options
def export(folder: Path, out: Path | None, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Export the transformers model in DIR (config.json and safetensors) to ONNX, and check it against torch.

    Nothing is downloaded. A graph that differs from the network is not written (exit code 4). Needs: pip install 'onnxprune[export]'.
    """
    from onnxprune.cli.screen import Screen
    from onnxprune.export.job import export_model
    from onnxprune.report.exported import export_tables

    screen = Screen(as_json, verbose, quiet)
    target = out or folder.parent / f"{folder.resolve().name}.onnx"
    with screen.progress() as progress:
        result = export_model(folder, target, progress=progress, **options).as_dict()
    screen.show(*export_tables(result))
    screen.result({"schema": "onnxprune.export/1", **result})
