"""How a sentence embedding is made of token states, as sentence-transformers writes it beside the model."""

from __future__ import annotations

from typing import Literal

from onnxprune.errors import InputError
from onnxprune.export.folder import ModelFolder, read_json

Pooling = Literal["mean", "cls"]

_DEFAULT_PLACE = "1_Pooling"
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def read_pooling(folder: ModelFolder) -> Pooling:
    """Mean over the tokens of the mask, or the state of the first token; mean where the folder says nothing.

    Raises:
        InputError: the folder asks for anything else, or for layers after the pooling: leaving them out would give other vectors.
    """
    kinds = [entry["type"].rpartition(".")[2] for entry in folder.modules]
    if further := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise InputError(
            f"{folder.root / 'modules.json'} has a module {further[0]}, which is not exported; --task encoder gives the token states"
        )
    place = next((str(entry.get("path", "")) for entry in folder.modules if entry["type"].endswith(".Pooling")), _DEFAULT_PLACE)
    file = folder.root / place / "config.json"
    if not file.is_file():
        return "mean"
    content = read_json(file)
    modes = [name for name, on in content.items() if name.startswith("pooling_mode_") and on is True]
    named = content.get("pooling_mode")
    if named is not None:  # the newer form, a word or a list of words
        modes = [named] if isinstance(named, str) else list(named)
    found = [_FLAGS.get(mode, mode) for mode in modes]
    if found == ["mean"]:
        return "mean"
    if found == ["cls"]:
        return "cls"
    raise InputError(f"{file} asks for pooling by {', '.join(map(str, found)) or 'nothing'}; mean and cls are known")
