"""Schedules in the order of what they promise beside narrower layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from onnxprune.graph.token_plan import Policy, TokenPlan
from onnxprune.passes import token_budget
from onnxprune.passes.token_budget import by_promise, fast_enough, fastest_within, in_narrow
from onnxprune.passes.tokens import Schedule
from onnxprune.runtime.session import RuntimeOptions


def schedule(error: float, share: float, policy: Policy = "drop") -> Schedule:
    return Schedule(TokenPlan(policy, ()), error, share)


def test_schedules_are_ranked_by_what_tokens_and_widths_lose_together() -> None:
    light, heavy = schedule(0.01, 0.8), schedule(0.2, 0.5)
    assert by_promise([heavy, light], lambda share: 0.1 * share) == [light, heavy]
    assert by_promise([light, heavy], lambda share: share) == [heavy, light]
    assert by_promise([light, heavy], lambda share: None if share > 0.6 else 0.0) == [heavy, light]


def test_what_may_be_lost_is_used_up() -> None:
    mild, strong, stronger = schedule(0.1, 0.9), schedule(0.2, 0.7), schedule(0.4, 0.5)
    assert fastest_within([mild, strong, stronger], 0.3, lambda item: item.error) is strong
    assert fastest_within([mild, strong, stronger], 0.05, lambda item: item.error) is None


def test_the_slowest_schedule_that_is_measured_to_meet_the_goal_is_tried_first() -> None:
    mild, strong, stronger = schedules = [schedule(0.1, 0.9), schedule(0.2, 0.7), schedule(0.4, 0.5)]
    assert fast_enough(schedules, 10.0, 7.5, None) == [strong, stronger]
    assert fast_enough(schedules, 10.0, 7.5, lambda item: 8.0 if item is strong else 6.0) == [stronger]
    assert fast_enough(schedules, 10.0, 1.0, None) == [stronger]
    assert fast_enough(schedules, 10.0, 9.5, lambda item: 9.0)[0] is mild


def test_a_schedule_is_measured_again_in_the_narrow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is a share of that model's, its error what it adds there; one that saves no time there is none."""
    errors = {None: 0.1, "drop": 0.3, "merge": 0.05, "grid": 0.1}

    def shares(whole: str | None, models: Mapping[str, str], *rest: Any) -> dict[str, float]:
        assert whole is None
        return {name: {"drop": 0.95, "merge": 0.9, "grid": 0.99}[model] for name, model in models.items()}

    monkeypatch.setattr(token_budget, "timed_shares", shares)
    narrow: Any = lambda item: item and item.plan.policy  # noqa: E731
    yardstick: Any = errors.__getitem__
    known = [schedule(0.01, 0.8), schedule(0.02, 0.7, "merge"), schedule(0.02, 0.6, "grid")]
    found = in_narrow(known, narrow, yardstick, {}, RuntimeOptions(), 0)
    assert [item.share for item in found] == [0.95, 0.9]
    assert [item.error for item in found] == pytest.approx([0.2, 0.0])
