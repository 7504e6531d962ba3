"""Compare models that do the same work: paired latency, size, multiply-adds and peak memory, with the noise of the machine beside them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from onnxprune.errors import InputError, OnnxPruneError
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.macs import total_macs
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import shapes_of
from onnxprune.runtime.measure import Ratio, Timings, clock_for, in_turn, latency_ms, ratio, replicas, time_sessions
from onnxprune.runtime.peak import peak_memory_bytes
from onnxprune.runtime.session import RuntimeOptions, open_session, run

log = logging.getLogger(__name__)

_AGAIN = "\0first variant again"
_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class VariantResult:
    """One model. ``quantiles_ms`` maps a quantile such as ``0.5`` to milliseconds; ``speedup`` is the first variant's time over this one's.

    ``bytes`` counts the file and its external data. ``macs`` is None where the graph has an operator that cannot be probed,
    ``peak_memory_bytes`` (a whole process) where the system does not tell. ``quality`` is its comparison with the first variant on real
    data, where one was made.
    """

    latency_ms: float
    quantiles_ms: Mapping[str, float]
    speedup: Ratio
    bytes: int
    parameters: int
    macs: int | None
    peak_memory_bytes: int | None
    provider: str
    quality: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Benchmark:
    """Results by variant, in the order given, and how they were measured.

    ``noise_floor`` is the ratio of two sets of sessions of the first variant; the intervals of all speed-ups are widened by how far it is
    from 1.
    """

    variants: Mapping[str, VariantResult]
    noise_floor: Ratio
    clock: str
    rounds: int
    threads: int
    load_average: float | None
    input_shapes: Mapping[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON; a variant that was not compared has no ``quality``."""
        result = asdict(self)
        for variant in result["variants"].values():
            if variant["quality"] is None:
                del variant["quality"]
        result["input_shapes"] = {name: list(shape) for name, shape in self.input_shapes.items()}
        return result


def benchmark(
    variants: Mapping[str, str | Path | Model],
    feeds: Mapping[str, np.ndarray],
    *,
    options: RuntimeOptions | None = None,
    rounds: int = 101,
    seed: int = 0,
    tolerance: float = 0.01,
    max_seconds: float = 60.0,
    memory: bool = True,
) -> Benchmark:
    """Measure models side by side on the same inputs and session settings.

    Args:
        variants: name -> model or its path; the first is the reference.
        feeds: inputs of one run. A variant is fed the inputs it has; one that is missing is an error.
        rounds, tolerance, max_seconds: see :func:`onnxprune.runtime.measure.time_sessions`.
        memory: also measure peak memory, in one fresh process per variant.

    Raises:
        InputError: a model cannot be loaded or does not run on ``feeds``.
        RuntimeUnavailable: the provider did not start.
    """
    if not variants:
        raise InputError("nothing to benchmark: give at least one model")
    options = options or RuntimeOptions()
    models = {name: load(source) for name, source in variants.items()}
    fed = {name: feeds_of(name, model, feeds) for name, model in models.items()}
    reference = next(iter(models))
    count = replicas(max(model.weight_bytes for model in models.values()))
    sessions = {name: [open_session(model, options) for _ in range(count)] for name, model in models.items()}
    # Other sessions, not the same ones twice: sessions of the same bytes differ by a per cent or two, and that is noise as well.
    sessions[_AGAIN] = [open_session(models[reference], options) for _ in range(count)]
    fed[_AGAIN] = fed[reference]
    timings = time_sessions(
        {name: in_turn([_call(session, fed[name]) for session in group]) for name, group in sessions.items()},
        rounds=rounds,
        clock=clock_for(options),
        seed=seed,
        tolerance=tolerance,
        max_seconds=max_seconds,
    )
    floor = ratio(timings, _AGAIN, reference, seed)
    providers = {name: group[0].get_providers()[0] for name, group in sessions.items()}
    sessions.clear()
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        results: dict[str, VariantResult] = {}
        for name, model in models.items():
            path = _on_disk(variants[name], Path(folder), len(results))
            peak = _peak(path, fed[name], options, Path(folder)) if memory else None
            speedup = ratio(timings, reference, name) if name == reference else _widened(ratio(timings, reference, name), floor)
            results[name] = _result(name, model, path, fed[name], timings, speedup, peak, providers[name])
    shapes = {name: tuple(array.shape) for name, array in fed[reference].items()}
    return Benchmark(results, floor, timings.clock, timings.rounds, options.threads, timings.load_average, shapes)


def feeds_of(name: str, model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of ``feeds`` that a variant takes; caches without the heads it lost.

    Raises:
        InputError: it wants an input that is not there, or one of another type.
    """
    chosen = {}
    for value in model.proto.graph.input:
        if value.name not in model.input_names:
            continue
        if value.name not in feeds:
            raise InputError(f"variant {name!r} wants input {value.name!r}; the benchmark inputs are {', '.join(feeds) or 'none'}")
        wanted, found = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type), feeds[value.name].dtype
        if wanted != found:
            raise InputError(
                f"variant {name!r} takes input {value.name!r} as {wanted}, the benchmark input is {found}; "
                "only models with the same input types can run in turns on one request"
            )
        chosen[value.name] = feeds[value.name]
    return {name: np.ascontiguousarray(array) for name, array in cut_feeds(model, chosen).items()}


def _call(session: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    arrays = dict(feeds)
    run(session, arrays)
    return lambda: session.run(None, arrays)


def _widened(measured: Ratio, floor: Ratio) -> Ratio:
    """An interval that also covers how far two sets of sessions of one file were apart: rounds alone do not see that."""
    slack = 1 + abs(floor.median - 1)
    return Ratio(measured.median, measured.low / slack, measured.high * slack)


def _result(
    name: str,
    model: Model,
    path: Path,
    feeds: Mapping[str, np.ndarray],
    timings: Timings,
    speedup: Ratio,
    peak: int | None,
    provider: str,
) -> VariantResult:
    values = timings.milliseconds[name]
    return VariantResult(
        latency_ms=latency_ms(timings, name),
        quantiles_ms={str(quantile): float(np.quantile(values, quantile)) for quantile in _QUANTILES},
        speedup=speedup,
        bytes=_bytes(path),
        parameters=model.parameters,
        macs=_macs(name, model, feeds),
        peak_memory_bytes=peak,
        provider=provider,
    )


def _macs(name: str, model: Model, feeds: Mapping[str, np.ndarray]) -> int | None:
    try:
        return total_macs(model, shapes_of(model, feeds))
    except OnnxPruneError as error:
        log.warning("multiply-adds of %s could not be counted: %s", name, error)
        return None


def _on_disk(source: str | Path | Model, folder: Path, number: int) -> Path:
    return source.save(folder / f"{number}.onnx") if isinstance(source, Model) else Path(source)


def _bytes(path: Path) -> int:
    source = load(path).source
    return 0 if source is None else source.bytes


def _peak(path: Path, feeds: Mapping[str, np.ndarray], options: RuntimeOptions, folder: Path) -> int | None:
    archive = folder / "feeds.npz"
    np.savez(archive, **feeds)  # type: ignore[arg-type]
    return peak_memory_bytes(path, archive, options)
