"""``onnxprune passes``: what passes there are."""

from __future__ import annotations

import click

from onnxprune.cli.options import Command, examples, json_option


@click.command(cls=Command, epilog=examples("onnxprune passes", "onnxprune passes heads", "onnxprune passes --json"))
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or say what one pass does and needs."""
    from onnxprune.cli.screen import Screen
    from onnxprune.passes.base import registry, select
    from onnxprune.report.tables import pass_details, pass_facts, pass_table

    screen = Screen(as_json)
    chosen = select([name] if name else registry())
    screen.print(pass_details(chosen[0]) if name else pass_table(chosen))
    screen.result([pass_facts(item) for item in chosen])
