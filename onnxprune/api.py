"""The public functions: the same words as the command line."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxprune.benchmark import Benchmark, benchmark, feeds_of
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import check_labels_of, choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.errors import GateError, InputError, Refusal
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise, check_prunable
from onnxprune.graph.depth import with_depths
from onnxprune.graph.explain import explain
from onnxprune.graph.hidden import Narrowing, narrow
from onnxprune.graph.layers import find_sublayers, substitute
from onnxprune.graph.macs import count_macs
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import feeds_of_shapes, shapes_of, take_profile
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.storage import release
from onnxprune.graph.stream import find_streams
from onnxprune.graph.token_cut import study_tokens
from onnxprune.graph.turning import turned
from onnxprune.graph.view import GraphView
from onnxprune.graph.vocabulary import cut_vocabulary
from onnxprune.options import parse_share, settings
from onnxprune.outputs import input_files, model_output, run_output
from onnxprune.passes.apply import execute, finish, shipped
from onnxprune.passes.rows import HELD_BACK, split
from onnxprune.passes.scope import Settings, Study, understand
from onnxprune.passes.shallow import decide_depth
from onnxprune.passes.workbench import Progress
from onnxprune.proof import final_name, losses, missed, over_limit, prove, save, steps_to
from onnxprune.record import TOO_LARGE, leave, model_facts, new_record, skip
from onnxprune.request import examples, made_up, request_feeds
from onnxprune.runtime.session import RuntimeOptions, open_session
from onnxprune.search.costs import measured_costs, site_macs
from onnxprune.search.plan import Plan, load_plan, maps_beside, save_id_maps
from onnxprune.verification import Comparison, Fidelity, compare

log = logging.getLogger(__name__)

ModelSource = str | os.PathLike[str] | bytes | Model
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
        options: see :func:`onnxprune.options.settings`.

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
    decision = decide_depth(*prepared(given, calib, chosen), chosen, progress)
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
        chain = steps_to(decision)
        record["chain"] = losses(chain, decision, chosen, comparison)
        variants: dict[str, Any] = {"file as given": given if given.source is None or given.source.path is None else given.source.path}
        # A model without its map takes other ids than the file as given; with it, it costs the same.
        as_written = written if written is not None and final is result else result
        variants |= chain | {final_name(decision): as_written}
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
    if decided.layers:
        canonical = substitute(canonical, find_sublayers(GraphView(canonical), profile), decided.layers)
        profile = take_profile(canonical, feeds_of_shapes(given, decided.example))
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
    check_prunable(given)
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
        "tokens": _tokens(canonical),
        "refusals": [refusal.as_dict() for refusal in anatomy.refusals],
        **({"why": [answer.as_dict() for answer in explain(known, why, given)]} if why is not None else {}),
    }


def _tokens(canonical: Model) -> dict[str, Any]:
    """Behind how many attentions tokens can leave, how many there are (None: as many as are given) and always stay; or why none can."""
    try:
        axis = study_tokens(canonical)
    except InputError as reason:
        axis = Refusal("OP705", "tokens", str(reason))
    if isinstance(axis, Refusal):
        return {"refusal": axis.as_dict()}
    return {"places": len(axis.places), "count": axis.count, "leading": axis.leading}


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
