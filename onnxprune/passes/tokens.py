"""``tokens``: which tokens leave where, chosen by what it costs the outputs and what it gains on the clock."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np

from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.errors import Refusal
from onnxprune.graph.model import Model
from onnxprune.graph.token_axis import TokenAxis
from onnxprune.graph.token_cut import cut_tokens, study_tokens
from onnxprune.graph.token_plan import MERGING, POLICIES, RANKING, CannotCut, Policy, TokenCut, TokenPlan
from onnxprune.graph.token_policy import kept_of
from onnxprune.passes.apply import finish
from onnxprune.passes.base import WholePass
from onnxprune.passes.int8 import timed
from onnxprune.passes.token_lines import Grid, Patches, fewer, joins_of, patches_by_place
from onnxprune.passes.token_predictor import fit_predictors
from onnxprune.passes.token_ranks import attention_received, nested, rank_positions, thresholds
from onnxprune.runtime.measure import clock_for, ratio, time_sessions
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run
from onnxprune.verification import Yardstick

log = logging.getLogger(__name__)

TOKENS = WholePass(
    name="tokens",
    kind="tokens",
    summary="fewer tokens in the later blocks: the least attended leave, or similar ones merge",
    detail=(
        "Behind an attention, tokens that get little of it, there or later, leave, are packed into one, or merge with those most like "
        "them, whichever changes the outputs least. Weights stay as they are. Schedules over the layers are measured, and share the budget "
        "with the other passes. Needs a latency target, or none; pays for images and for texts of 64 tokens and more."
    ),
)

TokenPolicy = Policy | Literal["auto"]

_SIDE_BY_SIDE = 6

FASTER = 0.98
"""A schedule must take no more than this share of the time with all tokens."""

_LEAST: dict[Policy, float] = {"merge": 1 / 2, "drop-merge": 1 / 3}
"""Share of the tokens in front of a place that merging leaves at least."""

_EQUAL = 1e-4
_CHECKED = 4
_TRIAL = 0.7


@dataclass(frozen=True)
class Schedule:
    """Tokens to leave, the divergence this costs, and the time it takes as a share of the time with all tokens."""

    plan: TokenPlan
    error: float
    share: float

    def as_dict(self) -> dict[str, Any]:
        return {**self.plan.summary(), "error": self.error, "share": self.share}


def choose_schedules(
    model: Model,
    rewrites: Sequence[str],
    yardstick: Yardstick,
    calibration: CalibrationData,
    request: Feeds,
    options: RuntimeOptions,
    *,
    policy: TokenPolicy = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Schedule, ...] | Refusal:
    """Schedules none of which is slower and worse than another one, from slow to fast.

    The policy and the score are chosen on one schedule, all others are of these; where merging is best, also of the best other policy.
    Every error and every time is measured, on the finished graph.

    Args:
        model: the canonical model, whose tokens are all there.
        yardstick: divergence from the model as given, on rows that decide nothing else.
        calibration: rows that tell which positions matter, where samples do not decide it themselves.
        request: what is timed.

    Returns:
        or why no token leaves.
    """
    axis = study_tokens(model)
    if isinstance(axis, Refusal):
        return axis
    places = len(axis.places)
    planner = Planner(model, axis, calibration, options)
    trials: dict[tuple[Policy, bool], Schedule] = {}
    reasons = []
    asked = POLICIES if policy == "auto" else (policy,)
    kinds = [(name, predicted) for name in asked for predicted in ((False, True) if name in RANKING else (False,))]
    batch = next(calibration.take(slice(0, _CHECKED)).batches(_CHECKED, trim=True))
    for kind in kinds:
        try:
            trial = planner.plan(*kind, _stages(places, _TRIAL))
            if not trial.cuts:
                raise CannotCut("the tokens are too few for a line of them to go")
            candidate = cut_tokens(model, trial)
            _check(model, cut_tokens(model, planner.plan(*kind, (1.0,) * places)), batch, options)
        except CannotCut as error:
            reasons.append(str(error))
            continue
        trials[kind] = Schedule(trial, yardstick(finish(candidate, rewrites)), 1.0)
    if not trials:
        return Refusal("OP705", "tokens", reasons[0])
    ranked = sorted(trials, key=lambda kind: trials[kind].error)
    # At most half of the tokens merge at a place, which takes time as well: the fastest schedules are of another policy.
    others = [kind for kind in ranked if kind[0] not in MERGING][:1] if ranked[0][0] in MERGING else []
    log.info("tokens: %s", ", ".join(f"{name} by {item.plan.score} {item.error:.3g}" for (name, _), item in trials.items()))
    wanted = (planner.plan(*kind, shares) for kind in (ranked[0], *others) for shares in profiles(places))
    plans = [plan for plan in dict.fromkeys(wanted) if plan.cuts]
    models = {f"{number}": finish(cut_tokens(model, plan), rewrites) for number, plan in enumerate(plans)}
    found = []
    shares = timed_shares(finish(model, rewrites), models, request, options, seed)
    for number, plan in enumerate(plans):
        found.append(Schedule(plan, yardstick(models[f"{number}"]), shares[f"{number}"]))
        if progress:
            progress(number + 1, len(plans))
    front = pareto(found)
    if not front:
        fastest = min(found, key=lambda schedule: schedule.share)
        tokens = _tokens(axis, calibration, request)
        reason = f"the fastest of {len(found)} schedules runs at {1 / fastest.share:.2f}x of the speed with all{tokens} tokens"
        return Refusal("OP706", "tokens", reason)
    return front


def _tokens(axis: TokenAxis, calibration: CalibrationData, request: Feeds) -> str:
    """`` 16`` for a request of sixteen tokens; nothing if neither the model nor the request tells."""
    told = [request[name].shape[along] for name, along in calibration.sequence_axes.items() if name in request]
    count = axis.count or max(told, default=None)
    return "" if count is None else f" {count}"


def pareto(found: Sequence[Schedule]) -> tuple[Schedule, ...]:
    """Those that no other one beats in both error and time, from slow to fast; none that is no faster than all tokens are."""
    front: list[Schedule] = []
    for schedule in sorted(found, key=lambda item: (item.share, item.error)):
        if schedule.share <= FASTER and np.isfinite(schedule.error) and (not front or schedule.error < front[-1].error):
            front.append(schedule)
    return tuple(reversed(front))


def profiles(places: int) -> Iterator[tuple[float, ...]]:
    """Shares of tokens that stay behind each place, never rising.

    Three places of the same ratio (EViT, DynamicViT), one place, evenly more at every place (ToMe), and little at first and much at the
    end, as learned schedules do (DiffRate).
    """
    for ratio_ in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        yield _stages(places, ratio_)
    for start in dict.fromkeys((0, places // 4, places // 2)):
        for left in (0.7, 0.5, 0.3):
            yield tuple(left if place >= start else 1.0 for place in range(places))
    for power in (1.0, 2.0):
        for left in (0.6, 0.4, 0.25, 0.1):
            yield tuple(1 - (1 - left) * ((place + 1) / places) ** power for place in range(places))


def _stages(places: int, ratio_: float) -> tuple[float, ...]:
    stages = sorted({places // 4, places // 2, 3 * places // 4})
    return tuple(ratio_ ** sum(place >= stage for stage in stages) for place in range(places))


class Planner:
    """Makes plans of schedules; what a policy has to know of calibration rows is found once."""

    def __init__(self, model: Model, axis: TokenAxis, calibration: CalibrationData, options: RuntimeOptions) -> None:
        self.model, self.axis, self.calibration, self.options = model, axis, calibration, options

    @cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        return rank_positions(self.model, self.axis, self.calibration, self.options)

    @cached_property
    def attended(self) -> list[dict[str, np.ndarray]]:
        return attention_received(self.model, self.calibration, self.options)

    @cached_property
    def predictors(self) -> dict[str, tuple[float, ...]]:
        return fit_predictors(self.model, self.calibration, self.options)

    @cached_property
    def patches(self) -> tuple[Grid, dict[str, Patches]]:
        return patches_by_place(self.model, self.calibration, self.options)

    def plan(self, policy: Policy, predicted: bool, shares: Sequence[float]) -> TokenPlan:
        """Cuts only where the share falls; merging takes no more than it can of the tokens that it finds at one place.

        Args:
            predicted: whether predictors rank tokens, and not the attention they get.
            shares: of tokens that stay behind each place.

        Raises:
            CannotCut: the policy does not fit the model.
        """
        cuts: list[TokenCut] = []
        before = 1.0
        for block, (place, wanted) in enumerate(zip(self.axis.places, shares, strict=True)):
            share = max(wanted, before * _LEAST.get(policy, 0.0))
            if share < before or all(other == 1.0 for other in shares):
                cuts.append(TokenCut(place.tensor, place.softmax.name, round(share, 4), block))
            before = share
        if policy == "threshold":
            found = thresholds(self.attended, [(cut.place, cut.share) for cut in cuts], self.axis.leading)
            cuts = [replace(cut, threshold=round(value, 5)) for cut, value in zip(cuts, found, strict=True)]
        if predicted:
            cuts = [replace(cut, predictor=self.predictors.get(cut.place, ())) for cut in cuts]
        if policy == "static":
            cuts = self._with_positions(cuts)
        if policy == "grid":
            cuts = self._with_joins(cuts)
        return TokenPlan(policy, tuple(cuts))

    def _with_positions(self, cuts: Sequence[TokenCut]) -> list[TokenCut]:
        ranks = [self.ranks[cut.place] for cut in cuts]
        keep = [self.axis.leading + kept_of(cut.share, len(rank) - self.axis.leading) for cut, rank in zip(cuts, ranks, strict=True)]
        return [replace(cut, positions=positions) for cut, positions in zip(cuts, nested(ranks, keep), strict=True)]

    def _with_joins(self, cuts: Sequence[TokenCut]) -> list[TokenCut]:
        """A line goes as a whole, so that a place may leave fewer than its share; one at which no line has to go is none."""
        grid, patches = self.patches
        assert self.axis.count is not None
        others, whole, found = self.axis.count - grid.count, all(cut.share == 1 for cut in cuts), []
        first = grid.count
        for cut in cuts:
            before, grid = grid, fewer(grid, patches[cut.place], kept_of(cut.share, first))
            if whole or grid.count < before.count:
                found.append(replace(cut, joins=joins_of(grid, others), share=round(grid.count / first, 4)))
        return found


def _check(model: Model, cut: Model, batch: Batch, options: RuntimeOptions) -> None:
    """With every token kept, the rewritten graph must compute what the graph does; padding leaves all the same."""
    mask = batch.token_mask
    for want, got in zip(*(run(open_session(item, options), batch.feeds) for item in (model, cut)), strict=True):
        if mask is not None and want.shape[:2] == got.shape[:2] == mask.shape:
            want, got = want[mask], got[mask]
        if want.shape != got.shape or not np.allclose(got, want, rtol=0, atol=_EQUAL * float(np.abs(want).max())):
            raise CannotCut("with all tokens kept, the rewritten graph does not compute what the graph does")


def timed_shares(whole: Model, models: Mapping[str, Model], request: Feeds, options: RuntimeOptions, seed: int) -> dict[str, float]:
    """Paired share of the time of ``whole`` that each model takes; only a few sessions are open at once."""
    shares: dict[str, float] = {}
    reference = timed(whole, request, options)
    for start in range(0, len(models), _SIDE_BY_SIDE):
        part = dict(islice(models.items(), start, start + _SIDE_BY_SIDE))
        calls = {"whole": reference} | {name: timed(model, request, options) for name, model in part.items()}
        timings = time_sessions(calls, clock=clock_for(options), seed=seed, rounds=41, max_seconds=40.0 * len(part) / len(models))
        shares |= {name: ratio(timings, name, "whole").median for name in part}
    return shares
