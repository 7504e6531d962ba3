"""The public functions: the same words as the command line."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.benchmark import Benchmark, benchmark, feeds_of
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import LossSource, Purpose, check_labels_of, choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.calibration.stream import stream
from onnxprune.errors import GateError, InputError, TargetError
from onnxprune.graph.anatomy import study
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.canonical import canonicalise, check_float
from onnxprune.graph.depth import with_depths
from onnxprune.graph.explain import explain
from onnxprune.graph.hidden import Narrowing, narrow
from onnxprune.graph.macs import count_macs
from onnxprune.graph.model import Model, load
from onnxprune.graph.paged import open_model
from onnxprune.graph.profile import feeds_of_shapes, shapes_of, take_profile
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.storage import release
from onnxprune.graph.stream import find_streams
from onnxprune.graph.token_policy import POLICIES
from onnxprune.graph.turning import turned
from onnxprune.graph.vocabulary import VocabMap, cut_vocabulary
from onnxprune.importance.registry import CRITERIA
from onnxprune.outputs import input_files, model_output, run_output
from onnxprune.passes.apply import execute, finish, shipped
from onnxprune.passes.base import exact
from onnxprune.passes.decision import HELD_BACK, Decision, split
from onnxprune.passes.int8 import Int8Choice
from onnxprune.passes.manager import MISS, decide
from onnxprune.passes.scope import Settings, Study, understand
from onnxprune.passes.tokens import TokenPolicy
from onnxprune.passes.workbench import Progress, Recipe, dense_student
from onnxprune.record import TOO_LARGE, leave, model_facts, new_record, skip
from onnxprune.request import examples, made_up, request_feeds
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.search.costs import measured_costs, site_macs
from onnxprune.search.plan import Plan, load_plan, maps_beside, save_id_maps
from onnxprune.search.target import Target, parse_target
from onnxprune.verification import TOLERANCE, Comparison, Fidelity, compare, masked_equals_sliced

log = logging.getLogger(__name__)

ModelSource = str | os.PathLike[str] | bytes | Model
_FIDELITY_ROWS = 64
PASSES = ("heads", "ffn")
PRESETS = {"fastformers": ("heads", "ffn", "int8")}
"""Pipelines from the literature by name: passes, with equal numbers of units in every layer.

``fastformers``: Kim and Hassan 2020, heads and neurons by gradient, then int8; least squares take the place of its second distillation.
"""
RANDOM = "random"


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What :func:`prune` did. ``model`` is None on a dry run, and when the target was met without pruning and no copy was asked for."""

    plan: Plan
    model: Model | None
    record: dict[str, Any]
    fidelity: Fidelity | None = None
    comparison: Comparison | None = None
    benchmark: Benchmark | None = None
    output: Path | None = None

    @property
    def already_met(self) -> bool:
        return bool(self.record["target"]["already_met"])


def settings(
    passes: Iterable[str] | None = None,
    *,
    preset: str | None = None,
    target_latency: str | None = None,
    target_macs: str | None = None,
    target_params: str | None = None,
    target_size: str | None = None,
    keep: Sequence[str] = (),
    exclude: Sequence[str] = (),
    samples: int = 1024,
    max_drop: float | str | None = None,
    output_name: str | None = None,
    loss: LossSource = "sampled",
    importance: str = "kfac",
    compensation: str = "refit",
    rounds: int = 4,
    seed: int = 0,
    threads: int = 1,
    provider: str = "cpu",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    purpose: Purpose | None = None,
    finishing: bool = True,
    int8: Int8Choice = "auto",
    keep_ids: str | os.PathLike[str] | None = None,
    vocab_map: VocabMap = "graph",
    token_policy: TokenPolicy = "auto",
    hidden_keep: float | str | None = None,
    uniform: bool = False,
    protect_classes: bool = False,
) -> Settings:
    """Check options and put them into one value.

    Args:
        passes: names, or one string of names with commas; None takes those of ``preset``, or heads and ffn.
        preset: a name in :data:`PRESETS`; it sets ``passes`` and ``uniform``.

    Raises:
        InputError: an option is out of range or contradicts another one, or more than one target is given.
    """
    passes, uniform = _pipeline(passes, preset, uniform)
    given = {"latency": target_latency, "macs": target_macs, "params": target_params, "size": target_size}
    targets = [parse_target(quantity, text) for quantity, text in given.items() if text is not None]  # type: ignore[arg-type]
    if len(targets) > 1:
        raise InputError(f"give one target, not {len(targets)}: {', '.join(map(str, targets))}")
    if importance not in CRITERIA:
        raise InputError(f"unknown importance {importance!r}; known: {', '.join(CRITERIA)}")
    if int8 not in ("auto", "dynamic", "static"):
        raise InputError(f"unknown int8 scheme {int8!r}; known: auto, dynamic, static")
    if compensation not in ("refit", "scale", "none"):
        raise InputError(f"unknown compensation {compensation!r}; known: refit, scale, none")
    for name, value, least in (("samples", samples, 8), ("rounds", rounds, 1), ("threads", threads, 0)):
        if value < least:
            raise InputError(f"--{name} {value} is too small; at least {least}")
    if vocab_map not in ("graph", "file"):
        raise InputError(f"unknown place of the vocabulary map {vocab_map!r}; known: graph, file")
    if (keep_ids is not None or vocab_map != "graph") and "vocab" not in passes:
        raise InputError(f"--keep-ids and --vocab-map say how, but vocab is not among the passes: --passes {','.join((*passes, 'vocab'))}")
    if token_policy not in ("auto", *POLICIES):
        raise InputError(f"unknown token policy {token_policy!r}; known: auto, {', '.join(POLICIES)}")
    if token_policy != "auto" and "tokens" not in passes:
        raise InputError(
            f"--token-policy {token_policy} says how, but tokens is not among the passes: --passes {','.join((*passes, 'tokens'))}"
        )
    if int8 != "auto" and "int8" not in passes:
        raise InputError(f"--int8 {int8} says how, but int8 is not among the passes; add it: --passes {','.join((*passes, 'int8'))}")
    if protect_classes and (not targets or targets[0].auto):
        raise InputError("--protect-classes compares two models of one target: give a target with a value, such as --target-latency 60%")
    return Settings(
        passes=passes,
        target=targets[0] if targets else Target("latency", None),
        keep=tuple(keep),
        exclude=tuple(exclude),
        samples=samples,
        max_drop=parse_share(max_drop, "--max-drop"),
        output=output_name,
        loss=loss,
        recipe=Recipe(importance=importance, compensation=compensation, rounds=rounds, seed=seed, uniform=uniform),
        runtime=RuntimeOptions(provider=provider, threads=threads),
        input_shapes={name: tuple(shape) for name, shape in (input_shapes or {}).items()},
        purpose=purpose,
        finishing=finishing,
        int8=int8,
        keep_ids=Path(keep_ids) if keep_ids is not None else None,
        vocab_map=vocab_map,
        token_policy=token_policy,
        protect_classes=protect_classes,
        hidden_keep=_hidden_keep(hidden_keep, passes),
    )


def _pipeline(passes: Iterable[str] | None, preset: str | None, uniform: bool) -> tuple[tuple[str, ...], bool]:
    """Names of the passes, and whether all layers keep equal numbers."""
    if preset is None:
        names = PASSES if passes is None else passes.split(",") if isinstance(passes, str) else passes
        return tuple(name.strip() for name in names), uniform
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if passes is not None:
        raise InputError(f"--preset {preset} stands for --passes {','.join(PRESETS[preset])} with equal layers; give one of the two")
    return PRESETS[preset], True


def _hidden_keep(value: float | str | None, passes: Iterable[str]) -> float:
    """The share of directions that stay, three quarters if nothing is said."""
    share = parse_share(value, "--hidden-keep")
    if share is None:
        return 0.75
    if "hidden" not in passes:
        raise InputError(f"--hidden-keep {value} says how, but hidden is not among the passes: --passes {','.join((*passes, 'hidden'))}")
    if not share:
        raise InputError("--hidden-keep 0% leaves nothing; write a share such as 75%")
    return share


def parse_share(value: float | str | None, option: str) -> float | None:
    """``1%`` or 0.01 as a share in [0, 1)."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise InputError(f"{option} {value!r} is not a share; write 1% or 0.01") from None
    if not 0 <= share < 1:
        raise InputError(f"{option} {value!r} is out of range; write a share such as 1% or 0.01")
    return share


def find_calibration(model: ModelSource, calib: Any) -> Any:
    """The calibration source: what was given, or ``<model>.calib.npz`` beside the model.

    Raises:
        InputError: neither; the message says how to make one.
    """
    if calib is not None:
        return calib
    if isinstance(model, str | os.PathLike):
        beside = Path(model).with_suffix(".calib.npz")
        if beside.is_file():
            return beside
        place = f" and {beside} does not exist"
    else:
        place = ""
    raise InputError(
        f"no calibration data: --calib was not given{place}. Save a few hundred inputs as an .npz whose keys are the model's input names: "
        "np.savez('data.npz', input_ids=..., attention_mask=...), axis 0 = samples"
    )


def prune(
    model: ModelSource,
    *,
    calib: Any = None,
    output: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    keep_best: bool = False,
    write_unpruned: bool = False,
    bench_seconds: float = 30.0,
    external_data: bool | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> PruneResult:
    """Decide, apply, verify, benchmark, report.

    Args:
        model: path, bytes or :class:`Model`; never modified.
        calib: anything :func:`onnxprune.calibration.load_calibration` takes.
        output: where to write the pruned model; None writes none.
        run_dir: where to leave run.json, plan.json, costs.json and report.html; None leaves nothing.
        dry_run: stop after the plan.
        keep_best: write the model even when the accuracy gate fails.
        write_unpruned: when the target is met without pruning, write the finished copy.
        bench_seconds: most time for the paired benchmark; 0 skips it.
        options: see :func:`settings`.

    Raises:
        OnnxPruneError: see :mod:`onnxprune.errors`; nothing is written half.
    """
    started = time.time()
    chosen = settings(**options)
    given = load(model)
    calib = find_calibration(model, calib)
    inputs = input_files(given, calib, keep_ids=chosen.keep_ids)
    target_file = model_output(output, inputs) if output is not None and not dry_run else None
    folder = run_output(run_dir, inputs) if run_dir is not None else None
    decision = decide(*prepared(given, calib, chosen), chosen, progress)
    record = new_record(decision, chosen, started, command)
    if dry_run or (decision.already_met and not write_unpruned and not decision.study.smaller):
        leave(folder, decision, record)
        return PruneResult(decision.plan, None, record)
    tell = progress or (lambda what, done, total: None)
    tell("verification", 0, 1)
    result = execute(decision.study.anatomy, decision.plan)
    fidelity, comparison = prove(decision, result, chosen, record)
    tell("verification", 1, 1)
    failure = missed(decision, chosen, record) or over_limit(comparison, chosen, record)
    if failure and not keep_best:
        record["wall_s"] = round(time.time() - started, 2)
        leave(folder, decision, record)
        advice = "--keep-best writes it all the same; a larger --max-drop allows it, a higher target prunes less"
        raise failure(f"no model was written ({advice})")
    final = shipped(result, decision.plan)
    written = save(result, final, target_file, external_data, decision, chosen) if target_file is not None else None
    measured = None
    if bench_seconds > 0 and not chosen.may_time(given):
        skip(record, "benchmark", f"{TOO_LARGE}; onnxprune bench compares the two files where memory holds both")
    elif bench_seconds > 0:
        tell("benchmark", 0, 1)
        chain = _chain(decision)
        record["chain"] = _losses(chain, decision, chosen, comparison)
        variants: dict[str, Any] = {"file as given": given if given.source is None or given.source.path is None else given.source.path}
        # A model without its map takes other ids than the file as given; with it, it costs the same.
        as_written = written if written is not None and final is result else result
        variants |= chain | {_final_name(decision): as_written}
        measured = benchmark(variants, decision.request, options=chosen.runtime, seed=chosen.recipe.seed, max_seconds=bench_seconds)
        record["benchmark"] = measured.as_dict()
        tell("benchmark", 1, 1)
    record["output"] = model_facts(load(written) if written else final, written)
    record["wall_s"] = round(time.time() - started, 2)
    leave(folder, decision, record)
    if failure:
        raise failure(f"{written or 'the model'} was written because of --keep-best")
    return PruneResult(decision.plan, final, record, fidelity, comparison, measured, written)


def plan(model: ModelSource, *, calib: Any = None, progress: Progress | None = None, **options: Any) -> Plan:
    """Decide only: :func:`prune` without applying anything."""
    return prune(model, calib=calib, dry_run=True, progress=progress, **options).plan


def apply(
    model: ModelSource,
    plan: Plan | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    external_data: bool | None = None,
) -> Model:
    """Replay a plan, without data. Same model and plan, same bytes.

    Raises:
        InputError: the plan was made for another file.
    """
    given = load(model)
    files = input_files(given, plan=None if isinstance(plan, Plan) else plan)
    target = model_output(output, files) if output is not None else None
    decided = plan if isinstance(plan, Plan) else load_plan(plan)
    sha256 = given.source.sha256 if given.source else ""
    if sha256 != decided.input_sha256:
        raise InputError(
            f"the plan was made for another file (sha256 {decided.input_sha256[:12]}..., this one is {sha256[:12]}...); "
            "make a new plan for this model"
        )
    canonical, profile = canonicalise(given, feeds_of_shapes(given, decided.example))
    if decided.vocabularies:
        canonical = cut_vocabulary(canonical, decided.vocabularies)
        profile = take_profile(canonical, feeds_of_shapes(given, decided.example))
    if decided.streams:
        narrowings = [Narrowing(name, basis) for name, basis in decided.streams.items()]
        canonical, profile = narrow(canonical, profile, narrowings, feeds_of_shapes(given, decided.example))
    anatomy = study(canonical, profile)
    if decided.bases:
        anatomy = turned(with_depths(anatomy, {name.rsplit(".", 1)[1] for name in decided.bases}), decided.bases)
    result = shipped(execute(anatomy, decided), decided)
    open_session(result, optimize=not result.paged, pack=not result.paged)
    release(result.weights.values())
    if target is not None:
        result.save(target, external_data)
        save_id_maps(decided, maps_beside(target))
    return result


def inspect(
    model: ModelSource,
    *,
    calib: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    time: bool = False,
    why: str | None = None,
    provider: str = "cpu",
    threads: int = 1,
) -> dict[str, Any]:
    """What can be pruned, what can not and why: sites with units, parameters, multiply-adds and their share of the model.

    Args:
        calib: real inputs, for a model that does not run on made-up ones.
        input_shapes: the request that multiply-adds are counted for.
        time: also measure what each site costs in milliseconds, as a search would.
        why: a refusal code, a site, a node or a tensor, or a part of such a name: the answers are under ``why``.
    """
    given = load(model)
    check_float(given)
    data = load_calibration(calib, given, samples=64) if calib is not None else None
    canonical, profile = canonicalise(given, examples(data) if data else None)
    anatomy = with_depths(study(canonical, profile))
    feeds = request_feeds(canonical, data or made_up(canonical), {name: tuple(shape) for name, shape in (input_shapes or {}).items()})
    macs = count_macs(canonical, shapes_of(canonical, feeds))
    streams, unturned = find_streams(anatomy.view, profile)
    known = replace(anatomy, refusals=(*anatomy.refusals, *unturned))
    total = max(sum(macs.values()), 1)
    sites: list[dict[str, Any]] = [
        {
            "site": site.name,
            "kind": site.kind,
            "units": site.units,
            "parameters": round(site.parameters_per_unit * site.units),
            "macs": round(site_macs(site, macs)),
            "macs_share": site_macs(site, macs) / total,
            "reads": site.consumers[0].leaf.node.name,
        }
        for site in anatomy.sites
    ]
    if time and sites:
        options = RuntimeOptions(provider, threads)
        table, _ = measured_costs(anatomy, anatomy.sites, lambda kept: finish(slice_model(anatomy, kept), ()), feeds, options, seed=0)
        for row in sites:
            row["ms"] = float(table.curves[row["site"]][-1])
            row["time_share"] = row["ms"] / table.full
    return {
        "schema": "onnxprune.inspect/1",
        "model": model_facts(given, given.source.path if given.source else None),
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
        "macs": total,
        "sites": sites,
        "streams": [
            {"stream": item.name, "width": item.width, "norms": len(set(item.norms)), "products_added": len(item.bridges)}
            for item in streams
        ],
        "refusals": [refusal.as_dict() for refusal in anatomy.refusals],
        **({"why": [answer.as_dict() for answer in explain(known, why, given)]} if why is not None else {}),
    }


def verify(
    original: ModelSource,
    model: ModelSource,
    *,
    calib: Any = None,
    samples: int | None = None,
    output_name: str | None = None,
    max_drop: float | str | None = None,
    provider: str = "cpu",
    threads: int = 1,
    seed: int = 0,
) -> Comparison:
    """Compare two models on data.

    Raises:
        GateError: the loss exceeds ``max_drop``.
    """
    before, after = load(original), load(model)
    data = load_calibration(find_calibration(original, calib), before, samples=samples, seed=seed)
    canonical, profile = canonicalise(before, examples(data))
    objective = choose_objective(study(canonical, profile), output_name, data.labels)
    check_labels_of(objective, data)
    if objective.output not in after.output_names:
        raise InputError(f"the second model has no output {objective.output!r}; it has {', '.join(after.output_names)}")
    result = compare(before, after, data, objective, RuntimeOptions(provider, threads), seed)
    limit = parse_share(max_drop, "--max-drop")
    name, loss = result.loss
    if limit is not None and not loss <= limit:
        raise GateError(f"{name} is {100 * loss:.2f}%, more than the {100 * limit:g}% allowed", result.as_dict())
    return result


def bench(
    models: Sequence[ModelSource],
    *,
    calib: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    provider: str = "cpu",
    threads: int = 1,
    seconds: float = 60.0,
    seed: int = 0,
) -> Benchmark:
    """Paired, interleaved benchmark of two or more models on one request; the first is the reference.

    With real data (not ``random``) the others are also compared with the first on all of its rows: ``quality`` of every variant.

    Raises:
        InputError: a model takes other inputs than the first, or inputs of another type, or lacks the output that is compared.
    """
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    loaded = [load(model) for model in models]
    if not loaded:
        raise InputError("nothing to benchmark: give at least one model")
    data = load_calibration(calib, loaded[0], seed=seed) if calib is not None else made_up(loaded[0])
    feeds = request_feeds(loaded[0], data, shapes)
    names = [str(model) if isinstance(model, str | os.PathLike) else f"model {number}" for number, model in enumerate(models)]
    variants: dict[str, Any] = {}
    for name, source, model in zip(names, models, loaded, strict=True):
        variants[name if name not in variants else f"{name} (again)"] = source if isinstance(source, str | os.PathLike) else model
    options = RuntimeOptions(provider, threads)
    named = dict(zip(variants, loaded, strict=True))
    for name, model in named.items():
        feeds_of(name, model, feeds)
    quality = _qualities(named, data, options, seed) if calib is not None and data.origin != RANDOM else {}
    measured = benchmark(variants, feeds, options=options, seed=seed, max_seconds=seconds)
    told = {name: replace(result, quality=quality.get(name)) for name, result in measured.variants.items()}
    return replace(measured, variants=told)


def _qualities(models: Mapping[str, Model], data: CalibrationData, options: RuntimeOptions, seed: int) -> dict[str, dict[str, Any]]:
    """Every model but the first against it; empty, with a warning, if it is not known what the first one's output means."""
    (first, reference), *others = models.items()
    try:
        canonical, profile = canonicalise(reference, examples(data))
        objective = choose_objective(study(canonical, profile), None, data.labels)
        check_labels_of(objective, data)
    except InputError as error:
        log.warning("quality is not compared: %s: %s", first, error)
        return {}
    for name, model in others:
        if objective.output not in model.output_names:
            raise InputError(f"variant {name!r} has no output {objective.output!r} to compare; it has {', '.join(model.output_names)}")
    return {name: compare(reference, model, data, objective, options, seed).as_dict() for name, model in others}


# --- one run -----------------------------------------------------------------------------------------------------------------------


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


def _final_name(decision: Decision) -> str:
    """What the benchmark calls the model that is shipped: "pruned + tokens + int8", "narrow", "fewer words", "finished copy"."""
    parts = ["pruned"] if any(decision.plan.removed.values()) else []
    parts += ["narrow"] if decision.plan.streams else []
    parts += ["tokens"] if decision.plan.tokens is not None else []
    parts += [name for name in decision.plan.rewrites if name not in exact(decision.plan.rewrites)]
    return " + ".join(parts) or ("fewer words" if decision.plan.vocabularies else "finished copy")


def _chain(decision: Decision) -> dict[str, Model]:
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


def _losses(chain: Mapping[str, Model], decision: Decision, chosen: Settings, final: Comparison) -> dict[str, Any]:
    """Every step against the file as given, on held-back rows."""
    found = {
        name: compare(decision.study.given, model, decision.held_back, decision.objective, chosen.runtime, chosen.recipe.seed)
        for name, model in chain.items()
        if name != "finished original"
    }
    return {name: result.as_dict() for name, result in {**found, _final_name(decision): final}.items()}


def prepared(given: Model, calib: Any, chosen: Settings) -> tuple[Study, CalibrationData]:
    """The model understood and the rows to decide and to judge on."""
    most = None if calib == RANDOM else chosen.samples + HELD_BACK
    # Ids of all rows count, not only of those that decide.
    corpus = load_calibration(calib, given) if "vocab" in chosen.passes and calib != RANDOM else None
    data = _judged(load_calibration(calib if corpus is None else corpus, given, samples=most, seed=chosen.recipe.seed), chosen)
    deciding = split(data, chosen)[0] if "hidden" in chosen.passes and calib != RANDOM else None
    return understand(given, chosen, examples(data), corpus, deciding), data


def _judged(data: CalibrationData, chosen: Settings) -> CalibrationData:
    """Random inputs say nothing about accuracy, so nothing may hang on them."""
    if data.origin == RANDOM and (chosen.max_drop is not None or chosen.target.auto):
        raise InputError("--calib random cannot judge accuracy: give real data, or a target without --max-drop")
    return data


Failure = Callable[[str], GateError | TargetError]


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
