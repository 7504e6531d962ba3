"""Which token ids matter: those in the data, those in a list, and the special ones that the files beside a model name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.calibration.npz import read_npz
from onnxprune.errors import InputError

_SPECIAL = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")


def read_ids(path: Path) -> np.ndarray:
    """Token ids of a file, int64 [n]: a list in JSON, all integer arrays of an ``.npz``, or a text of numbers with blanks or commas.

    Raises:
        InputError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise InputError(f"list of ids not found: {path}")
    wanted = "wanted whole numbers that are not negative: a JSON list, an .npz of integer arrays, or a text with blanks between them"
    if path.suffix == ".npz":
        arrays = list(read_npz(path).values())
    else:
        try:
            text = path.read_text()
            values = json.loads(text) if path.suffix == ".json" else [int(word) for word in text.replace(",", " ").split()]
            arrays = [np.array(values)]
        except ValueError as error:
            raise InputError(f"{path} is no list of ids ({error}); {wanted}") from error
    for array in arrays:
        if not array.size or array.dtype.kind not in "iu" or array.min() < 0:
            raise InputError(f"{path} is no list of ids: it holds {array.dtype} of shape {list(array.shape)}; {wanted}")
    if not arrays:
        raise InputError(f"{path} holds no array; {wanted}")
    return np.unique(np.concatenate([array.reshape(-1).astype(np.int64) for array in arrays]))


def special_ids(model: Path | None) -> frozenset[int]:
    """Ids that are used whatever the text is, as the files beside a model name them.

    Read are config.json, generation_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json and vocab.txt; a model in a
    folder ``onnx`` also has those of the folder above. Files that are missing or malformed say nothing.
    """
    if model is None:
        return frozenset()
    folders = [model.parent] + ([model.parent.parent] if model.parent.name == "onnx" else [])
    return frozenset().union(*(_special_of(folder) for folder in folders))


def _special_of(folder: Path) -> set[int]:
    tokenizer = _object(folder / "tokenizer.json")
    vocabulary = _vocabulary(tokenizer, folder)
    names = [_object(folder / name).get(key) for name in ("special_tokens_map.json", "tokenizer_config.json") for key in _SPECIAL]
    model = tokenizer.get("model")
    added = tokenizer.get("added_tokens")
    ids = {vocabulary[text] for text in map(_text, names) if text in vocabulary}
    ids.update(value for name in ("config.json", "generation_config.json") for value in _numbered(_object(folder / name)))
    if isinstance(model, dict):
        ids.update(_whole(model.get("unk_id")))
        ids.update([vocabulary[unknown]] if (unknown := _text(model.get("unk_token"))) in vocabulary else [])
    ids.update(
        value for entry in (added if isinstance(added, list) else ()) if isinstance(entry, dict) for value in _whole(entry.get("id"))
    )
    return ids


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _vocabulary(tokenizer: dict[str, Any], folder: Path) -> dict[str | None, int]:
    """Ids by token."""
    found: dict[str | None, int] = {}
    model = tokenizer.get("model")
    known = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(known, dict):
        found.update((token, value) for token, value in known.items() if isinstance(value, int))
    elif isinstance(known, list):  # unigram models list pairs of a piece and its score
        found.update((str(entry[0]), number) for number, entry in enumerate(known) if isinstance(entry, list) and entry)
    elif (words := folder / "vocab.txt").is_file():
        found.update((line, number) for number, line in enumerate(words.read_text(errors="replace").splitlines()))
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[_text(entry)] = entry["id"]
    return found


def _text(value: Any) -> str | None:
    """A token is a text, or an object with one."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _numbered(config: dict[str, Any]) -> Iterator[int]:
    """Values of ``pad_token_id`` and its like, also those of the encoder and decoder inside."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbered(value)
        elif key.endswith("_token_id"):
            yield from _whole(value)


def _whole(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool) and number >= 0]
