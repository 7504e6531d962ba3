"""The documentation against the code: links, commands, options, codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from docs import generate
from onnxprune import errors
from onnxprune.cli import main
from onnxprune.passes.base import registry
from onnxprune.refusals import CODES
from tests.markdown import ROOT, broken_links, commands, fenced

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"))]
PAGES += sorted((ROOT / "samples").rglob("*.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def options_of(command: click.Command) -> set[str]:
    return {word for param in command.params if isinstance(param, click.Option) for word in param.opts if word.startswith("--")}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_parse(path: Path) -> None:
    for program, *words in commands(path):
        if program != "onnxprune" or not words or words[-1] in ("--help", "--version"):
            continue
        name, *rest = main._with_command(words)
        context = main.commands[name].make_context(name, rest)
        assert context.command.name == name


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_compiles_and_json_parses(path: Path) -> None:
    for block in fenced(path, "python"):
        compile(block, path.name, "exec")
    for block in fenced(path, "json"):
        json.loads(block)


def test_every_command_and_option_is_explained() -> None:
    text = (DOCS / "cli.md").read_text()
    missing = [name for name in main.commands if not re.search(rf"onnxprune {name}\b", text)]
    options = sorted(set().union(*(options_of(command) for command in main.commands.values())))
    assert missing + [option for option in options if option not in text] == []


def test_no_option_is_explained_that_does_not_exist() -> None:
    known = set().union(*(options_of(command) for command in main.commands.values())) | {"--help", "--version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (DOCS / "cli.md").read_text())) <= known


def test_every_refusal_code_is_registered_and_used() -> None:
    """A code that the table lacks fails when it is used; one that nothing uses has lost its meaning."""
    rooms = [path for path in (ROOT / "onnxprune").rglob("*.py") if path.name != "refusals.py"]
    assert {code for path in rooms for code in re.findall(r"\bOP\d{3}\b", path.read_text())} == set(CODES)
    with pytest.raises(ValueError, match="'OP999' is not registered"):
        errors.Refusal("OP999", "layer.0.heads", "no")


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_fresh(name: str) -> None:
    assert (DOCS / name).read_text() == generate.PAGES[name](), "make docs writes it anew"


def test_a_refusal_names_the_registered_way_out_unless_it_knows_a_better_one() -> None:
    assert errors.Refusal("OP203", "fc1", "only one neuron is left").hint == CODES["OP203"].hint
    assert errors.Refusal("OP203", "fc1", "only one neuron is left", "widen it").hint == "widen it"


def test_every_exit_code_is_explained() -> None:
    text = (DOCS / "errors.md").read_text()
    for kind in errors.OnnxPruneError.__subclasses__():
        assert re.search(rf"\b{kind.exit_code}\b", text), kind
        assert kind.__name__ in text


def test_messages_that_are_explained_are_messages_of_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "onnxprune").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may stand in several lines
    table = (DOCS / "errors.md").read_text().split("## Frequent errors")[1].split("##")[0]
    messages = re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(messages) > 12
    for message in messages:
        fixed = max(re.split(r"'[^']*'|\d\S*", message), key=len).strip()
        assert fixed in source, message


def test_every_file_of_a_run_directory_is_explained() -> None:
    text = (DOCS / "run-directory.md").read_text()
    for name in ("run.json", "plan.json", "plan.weights.npz", "costs.json", "report.html"):
        assert name in text, name


@pytest.mark.parametrize("name", registry())
def test_every_pass_has_a_page(name: str) -> None:
    assert (DOCS / "passes" / f"{name}.md").read_text().startswith(f"# {name}\n")
