"""Texts to arrays of the graph's inputs, by the tokenizer of the folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from onnxprune.errors import InputError
from onnxprune.export.folder import ModelFolder
from onnxprune.export.rows import Row
from onnxprune.export.signature import Signature

LONGEST = 512
"""Tokens of a row unless more are asked for: rows are padded to the longest one, so a single long text makes all of them long."""
_NO_LIMIT = 1_000_000
"""Tokenizers without a limit name an absurd one."""


def encode(folder: ModelFolder, signature: Signature, rows: Sequence[Row], max_length: int | None) -> dict[str, np.ndarray]:
    """int64 ``[rows, tokens]`` per input, padded on the right to the longest row; a cache is empty: ``[rows, heads, 0, width]``.

    Raises:
        InputError: there is no tokenizer, it does not fit the network, or ``max_length`` is out of range.
    """
    if not folder.has_tokenizer:
        raise InputError(f"no tokenizer in {folder.path} (tokenizer.json); copy that of the model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever the damaged file leads to
        raise InputError(f"the tokenizer in {folder.path} cannot be loaded: {error}") from error
    limit = _limit(folder, signature, tokenizer, max_length)
    texts = [[row.texts[part] for row in rows] for part in range(len(rows[0].texts))]
    encoded = tokenizer(*texts, truncation=True, max_length=limit, padding=False, return_token_type_ids=True, return_attention_mask=False)
    ids: list[list[int]] = encoded["input_ids"]
    if empty := next((row.where for row, tokens in zip(rows, ids, strict=True) if not tokens), None):
        raise InputError(f"{empty}: the tokenizer makes no tokens of this text; leave it out")
    width = max(map(len, ids))
    arrays = {}
    for item in signature.inputs:
        match item.kind:
            case "ids":
                arrays[item.name] = _padded(ids, width, signature.pad)
                if (largest := int(arrays[item.name].max())) >= item.high:
                    raise InputError(f"the tokenizer in {folder.path} makes token {largest}; the network knows {item.high}")
            case "mask":
                arrays[item.name] = _padded([[1] * len(tokens) for tokens in ids], width, 0)
            case "types":
                arrays[item.name] = _padded(encoded["token_type_ids"], width, 0)
            case _:
                arrays[item.name] = np.zeros((len(rows), int(item.dims[1]), 0, int(item.dims[3])), np.float32)
    return arrays


def _limit(folder: ModelFolder, signature: Signature, tokenizer: Any, asked: int | None) -> int:
    positions = signature.positions
    if asked is not None:
        if asked < 1 or (positions is not None and asked > positions):
            raise InputError(f"--max-length {asked} is out of range; the network takes 1 to {positions or 'any number of'} tokens")
        return asked
    given = folder.optional_json("sentence_bert_config.json").get("max_seq_length")
    limits = [given, positions, tokenizer.model_max_length, LONGEST]
    return min(int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT)


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> np.ndarray:
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows], np.int64)
