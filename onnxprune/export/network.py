"""The torch side: load a folder, and wrap the network so that tensors go in and come out in the order of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from onnxprune.errors import InputError
from onnxprune.export.folder import ModelFolder
from onnxprune.export.pooling import Pooling, read_pooling
from onnxprune.export.signature import BATCH, PAST, TOKENS, TOTAL, Input, Signature
from onnxprune.export.tasks import Task

_IMAGE_SIZE = 224
"""Of networks whose configuration names none."""


class Network(nn.Module):
    """Tensors in the order of ``names`` in, the outputs of a task out."""

    def __init__(self, model: Any, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(getattr(result, name) for name in self.outputs)


class Embedding(Network):
    """Token states pooled over the mask, as vectors of length 1."""

    def __init__(self, model: Any, names: tuple[str, ...], pooling: Pooling) -> None:
        super().__init__(model, names, ("last_hidden_state",))
        self.pooling = pooling

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (states,) = super().forward(*tensors)
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            weight = tensors[self.names.index("attention_mask")].unsqueeze(-1).to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return (nn.functional.normalize(pooled, dim=1),)


class Cached(Network):
    """A decoder step: keys and values of all earlier tokens in, those of all tokens out, after the logits."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = sum(not name.startswith("past_key_values.") for name in self.names)
        past = tensors[count:]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        inputs = dict(zip(self.names, tensors[:count], strict=False))
        result = self.model(**inputs, past_key_values=cache, use_cache=True)
        return (result.logits, *(tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)))


def load_network(folder: ModelFolder, task: Task, cache: bool = False) -> tuple[Network, Signature]:
    """The network in float32 with plain attention, in eval mode, and what its graph takes and gives.

    Nothing is downloaded, no code of the folder is run, nothing but safetensors is read.

    Raises:
        InputError: the folder does not fit the task, or the network is of a kind that cannot be exported.
    """
    model = _load(folder, task)
    names = _input_names(model, task)
    outputs = {name: {0: BATCH, 1: TOKENS} if name.endswith("hidden_state") else {0: BATCH} for name in task.outputs}
    if task.name in ("token-classification", "question-answering", "causal-lm"):
        outputs = {name: {0: BATCH, 1: TOKENS} for name in task.outputs}
    if "pixel_values" in names:
        image = Input("pixel_values", "pixels", (BATCH, *_image_shape(model.config)))
        if task.name == "encoder":
            outputs = {name: {0: BATCH} for name in task.outputs}
        return Network(model, names, task.outputs).eval(), Signature((image,), outputs)
    text = model.config.get_text_config()
    mask_dims = (BATCH, TOTAL if cache else TOKENS)
    known = {
        "input_ids": Input("input_ids", "ids", (BATCH, TOKENS), text.vocab_size),
        "attention_mask": Input("attention_mask", "mask", mask_dims),
        "token_type_ids": Input("token_type_ids", "types", (BATCH, TOKENS), getattr(text, "type_vocab_size", 0) or 0),
    }
    inputs = tuple(known[name] for name in names)
    if cache:
        past = _past(model)
        inputs += past
        names += tuple(item.name for item in past)
        outputs |= {item.name.replace("past_key_values", "present"): {0: BATCH, 2: TOTAL} for item in past}
    signature = Signature(inputs, outputs, _pad(text), _positions(model))
    if task.name == "embedding":
        return Embedding(model, names, read_pooling(folder)).eval(), signature
    return (Cached if cache else Network)(model, names, task.outputs).eval(), signature


def compute(network: Network, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of the torch network on numpy inputs.

    Raises:
        InputError: it fails on inputs of this kind.
    """
    try:
        with torch.inference_mode():
            return [tensor.numpy() for tensor in network(*tensors(network, feeds))]
    except Exception as error:  # whatever a network of any family raises
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"the network does not run on {', '.join(feeds)} alone ({reason}); such models are not exported") from error


def tensors(network: Network, feeds: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(feeds[name]) for name in network.names)


@contextmanager
def attention(network: Network, form: str) -> Iterator[None]:
    """The network with another form of attention (``sdpa``), where it has that form; plain attention afterwards."""
    supported = form == "eager" or bool(getattr(network.model, "_supports_sdpa", False))
    if supported:
        network.model.set_attn_implementation(form)
    try:
        yield
    finally:
        if supported:
            network.model.set_attn_implementation("eager")


def _load(folder: ModelFolder, task: Task) -> Any:
    try:
        model, found = getattr(transformers, task.auto_class).from_pretrained(
            folder.path,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError and safetensors' own
        if folder.config.get("auto_map"):
            raise InputError(f"{folder.path} brings its own code, which is not run; transformers alone cannot load it") from error
        kind = folder.config.get("model_type", "unknown")
        raise InputError(f"transformers cannot load {folder.path} ({kind}) for {task.name}: {_first_line(error)}") from error
    # Only the token states are exported of a bare encoder, so a pooler may be missing.
    unused = ("pooler.",) if task.auto_class == "AutoModel" else ()
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(unused)):
        raise InputError(
            f"{folder.path} has no weights for {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}: it was saved as "
            f"{folder.architecture or 'another class'} and does not fit --task {task.name}"
        )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the only form of experts that both exporters can write
    model.config.return_dict = True
    for name in ("use_cache", "output_hidden_states"):
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, name, False):
                setattr(config, name, False)
    return model.eval()


def _input_names(model: Any, task: Task) -> tuple[str, ...]:
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        if task.name not in ("image-classification", "encoder"):
            raise InputError(f"{type(model).__name__} reads images; --task {task.name} is for text")
        return ("pixel_values",)
    if model.main_input_name != "input_ids" or "pixel_values" in accepted:
        raise InputError(f"{type(model).__name__} reads {model.main_input_name} and more; only networks of text or of images are exported")
    kinds = int(getattr(model.config.get_text_config(), "type_vocab_size", 0) or 0)
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kinds > 1 else [])
    return tuple(name for name in names if name in accepted)


def _image_shape(config: Any) -> tuple[int, int, int]:
    """[channels, height, width], of the vision half where the configuration holds two (SigLIP)."""
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return int(getattr(config, "num_channels", 3)), height, width


def _pad(config: Any) -> int:
    return int(config.pad_token_id) if isinstance(getattr(config, "pad_token_id", None), int) and config.pad_token_id >= 0 else 0


def _positions(model: Any) -> int | None:
    """Most tokens of a text. RoBERTa and its kin count positions from behind the padding index, so their table is longer than that."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx:
            return min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def _past(model: Any) -> tuple[Input, ...]:
    """Inputs for keys and values ``[batch, key heads, past, width]`` of every layer, with the sizes that a run shows.

    Raises:
        InputError: the network keeps its past in another form (state spaces, convolutions, compressed keys).
    """
    try:
        with torch.inference_mode():
            cache = model(input_ids=torch.ones(1, 3, dtype=torch.int64), past_key_values=DynamicCache(), use_cache=True).past_key_values
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        if not pairs or any(tensor.ndim != 4 or tensor.shape[2] != 3 for pair in pairs for tensor in pair):
            raise ValueError("its keys and values are not [batch, heads, tokens, width]")
    except Exception as error:  # whatever a network of any family raises
        raise InputError(
            f"{type(model).__name__} keeps no plain keys and values ({_first_line(error)}); export it without --cache"
        ) from error
    return tuple(
        Input(f"past_key_values.{index}.{word}", "past", (BATCH, tensor.shape[1], PAST, tensor.shape[3]))
        for index, pair in enumerate(pairs)
        for word, tensor in zip(("key", "value"), pair, strict=True)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
