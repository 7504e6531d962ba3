"""The pass manager: from a model, data and a target to a plan.

Load and understand, measure costs, decide in rounds, measure the winner, re-anchor and decide again if it misses: every step is a function
of the values before it, and all random draws come from one seed.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import LossSource, Objective, Purpose, Targets, check_labels_of, check_loss, choose_objective
from onnxprune.errors import InputError, NothingPrunable, Refusal, TargetError
from onnxprune.graph.anatomy import Anatomy, Site, study
from onnxprune.graph.canonical import canonicalise, check_float
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.passes.apply import finish, install
from onnxprune.passes.base import RewritePass, WidthPass, select
from onnxprune.passes.rounds import Progress, Recipe, Scores, Student, Workbench, choose, cut, dense_student, descend, score
from onnxprune.request import examples, request_feeds
from onnxprune.runtime.measure import clock_for, in_turn, ratio, replicas, time_sessions
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.search.costs import GRANULARITY, CostTable, CostUnit, counted_costs, measured_costs
from onnxprune.search.plan import Plan, recipe_dict
from onnxprune.search.target import Target
from onnxprune.verification import Comparison, compare

log = logging.getLogger(__name__)

MISS = 0.02
"""A target counts as met up to this share over it: what one more step of a width, and the clock's noise, amount to."""

_ANCHORED = 0.01
"""A measured latency may miss its goal by this share before the search is repeated with a re-anchored table."""

_CLOSE = 1.005

_REPEATS = 2
_BATCH_ROWS = 8
_OUTPUT_BYTES = 64_000_000
HELD_BACK = 1024
_AUTO_STEP = 0.82
_AUTO_FLOOR = 0.08
_UNITS: dict[str, CostUnit] = {"latency": "ms", "macs": "macs", "params": "params", "size": "bytes"}


@dataclass(frozen=True)
class Settings:
    """What the user asked for, in the words of the command line."""

    passes: tuple[str, ...]
    target: Target
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 1024
    max_drop: float | None = None
    output: str | None = None
    loss: LossSource = "sampled"
    recipe: Recipe = field(default_factory=Recipe)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    purpose: Purpose | None = None
    finishing: bool = True


@dataclass(frozen=True, eq=False)
class Study:
    """The model understood: canonical graph, sites in the scope of the passes, refusals, what to preserve."""

    given: Model
    anatomy: Anatomy
    sites: tuple[Site, ...]
    rewrites: tuple[str, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan and everything it was decided from. ``met`` is None when the target was met by the finished file without pruning."""

    study: Study
    objective: Objective
    plan: Plan
    table: CostTable
    calibration: CalibrationData
    held_back: CalibrationData
    request: Mapping[str, np.ndarray]
    given_cost: float
    finished_cost: float
    goal: float | None
    predicted: float
    measured: float
    already_met: bool
    student: Student
    fits: tuple[Any, ...]
    trail: tuple[dict[str, Any], ...]


def understand(given: Model, settings: Settings, samples: Mapping[str, np.ndarray] | None = None) -> Study:
    """Canonicalise, find sites, apply the passes' scope and the keep/exclude patterns.

    Raises:
        InputError: a pattern matches nothing, an unknown pass, a model in a form that cannot be pruned.
        NothingPrunable: no site of the kinds asked for.
    """
    check_float(given)
    passes = select(settings.passes)
    widths = [item for item in passes if isinstance(item, WidthPass)]
    rewrites = [item.name for item in passes if isinstance(item, RewritePass)]
    if settings.finishing and settings.runtime.provider == "cpu" and "residual-sum" not in rewrites:
        rewrites.append("residual-sum")
    canonical, profile = canonicalise(given, samples)
    anatomy = study(canonical, profile)
    kinds = {item.kind for item in widths}
    found = [site for site in anatomy.sites if site.kind in kinds]
    sites = _scope(found, settings)
    refusals = tuple(refusal for refusal in anatomy.refusals if _concerns(refusal, kinds))
    if found and not sites:
        raise NothingPrunable(f"nothing to prune: --keep and --exclude protect all {len(found)} sites of {', '.join(sorted(kinds))}")
    if widths and not sites:
        raise NothingPrunable(_nothing(given, anatomy, kinds, refusals))
    return Study(given, anatomy, tuple(sites), tuple(rewrites), refusals)


def _concerns(refusal: Refusal, kinds: set[str]) -> bool:
    return {"1": "heads", "2": "ffn"}.get(refusal.code[2], "") in kinds or refusal.code[2] not in "12"


def _nothing(given: Model, anatomy: Anatomy, kinds: set[str], refusals: tuple[Refusal, ...]) -> str:
    counts: dict[str, int] = {}
    for node in anatomy.view.nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
    common = ", ".join(f"{count} {op}" for op, count in sorted(counts.items(), key=lambda item: -item[1])[:6])
    found = f"the graph has {len(anatomy.view.nodes)} nodes ({common})"
    others = sorted({site.kind for site in anatomy.sites} - kinds)
    more = f"; it does have {', '.join(others)} sites: add them to --passes" if others else ""
    reasons = "".join(f"\n  {refusal}" for refusal in refusals)
    wanted = sorted(kinds)
    return f"nothing to prune for {', '.join(wanted)}: {found} and none of it is a transformer block's {' or '.join(wanted)}{more}{reasons}"


def _scope(sites: list[Site], settings: Settings) -> list[Site]:
    """``--keep`` protects sites, ``--exclude`` does too: both are patterns on site names, and each must match something."""
    protected: set[str] = set()
    for option, patterns in (("--keep", settings.keep), ("--exclude", settings.exclude)):
        for pattern in patterns:
            try:
                matched = {site.name for site in sites if re.search(pattern, site.name)}
            except re.error as error:
                raise InputError(f"{option} {pattern!r} is not a regular expression: {error}") from error
            if not matched and sites:
                raise InputError(f"{option} {pattern!r} matches no site; sites are named like {sites[0].name} (see onnxprune inspect)")
            protected |= matched
    return [site for site in sites if site.name not in protected]


def split(data: CalibrationData, settings: Settings) -> tuple[CalibrationData, CalibrationData]:
    """Rows that decide and rows that judge: at most ``samples`` and 1,024; at least a quarter is held back."""
    rows = min(settings.samples, int(len(data) * 0.75))
    held = min(len(data) - rows, HELD_BACK)
    return data.split(rows, held, settings.recipe.seed)


def decide(study_: Study, data: CalibrationData, settings: Settings, progress: Progress | None = None) -> Decision:
    """Find the plan.

    Raises:
        TargetError: the target is below what any choice of units reaches.
    """
    if not study_.sites:
        raise InputError(f"--passes {','.join(settings.passes)} removes nothing: name heads, ffn or both; rewrites run along with them")
    return _Search(study_, data, settings, progress).run()


class _Search:
    """One search; attributes are set once, in the order of :meth:`run`."""

    def __init__(self, study_: Study, data: CalibrationData, settings: Settings, progress: Progress | None) -> None:
        self.study, self.settings, self.progress = study_, settings, progress
        self.objective = choose_objective(study_.anatomy, settings.output, data.labels, settings.purpose)
        check_loss(self.objective, data, settings.loss)
        check_labels_of(self.objective, data)
        self.calibration, self.held_back = split(data, settings)
        # What is chosen by looking at some rows must be reported on others.
        middle = len(self.held_back) // 2 if settings.target.auto else 0
        self.judges, self.held_back = self.held_back.take(slice(0, middle)), self.held_back.take(slice(middle, None))
        self.request = request_feeds(study_.given, data, settings.input_shapes)
        self.example = {name: array.shape for name, array in examples(data).items()}
        recipe = replace(settings.recipe, align=GRANULARITY.get(settings.runtime.provider, settings.recipe.align))
        self.bench = self._workbench(recipe)
        self.trail: list[dict[str, Any]] = []

    def _workbench(self, recipe: Recipe) -> Workbench:
        anatomy = self.study.anatomy
        tensor = self.objective.tensor
        batches = list(self.calibration.batches(self._batch_rows(), trim=True))
        session = open_session(with_outputs(anatomy.model, [tensor], keep=False), self.settings.runtime)
        targets = Targets(self.objective, batches, self.settings.loss, recipe.seed)
        for number, batch in enumerate(batches):
            targets.add(run(session, batch.feeds, [tensor])[0])
            if self.progress:
                self.progress("dense outputs", number + 1, len(batches))
        return Workbench(anatomy, self.study.sites, self.objective, batches, targets, self.settings.runtime, recipe, self.progress)

    def _batch_rows(self) -> int:
        """Rows per run: fewer when a row's output is large, a score for every word of a vocabulary at every token."""
        request = shapes_of(self.study.anatomy.model, self.request)
        per_row = 4 * int(np.prod(request.get(self.objective.tensor, (1,))[1:], dtype=np.int64))
        return int(np.clip(_OUTPUT_BYTES // max(per_row, 1), 1, _BATCH_ROWS))

    def build(self, kept: Kept) -> Model:
        """The graph that would be shipped, uncompensated."""
        return finish(slice_model(self.study.anatomy, kept), self.study.rewrites)

    def ship(self, student: Student) -> Model:
        return finish(install(slice_model(self.study.anatomy, student.kept), student.changes), self.study.rewrites)

    def run(self) -> Decision:
        target = self.settings.target
        table, given = self._costs()
        goal = None if target.auto else target.absolute(given)
        full = table.full
        if goal is not None and full <= goal:
            student = dense_student(self.bench)
            return self._decision(student, table, given, full, goal, full, full, already_met=True)
        if goal is not None and table.floor > goal:
            self._impossible(table, given, goal)
        if goal is None:
            student, predicted, measured = self._auto(table, given)
        else:
            student, table, predicted, measured = self._reach(table, given, goal)
        return self._decision(student, table, given, full, goal, predicted, measured, already_met=False)

    def _impossible(self, table: CostTable, given: float, goal: float) -> NoReturn:
        words = {"ms": "ms", "macs": "multiply-adds", "params": "parameters", "bytes": "bytes"}[table.unit]
        kinds = " and ".join(sorted({site.kind for site in self.bench.sites}))
        raise TargetError(
            f"target {self.settings.target} cannot be met: it asks for {goal:.4g} {words}, and with every {kinds} "
            f"unit removed the model still takes {table.floor:.4g} {words} ({100 * table.floor / given:.0f}% of the file as given). "
            f"Ask for at least {math.ceil(100 * table.floor / given)}%, or allow more passes"
        )

    def _costs(self) -> tuple[CostTable, float]:
        unit = _UNITS[self.settings.target.quantity]
        if unit != "ms":
            table = counted_costs(self.study.anatomy, self.bench.sites, unit, self.request)
            return table, table.full
        return measured_costs(
            self.study.anatomy,
            self.bench.sites,
            self.build,
            self.request,
            self.settings.runtime,
            seed=self.settings.recipe.seed,
            given=self.study.given,
            progress=self.bench.report("cost table"),
        )

    def _reach(self, table: CostTable, given: float, goal: float) -> tuple[Student, CostTable, float, float]:
        """Rounds to the goal; for milliseconds, measure, re-anchor and cut again while it misses."""
        found = descend(self.bench, table, goal, self.bench.recipe.rounds)
        if found is None:
            self._impossible(table, given, goal)
        student, before, scores = found
        if table.unit != "ms":
            cost = table.predict(student.counts)
            return student, table, cost, cost
        best: tuple[float, Student, float, float] | None = None
        for attempt in range(_REPEATS + 1):
            predicted = table.predict(student.counts)
            measured = self._measure(student, given)
            self._note(f"anchor {attempt}", student, predicted, measured)
            miss = abs(measured / goal - 1)
            # Faster than asked for is no failure: a model over the goal ranks behind every one that is not.
            rank = miss if measured <= goal * _CLOSE else miss + 1
            if best is None or rank < best[0]:
                best = (rank, student, predicted, measured)
            if miss <= _ANCHORED or attempt == _REPEATS:
                break
            table = table.scaled(measured / predicted)
            again = self._again(before, scores, table, goal)
            if again is None or all(np.array_equal(again.kept[site], student.kept[site]) for site in again.kept):
                break
            student = again
        assert best is not None
        _, student, predicted, measured = best
        return student, table, predicted, measured

    def _again(self, before: Student, scores: Scores, table: CostTable, goal: float) -> Student | None:
        kept = choose(self.bench, before, scores, table, goal)
        return None if kept is None else cut(self.bench, kept)

    def _auto(self, table: CostTable, given: float) -> tuple[Student, float, float]:
        """Go down in steps while the judging rows allow it, then half a step more; step back if the other held-back rows disagree."""
        limit = self.settings.max_drop if self.settings.max_drop is not None else 0.01
        prunable = table.full - table.fixed
        student, share = dense_student(self.bench), 1.0
        passed: list[Student] = []
        number = 0
        while share * _AUTO_STEP >= _AUTO_FLOOR:
            number += 1
            scores = score(self.bench, student, number)
            while share * _AUTO_STEP >= _AUTO_FLOOR and self._unchanged(
                student, scores, table, table.fixed + prunable * share * _AUTO_STEP
            ):
                share *= _AUTO_STEP  # the step is finer than the widths on offer
            tried = self._try(student, scores, table, prunable, share * _AUTO_STEP, limit)
            if tried is None:
                half = self._try(student, scores, table, prunable, share * _AUTO_STEP**0.5, limit)
                passed += [half] if half else []
                break
            passed.append(tried)
            student = tried
            share *= _AUTO_STEP
        while passed and not self.judge(passed[-1], self.held_back).loss[1] <= limit:
            passed.pop()
        if not passed:
            raise TargetError(
                f"no pruned model stays within --max-drop {100 * limit:g}% on {len(self.judges) + len(self.held_back)} held-back rows; "
                "allow a larger drop or give more calibration rows"
            )
        chosen = passed[-1]
        return chosen, table.predict(chosen.counts), self._measure(chosen, given)

    def _unchanged(self, student: Student, scores: Scores, table: CostTable, budget: float) -> bool:
        kept = choose(self.bench, student, scores, table, budget)
        return kept is not None and all(len(kept[site]) == len(units) for site, units in student.kept.items())

    def _try(self, student: Student, scores: Scores, table: CostTable, prunable: float, share: float, limit: float) -> Student | None:
        kept = choose(self.bench, student, scores, table, table.fixed + prunable * share)
        if kept is None:
            return None
        candidate = cut(self.bench, kept)
        judged = self.judge(candidate, self.judges)
        name, loss = judged.loss
        # A count of hits on a few hundred rows is too noisy to steer by; the expected drop is not, and needs no labels.
        expected = judged.expected_drop.value if judged.drop is not None and judged.expected_drop is not None else 0.0
        self._note(f"auto {100 * share:.0f}%", candidate, table.predict(candidate.counts), None, **{name: loss, "expected drop": expected})
        return candidate if max(loss, expected) <= limit else None

    def judge(self, student: Student, rows: CalibrationData) -> Comparison:
        settings = self.settings
        return compare(self.study.given, self.ship(student), rows, self.objective, settings.runtime, settings.recipe.seed)

    def _measure(self, student: Student, given: float) -> float:
        """Milliseconds of a student, as its paired share of the file as given."""
        number = replicas(self.study.given.weight_bytes)
        calls = {
            name: in_turn([partial(run, open_session(model, self.settings.runtime), self.request) for _ in range(number)])
            for name, model in (("given", self.study.given), ("pruned", self.ship(student)))
        }
        clock = clock_for(self.settings.runtime)
        timings = time_sessions(calls, clock=clock, seed=self.settings.recipe.seed, rounds=121, tolerance=0.004, max_seconds=20.0)
        return given * ratio(timings, "pruned", "given").median

    def _note(self, step: str, student: Student, predicted: float, measured: float | None, **losses: float) -> None:
        self.trail.append({"step": step, "kept": student.counts, "predicted": predicted, "measured": measured, **losses})
        log.info("%s: predicted %.4g, measured %s %s", step, predicted, f"{measured:.4g}" if measured else "-", losses or "")

    def _decision(
        self,
        student: Student,
        table: CostTable,
        given: float,
        finished: float,
        goal: float | None,
        predicted: float,
        measured: float,
        *,
        already_met: bool,
    ) -> Decision:
        from onnxprune import __version__

        settings = self.settings
        source = self.study.given.source
        plan = Plan(
            version=__version__,
            input_sha256=source.sha256 if source else "",
            passes=settings.passes,
            rewrites=self.study.rewrites,
            kept={site: tuple(int(unit) for unit in units) for site, units in student.kept.items()},
            units={site.name: site.units for site in self.bench.sites},
            target=str(settings.target),
            predicted={table.unit: predicted},
            recipe={**recipe_dict(self.bench.recipe), "loss": settings.loss, "calibration_sha256": self.calibration.sha256},
            objective={"output": self.objective.output, "link": self.objective.link, "why": self.objective.why},
            refusals=self.study.refusals,
            example={name: tuple(shape) for name, shape in self.example.items()},
            changes=student.changes,
        )
        return Decision(
            self.study,
            self.objective,
            plan,
            table,
            self.calibration,
            self.held_back,
            self.request,
            given,
            finished,
            goal,
            predicted,
            measured,
            already_met,
            student,
            student.fits,
            tuple(self.trail),
        )


def summary(sites: Sequence[Site], plan: Plan) -> list[dict[str, Any]]:
    """Kept and total units of every site, for tables and reports."""
    return [{"site": site.name, "kind": site.kind, "units": site.units, "kept": len(plan.kept[site.name])} for site in sites]
