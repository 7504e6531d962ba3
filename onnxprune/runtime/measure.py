"""Paired, interleaved timing of several things that do the same work.

Each round times every variant once, in shuffled order, so that drift and other load hit all alike; a ratio is the median of per-round
ratios. With one thread the thread's CPU time is read, which other processes hardly disturb; with more, or off the CPU, wall time.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxprune.runtime.session import PROVIDERS, RuntimeOptions

WARM_UPS = 5
MINIMUM_ROUNDS = 11
SAMPLE_SECONDS = 0.005
"""A sample repeats a run until it lasts this long, so that the clock's own cost and resolution do not matter."""

REPLICAS = 3
REPLICA_BYTES = 200_000_000
"""Sessions of the same bytes differ by a per cent or two, so models with less weight than this are timed over several sessions."""

Clock = Literal["thread", "wall"]
_CLOCKS: Mapping[str, Callable[[], float]] = {"thread": time.thread_time, "wall": time.perf_counter}
_RESAMPLES = 1000
_CHECK_EVERY = 5


@dataclass(frozen=True)
class Timings:
    """What was measured. ``milliseconds[name]`` is float64 ``[rounds]``, one entry per round, the rounds of all variants paired."""

    milliseconds: Mapping[str, np.ndarray]
    clock: Clock
    load_average: float | None

    @property
    def rounds(self) -> int:
        return len(next(iter(self.milliseconds.values())))


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval, relative to the median."""
        return (self.high - self.low) / (2 * self.median)


def clock_for(options: RuntimeOptions) -> Clock:
    """``thread`` for one thread on the CPU, else ``wall``: thread time sees neither worker threads nor a GPU."""
    on_cpu = PROVIDERS.get(options.provider.lower(), options.provider) == PROVIDERS["cpu"]
    return "thread" if options.threads == 1 and on_cpu else "wall"


def replicas(weight_bytes: int) -> int:
    """How many sessions to time a model over: several, unless their memory would matter."""
    return REPLICAS if weight_bytes < REPLICA_BYTES else 1


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call that makes the given ones in turn, one each time."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def time_sessions(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 101,
    min_seconds: float = SAMPLE_SECONDS,
    clock: Clock = "thread",
    seed: int = 0,
    tolerance: float = 0.01,
    max_seconds: float = 60.0,
) -> Timings:
    """Time every variant once per round, in shuffled order.

    Args:
        runs: name -> a call that does the work once. The first is the reference of the stopping rule.
        rounds: most rounds; fewer when every ratio to the reference is known to ``tolerance`` (0 runs all of them).
        min_seconds: least length of a sample; shorter runs are repeated, and the sample divided.
        tolerance: relative half width of the 95 % interval of a ratio that is good enough.
        max_seconds: wall time after which no new round starts (at least one is run).
    """
    if not runs:
        raise ValueError("time_sessions needs at least one variant")
    read = _CLOCKS[clock]
    repeats = {name: _repeats(call, min_seconds, read) for name, call in runs.items()}
    rng = np.random.default_rng(seed)
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    with _no_garbage_collection():
        for done in range(1, rounds + 1):
            for position in rng.permutation(len(names)):
                name = names[position]
                samples[name].append(_sample(runs[name], repeats[name], read))
            if time.perf_counter() - started > max_seconds or _settled(samples, names, done, tolerance):
                break
    return Timings({name: np.array(values) for name, values in samples.items()}, clock, load_average())


def ratio(timings: Timings, a: str, b: str, seed: int = 0) -> Ratio:
    """Time of ``a`` over time of ``b``: median of the per-round ratios, with a 95 % percentile bootstrap interval over rounds."""
    return _interval(timings.milliseconds[a] / timings.milliseconds[b], seed)


def latency_ms(timings: Timings, name: str) -> float:
    """Best estimate of one run's time in milliseconds.

    The minimum of thread CPU time: of two equal sessions on a loaded machine its spread is the least of all estimators. Of wall time the
    minimum spreads most, so there it is the median.
    """
    values = timings.milliseconds[name]
    return float(values.min() if timings.clock == "thread" else np.median(values))


def load_average() -> float | None:
    """Processes that wanted to run during the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _repeats(call: Callable[[], object], min_seconds: float, read: Callable[[], float]) -> int:
    """Warm up, then choose how often to repeat a run so that a sample lasts ``min_seconds``."""
    for _ in range(WARM_UPS - 1):
        call()
    single = _sample(call, 1, read) / 1000
    return max(1, min(10_000, int(np.ceil(min_seconds / max(single, 1e-7)))))


def _sample(call: Callable[[], object], repeats: int, read: Callable[[], float]) -> float:
    start = read()
    for _ in range(repeats):
        call()
    # A coarse clock may not have moved; a ratio needs a positive time.
    return max(read() - start, 1e-9) * 1000 / repeats


def _settled(samples: Mapping[str, list[float]], names: list[str], done: int, tolerance: float) -> bool:
    if done < MINIMUM_ROUNDS or done % _CHECK_EVERY:
        return False
    reference = np.array(samples[names[0]])
    pairs = [np.array(samples[name]) / reference for name in names[1:]] or [reference]
    return all(_interval(pair, 0).half_width < tolerance for pair in pairs)


def _interval(values: np.ndarray, seed: int) -> Ratio:
    picks = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(values)), float(low), float(high))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
