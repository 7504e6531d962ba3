"""What must hold before the model of a run counts: it is the masked one, it is the one that was judged, it met what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.stream import stream
from onnxprune.errors import GateError, TargetError
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.model import Model
from onnxprune.graph.paged import open_model
from onnxprune.passes.anchor import MISS
from onnxprune.passes.apply import execute, finish
from onnxprune.passes.base import exact
from onnxprune.passes.decision import Decision
from onnxprune.passes.scope import Settings
from onnxprune.passes.workbench import dense_student
from onnxprune.runtime.session import open_session, run
from onnxprune.search.plan import maps_beside, save_id_maps
from onnxprune.verification import TOLERANCE, Comparison, Fidelity, compare, masked_equals_sliced

log = logging.getLogger(__name__)

_FIDELITY_ROWS = 64
Failure = Callable[[str], GateError | TargetError]


def prove(decision: Decision, result: Model, chosen: Settings, record: dict[str, Any]) -> tuple[Fidelity, Comparison]:
    """Masked against sliced, searched against finished, and the result against the original; into ``record`` as well.

    Raises:
        GateError: two of them that must be equal are not.
    """
    run(open_model(result, chosen.runtime), cut_feeds(result, decision.request))
    rows = decision.held_back.take(slice(0, _FIDELITY_ROWS))
    kept = {site: np.array(units, np.int64) for site, units in decision.plan.kept.items()}
    fidelity = masked_equals_sliced(decision.study.anatomy, kept, rows, chosen.runtime, decision.objective.output)
    record["verification"] = {"masked_equals_sliced": fidelity.as_dict()}
    if not fidelity.passed:
        raise GateError(
            f"the sliced model differs from the masked one by {fidelity.relative:.2g} of its output (allowed {fidelity.tolerance:g}); "
            "this is a defect of onnxprune: no model was written, please report it with onnxprune inspect --json",
            record,
        )
    _same(decision, rows, chosen)
    comparison = compare(decision.study.given, result, decision.held_back, decision.objective, chosen.runtime, chosen.recipe.seed)
    record["verification"]["against_original"] = comparison.as_dict()
    return fidelity, comparison


def _same(decision: Decision, rows: CalibrationData, chosen: Settings) -> None:
    """In float, with all tokens, the finished model computes what the search judged: finishing and replaying the plan changed nothing."""
    plan = replace(decision.plan, rewrites=exact(decision.plan.rewrites), int8=None, tokens=None)
    in_float = execute(decision.study.anatomy, plan)
    judged = stream(decision.student.model, rows, [decision.objective.output], options=chosen.runtime)
    finished = stream(in_float, rows, [decision.objective.output], options=chosen.runtime)
    for (_, a), (_, b) in zip(judged, finished, strict=True):
        x, y = a[decision.objective.output], b[decision.objective.output]
        if not np.allclose(x, y, rtol=1e-3, atol=TOLERANCE * float(np.abs(x).max())):
            raise GateError("the finished model differs from the one the search judged: a defect of onnxprune; no model was written")


def final_name(decision: Decision) -> str:
    """What the benchmark calls the model that is shipped: "pruned + tokens + int8", "narrow", "shallow", "fewer words", "finished copy"."""
    parts = ["pruned"] if any(decision.plan.removed.values()) else []
    parts += ["narrow"] if decision.plan.streams else []
    parts += ["shallow"] if decision.plan.layers else []
    parts += ["tokens"] if decision.plan.tokens is not None else []
    parts += [name for name in decision.plan.rewrites if name not in exact(decision.plan.rewrites)]
    return " + ".join(parts) or ("fewer words" if decision.plan.vocabularies else "finished copy")


def steps_to(decision: Decision) -> dict[str, Model]:
    """What lies between the file as given and the one that is shipped, step by step: finished, then pruned, then in other numbers."""
    anatomy, plan = decision.study.anatomy, decision.plan
    rewrites = exact(plan.rewrites)
    steps = {"finished original": finish(decision.study.whole, rewrites)}
    pruned = any(plan.removed.values())
    if (plan.rewrites != rewrites or plan.tokens is not None) and pruned:
        if plan.int8 is not None:
            steps["int8"] = replace(decision.shipping, tokens=None).final(dense_student(anatomy, decision.study.sites))
        steps["pruned"] = execute(anatomy, replace(plan, rewrites=rewrites, int8=None, tokens=None))
    if plan.rewrites != rewrites and plan.tokens is not None:
        steps["pruned + tokens" if pruned else "tokens"] = execute(anatomy, replace(plan, rewrites=rewrites, int8=None))
    return steps


def losses(chain: Mapping[str, Model], decision: Decision, chosen: Settings, final: Comparison) -> dict[str, Any]:
    """Every step against the file as given, on held-back rows."""
    found = {
        name: compare(decision.study.given, model, decision.held_back, decision.objective, chosen.runtime, chosen.recipe.seed)
        for name, model in chain.items()
        if name != "finished original"
    }
    return {name: result.as_dict() for name, result in {**found, final_name(decision): final}.items()}


def missed(decision: Decision, chosen: Settings, record: dict[str, Any]) -> Failure | None:
    """The search ran and its best model is still slower than asked for; or, with nothing asked for, slower than the file as given."""
    if decision.goal is None:
        return _slower(decision, record)
    if decision.measured <= decision.goal * (1 + MISS):
        return None
    share = 100 * (decision.measured / decision.goal - 1)
    found = f"target {chosen.target} was missed by {share:.1f}%: measured {decision.measured:.4g}, asked for {decision.goal:.4g}"
    return lambda advice: TargetError(f"{found}; {advice}", record)


def _slower(decision: Decision, record: dict[str, Any]) -> Failure | None:
    """What was pruned or put into int8 for speed alone must have brought some; other numbers somebody may want for their size."""
    plan = decision.plan
    for_speed = any(plan.removed.values()) or plan.int8 is not None
    if not for_speed or set(plan.rewrites) - {*exact(plan.rewrites), "int8"} or decision.measured <= decision.given_cost * (1 + MISS):
        return None
    found = f"the result is slower than the file as given: {decision.measured:.4g} ms instead of {decision.given_cost:.4g} ms"
    return lambda advice: TargetError(f"{found}; {advice}", record)


def over_limit(comparison: Comparison, chosen: Settings, record: dict[str, Any]) -> Failure | None:
    """What to raise if the loss is larger than allowed; the gate goes into ``record`` either way."""
    limit = chosen.max_drop if chosen.max_drop is not None else (0.01 if chosen.target.auto else None)
    if limit is None:
        return None
    name, loss = comparison.loss
    passed = bool(loss <= limit)
    record["gates"] = [{"name": name, "limit": limit, "value": loss, "passed": passed, "samples": comparison.samples}]
    if comparison.samples < 1 / max(limit, 1e-9):
        log.warning("%d held-back rows cannot tell a loss of %g%%; give more calibration rows", comparison.samples, 100 * limit)
    if passed:
        return None
    found = f"{name} is {100 * loss:.2f}% on {comparison.samples} held-back rows, more than the {100 * limit:g}% allowed"
    return lambda advice: GateError(f"{found}; {advice}", record)


def save(result: Model, final: Model, target: Path, external_data: bool | None, decision: Decision, chosen: Settings) -> Path:
    """Write the model, then open the file in onnxruntime as a user will, and compare. ``result`` takes the ids of the file as given.

    Raises:
        GateError: the file does not compute what the model does; it is removed.
    """
    feeds = dict(cut_feeds(result, decision.request))
    expected = run(open_model(result, chosen.runtime), feeds)
    for words in decision.plan.vocabularies if final is not result else ():
        feeds = words.mapped(feeds)
    written = final.save(target, external_data)
    whole = open_session(str(written), chosen.runtime, optimize=not result.paged, pack=not result.paged)
    found = run(whole, feeds)
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            written.unlink()
            raise GateError(f"{written} does not compute what was verified: a defect of onnxprune; the file was removed")
    save_id_maps(decision.plan, maps_beside(written))
    return written
