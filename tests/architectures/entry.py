"""What an entry is, inputs for it, and weights that let mistakes show."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np

from onnxprune.export.signature import BATCH, PAST, TOKENS, TOTAL, Input

Family = Literal["encoder", "decoder", "encoder-decoder", "vision", "convolution"]

LAYERS, HIDDEN, HEADS, FFN = 2, 32, 4, 80
VOCABULARY, POSITIONS = 120, 64
TARGET, IMAGES = "target", "images"
"""Length of what the decoder of an encoder-decoder reads, and how many images are compared with each text."""

IDS = Input("input_ids", "ids", (BATCH, TOKENS), VOCABULARY)
MASK = Input("attention_mask", "mask", (BATCH, TOKENS))
TYPES = Input("token_type_ids", "types", (BATCH, TOKENS))

LAYER_SITES: Mapping[str, tuple[int, ...]] = {"heads": (HEADS,) * LAYERS, "ffn": (FFN,) * LAYERS}
TOKEN_AXES = {0: BATCH, 1: TOKENS}


@dataclass(frozen=True)
class Architecture:
    """``build(attention)`` makes the module. ``outputs`` maps attributes of its result to dynamic axes.

    ``sites`` maps a kind to the units of every site that the configuration holds, in the order of the layers. ``cached``: inputs and
    outputs for keys and values of earlier tokens. ``forms`` of attention are those that the network has.
    """

    name: str
    family: Family
    build: Callable[[str], Any]
    inputs: tuple[Input, ...]
    outputs: Mapping[str, Mapping[int, str]]
    sites: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(LAYER_SITES))
    pad: int = 0
    cached: bool = False
    forms: tuple[str, ...] = ("sdpa", "eager")

    @property
    def transformer(self) -> bool:
        return self.family != "convolution"


def network(architecture: Architecture, attention: str = "sdpa") -> Any:
    """The torch module in eval mode: tensors in the order of ``inputs`` in, plain tensors in the order of ``outputs`` out."""
    import torch

    from onnxprune.export.network import Cached, Network

    torch.manual_seed(zlib.crc32(architecture.name.encode()))
    model = architecture.build(attention)
    for config in {id(item): item for item in _configs(model)}.values():
        config.return_dict, config.use_cache = True, architecture.cached
    randomise(model)
    names = tuple(item.name for item in architecture.inputs)
    return (Cached if architecture.cached else Network)(model, names, tuple(architecture.outputs)).eval()


def _configs(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    inner = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    return [item for item in (config, *inner) if item is not None]


def randomise(model: Any) -> None:
    """Weights anew: exporters merge equal initializers, of which fresh modules have many, and attention must be far from uniform."""
    import torch

    with torch.no_grad():
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn_like(parameter)
                if parameter.ndim <= 1:
                    parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise)
                elif isinstance(module, torch.nn.Embedding) or any(word in name for word in ("token", "embed", "bias")):
                    parameter.copy_(0.5 * noise)
                else:
                    # transformers' Conv1D keeps [in, out], Linear and convolutions [out, in, ...], stacked experts [expert, out, in].
                    inputs = parameter.shape[0] if type(module).__name__ == "Conv1D" else prod(parameter.shape[1:])
                    inputs = parameter.shape[-1] if parameter.ndim == 3 and not isinstance(module, torch.nn.Conv1d) else inputs
                    sharp = any(
                        word in f"{path}.{name}" for word in ("query", "key", "q_proj", "k_proj", "q_lin", "k_lin", "qkv", "c_attn")
                    )
                    parameter.copy_((1.6 if sharp else 1.0) * inputs**-0.5 * noise)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * torch.randn_like(module.running_mean))
                module.running_var.copy_(0.5 + torch.rand_like(module.running_var))


def feeds(architecture: Architecture, batch: int = 2, tokens: int = 7, past: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of an entry. Rows of text are padded to different lengths, at the end, or with a cache at the start."""
    rng = np.random.default_rng(seed)
    sizes = {BATCH: batch, TOKENS: tokens, TARGET: max(1, tokens - 2), IMAGES: batch + 1, PAST: past, TOTAL: past + tokens}
    result = {}
    for item in architecture.inputs:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in item.dims)
        hidden = _hidden(shape, architecture.cached) if item.kind in ("ids", "mask", "types") else None
        match item.kind:
            case "ids":
                ids = rng.integers(3, item.high, shape)
                result[item.name] = ids if architecture.cached or item.dims[1] == TARGET else np.where(hidden, architecture.pad, ids)
            case "mask":
                result[item.name] = np.where(hidden, 0, 1)
            case "types":
                result[item.name] = np.where(hidden, 0, rng.integers(0, item.high, shape))
            case _:
                result[item.name] = rng.standard_normal(shape).astype(np.float32)
    return result


def _hidden(shape: tuple[int, ...], at_start: bool) -> np.ndarray:
    """bool ``[batch, tokens]``: row r hides r tokens, and shows at least one."""
    rows, tokens = shape
    places = np.arange(tokens)[None, :]
    counts = np.minimum(np.arange(rows), tokens - 1)[:, None]
    return places < counts if at_start else places >= tokens - counts
