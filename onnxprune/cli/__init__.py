"""The command line. Commands hold no logic: they call :mod:`onnxprune.api` and print with :mod:`onnxprune.report`.

Only click is imported here; everything else waits until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import click

from onnxprune import __version__
from onnxprune.cli.apply import apply
from onnxprune.cli.bench import bench
from onnxprune.cli.doctor import doctor
from onnxprune.cli.export import export
from onnxprune.cli.family import family
from onnxprune.cli.inspect import inspect
from onnxprune.cli.options import SETTINGS, examples
from onnxprune.cli.passes import passes
from onnxprune.cli.plan import plan
from onnxprune.cli.program import Program
from onnxprune.cli.prune import prune
from onnxprune.cli.report import report
from onnxprune.cli.verify import verify


@click.group(
    cls=Program,
    context_settings=SETTINGS,
    epilog=examples(
        "onnxprune model.onnx --passes heads,ffn --target-latency 5ms --calib data.npz -o small.onnx",
        "onnxprune model.onnx --passes heads,ffn,int8 --target-latency 25% --calib data.npz",
        "onnxprune model.onnx --passes int8              # int8 alone; --preset fastformers: one known pipeline",
        "onnxprune model.onnx --target-latency          # as fast as a 1% loss allows, data in model.calib.npz",
        "onnxprune inspect model.onnx                   # what can be pruned, what cannot and why",
        "onnxprune verify model.onnx small.onnx --calib test.npz --max-drop 1%",
        "onnxprune bench model.onnx small.onnx          # paired latency with an interval",
    ),
)
@click.version_option(__version__, "--version", message="%(prog)s %(version)s")
def main() -> None:
    """Prune transformer ONNX files after training to a latency you name, and prove the result in onnxruntime.

    The first word may be a command or a model: `onnxprune MODEL ...` is `onnxprune prune MODEL ...`.
    """


for command in (prune, family, inspect, plan, apply, verify, bench, export, passes, doctor, report):
    main.add_command(command)
