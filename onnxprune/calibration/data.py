"""Calibration rows in memory, and how they are cut into batches a model accepts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnxprune.errors import InputError

IGNORED_LABEL = -100
"""Token labels of this value count in no loss and no metric."""


@dataclass(frozen=True)
class Batch:
    """What one run of a model is fed.

    Attributes:
        feeds: arrays by input name, ``[rows, ...]``.
        index: int64 ``[rows]``, the calibration row behind each row of the batch (sorting by length changes the order).
        valid: bool ``[rows]``; False for a row that only fills up a model of fixed batch size and must not be counted again.
        token_mask: bool ``[rows, tokens]``, False for padding and for rows that are not valid; None without an attention mask.
        labels: labels of the rows, cut along the sequence like the feeds; None without labels.
    """

    feeds: Mapping[str, np.ndarray]
    index: np.ndarray
    valid: np.ndarray
    token_mask: np.ndarray | None
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.index)

    def real_rows(self, rows: int) -> np.ndarray:
        """Which of ``rows`` flattened positions count, bool ``[rows]``: no padding, no filler rows. Samples must be the leading axis."""
        if self.token_mask is not None and self.token_mask.size == rows:
            return self.token_mask.reshape(-1)
        return np.repeat(self.valid, rows // len(self))


@dataclass(frozen=True)
class CalibrationData:
    """Samples of a model's inputs; rows are samples.

    Attributes:
        inputs: arrays ``[samples, ...]``, one per input of the model.
        labels: int64 ``[samples]`` or ``[samples, tokens]`` (:data:`IGNORED_LABEL` is left out), or float32 for regression; None without.
        origin: where the data came from, for reports.
        token_mask: bool ``[samples, tokens]``, False for padding; None without an attention mask.
        sequence_axes: input name -> its axis that may be cut to the longest row of a batch; empty when the model fixes the length.
        fixed_rows: the batch size the model insists on, 0 when it takes any.
    """

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    origin: str
    token_mask: np.ndarray | None = None
    sequence_axes: Mapping[str, int] = field(default_factory=dict)
    fixed_rows: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, rows: Sequence[int] | np.ndarray | slice) -> CalibrationData:
        """The same data with only these rows, in this order."""
        return replace(
            self,
            inputs={name: array[rows] for name, array in self.inputs.items()},
            labels=None if self.labels is None else self.labels[rows],
            token_mask=None if self.token_mask is None else self.token_mask[rows],
        )

    def split(self, calibration_rows: int, held_back_rows: int, seed: int) -> tuple[CalibrationData, CalibrationData]:
        """Two disjoint random parts, to decide on the one and to judge on the other.

        Raises:
            InputError: there are fewer rows than both parts need.
        """
        wanted = calibration_rows + held_back_rows
        if calibration_rows < 1 or held_back_rows < 1 or wanted > len(self):
            raise InputError(
                f"cannot split {len(self)} calibration rows of {self.origin} into {calibration_rows} and {held_back_rows} held back; "
                "both parts need at least one row and their sum at most all rows"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[:calibration_rows])), self.take(np.sort(order[calibration_rows:wanted]))

    @cached_property
    def sha256(self) -> str:
        """Digest of the names, types, shapes and values of all inputs and labels."""
        digest = hashlib.sha256()
        arrays = dict(self.inputs) if self.labels is None else {**self.inputs, "labels": self.labels}
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
        return digest.hexdigest()

    def batches(self, rows: int, trim: bool) -> Iterator[Batch]:
        """All rows in batches of ``rows`` (the last may be shorter), or of :attr:`fixed_rows` if the model insists.

        Args:
            trim: sort rows by length, longest first, and cut each batch to its longest row, where the model allows it.
        """
        order, rows = self.order(trim), self.fixed_rows or rows
        for start in range(0, len(order), rows):
            yield self.batch(order[start : start + rows], trim)

    def order(self, trim: bool) -> np.ndarray:
        """Row numbers, int64 ``[samples]``, in the order in which :meth:`batches` takes them."""
        if not trim or self.token_mask is None or not self.sequence_axes:
            return np.arange(len(self))
        return np.argsort(-self.token_mask.sum(axis=1), kind="stable")

    def batch(self, index: np.ndarray, trim: bool) -> Batch:
        """One batch of the rows ``index``; a model of fixed batch size gets the last row repeated, marked as not valid."""
        missing = max(self.fixed_rows - len(index), 0)
        valid = np.arange(len(index) + missing) < len(index)
        index = np.concatenate([index, np.repeat(index[-1:], missing)])
        tokens = self._used_columns(index) if trim else slice(None)
        mask = None if self.token_mask is None else self.token_mask[index][:, tokens] & valid[:, None]
        feeds = {}
        for name, array in self.inputs.items():
            axis = self.sequence_axes.get(name)
            rows = array[index]
            feeds[name] = np.ascontiguousarray(rows if axis is None else rows[(slice(None),) * axis + (tokens,)])
        labels = None if self.labels is None else self.labels[index]
        if labels is not None and self.token_mask is not None and labels.shape[1:] == self.token_mask.shape[1:]:
            labels = labels[:, tokens]
        return Batch(feeds, index, valid, mask, labels)

    def _used_columns(self, index: np.ndarray) -> slice:
        """The columns of the sequence axis that hold a real token in any of these rows."""
        if self.token_mask is None or not self.sequence_axes:
            return slice(None)
        used = np.flatnonzero(self.token_mask[index].any(axis=0))
        if not used.size:
            return slice(None)
        # A graph that counts positions itself would see other ones if padding on the left went away.
        first = int(used[0]) if any("position" in name for name in self.sequence_axes) else 0
        return slice(first, int(used[-1]) + 1)
