"""Weights that live in files: mapped, not read, and given back after use.

A page of a mapped file counts as memory of the process from the first touch until it is unmapped. Whoever walks through a large model
therefore calls :func:`release` on the weights it is done with: the values stay, the memory goes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

LARGE_BYTES = 3 << 29
"""Models with more weights than this (1.5 GiB, above BERT-large) are walked piece by piece.

A search holds sessions of teacher, student and gradients, each with packed copies of its weights: about four times the model. A constant
and no share of this machine's memory, so that a plan does not depend on the machine.
"""

_ALIGNMENT = 4096
_Key = TypeVar("_Key")
_ADVICE: int | None = getattr(mmap, "MADV_DONTNEED", None)


def map_file(file: Path | IO[bytes]) -> np.ndarray:
    """All bytes of a file as a read-only uint8 array [size], mapped; empty files give an empty array."""
    size = file.stat().st_size if isinstance(file, Path) else os.fstat(file.fileno()).st_size
    return np.memmap(file, np.uint8, mode="r") if size else np.zeros(0, np.uint8)


def view_of(content: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """The array that lies at ``offset`` bytes of a mapped file; it shares the mapping."""
    length = prod(shape) * dtype.itemsize
    return content[offset : offset + length].view(dtype).reshape(shape) if length else np.zeros(shape, dtype)


def release(arrays: Iterable[np.ndarray]) -> None:
    """Give back the memory behind arrays that lie in mapped files; others are left alone. They read the file anew when next touched."""
    for array in arrays:
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        mapping: object = owner.base
        if not isinstance(mapping, mmap.mmap) or _ADVICE is None or not array.size:
            continue
        start = np.lib.array_utils.byte_bounds(owner)[0]
        low, high = (bound - start for bound in np.lib.array_utils.byte_bounds(array))
        first = low // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(_ADVICE, first, min(high, len(mapping)) - first)


class Scratch:
    """A file without a name, in the system's folder for temporary files (TMPDIR): it goes when the last array in it does."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  the arrays keep its mapping, not the handle
        self._entries: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
        self._end = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Append the values of an array under a name that is new."""
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._entries[name] = array.dtype, array.shape, offset
        self._end = offset + array.nbytes

    def close(self) -> dict[str, np.ndarray]:
        """All arrays by name, mapped and read-only."""
        self._file.flush()
        content = map_file(self._file)
        self._file.close()
        return {name: view_of(content, dtype, shape, offset) for name, (dtype, shape, offset) in self._entries.items()}


def stored(arrays: Mapping[_Key, np.ndarray]) -> dict[_Key, np.ndarray]:
    """The same arrays in a file of their own instead of in memory."""
    scratch = Scratch()
    for number, array in enumerate(arrays.values()):
        scratch.add(str(number), array)
    return dict(zip(arrays, scratch.close().values(), strict=True))
