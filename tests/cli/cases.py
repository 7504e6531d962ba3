"""A folder as a user has it, and the command line run in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from onnxprune.cli import main
from tests import zoo
from tests.passes.cases import VIT, arrays

QUICK = ("--target-macs", "60%", "--rounds", "1", "--importance", "magnitude", "--compensation", "none", "--no-bench")


def run(*words: str | Path) -> Result:
    """The command in this process, as the shell would run it."""
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="onnxprune")


def fill(folder: Path) -> None:
    """``model.onnx`` and ``data.npz`` of 32 rows."""
    (folder / "model.onnx").write_bytes(zoo.path(VIT).read_bytes())
    np.savez(folder / "data.npz", **arrays(VIT))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash: what a failed command must not change."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
