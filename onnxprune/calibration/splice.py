"""Rows made of two: more inputs of the kind that a model knows, from few samples.

A text begins as one sample and, behind a column where both have a real token, goes on as another; an image shows a box of a second one
(CutMix, Yun et al., ICCV 2019). Of a text, single words may also be those that others have at the same place (in place of TinyBERT's words
from a language model; Jiao et al., 2020). Nobody has to label them where the dense model says what it makes of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from onnxprune.calibration.data import CalibrationData

_WORDS = 0.25
"""Mean share of the words of a text that are replaced; it is drawn for each text, between none and twice as many."""

_SHORT = 8
"""Axes of fewer positions hold channels, not places."""


def spliced(data: CalibrationData, rows: int, rng: np.random.Generator) -> CalibrationData | None:
    """``rows`` new rows without labels; None where inputs are neither token ids nor images (or other arrays with places)."""
    if len(data) < 2:
        return None
    first = rng.integers(0, len(data), rows)
    second = (first + rng.integers(1, len(data), rows)) % len(data)
    mask = _tokens(data)
    if mask is not None:
        return _texts(data, mask, first, second, rng)
    if any(_places(array) for array in data.inputs.values()):
        return _images(data, first, second, rng)
    return None


def reworded(data: CalibrationData, words: Collection[str], rng: np.random.Generator) -> CalibrationData | None:
    """The rows with some words, neither the first nor the last of a text, as others have them at the same place.

    Args:
        words: inputs [samples, tokens] that hold ids of words. What masks, positions and types of tokens say stays.

    Returns:
        None if there are no such inputs.
    """
    mask = _tokens(data)
    if mask is None or len(data) < 2:
        return None
    found = [name for name in set(words) - set(_positions(data, mask)) if name in data.inputs and data.inputs[name].shape == mask.shape]
    if not found:
        return None
    rows, width = mask.shape
    inner = np.zeros_like(mask)
    inner[:, 1:-1] = mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]
    other = (np.arange(rows)[:, None] + rng.integers(1, rows, mask.shape)) % rows
    columns = np.arange(width)
    chosen = (rng.random(mask.shape) < 2 * _WORDS * rng.random((rows, 1))) & inner & inner[other, columns]
    changed = {name: np.where(chosen, data.inputs[name][other, columns], data.inputs[name]) for name in found}
    return replace(data, inputs={**data.inputs, **changed}, labels=None)


def joined(data: CalibrationData, more: CalibrationData | None) -> CalibrationData:
    """The rows of both, without labels."""
    if more is None:
        return replace(data, labels=None)
    masks = None if data.token_mask is None or more.token_mask is None else np.concatenate([data.token_mask, more.token_mask])
    inputs = {name: np.concatenate([array, more.inputs[name]]) for name, array in data.inputs.items()}
    return replace(data, inputs=inputs, labels=None, token_mask=masks)


def _tokens(data: CalibrationData) -> np.ndarray | None:
    """Which positions hold real tokens, bool [samples, tokens]; None if the inputs are no sequences of ids."""
    if data.token_mask is not None:
        return data.token_mask
    ids = [array for array in data.inputs.values() if array.ndim == 2 and array.dtype.kind in "iu"]
    return np.ones(ids[0].shape, bool) if ids and len(ids) == len(data.inputs) else None


def _texts(data: CalibrationData, mask: np.ndarray, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> CalibrationData:
    # The first column stays that of the first sample: a class token belongs to the row, not to a text.
    shared = mask[first] & mask[second]
    shared[:, 0] = False
    draws = np.where(shared, rng.random(shared.shape), -1.0)
    width = mask.shape[1]
    column = np.where(shared.any(axis=1), draws.argmax(axis=1), width)
    behind = np.arange(width) >= column[:, None]
    inputs = {}
    for name, array in data.inputs.items():
        axis = data.sequence_axes.get(name, 1)
        if array.ndim <= axis or array.shape[axis] != width:
            inputs[name] = array[first]
            continue
        chosen = behind.reshape([len(first), *(width if at == axis else 1 for at in range(1, array.ndim))])
        inputs[name] = np.where(chosen, array[second], array[first])
    there = np.where(behind, mask[second], mask[first])
    for name in _positions(data, mask):  # those of a second sample that is padded on the left do not go on from the first one's
        inputs[name] = np.where(there, _first(data.inputs[name], mask) + there.cumsum(axis=1) - 1, inputs[name]).astype(inputs[name].dtype)
    return replace(data, inputs=inputs, labels=None, token_mask=None if data.token_mask is None else there)


def _first(positions: np.ndarray, mask: np.ndarray) -> int:
    """The position of the first real token of a sample."""
    return int(positions[0, mask[0].argmax()])


def _positions(data: CalibrationData, mask: np.ndarray) -> list[str]:
    """Inputs in which the real tokens of every sample are counted from one number on."""
    found = []
    for name, array in data.inputs.items():
        if array.shape == mask.shape and array.dtype.kind in "iu" and mask.any(axis=1).all():
            counted = np.where(mask, array - mask.cumsum(axis=1), 0)
            if (mask.sum(axis=1) > 1).any() and np.ptp(counted[mask]) == 0:
                found.append(name)
    return found


def _places(array: np.ndarray) -> list[int]:
    """Axes along which an array shows places: of an image or a spectrogram, its height and width."""
    if array.ndim < 3 or array.dtype.kind != "f":
        return []
    return [axis for axis in range(1, array.ndim) if array.shape[axis] >= _SHORT]


def _images(data: CalibrationData, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> CalibrationData:
    inputs = {}
    share = rng.random(len(first))
    corner = rng.random((len(first), 8))
    for name, array in data.inputs.items():
        axes = _places(array)
        mixed = array[first]
        for row, (other, part) in enumerate(zip(second, share, strict=True)):
            if axes:
                box = [slice(None)] * (array.ndim - 1)
                for axis in axes:
                    length = round(array.shape[axis] * part ** (1 / len(axes)))
                    start = int(corner[row, axis] * (array.shape[axis] - length + 1))
                    box[axis - 1] = slice(start, start + length)
                mixed[(row, *box)] = array[(other, *box)]
        inputs[name] = mixed
    return replace(data, inputs=inputs, labels=None)
