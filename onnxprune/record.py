"""run.json and the run directory: everything a run knew, measured and decided."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import InputError, Refusal
from onnxprune.graph.model import Model, atomic_file
from onnxprune.passes.anchor import MISS
from onnxprune.passes.decision import Decision, summary
from onnxprune.passes.scope import Settings
from onnxprune.passes.token_samples import token_samples
from onnxprune.runtime.environment import describe
from onnxprune.search.plan import save_id_maps

log = logging.getLogger(__name__)


def model_facts(model: Model, path: Path | None) -> dict[str, Any]:
    """Size and identity of a model for a record; ``path`` is the file it was loaded from, if any."""
    source = model.source if model.source is not None and model.source.path == path else None
    return {
        "path": str(path) if path else None,
        "sha256": source.sha256 if source else None,
        "bytes": source.bytes if source else None,
        "parameters": model.parameters,
        "nodes": len(model.proto.graph.node),
        "opset": model.opset(),
        "ir_version": model.proto.ir_version,
    }


TOO_LARGE = "whole sessions of a model above 1.5 GiB would be open side by side"


def skip(record: dict[str, Any], step: str, reason: str) -> None:
    """Note that a step of the run was left out though nobody asked for that."""
    log.warning("%s is left out: %s", step, reason)
    record["skipped"].append({"step": step, "reason": reason})


def new_record(decision: Decision, chosen: Settings, started: float, command: Sequence[str]) -> dict[str, Any]:
    """The beginning of run.json: everything known before the model is applied."""
    from onnxprune import __version__

    given = decision.study.given
    unit = decision.table.unit
    record: dict[str, Any] = {
        "schema": "onnxprune.run/1",
        "tool": {"name": "onnxprune", "version": __version__},
        "command": list(command),
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.time() - started, 2),
        "seed": chosen.recipe.seed,
        "environment": describe(),
        "input": model_facts(given, given.source.path if given.source else None),
        "calibration": {
            "origin": decision.calibration.origin,
            "rows": len(decision.calibration),
            "held_back": len(decision.held_back),
            "labels": decision.calibration.labels is not None,
            "sha256": decision.calibration.sha256,
        },
        "objective": asdict(decision.objective),
        "recipe": dict(decision.plan.recipe),
        "passes": list(decision.plan.passes),
        "rewrites": list(decision.plan.rewrites),
        "target": {
            "asked": str(chosen.target),
            "unit": unit,
            "goal": decision.goal,
            "tolerance": MISS,
            "given": decision.given_cost,
            "finished": decision.finished_cost,
            "predicted": decision.predicted,
            "measured": decision.measured,
            "already_met": decision.already_met,
        },
        "sites": summary(decision.study.sites, decision.plan),
        "caches": [
            {"input": name, "output": cut.output, "axis": cut.axis, "units": cut.of, "kept": len(cut.kept)}
            for name, cut in decision.plan.caches.items()
        ],
        "compensation": [asdict(fit) for fit in decision.student.fits],
        "search": list(decision.trail),
        "finishing": [part.as_dict() for part in decision.shipping.parts],
        "vocabulary": {
            "map": decision.study.words.place,
            "tables": [covered.as_dict() for covered in decision.study.words.coverage],
        },
        "hidden": decision.study.streams.as_dict() if decision.study.streams else [],
        "layers": decision.study.shallow.as_dict() if decision.study.shallow else [],
        "polish": decision.polished.as_dict() if decision.polished else None,
        "tokens": {
            "chosen": None if decision.plan.tokens is None else decision.plan.tokens.summary(),
            "schedules": [schedule.as_dict() for schedule in decision.shipping.schedules],
            "samples": token_samples(decision, chosen),
        },
        "int8": {
            "scheme": str(decision.shipping.scheme) if decision.plan.int8 else None,
            "trials": [trial.as_dict() for trial in decision.shipping.trials],
            "groups": [group.as_dict() for group in decision.shipping.groups],
            "float": sorted(decision.shipping.floats),
        },
        "refusals": [refusal.as_dict() for refusal in decision.refusals],
        "plan_sha256": decision.plan.sha256,
        "gates": [],
        "skipped": [],
        "output": None,
    }
    if chosen.finishing and not chosen.may_time(given):
        skip(record, "finishing", f"{TOO_LARGE}; name the rewrites in --passes to have them all the same")
    if decision.study.sites and given.paged and chosen.recipe.importance == "kfac":
        reason = "it holds gradients of all layers at once; above 1.5 GiB units are scored by fisher, in the same unit"
        skip(record, "elimination under curvature", reason)
    return record


def leave(folder: Path | None, decision: Decision, record: dict[str, Any]) -> None:
    """Write the run directory, if there is to be one.

    Raises:
        InputError: it cannot be written.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        decision.plan.save(folder / "plan.json")
        save_id_maps(decision.plan, folder / "vocab.json")
        for name, content in (("run.json", record), ("costs.json", decision.table.as_dict())):
            with atomic_file(folder / name) as temporary:
                temporary.write_text(json.dumps(content, indent=1, default=plain) + "\n")
        from onnxprune.report.html import write_report

        write_report(folder)
    except OSError as error:
        raise InputError(f"cannot write the run directory {folder}: {error.strerror or error}") from error


def plain(value: Any) -> Any:
    """``default`` of :func:`json.dumps` for the values in records."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Refusal):
        return value.as_dict()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")
