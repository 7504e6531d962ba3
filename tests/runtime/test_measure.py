"""The timing loop, driven by a clock that the test turns."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest

from onnxprune.runtime import measure
from onnxprune.runtime.measure import Ratio, Timings, clock_for, latency_ms, ratio, time_sessions
from onnxprune.runtime.session import RuntimeOptions


class FakeClock:
    """Seconds that pass only when a run says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def read(self) -> float:
        return self.now

    def work(self, name: str, seconds: float | Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(measure, "_CLOCKS", {"thread": fake.read, "wall": fake.read})
    return fake


def test_times_are_milliseconds_of_one_run(clock: FakeClock) -> None:
    timings = time_sessions({"slow": clock.work("slow", 0.008), "quick": clock.work("quick", 0.0005)}, rounds=20, tolerance=0)
    assert timings.rounds == 20
    np.testing.assert_allclose(timings.milliseconds["slow"], 8)
    np.testing.assert_allclose(timings.milliseconds["quick"], 0.5)
    assert latency_ms(timings, "slow") == pytest.approx(8)


def test_short_runs_are_repeated_until_a_sample_is_long_enough(clock: FakeClock) -> None:
    time_sessions({"slow": clock.work("slow", 0.008), "quick": clock.work("quick", 0.0005)}, rounds=3, tolerance=0)
    assert clock.calls.count("slow") == 5 + 3
    assert clock.calls.count("quick") == 5 + 3 * 10


def test_each_round_runs_every_variant_in_an_order_of_its_own(clock: FakeClock) -> None:
    names = ["a", "b", "c"]
    time_sessions({name: clock.work(name, 0.01) for name in names}, rounds=30, tolerance=0)
    rounds = np.array(clock.calls[15:]).reshape(30, 3)
    assert all(sorted(order) == names for order in rounds.tolist())
    assert len({tuple(order) for order in rounds.tolist()}) == 6


def test_the_order_follows_from_the_seed(clock: FakeClock) -> None:
    orders = []
    for seed in (0, 0, 1):
        clock.calls.clear()
        time_sessions({name: clock.work(name, 0.01) for name in "abc"}, rounds=10, seed=seed, tolerance=0)
        orders.append(clock.calls[:])
    assert orders[0] == orders[1] != orders[2]


def test_it_stops_as_soon_as_the_ratio_is_known_and_goes_on_while_it_is_not(clock: FakeClock) -> None:
    rng = np.random.default_rng(0)
    still = {"a": clock.work("a", 0.01), "b": clock.work("b", 0.02)}
    assert time_sessions(still, rounds=200, tolerance=0.01).rounds == 15
    noisy = {"a": clock.work("a", 0.01), "b": clock.work("b", lambda: 0.02 * float(rng.uniform(0.5, 1.5)))}
    assert time_sessions(noisy, rounds=100, tolerance=0.01).rounds == 100


def test_it_stops_when_time_is_up(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.time, "perf_counter", clock.read)
    assert time_sessions({"a": clock.work("a", 1.0)}, rounds=100, tolerance=0, max_seconds=3.5).rounds == 4


def test_drift_that_hits_all_variants_leaves_the_ratio_alone(clock: FakeClock) -> None:
    def drifting(base: float) -> Callable[[], float]:
        return lambda: base * (1 + clock.now)

    timings = time_sessions({"a": clock.work("a", drifting(0.01)), "b": clock.work("b", drifting(0.02))}, rounds=60, tolerance=0)
    assert timings.milliseconds["a"][-1] > 2 * timings.milliseconds["a"][0]
    found = ratio(timings, "b", "a")
    assert found.low <= 2 <= found.high
    assert found.median == pytest.approx(2, rel=0.03)


def test_garbage_collection_is_off_while_timing_and_back_on_after_a_failure() -> None:
    states: list[bool] = []
    time_sessions({"a": lambda: states.append(gc.isenabled())}, rounds=1, min_seconds=0)
    assert states[-1] is False
    assert gc.isenabled()
    calls = iter(range(6))
    with pytest.raises(StopIteration):
        time_sessions({"a": lambda: next(calls)}, rounds=5, min_seconds=0)
    assert gc.isenabled()


def timings_of(clock: measure.Clock, **values: list[float]) -> Timings:
    return Timings({name: np.array(times) for name, times in values.items()}, clock, None)


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    found = ratio(timings_of("wall", a=[1, 10, 100], b=[2, 5, 400]), "a", "b")
    assert found.median == 0.5
    assert (found.low, found.high) == (0.25, 2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        noise = rng.lognormal(0, 0.05, (2, 31))
        found = ratio(timings_of("wall", a=list(3 * noise[0]), b=list(noise[1])), "a", "b", seed=trial)
        hits += found.low <= 3 <= found.high
    assert 180 <= hits <= 199


def test_best_estimate_is_the_minimum_of_thread_time_and_the_median_of_wall_time() -> None:
    assert latency_ms(timings_of("thread", a=[3, 1, 2, 9, 8]), "a") == 1
    assert latency_ms(timings_of("wall", a=[3, 1, 2, 9, 8]), "a") == 3


@pytest.mark.parametrize(
    ("provider", "threads", "expected"), [("cpu", 1, "thread"), ("cpu", 2, "wall"), ("cpu", 0, "wall"), ("cuda", 1, "wall")]
)
def test_thread_time_only_where_the_work_is_done_in_the_calling_thread(provider: str, threads: int, expected: str) -> None:
    assert clock_for(RuntimeOptions(provider, threads)) == expected


def test_half_width_is_relative() -> None:
    assert Ratio(2.0, 1.9, 2.1).half_width == pytest.approx(0.05)


def test_nothing_to_time_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        time_sessions({})
