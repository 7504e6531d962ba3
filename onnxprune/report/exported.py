"""Terminal tables of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from onnxprune.report.numbers import count, figures, milliseconds, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

Record = Mapping[str, Any]


def export_tables(record: Record) -> list[RenderableType]:
    """What was written, and how the exporters compare. ``record``: :meth:`onnxprune.export.job.ExportResult.as_dict`."""
    return [_facts(record), _attempts(record)]


def _facts(record: Record) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("model", f"{record['output'] or 'not written'}, opset {record['opset']}, {count(record['parameters'])} parameters"),
        ("task", f"{record['task']}: {_names(record['inputs'])} -> {_names(record['outputs'])}"),
    ]
    if record["calibration"]:
        shapes = ", ".join(f"{name} {shape}" for name, shape in record["calibration_shapes"].items() if 0 not in shape)
        rows.append(("data", f"{record['calibration']}: {shapes}"))
    for name, value in (*rows, ("took", seconds(record["wall_s"]))):
        table.add_row(name, Text(value))
    return table


def _attempts(record: Record) -> Table:
    timing = record["timing"]
    shape = "" if timing is None else "x".join(map(str, next(iter(timing["input_shapes"].values()))))
    table = Table(title=f"Exporters{f' (timed on {shape})' if shape else ''}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("exporter", "opset", "largest difference to torch", "latency", ""):
        table.add_column(heading, justify="left" if heading in ("exporter", "") else "right")
    for attempt in record["attempts"]:
        name, parity = attempt["exporter"], attempt["parity"]
        found = [case["relative_error"] for case in (parity or {"cases": []})["cases"]]
        worst = "-" if not found or None in found else figures(max(found))
        latency = milliseconds(timing["latency_ms"].get(name)) if timing else "-"
        note = "taken" if name == record["exporter"] else attempt["failure"] or "slower, or no faster"
        table.add_row(name, str(attempt["opset"]), worst, latency, Text(note))
    return table


def _names(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
