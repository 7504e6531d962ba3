"""``onnxprune doctor``: does this installation work?"""

from __future__ import annotations

import click

from onnxprune.cli.options import Command, examples, json_option


@click.command(cls=Command, epilog=examples("onnxprune doctor", "onnxprune doctor --json    # the same facts as in run.json"))
@json_option
def doctor(as_json: bool) -> None:
    """Show versions and cores, and start every execution provider. Exit code 6 if onnxruntime is missing or damaged."""
    from onnxprune.cli.screen import Screen
    from onnxprune.errors import RuntimeUnavailable
    from onnxprune.report.tables import doctor_table
    from onnxprune.runtime.environment import describe, providers_that_start

    screen = Screen(as_json)
    facts = describe()
    if facts["conflicts"]:
        screen.print(doctor_table(facts, {}))
        raise RuntimeUnavailable("; ".join(facts["conflicts"]))
    providers = providers_that_start()
    screen.print(doctor_table(facts, providers))
    screen.result({**facts, "providers": providers})
