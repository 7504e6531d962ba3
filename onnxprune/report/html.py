"""report.html: one self-contained file, rendered from run.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(record: dict[str, Any]) -> str:
    return ""


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    return out or run_dir / "report.html"
