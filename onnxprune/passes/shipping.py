"""From a student to the graph that is shipped: sliced, compensated, in the numbers decided on, finished."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Objective
from onnxprune.errors import Refusal
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.graph.token_cut import cut_tokens, present_in
from onnxprune.graph.token_plan import TokenPlan
from onnxprune.passes.apply import finish, install
from onnxprune.passes.base import ordered
from onnxprune.passes.finishing import Part, choose_parts
from onnxprune.passes.int8 import Scheme, Trial, choose_scheme, tailor, untailored
from onnxprune.passes.precision import Group, measure_groups
from onnxprune.passes.rounding import round_weights
from onnxprune.passes.scope import Settings, Study
from onnxprune.passes.tokens import Schedule
from onnxprune.passes.workbench import Student, Workbench
from onnxprune.quantize.form import Int8Form
from onnxprune.runtime.session import Feeds, RuntimeOptions
from onnxprune.verification import Yardstick

_JUDGED = 128
_SENSITIVITY_ROWS = 64
_FORMS = 2
"""Students whose int8 forms are kept: each holds the student's weights."""


@dataclass(frozen=True, eq=False)
class Shipping:
    """How students become files.

    ``rewrites`` run on the float graph, ``parts`` says which finishing rewrites were tried and what came of it. ``scheme`` is how int8 is
    done (None: not at all), after ``trials``; ``floats`` are the products that stay in float, chosen by the errors of ``groups``.
    ``tokens`` says which tokens leave where (None: none), one of ``schedules``.
    """

    anatomy: Anatomy
    rewrites: tuple[str, ...]
    calibration: CalibrationData
    options: RuntimeOptions
    parts: tuple[Part, ...] = ()
    scheme: Scheme | None = None
    trials: tuple[Trial, ...] = ()
    groups: tuple[Group, ...] = ()
    floats: frozenset[str] = frozenset()
    schedules: tuple[Schedule, ...] = ()
    tokens: TokenPlan | None = None
    _forms: dict[int, tuple[Student, Int8Form]] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> tuple[str, ...]:
        """Rewrites of the shipped graph, integers in their place."""
        return ordered((*self.rewrites, "int8")) if self.scheme is not None else self.rewrites

    def probe(self, kept: Kept) -> Model:
        """The graph that would be shipped, with weights that do not matter: for timing."""
        model = slice_model(self.anatomy, kept)
        form = untailored(model, self.scheme, self.floats) if self.scheme is not None else None
        return finish(self._cut(model), self.steps, form)

    def _cut(self, model: Model) -> Model:
        """The model with fewer tokens; int8 is decided on all of them."""
        return model if self.tokens is None else cut_tokens(model, present_in(model, self.tokens))

    def tokens_of(self, student: Student) -> TokenPlan | None:
        """The cuts that this student has an attention for."""
        if self.tokens is None:
            return None
        found = present_in(slice_model(self.anatomy, student.kept), self.tokens)
        return found if found.cuts else None

    def form(self, student: Student) -> Int8Form | None:
        """How int8 is done in this student; kept for the last few that were asked for."""
        if self.scheme is None:
            return None
        known = self._forms.get(id(student))
        if known is None:
            while len(self._forms) >= _FORMS:
                self._forms.pop(next(iter(self._forms)))
            known = self._forms[id(student)] = student, self._tailored(self.sliced(student), self.scheme)
        return known[1]

    def _tailored(self, model: Model, scheme: Scheme) -> Int8Form:
        smoothed = {group.tensor for group in self.groups if group.smoothed}
        return tailor(model, scheme, self.calibration, self.options, floats=self.floats, smoothed=smoothed)

    def final_form(self, student: Student) -> Int8Form | None:
        """The form with weights rounded to second order, which takes longer than candidates are worth."""
        form = self.form(student)
        if form is None:
            return None
        return replace(form, integers=round_weights(self.sliced(student), form, self.calibration, self.options))

    def final(self, student: Student) -> Model:
        """The graph as it is written."""
        return finish(self._cut(self.sliced(student)), self.steps, self.final_form(student))

    def sliced(self, student: Student) -> Model:
        """The float graph of a student, before tokens leave and rewrites run."""
        return install(slice_model(self.anatomy, student.kept), student.changes)

    def ship(self, student: Student, sliced: Model | None = None) -> Model:
        """The graph of a candidate: weights are rounded to nearest. ``sliced`` is what :meth:`sliced` makes, if it is there."""
        return finish(self._cut(sliced or self.sliced(student)), self.steps, self.form(student))

    def with_floats(self, floats: frozenset[str]) -> Shipping:
        """The same with these products in float; without integers if that is all of them."""
        if all(name in floats for group in self.groups for name in group.products):
            return self.in_float()
        return replace(self, floats=floats, _forms={})

    def with_tokens(self, tokens: TokenPlan) -> Shipping:
        """The same with tokens that leave. How int8 is done does not depend on them."""
        return replace(self, tokens=tokens)

    def in_float(self) -> Shipping:
        """The same without integers."""
        return replace(self, scheme=None, floats=frozenset(), _forms={})


def choose_shipping(
    study: Study,
    bench: Workbench,
    objective: Objective,
    calibration: CalibrationData,
    judges: CalibrationData,
    request: Feeds,
    settings: Settings,
) -> tuple[Shipping, Refusal | None]:
    """Finishing rewrites that pay, how int8 is done if it is asked for, and what it costs where: all measured on the unpruned model.

    Returns:
        How students are to be shipped, and why not in int8 if that was asked for and does not pay.
    """
    model, options, seed = study.anatomy.model, settings.runtime, settings.recipe.seed
    rewrites: tuple[str, ...] = study.rewrites
    parts: tuple[Part, ...] = ()
    if settings.finishing and settings.may_time(study.given):
        samples = [dict(batch.feeds) for batch in bench.batches[:2]]
        rewrites, parts = choose_parts(model, rewrites, request, options, seed, samples, bench.report("finishing"))
    shipping = Shipping(study.anatomy, rewrites, calibration, options, parts)
    if not study.integers:
        return shipping, None
    steps = ordered((*rewrites, "int8"))
    yardstick = Yardstick(model, judges.take(slice(0, _JUDGED)), objective, options)
    report = bench.report("int8 schemes")
    scheme, trials = choose_scheme(model, steps, yardstick, calibration, request, options, choice=settings.int8, seed=seed, progress=report)
    if scheme is None:
        return replace(shipping, trials=trials), _not_faster(trials)
    yardstick = Yardstick(model, judges.take(slice(0, _SENSITIVITY_ROWS)), objective, options)
    report = bench.report("int8 sensitivity")
    groups = measure_groups(study.anatomy, study.sites, scheme, yardstick, calibration, request, options, report)
    return replace(shipping, scheme=scheme, trials=trials, groups=groups), None


def _not_faster(trials: tuple[Trial, ...]) -> Refusal:
    best = max(trials, key=lambda trial: trial.speedup, default=None)
    if best is None:
        reason = "nothing computes in int8: the graph has no MatMul or plain Gemm of an activation with a constant float32 matrix"
        return Refusal("OP401", "int8", reason, "leave int8 out; convolutions and products of two activations stay in float")
    found = f"the best form tried ({best.scheme}) runs at {best.speedup:.2f}x of its speed"
    return Refusal("OP401", "int8", f"int8 is not faster than float here: {found}")
