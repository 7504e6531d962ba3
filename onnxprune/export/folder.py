"""A local folder of a transformers model, looked at before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.errors import InputError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
_TOKENIZERS = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "bpe.codes",
)  # fmt: skip
_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ModelFolder:
    """``path`` holds config.json and the weights; ``root`` is the folder named, which differs where sentence-transformers nests them.

    ``modules`` are the entries of modules.json, empty without one.
    """

    root: Path
    path: Path
    config: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...] = ()

    @property
    def architecture(self) -> str:
        """Name of the class that was saved, empty if config.json names none."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def has_tokenizer(self) -> bool:
        return any((self.path / name).is_file() for name in _TOKENIZERS)

    @property
    def has_image_processor(self) -> bool:
        return any((self.path / name).is_file() for name in _IMAGE_PROCESSORS)

    def optional_json(self, name: str) -> Mapping[str, Any]:
        """An object of a file in the folder, empty if there is no such file."""
        return _object(self.path / name) if (self.path / name).is_file() else {}

    def files(self) -> list[Path]:
        """Every file of the folder: what an export must not overwrite."""
        return [path for path in self.root.rglob("*") if path.is_file()]


def open_folder(folder: str | os.PathLike[str]) -> ModelFolder:
    """Check that a folder holds a model that can be exported: configuration, safetensors, float weights, one network.

    Raises:
        InputError: it does not; the message says what is missing and what to do.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is no folder; export reads a local model folder and downloads nothing: fetch the model first")
    modules = _modules(root)
    path = _transformer(root, modules)
    if not (path / "config.json").is_file():
        raise InputError(f"no config.json in {path}; name the folder that save_pretrained wrote")
    config = _object(path / "config.json")
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} holds an adapter; merge it into its model (merge_and_unload in peft), save that, and export it")
    _check_weights(path)
    if config.get("quantization_config"):
        raise InputError(f"the weights in {path} are quantized; export the float model, and quantize after pruning")
    if config.get("is_encoder_decoder"):
        raise InputError(f"{path} is an encoder-decoder model ({config.get('model_type')}); only encoders and decoders are exported")
    return ModelFolder(root, path, config, modules)


def read_json(path: Path) -> Any:
    """
    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def _object(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}; wanted a JSON object")
    return content


def _modules(root: Path) -> tuple[Mapping[str, Any], ...]:
    """Entries of a sentence-transformers modules.json."""
    file = root / "modules.json"
    content = read_json(file) if file.is_file() else []
    if not isinstance(content, list) or not all(isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in content):
        raise InputError(f"{file} is not a list of modules with a type")
    return tuple(content)


def _transformer(root: Path, modules: tuple[Mapping[str, Any], ...]) -> Path:
    """Where the network lies: the folder itself, or the subfolder that modules.json names."""
    if (root / "config.json").is_file():
        return root
    inner = next((str(entry.get("path", "")) for entry in modules if entry["type"].endswith(".Transformer")), "")
    return root / inner


def _check_weights(path: Path) -> None:
    if (path / WEIGHTS_INDEX).is_file():
        parts = sorted(set(_object(path / WEIGHTS_INDEX).get("weight_map", {}).values()))
        if absent := [part for part in parts if not (path / part).is_file()]:
            raise InputError(f"{path / WEIGHTS_INDEX} names {len(absent)} files that are not there, such as {absent[0]}; copy them again")
        return
    if (path / WEIGHTS).is_file():
        return
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))
    if others:
        raise InputError(
            f"no {WEIGHTS} in {path}, only {', '.join(others[:3])}; such files can run code when they are loaded and are refused: "
            "where you trust them, load the model with transformers and save it with save_pretrained, which writes safetensors"
        )
    raise InputError(f"no weights in {path}: wanted {WEIGHTS} or {WEIGHTS_INDEX}")
