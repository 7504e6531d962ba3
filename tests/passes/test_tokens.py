"""Which tokens leave where: schedules, what is chosen of them, and a whole run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune
from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import InputError, NothingPrunable, Refusal, TargetError
from onnxprune.graph.model import load
from onnxprune.graph.token_plan import TokenPlan
from onnxprune.passes import token_budget, tokens
from onnxprune.passes.aim import Aim, Outcome, Trail
from onnxprune.passes.premises import Premises
from onnxprune.passes.tokens import Schedule, pareto, profiles
from onnxprune.search.target import Target
from tests.architectures import exports

SAMPLE = Path(__file__).parents[2] / "samples" / "vision"


def schedule(error: float, share: float) -> Schedule:
    return Schedule(TokenPlan("drop", ()), error, share)


@given(st.integers(1, 40))
def test_shares_never_rise_and_some_token_stays(places: int) -> None:
    for shares in profiles(places):
        assert len(shares) == places
        assert all(1 >= before >= after > 0 for before, after in itertools.pairwise(shares))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1.5))))
def test_nothing_that_is_slower_and_worse_is_offered(found: list[tuple[float, float]]) -> None:
    front = pareto([schedule(*item) for item in found])
    assert all(a.share > b.share and a.error < b.error for a, b in itertools.pairwise(front))
    for item in (schedule(*values) for values in found):
        if item.share <= 0.98:
            assert any(other.share <= item.share and other.error <= item.error for other in front)


class Rivals:
    """A search whose results are known: by schedule (None: all tokens) the cost that widths reach and what is lost then."""

    def __init__(self, known: dict[Schedule | None, tuple[float, float] | None], most: int) -> None:
        self.known, self.most, self.tried = known, most, list[Schedule | None]()
        self.trail = Trail()
        self.refusals: tuple[Refusal, ...] = ()

    def search(self, premises: Premises, aim: Aim) -> Any:
        now: Any = aim.shipping
        self.tried.append(now.taken)
        if (found := self.known[now.taken]) is None:
            raise TargetError("out of reach")
        reached = SimpleNamespace(measured=found[0], predicted=1.0, student=SimpleNamespace(lost=found[1], counts={}))
        return Outcome(reached, now)  # type: ignore[arg-type]

    def chosen(self, monkeypatch: pytest.MonkeyPatch) -> Schedule | None:
        plans = {schedule.plan: schedule for schedule in self.known if schedule}
        whole = SimpleNamespace(schedules=list(plans.values()), taken=None, ship=lambda student: student.lost)
        whole.with_tokens = lambda plan: SimpleNamespace(**{**vars(whole), "taken": plans[plan]})
        tables = SimpleNamespace(scaled=lambda factor: None)
        premises: Any = SimpleNamespace(
            meter=SimpleNamespace(tables=lambda shipping: (tables, 1.0)),
            yardstick=lambda lost: lost,
        )
        monkeypatch.setattr(token_budget, "_promising", lambda *rest: (list(self.known), self.most))
        aim: Any = Aim(Target("latency", 1.0), 1.0, 1.0, tables, SimpleNamespace(), whole, self.trail)  # type: ignore[arg-type]
        outcome: Any = token_budget.search_beside_tokens(premises, aim, self.search)
        self.refusals = outcome.refusals
        return outcome.shipping.taken  # type: ignore[no-any-return]


LIGHT, MEDIUM, HEAVY = (
    replace(schedule(0.01, share), plan=TokenPlan(policy, ())) for policy, share in (("drop", 0.9), ("merge", 0.7), ("grid", 0.5))
)


def test_of_all_tokens_and_the_schedules_that_promise_most_what_loses_least_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = Rivals({None: (1.0, 0.3), MEDIUM: (1.0, 0.2), LIGHT: (1.0, 0.4), HEAVY: (1.0, 0.1)}, most=3)
    assert rivals.chosen(monkeypatch) is MEDIUM
    assert rivals.tried == [None, MEDIUM, LIGHT]
    assert not rivals.refusals
    steps = [(entry["step"], entry["divergence"]) for entry in rivals.trail.steps]
    assert steps == [
        ("all tokens: result", 0.3),
        ("schedule 1: result", 0.2),
        ("schedule 2: result", 0.4),
        ("schedule 1: taken", 0.2),
    ]


def test_all_tokens_stay_if_that_loses_least_and_the_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = Rivals({None: (1.0, 0.1), MEDIUM: (1.0, 0.2)}, most=3)
    assert rivals.chosen(monkeypatch) is None
    assert [refusal.code for refusal in rivals.refusals] == ["OP707"]


def test_what_loses_least_but_misses_the_goal_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Rivals({None: (1.0, 0.3), MEDIUM: (1.05, 0.2)}, most=3).chosen(monkeypatch) is None


@pytest.mark.parametrize("most", [1, 2])
def test_what_misses_the_goal_takes_nobodys_place(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = Rivals({LIGHT: (1.2, 0.3), MEDIUM: (1.1, 0.2), HEAVY: (1.0, 0.4)}, most=most)
    assert rivals.chosen(monkeypatch) is HEAVY
    assert rivals.tried == [LIGHT, MEDIUM, HEAVY]


def test_a_schedule_that_cannot_reach_the_goal_gives_way_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = Rivals({LIGHT: None, MEDIUM: (1.0, 0.2), HEAVY: (1.0, 0.1)}, most=1)
    assert rivals.chosen(monkeypatch) is MEDIUM
    assert rivals.tried == [LIGHT, MEDIUM]
    with pytest.raises(TargetError, match="out of reach"):
        Rivals({None: None, LIGHT: None}, most=1).chosen(monkeypatch)


def by_tokens(whole: Any, models: dict[str, Any], *rest: Any) -> dict[str, float]:
    """Later schedules of the list take fewer tokens' time, whatever the machine is doing."""
    return {name: 0.95 - 0.02 * number for number, name in enumerate(models)}


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "timed_shares", by_tokens)
    monkeypatch.setattr(token_budget, "timed_shares", by_tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("no_clock")
def test_tokens_leave_a_real_model_within_the_drop_and_the_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    model = SAMPLE / "model.onnx"
    result = onnxprune.prune(
        model,
        passes="tokens",
        max_drop="5%",
        calib=SAMPLE / "calib.npz",
        output=tmp_path / "out.onnx",
        run_dir=tmp_path / "run",
        samples=32,
        finishing=False,
        bench_seconds=0,
    )
    assert result.plan.tokens is not None
    samples = result.record["tokens"]["samples"]
    for sample in samples:
        for number, cut in enumerate(result.plan.tokens.cuts):
            assert sum(left > number for left in sample["stayed"]) >= 1 + np.ceil(cut.share * 49 - 1e-4)
        assert (sample["picture"]["rows"], sample["picture"]["columns"], sample["picture"]["others"]) == (7, 7, 1)
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png;base64,") == len(samples) == 6
    assert result.plan.tokens.cuts
    result.plan.save(tmp_path / "plan.json")
    onnxprune.apply(model, tmp_path / "plan.json", output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert "behind attention" in result.plan.explain()


def test_short_texts_are_told_that_it_is_not_worth_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a clock by which choosing tokens takes as long as they do."""
    monkeypatch.setattr(tokens, "timed_shares", lambda whole, models, *rest: dict.fromkeys(models, 1.04))
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 30, (24, 12))
    np.savez(tmp_path / "calib.npz", input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    with pytest.raises(NothingPrunable, match=r"OP706.*0\.96x of the speed with all 12 tokens"):
        onnxprune.prune(
            exports.path("bert", "do18-sdpa"), passes="tokens", target_latency="80%", calib=tmp_path / "calib.npz", finishing=False
        )


def test_fewer_tokens_serve_no_target_that_is_counted() -> None:
    with pytest.raises(InputError, match="--target-latency"):
        onnxprune.prune(exports.path("vit", "do18-sdpa"), passes="tokens", target_macs="50%", calib="random")


def test_a_language_model_is_refused() -> None:
    path = exports.path("gpt2", "do18-sdpa")
    with pytest.raises(NothingPrunable, match="OP703"):
        onnxprune.prune(path, passes="tokens", target_latency="50%", calib="random", finishing=False)


def test_a_policy_without_the_pass_is_an_error() -> None:
    with pytest.raises(InputError, match="tokens is not among the passes"):
        onnxprune.prune(load(exports.path("vit", "do18-sdpa")), token_policy="merge", calib="random")


def test_schedules_are_of_one_policy(no_clock: None) -> None:
    """With sixteen tokens, on the clock of this test."""
    from onnxprune.graph.canonical import canonicalise
    from onnxprune.graph.profile import synthetic_feeds
    from onnxprune.runtime.session import RuntimeOptions, open_session, run

    model, _ = canonicalise(load(exports.path("dinov2", "do18-sdpa")))
    feeds = synthetic_feeds(model)
    before = run(open_session(model), feeds)[0]

    def error(candidate: Any) -> float:
        return float(np.abs(run(open_session(candidate), feeds)[0] - before).mean())

    found = tokens.choose_schedules(model, (), error, CalibrationData(feeds, None, "one row"), feeds, RuntimeOptions())  # type: ignore[arg-type]
    assert isinstance(found, tuple)
    assert len({item.plan.policy for item in found}) == 1
    assert [item.error for item in found] == sorted(item.error for item in found)
