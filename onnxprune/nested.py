"""A family of models from one run: smaller ones keep a part of the units that larger ones keep.

DynaBERT (Hou et al., NeurIPS 2020) and ViT-Slim (Chavan et al., CVPR 2022) train one network that is cut to several widths. Here the search
goes on: each target begins at the units that the one before kept, scored anew, and every model is re-fitted from the dense weights.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxprune.api import ModelSource, PruneResult, find_calibration, prepared
from onnxprune.benchmark import Benchmark, benchmark
from onnxprune.errors import InputError, OnnxPruneError
from onnxprune.graph.model import Model, atomic_file, load
from onnxprune.options import settings
from onnxprune.outputs import input_files, model_output, run_output
from onnxprune.passes.apply import execute, shipped
from onnxprune.passes.decision import Decision
from onnxprune.passes.manager import decide_nested
from onnxprune.passes.scope import Settings
from onnxprune.passes.workbench import Progress
from onnxprune.proof import missed, over_limit, prove, save
from onnxprune.record import TOO_LARGE, leave, model_facts, new_record, plain
from onnxprune.search.target import Quantity, Target, parse_target

log = logging.getLogger(__name__)

MANIFEST = "family.json"


@dataclass(frozen=True, eq=False)
class Family:
    """What :func:`family` made: ``members`` from the largest to the smallest, and the content of ``family.json``."""

    members: tuple[PruneResult, ...]
    manifest: dict[str, Any]
    folder: Path
    benchmark: Benchmark | None = None


def family(
    model: ModelSource,
    *,
    targets: str | Sequence[str],
    output: str | os.PathLike[str],
    quantity: Quantity = "latency",
    calib: Any = None,
    bench_seconds: float = 60.0,
    external_data: bool | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> Family:
    """Prune to several targets with one calibration and one measurement of costs; the kept units are nested.

    Args:
        targets: ``80%,50%,30%`` or a sequence of such words: all shares of the file as given, or all absolute; in any order.
        output: folder for the models, a run directory each, and ``family.json``; made if it is missing.
        quantity: what the targets are shares of: latency, macs, params or size.
        bench_seconds: most time for the one paired benchmark of all members; 0 skips it.
        options: those of :func:`onnxprune.prune` that decide, without a target.

    Raises:
        OnnxPruneError: see :mod:`onnxprune.errors`. Members that were finished before stay, and ``family.json`` names them.
    """
    started = time.time()
    asked = _sorted_targets(targets, quantity)
    options[f"target_{quantity}"] = asked[0][0]
    chosen = settings(**options)
    given = load(model)
    calib = find_calibration(model, calib)
    folder = Path(output)
    stem = given.source.path.stem if given.source is not None and given.source.path is not None else "model"
    files = [folder / f"{stem}-{_in_a_name(word)}.onnx" for word, _ in asked]
    inputs = input_files(given, calib, keep_ids=chosen.keep_ids)
    run_output(folder, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        model_output(file, inputs)
    study, data = prepared(given, calib, chosen)
    decisions = decide_nested(study, data, chosen, [target for _, target in asked], progress)
    members: list[PruneResult] = []
    try:
        for (_, target), file in zip(asked, files, strict=True):
            began = time.time()
            decision = next(decisions)
            # That of a run before would speak of files that are about to be replaced.
            (folder / MANIFEST).unlink(missing_ok=True)
            members.append(_member(decision, replace(chosen, target=target), file, external_data, began, command))
    except OnnxPruneError:
        if members:
            _write(folder, _manifest(given, members, asked, quantity, started, command, None))
        raise
    measured = None
    if bench_seconds > 0 and not chosen.may_time(given):
        log.warning("benchmark is left out: %s; onnxprune bench compares two files where memory holds both", TOO_LARGE)
    elif bench_seconds > 0:
        variants: dict[str, Any] = {"file as given": given if given.source is None or given.source.path is None else given.source.path}
        variants |= {member.output.name: member.output for member in members if member.output is not None}
        request = decision.request
        measured = benchmark(variants, request, options=chosen.runtime, seed=chosen.recipe.seed, max_seconds=bench_seconds)
    manifest = _manifest(given, members, asked, quantity, started, command, measured)
    _write(folder, manifest)
    return Family(tuple(members), manifest, folder, measured)


def _sorted_targets(targets: str | Sequence[str], quantity: Quantity) -> list[tuple[str, Target]]:
    """The words and what they mean, the largest first."""
    words = [word.strip() for word in (targets.split(",") if isinstance(targets, str) else targets)]
    found = {word: parse_target(quantity, word, "--targets") for word in words}
    values = {word: target.value for word, target in found.items() if target.value is not None}
    if len(values) != len(found) or len({target.relative for target in found.values()}) != 1:
        raise InputError(f"--targets {','.join(words)}: give shares such as 80%,50%,30%, or absolute values only; auto is none of them")
    if len(set(values.values())) != len(words):
        raise InputError(f"--targets {','.join(words)} names one target twice")
    return [(word, found[word]) for word in sorted(found, key=lambda word: -values[word])]


def _in_a_name(word: str) -> str:
    return re.sub(r"[^\w.]", "", word.replace("%", "pct"))


def _member(
    decision: Decision, chosen: Settings, file: Path, external_data: bool | None, started: float, command: Sequence[str]
) -> PruneResult:
    """Apply, prove and write one decision, with its run directory."""
    record = new_record(decision, chosen, started, command)
    folder = file.with_suffix(".run")
    result = execute(decision.study.anatomy, decision.plan)
    fidelity, comparison = prove(decision, result, chosen, record)
    failure = missed(decision, chosen, record) or over_limit(comparison, chosen, record)
    if failure:
        leave(folder, decision, record)
        raise failure(f"{file.name} and smaller ones were not written")
    final = shipped(result, decision.plan)
    written = save(result, final, file, external_data, decision, chosen)
    record["output"] = model_facts(load(written), written)
    record["wall_s"] = round(time.time() - started, 2)
    leave(folder, decision, record)
    return PruneResult(decision.plan, final, record, fidelity, comparison, None, written)


def _manifest(
    given: Model,
    members: Sequence[PruneResult],
    asked: Sequence[tuple[str, Target]],
    quantity: Quantity,
    started: float,
    command: Sequence[str],
    measured: Benchmark | None,
) -> dict[str, Any]:
    first = members[0].record
    return {
        "schema": "onnxprune.family/1",
        "tool": first["tool"],
        "command": list(command),
        "wall_s": round(time.time() - started, 2),
        "environment": first["environment"],
        "input": model_facts(given, given.source.path if given.source else None),
        "calibration": first["calibration"],
        "objective": first["objective"],
        "recipe": first["recipe"],
        "quantity": quantity,
        "units": dict(members[0].plan.units),
        "missing": [word for word, _ in asked[len(members) :]],
        "members": [_entry(word, member, measured) for (word, _), member in zip(asked, members, strict=False)],
        "benchmark": None if measured is None else measured.as_dict(),
    }


def _entry(word: str, member: PruneResult, measured: Benchmark | None) -> dict[str, Any]:
    """What the manifest says of one model; figures of quality are those of rows that decided nothing."""
    assert member.output is not None
    assert member.comparison is not None
    timed = None if measured is None else measured.variants[member.output.name]
    quality = {
        name: value.value
        for name, value in (
            ("accuracy", member.comparison.accuracy_after),
            ("agreement", member.comparison.agreement),
            ("kl", member.comparison.kl),
            ("cosine", member.comparison.cosine),
        )
        if value is not None
    }
    target = member.record["target"]
    return {
        "target": word,
        "file": member.output.name,
        "run": member.output.with_suffix(".run").name,
        "sha256": member.record["output"]["sha256"],
        "bytes": member.record["output"]["bytes"],
        "parameters": member.record["output"]["parameters"],
        **{name: target[name] for name in ("unit", "given", "goal", "predicted", "measured")},
        "latency_ms": None if timed is None else timed.latency_ms,
        "speedup": None if timed is None else timed.speedup.median,
        **quality,
        "kept": {site: len(units) for site, units in member.plan.kept.items()},
    }


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, default=plain) + "\n")
