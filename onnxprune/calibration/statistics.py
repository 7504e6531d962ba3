"""Sums over calibration samples. Sums merge, so calibration can be streamed, resumed, sharded and spread over machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnxprune.calibration.npz import read_npz
from onnxprune.errors import InputError
from onnxprune.graph.model import atomic_file

_SCHEMA = "onnxprune.statistics/1"


class Statistics:
    """Named float64 sums, each with the number of samples, tokens or batches that went into it."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: np.ndarray | float, count: int = 1) -> None:
        """Add ``value`` (any shape, the same each time) that stands for ``count`` units.

        Raises:
            InputError: the shape is not that of earlier values, or a value is not finite.
        """
        array = np.asarray(value, dtype=np.float64)
        if not np.isfinite(array).all():
            raise InputError(f"statistic {name!r} is not finite: the model overflows or returns NaN on this calibration data")
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = array.copy()
            self._counts[name] = int(count)
            return
        if known.shape != array.shape:
            raise InputError(f"statistic {name!r} has shape {list(array.shape)}, before {list(known.shape)}; are they of different models?")
        known += array
        self._counts[name] += int(count)

    def __getitem__(self, name: str) -> np.ndarray:
        """The sum, float64. Do not write into it."""
        return self._sums[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def count(self, name: str) -> int:
        return self._counts[name]

    def mean(self, name: str) -> np.ndarray:
        """Sum over count."""
        return self._sums[name] / self._counts[name]

    def __add__(self, other: Statistics) -> Statistics:
        """Both parts as if gathered in one go; names that only one part has are kept."""
        merged = Statistics()
        for part in (self, other):
            for name in part:
                merged.add(name, part[name], part.count(name))
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return self._counts == other._counts and all(np.array_equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an npz atomically.

        Raises:
            InputError: the path cannot be written.
        """
        target = Path(path)
        index = json.dumps({"schema": _SCHEMA, "names": list(self._sums), "counts": list(self._counts.values())})
        arrays = {f"sum{number}": array for number, array in enumerate(self._sums.values())}
        try:
            with atomic_file(target) as temporary, temporary.open("wb") as stream:
                np.savez(stream, allow_pickle=False, index=np.array(index), **arrays)
        except OSError as error:
            raise InputError(f"cannot write statistics {target}: {error.strerror or error}; nothing was left half-written") from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: missing, truncated, or not a statistics file.
        """
        if not Path(path).exists():
            raise InputError(f"statistics not found: {path}")
        archive = read_npz(path)
        statistics = cls()
        try:
            index = json.loads(str(archive["index"]))
            schema, names, counts = index["schema"], index.get("names", []), index.get("counts", [])
            if schema == _SCHEMA:
                for number, (name, count) in enumerate(zip(names, counts, strict=True)):
                    statistics.add(name, archive[f"sum{number}"], count)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a statistics file of onnxprune: {error}") from error
        if schema != _SCHEMA:
            raise InputError(f"{path} has schema {schema!r}; this version reads {_SCHEMA!r}")
        return statistics


_BLOCK_ROWS, _BLOCK_VALUES = 1024, 2**21
"""Most rows, and most numbers, that wait to be multiplied."""

_PANEL = 512


class SecondMoment:
    """x'x and the sum of rows x [1, width], in float64: one float32 product for every 1,024 rows, or fewer where they are wide.

    Of x'x only panels of rows up to the diagonal are computed and kept: the sums for all wide matrices of a model are in memory at once.

    Args:
        waiting: most rows that wait to be multiplied, if not the usual number. Sums take memory once there are more.
    """

    def __init__(self, width: int, waiting: int | None = None) -> None:
        self._panels: list[np.ndarray] = []
        self.total = np.zeros(width)
        self.rows = 0
        self._block = max(min(_BLOCK_ROWS, _BLOCK_VALUES // max(width, 1)) if waiting is None else waiting, 1)
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Add rows [rows, width]."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= self._block:
            self.flush()

    def flush(self) -> None:
        """Bring the sums up to date with every row added."""
        if not self._panels:
            width = len(self.total)
            ends = [min(start + _PANEL, width) for start in range(0, width, _PANEL)]
            self._panels = [np.zeros((end - start, end)) for start, end in zip(range(0, width, _PANEL), ends, strict=True)]
        if self._waiting:
            block = np.concatenate(self._waiting)
            self._waiting.clear()
            for panel in self._panels:
                height, end = panel.shape
                panel += block[:, end - height : end].T @ block[:, :end]
            self.total += block.sum(axis=0, dtype=np.float64)
            self.rows += len(block)

    @property
    def mean(self) -> np.ndarray:
        """x'x per row, [width, width]."""
        self.flush()
        result = np.empty((len(self.total), len(self.total)))
        for panel in self._panels:
            height, end = panel.shape
            np.divide(panel, max(self.rows, 1), out=result[end - height : end, :end])
            result[: end - height, end - height : end] = result[end - height : end, : end - height].T
        return result

    @property
    def covariance(self) -> np.ndarray:
        """x'x per row of rows less their mean."""
        result = self.mean
        result -= np.outer(self.total / max(self.rows, 1), self.total / max(self.rows, 1))
        return result


class SampleMoment:
    """Second moments of rows x [1, width] that belong to samples: of all, of what the rows of a sample have in common, and of their sums.

    With m the mean of the n rows of a sample, the sum of x'x is that of n m'm over samples and that of (x - m)'(x - m) over rows.

    Args:
        summed: whether :attr:`summed` will be asked for.
    """

    def __init__(self, width: int, *, summed: bool = True) -> None:
        self.all = SecondMoment(width)
        self._means = SecondMoment(width, waiting=width)
        self._sums = SecondMoment(width, waiting=width) if summed else None
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, rows: np.ndarray, real: np.ndarray, samples: int) -> None:
        """Add rows [samples * places, width], as many places of each sample; those that are not ``real``, bool [rows], do not count."""
        self.all.add(rows[real])
        places = real.reshape(samples, -1)
        counts = places.sum(axis=1)
        there = counts > 0
        sums = np.einsum("spw,sp->sw", rows.reshape(samples, -1, rows.shape[1]), places.astype(np.float32))
        self._waiting.append((sums[there], counts[there]))
        # Until there are as many samples as columns, one row of each takes less memory than products do.
        if sum(len(counts) for _, counts in self._waiting) >= rows.shape[1]:
            self._fold()

    def _fold(self) -> None:
        for sums, counts in self._waiting:
            if self._sums is not None:
                self._sums.add(sums)
            self._means.add((sums / np.sqrt(counts)[:, None]).astype(np.float32))
        self._waiting.clear()

    @property
    def rows(self) -> int:
        self.all.flush()
        return self.all.rows

    @property
    def common(self) -> np.ndarray:
        """Sum of n m'm per row, [width, width]."""
        self._fold()
        moment = self._means.mean
        moment *= self._means.rows / max(self.rows, 1)
        return moment

    @property
    def summed(self) -> np.ndarray:
        """Sum of n^2 m'm over samples, [width, width]."""
        assert self._sums is not None
        self._fold()
        moment = self._sums.mean
        moment *= self._sums.rows
        return moment
