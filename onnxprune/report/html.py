"""report.html: one self-contained file (no scripts, nothing loaded), rendered from run.json."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxprune.errors import InputError
from onnxprune.graph.model import atomic_file
from onnxprune.report import figures, numbers, story, token_pictures

if TYPE_CHECKING:
    from jinja2 import Template

_SCHEMA = "onnxprune.run/1"


def render(record: Mapping[str, Any]) -> str:
    """The report of one run.

    Args:
        record: content of run.json; ``plan_kept`` (site -> kept unit indices), where present, shows which heads stayed.
    """
    benchmark = record.get("benchmark")
    comparison = record.get("verification", {}).get("against_original")
    chain = record.get("chain") or ({"pruned": comparison} if comparison else {})
    known = record.get("int8") or {}
    return _template().render(
        record=record,
        verdict=story.verdict(record),
        headline=story.headline(record),
        speed=story.speed(record),
        split=story.split(record),
        asked=story.asked(record),
        quality=story.quality(comparison),
        comparison=comparison,
        fidelity=record.get("verification", {}).get("masked_equals_sliced"),
        bars=figures.latency_bars(benchmark) if benchmark else [],
        spread=figures.latency_boxes(benchmark) if benchmark else None,
        layers=figures.layers(record),
        accuracy=figures.intervals(chain),
        chain=chain,
        measures=story.measures(chain),
        measured_as=story.measured_as,
        kept=story.kept(record),
        finishing=record.get("finishing", []),
        int8=known if known.get("trials") else None,
        sensitivity=figures.sensitivity(known) if known.get("groups") else None,
        divergence=story.divergence(record),
        command=shlex.join(record["command"]),
        tokens=token_pictures.tokens(record),
        numbers=numbers,
        variants=(benchmark or {}).get("variants", {}),
    )


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Render the run directory's record to ``out`` (default: report.html in it) and return where it went.

    Raises:
        InputError: no run.json of this schema there, or the file cannot be written.
    """
    target = out or run_dir / "report.html"
    record = _read(run_dir / "run.json")
    if record.get("schema") != _SCHEMA:
        raise InputError(f"{run_dir / 'run.json'} has schema {record.get('schema')!r}; this version reads {_SCHEMA}")
    plan = run_dir / "plan.json"
    if plan.is_file():
        record["plan_kept"] = _read(plan).get("kept", {})
    try:
        text = render(record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{run_dir / 'run.json'} is damaged: {type(error).__name__} {error}") from error
    try:
        with atomic_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report to {target}: {error.strerror or error}") from error
    return target


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is not a run directory: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object")
    return content


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("onnxprune.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("template.html.j2")
