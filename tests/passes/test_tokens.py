"""Which tokens leave where: schedules, what is chosen of them, and a whole run."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune
from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import InputError, NothingPrunable
from onnxprune.graph.model import load
from onnxprune.graph.token_plan import TokenPlan
from onnxprune.passes import manager, tokens
from onnxprune.passes.tokens import Schedule, best_schedule, pareto, profiles
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


def test_tokens_leave_when_widths_would_lose_more() -> None:
    light, heavy = schedule(0.01, 0.8), schedule(0.2, 0.5)
    assert best_schedule([light, heavy], lambda share: 0.1 * share) is light
    assert best_schedule([light, heavy], lambda share: 0.001) is None
    assert best_schedule([light, heavy], lambda share: None if share > 0.6 else 0.0) is heavy


@pytest.mark.parametrize(
    ("floors", "sites", "tried"),
    [((0.9,), True, 1), ((1.01, 0.95), True, 2), ((1.01,), False, 1), ((1.1, 1.05), True, 2)],
    ids=["meets the goal", "a faster one does", "a miss that counts as none", "none does"],
)
def test_a_schedule_that_cannot_reach_the_goal_gives_way_to_a_faster_one(floors: tuple[float, ...], sites: bool, tried: int) -> None:
    schedules = [schedule(0.01, 0.8), schedule(0.2, 0.5)]
    asked: list[TokenPlan] = []
    table = [SimpleNamespace(floats=SimpleNamespace(floor=floor), integers=SimpleNamespace(floor=floor)) for floor in floors]
    search = object.__new__(manager._Search)
    search.study = SimpleNamespace(sites=sites)  # type: ignore[assignment]
    search.shipping = SimpleNamespace(schedules=schedules, with_tokens=lambda plan: asked.append(plan))  # type: ignore[assignment]
    measured = iter([(SimpleNamespace(scaled=lambda factor, one=one: one), 1.0) for one in table])
    search.meter = SimpleNamespace(tables=lambda shipping: next(measured))  # type: ignore[assignment]
    search._best_schedule = search._fast_enough = lambda *rest: schedules[0]  # type: ignore[method-assign, assignment]
    full = SimpleNamespace(floats=SimpleNamespace(full=2.0), integers=SimpleNamespace(full=2.0))
    assert search._leave_tokens(full, 1.0, 1.0) is table[tried - 1]  # type: ignore[arg-type, comparison-overlap]
    assert len(asked) == tried


def by_tokens(whole: Any, models: dict[str, Any], *rest: Any) -> dict[str, float]:
    """Later schedules of the list take fewer tokens' time, whatever the machine is doing."""
    return {name: 0.95 - 0.02 * number for number, name in enumerate(models)}


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_timed", by_tokens)


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
    monkeypatch.setattr(tokens, "_timed", lambda whole, models, *rest: dict.fromkeys(models, 1.04))
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
