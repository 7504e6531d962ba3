"""``onnxprune report``: render the HTML report again."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune.cli.options import Command, examples, file_option, json_option, noise_options


@click.command(cls=Command, epilog=examples("onnxprune report small.run", "onnxprune report small.run -o for-the-team.html"))
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@file_option("-o", "--out", heading="What to write", help="HTML file. Default: RUN_DIR/report.html.")
@json_option
@noise_options
def report(run_dir: Path, out: Path | None, as_json: bool, verbose: int, quiet: bool) -> None:
    """Render report.html of a run directory again, from its run.json and plan.json."""
    from onnxprune.cli.screen import Screen
    from onnxprune.report.html import write_report
    from onnxprune.report.tables import written

    screen = Screen(as_json, verbose, quiet)
    target = write_report(run_dir, out)
    screen.show(written("report", target))
    screen.result({"report": str(target)})
