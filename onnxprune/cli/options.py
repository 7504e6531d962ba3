"""Options that several commands share, under headings, and help that teaches by example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_HEADINGS = ("What to reach", "What to prune", "Data", "How to decide", "Where to run", "What to write", "Output")
_REST = "Options"


class Option(click.Option):
    """An option under a heading of the help page."""

    def __init__(self, *args: Any, heading: str = _REST, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """A command whose help lists options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if row is not None:
                groups.setdefault(getattr(param, "heading", _REST), []).append(row)
        for heading in (*_HEADINGS, _REST):
            if heading in groups:
                with formatter.section(heading):
                    formatter.write_dl(groups[heading])


class InputShape(click.ParamType):  # type: ignore[type-arg]
    """``name:1x128`` as (name, (1, 128))."""

    name = "name:1x128"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, colon, sizes = str(value).rpartition(":")
        parts = sizes.lower().split("x")
        if not colon or not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a shape; write the input's name and its sizes, such as input_ids:1x128", param, ctx)
        return name, tuple(int(part) for part in parts)


def examples(*lines: str) -> str:
    """An epilog that click does not re-wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def option(*names: str, heading: str, **kwargs: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=Option, heading=heading, **kwargs)


def beside(path: Path, ending: str) -> Path:
    """``model.onnx`` with another ending, in the same folder."""
    return path.parent / (path.stem + ending)


def stack(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators as one, in reading order."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def file_option(*names: str, heading: str, help: str, metavar: str = "FILE") -> Callable[[Any], Any]:
    return option(*names, heading=heading, type=click.Path(path_type=Path), metavar=metavar, help=help)


model_argument = click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")

json_option = option("--json", "as_json", heading="Output", is_flag=True, help="Result as JSON on stdout; all else stays on stderr.")
noise_options = stack(
    option("-v", "--verbose", heading="Output", count=True, help="Say what is done (-vv: in detail) and show tracebacks."),
    option("-q", "--quiet", heading="Output", is_flag=True, help="No tables and no progress, only errors."),
)
calib_option = option(
    "--calib",
    heading="Data",
    metavar="PATH",
    help=(
        ".npz with one array per input (axis 0 = samples, 'labels' optional), a folder of such files, script.py:function, or random. "
        "Default: MODEL with the ending .calib.npz."
    ),
)
purpose_option = option(
    "--purpose",
    heading="Data",
    type=click.Choice(["classes", "vector"]),
    help="What that output means, where its name misleads: class scores, or a vector to stay near.",
)
output_name_option = option(
    "--output", "output_name", heading="Data", metavar="NAME", help="Graph output to preserve, if there are several."
)
seed_option = option(
    "--seed", heading="How to decide", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all random draws."
)
runtime_options = stack(
    option(
        "--provider",
        heading="Where to run",
        default="cpu",
        show_default=True,
        metavar="NAME",
        help="cpu, cuda, tensorrt; must start, or it is an error.",
    ),
    option(
        "--threads",
        heading="Where to run",
        type=click.IntRange(min=0),
        default=1,
        show_default=True,
        help="Threads of onnxruntime; 0 lets it choose.",
    ),
)
shape_option = option(
    "--input-shape",
    "input_shapes",
    heading="Where to run",
    type=InputShape(),
    multiple=True,
    help="Shape of the timed request, repeatable. Default: one calibration sample.",
)
external_data_option = option(
    "--external-data",
    heading="What to write",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    callback=lambda context, param, value: {"auto": None, "always": True, "never": False}[value],
    help="Weights in OUT.data beside the file; auto does so above 1.9 GB.",
)

target_options = stack(
    # A value-less --target-latency means auto: as fast as the allowed loss permits.
    option(
        "--target-latency",
        heading="What to reach",
        is_flag=False,
        flag_value="auto",
        metavar="[5ms|60%|auto]",
        help="Latency to reach; without a value: as fast as --max-drop allows. The default.",
    ),
    option("--target-macs", heading="What to reach", metavar="50%|300M", help="Multiply-adds of one request."),
    option("--target-params", heading="What to reach", metavar="50%|10M", help="Number of parameters."),
    option("--target-size", heading="What to reach", metavar="50%|40MB", help="Size of the file."),
)
deciding_options = stack(
    option(
        "--max-drop",
        heading="What to reach",
        metavar="1%",
        help="Largest loss of accuracy (or agreement) on held-back rows; more fails with exit code 4.",
    ),
    option(
        "--passes",
        heading="What to prune",
        metavar="A,B",
        help="Passes to run; see onnxprune passes. Default: heads,ffn.",
    ),
    option(
        "--preset",
        heading="What to prune",
        type=click.Choice(["fastformers"]),
        help="In place of --passes: heads,ffn,int8 with equal numbers of heads and neurons in every layer.",
    ),
    option(
        "--no-finishing",
        "finishing",
        heading="What to prune",
        flag_value=False,
        default=True,
        help="Leave out the rewrites that speed up the unpruned model as well.",
    ),
    option(
        "--keep", heading="What to prune", multiple=True, metavar="REGEX", help="Sites to leave whole, repeatable; a pattern must match."
    ),
    option("--exclude", heading="What to prune", multiple=True, metavar="REGEX", help="The same as --keep, as the word other tools use."),
    calib_option,
    option(
        "--samples",
        heading="Data",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Most calibration rows to decide on; at least a quarter of all rows is held back.",
    ),
    file_option(
        "--keep-ids",
        heading="What to prune",
        help="Token ids that the vocab pass keeps besides those of the data: text, JSON list or .npz.",
    ),
    option(
        "--vocab-map",
        heading="What to prune",
        type=click.Choice(["graph", "file"]),
        default="graph",
        show_default=True,
        help="Who maps token ids to the rows that the vocab pass keeps: the model, or your tokenizer by OUT.vocab.json.",
    ),
    option(
        "--hidden-keep",
        heading="What to prune",
        metavar="SHARE",
        help="How much of the residual stream's width the hidden pass keeps, such as 75%, which is the default.",
    ),
    option(
        "--token-policy",
        heading="What to prune",
        type=click.Choice(["auto", "drop", "package", "merge", "drop-merge", "static", "grid", "threshold"]),
        default="auto",
        show_default=True,
        help="What becomes of tokens that the tokens pass takes out: nothing, one token of their mean, part of a similar or near one.",
    ),
    file_option(
        "--tokenizer",
        heading="Data",
        help="The model's tokenizer.json: the report then shows the words that the tokens pass takes out, not their ids.",
    ),
    output_name_option,
    purpose_option,
    option(
        "--loss",
        heading="How to decide",
        type=click.Choice(["sampled", "labels"]),
        default="sampled",
        show_default=True,
        help="Gradients of labels drawn from the model, or of 'labels' in the data.",
    ),
    option("--importance", heading="How to decide", default="kfac", show_default=True, metavar="NAME", help="How units are scored."),
    option(
        "--protect-classes",
        heading="How to decide",
        is_flag=True,
        help="Also search by class, and take the model whose worst class agrees better with the original.",
    ),
    option(
        "--compensation",
        heading="How to decide",
        type=click.Choice(["refit", "scale", "none"]),
        default="refit",
        show_default=True,
        help="How the layers that stay make up for what goes.",
    ),
    option(
        "--rounds",
        heading="How to decide",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        help="Score, cut, re-fit so many times on the way.",
    ),
    option(
        "--int8",
        heading="How to decide",
        type=click.Choice(["auto", "dynamic", "static"]),
        default="auto",
        show_default=True,
        help="How the int8 pass scales activations: at run time, by calibration, or what measures best.",
    ),
    seed_option,
    runtime_options,
    shape_option,
)
settings_options = stack(target_options, deciding_options)
