"""The search, and around it the question of depth: how many sublayers go before widths, tokens and numbers are decided.

Alone, depth goes as far as the target asks for. With other passes the search runs twice, with all sublayers and with fewer, and what loses
less on the rows that judge is taken: whole sublayers are coarse, and where widths can do the same they lose more than widths do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import Objective, choose_objective
from onnxprune.errors import NothingPrunable, Refusal, TargetError
from onnxprune.graph.macs import total_macs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of
from onnxprune.passes.apply import finish
from onnxprune.passes.base import finishing
from onnxprune.passes.decision import Decision
from onnxprune.passes.int8 import timed
from onnxprune.passes.layers import COLLAPSE, Bench, Shallow, shallower_models
from onnxprune.passes.manager import decide
from onnxprune.passes.meter import UNITS
from onnxprune.passes.premises import MOST_DROP
from onnxprune.passes.rows import JUDGES, judging_rows, split
from onnxprune.passes.scope import Settings, Study, of_shallow
from onnxprune.passes.workbench import Progress
from onnxprune.request import examples, request_feeds
from onnxprune.runtime.measure import clock_for, ratio, time_sessions
from onnxprune.runtime.session import Feeds
from onnxprune.search.costs import counted
from onnxprune.verification import Yardstick, compare

log = logging.getLogger(__name__)

_FIT_ROWS = 256
_TRIED, _GLANCED = 128, 32
"""Most rows that judge substitutes of what may go next, and those of all sublayers at first."""

_HALF = 0.5
"""Of what may be lost, depth takes this part at most: the rest is for what follows."""


def decide_depth(study_: Study, data: CalibrationData, settings: Settings, progress: Progress | None = None) -> Decision:
    """Find the plan, sublayers included.

    Raises:
        TargetError: the target is below what any choice reaches.
        NothingPrunable: no sublayer can be replaced, and no other pass runs.
    """
    if not study_.layers:
        return decide(study_, data, settings, progress)
    around = _Around(study_, data, settings, progress)
    models = around.models()
    others = bool(study_.sites or study_.integers or study_.tokens)
    if isinstance(models, Refusal):
        refusals = (*study_.refusals, study_.refused(models, others=others))
        return decide(replace(study_, refusals=refusals), data, settings, progress)
    if settings.target.auto:
        return around.down(models)
    return around.better_of_two(models) if others else around.deep_enough(models)


@dataclass(frozen=True)
class _Around:
    """What decisions about depth need to know."""

    study: Study
    data: CalibrationData
    settings: Settings
    progress: Progress | None

    @property
    def objective(self) -> Objective:
        return choose_objective(self.study.anatomy, self.settings.output, self.data.labels, self.settings.purpose)

    @property
    def request(self) -> Feeds:
        return request_feeds(self.study.given, self.data, self.settings.input_shapes)

    @property
    def judges(self) -> CalibrationData:
        held = split(self.data, self.settings)[1]
        return held.take(slice(0, min(judging_rows(self.study, self.settings, len(held)), JUDGES)))

    def yardstick(self, rows: int = JUDGES) -> Yardstick:
        return Yardstick(self.study.given, self.judges.take(slice(0, rows)), self.objective, self.settings.runtime)

    def models(self) -> Iterator[Shallow] | Refusal:
        """Ever shallower models, each made when it is asked for."""
        tell = self.progress or (lambda what, done, total: None)
        bench = Bench(
            split(self.data, self.settings)[0].take(slice(0, _FIT_ROWS)),
            self.yardstick(_TRIED),
            self.yardstick(_GLANCED),
            self.request,
            self.settings.runtime,
            (*self.settings.keep, *self.settings.exclude),
            examples(self.data),
            lambda done, total: tell("layers", done, total),
        )
        return shallower_models(self.study.anatomy, bench)

    def search(self, shallow: Shallow | None) -> Decision:
        """The decision about everything else."""
        study_ = self.study if shallow is None else of_shallow(self.study, shallow)
        if shallow is not None:
            log.info("layers: without %s", ", ".join(item.label for item in shallow.replaced))
        return decide(study_, self.data, self.settings, self.progress)

    def down(self, models: Iterator[Shallow]) -> Decision:
        """The search on the deepest model that loses half of what may be lost, or on less deep ones while other rows disagree with that."""
        limit = _HALF * (MOST_DROP if self.settings.max_drop is None else self.settings.max_drop)

        def fits(shallow: Shallow) -> bool:
            options, seed = self.settings.runtime, self.settings.recipe.seed
            return compare(self.study.given, shallow.model, self.judges, self.objective, options, seed).loss[1] <= limit

        for shallow in reversed(list(takewhile(fits, models))):
            try:
                return self.search(shallow)
            except TargetError as error:
                log.info("layers: %s", error)
        return self.search(None)

    def deep_enough(self, models: Iterator[Shallow]) -> Decision:
        """The deepest model that meets the target; depth alone decides."""
        try:
            return self.search(None)
        except TargetError as error:
            failure = error
        untried = None
        for shallow in models:
            untried = shallow
            if self._promising(shallow):
                untried = None
                try:
                    return self.search(shallow)
                except TargetError as error:
                    failure = error
        if untried is not None:
            return self.search(untried)  # an error that says how far depth goes
        raise failure

    def _promising(self, shallow: Shallow) -> bool:
        """Whether a model is not far too large or too slow; of milliseconds only a share can be told from a share."""
        target, runtime = self.settings.target, self.settings.runtime
        if target.quantity != "latency":
            return self._counted(shallow.model) <= target.absolute(self._counted(self.study.whole)) * _NEARLY
        if not target.relative:
            return True
        rewrites = finishing(runtime.short_provider) if self.settings.finishing else ()
        models = {"given": self.study.given, "shallow": finish(shallow.model, rewrites)}
        calls = {name: timed(model, self.request, runtime) for name, model in models.items()}
        timings = time_sessions(calls, clock=clock_for(runtime), seed=self.settings.recipe.seed, rounds=21, max_seconds=5.0)
        return ratio(timings, "shallow", "given").median <= target.absolute(1.0) * _NEARLY

    def _counted(self, model: Model) -> float:
        """Multiply-adds, parameters or bytes, whichever the target counts."""
        unit = UNITS[self.settings.target.quantity]
        if unit == "params" or unit == "bytes":
            return counted(model, unit)
        return float(total_macs(model, shapes_of(model, self.request)))

    def better_of_two(self, models: Iterator[Shallow]) -> Decision:
        """The decision with all sublayers, or the one without those whose loss is within half of what the first one loses."""
        yardstick = self.yardstick()
        plain: Decision | None = None
        allowed = COLLAPSE
        failure: TargetError | None = None
        try:
            plain = self.search(None)
        except TargetError as error:
            failure = error
        if plain is not None:
            if plain.already_met:
                return plain
            lost = yardstick(plain.shipping.ship(plain.student))
            allowed = _HALF * lost
        chosen = _last(takewhile(lambda shallow: shallow.error <= allowed, models))
        if chosen is not None:
            try:
                other = self.search(chosen)
            except (TargetError, NothingPrunable) as error:
                log.info("layers: %s", error)
                failure = failure or (error if isinstance(error, TargetError) else None)
            else:
                if plain is None or yardstick(other.shipping.ship(other.student)) < lost:
                    return other
        if plain is None:
            assert failure is not None
            raise failure
        refusal = Refusal("OP803", "layers", "the model loses less with all of its sublayers")
        refusals = (*plain.refusals, refusal)
        return replace(plain, refusals=refusals, plan=replace(plain.plan, refusals=refusals))


_NEARLY = 1.05
"""What is slower than the target by less than this may be found fast enough when it is measured again."""


def _last(models: Iterator[Shallow]) -> Shallow | None:
    found = None
    for found in models:  # noqa: B007
        pass
    return found
