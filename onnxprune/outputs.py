"""Where results go, checked before the work starts: nothing that is read is ever written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.search.plan import maps_beside, weights_beside

RUN_FILES = ("run.json", "plan.json", "plan.weights.npz", "vocab.json", "costs.json", "report.html")


def input_files(
    model: Model, calib: Any = None, plan: str | os.PathLike[str] | None = None, keep_ids: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Every file a run reads: the model and its external data, calibration files, a list of ids, a plan and its weights."""
    files: list[Path] = []
    if model.source is not None and model.source.path is not None:
        files += [model.source.path, *model.source.external]
    if isinstance(calib, str | os.PathLike):
        source = Path(str(calib).split(".py:")[0] + ".py") if ".py:" in str(calib) else Path(calib)
        files += sorted(source.glob("*.npz")) if source.is_dir() else [source]
    if plan is not None:
        files += [Path(plan), weights_beside(Path(plan))]
    return files + ([Path(keep_ids)] if keep_ids is not None else [])


def model_output(output: str | os.PathLike[str], inputs: Iterable[Path]) -> Path:
    """A model file that may be written, with external data and a map of ids beside it.

    Raises:
        InputError: it is an input, a directory, not a regular file, or its folder is missing or not writable.
    """
    target = Path(output)
    return _checked(target, [target, target.parent / f"{target.name}.data", maps_beside(target)], inputs)


def plan_output(output: str | os.PathLike[str], inputs: Iterable[Path]) -> Path:
    """A plan file that may be written, with its weights beside it. Errors as for :func:`model_output`."""
    target = Path(output)
    return _checked(target, [target, weights_beside(target)], inputs)


def run_output(folder: str | os.PathLike[str], inputs: Iterable[Path]) -> Path:
    """A run directory that may be made or filled. Errors as for :func:`model_output`."""
    target = Path(folder)
    existing = next(place for place in (target, *target.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"the run directory {target} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise InputError(f"the run directory {target} cannot be written: {existing} is not writable")
    _refuse_inputs([target / name for name in RUN_FILES], inputs)
    return target


def _checked(target: Path, written: list[Path], inputs: Iterable[Path]) -> Path:
    if target.is_dir():
        raise InputError(f"the output {target} is a directory; name a file in it")
    if target.exists() and not target.is_file():
        raise InputError(f"the output {target} is not a regular file")
    if not target.parent.is_dir():
        raise InputError(f"the directory of the output does not exist: {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"the directory of the output is not writable: {target.parent}")
    _refuse_inputs(written, inputs)
    return target


def _refuse_inputs(written: Iterable[Path], inputs: Iterable[Path]) -> None:
    read = {path.resolve() for path in inputs if path.exists()}
    for path in written:
        if path.exists() and path.resolve() in read:
            raise InputError(f"the output {path} is an input file of this run; onnxprune never overwrites its input, choose another name")
