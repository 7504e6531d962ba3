"""From a student to the graph that is shipped: sliced, compensated, in the numbers decided on, finished."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from onnxprune.calibration.data import CalibrationData
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept, slice_model
from onnxprune.passes.apply import finish, install
from onnxprune.passes.base import ordered
from onnxprune.passes.finishing import Part
from onnxprune.passes.int8 import Scheme, Trial, tailor, untailored
from onnxprune.passes.precision import Group
from onnxprune.passes.rounding import round_weights
from onnxprune.passes.rounds import Student
from onnxprune.quantize.form import Int8Form
from onnxprune.runtime.session import RuntimeOptions


@dataclass(frozen=True, eq=False)
class Shipping:
    """How students become files.

    ``rewrites`` run on the float graph, ``parts`` says which finishing rewrites were tried and what came of it. ``scheme`` is how int8 is
    done (None: not at all), after ``trials``; ``floats`` are the products that stay in float, chosen by the errors of ``groups``.
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
    _forms: dict[int, tuple[Student, Int8Form]] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> tuple[str, ...]:
        """Rewrites of the shipped graph, integers in their place."""
        return ordered((*self.rewrites, "int8")) if self.scheme is not None else self.rewrites

    def probe(self, kept: Kept) -> Model:
        """The graph that would be shipped, with weights that do not matter: for timing."""
        model = slice_model(self.anatomy, kept)
        form = untailored(model, self.scheme, self.floats) if self.scheme is not None else None
        return finish(model, self.steps, form)

    def form(self, student: Student) -> Int8Form | None:
        """How int8 is done in this student; computed once."""
        if self.scheme is None:
            return None
        known = self._forms.get(id(student))
        if known is None:
            model = install(slice_model(self.anatomy, student.kept), student.changes)
            known = self._forms[id(student)] = student, self._tailored(model, self.scheme)
        return known[1]

    def _tailored(self, model: Model, scheme: Scheme) -> Int8Form:
        smoothed = {group.tensor for group in self.groups if group.smoothed}
        return tailor(model, scheme, self.calibration, self.options, floats=self.floats, smoothed=smoothed)

    def final_form(self, student: Student) -> Int8Form | None:
        """The form with weights rounded to second order, which takes longer than candidates are worth."""
        form = self.form(student)
        if form is None:
            return None
        model = install(slice_model(self.anatomy, student.kept), student.changes)
        return replace(form, integers=round_weights(model, form, self.calibration, self.options))

    def final(self, student: Student) -> Model:
        """The graph as it is written."""
        model = install(slice_model(self.anatomy, student.kept), student.changes)
        return finish(model, self.steps, self.final_form(student))

    def ship(self, student: Student) -> Model:
        """The graph of a candidate: weights are rounded to nearest."""
        model = install(slice_model(self.anatomy, student.kept), student.changes)
        return finish(model, self.steps, self.form(student))

    def with_floats(self, floats: frozenset[str]) -> Shipping:
        """The same with these products in float; without integers if that is all of them."""
        if all(name in floats for group in self.groups for name in group.products):
            return self.in_float()
        return replace(self, floats=floats, _forms={})

    def in_float(self) -> Shipping:
        """The same without integers."""
        return replace(self, scheme=None, floats=frozenset(), _forms={})
