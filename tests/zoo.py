"""Small random-weight transformers as three exporter settings write them, with the torch modules they came from.

Six architectures x {TorchScript opset 17, dynamo opset 18, dynamo opset 23} x {sdpa, eager attention} = 36 files of three layers each.
Exporters share equal initializers, and fresh modules have many (all LayerNorm weights are ones), so every norm weight and bias is drawn at
random; query and key weights are large enough that attention is far from uniform.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = ("bert", "minilm", "vit", "deit", "gpt2", "llama")
EXPORTS = ("ts17", "do18", "do23")
ATTENTION = ("sdpa", "eager")
NAMES: tuple[str, ...] = tuple(f"{arch}-{attn}-{export}" for arch in ARCHITECTURES for attn in ATTENTION for export in EXPORTS)

VOCABULARY = 200
MAX_SEQUENCE = 64
IMAGE = 32
LAYERS = 3
HEADS = {"bert": 4, "minilm": 6, "vit": 4, "deit": 3, "gpt2": 4, "llama": 8}
HIDDEN = {"bert": 64, "minilm": 96, "vit": 64, "deit": 48, "gpt2": 64, "llama": 64}
FFN = {"bert": 160, "minilm": 192, "vit": 128, "deit": 192, "gpt2": 256, "llama": 144}
KV_HEADS = 2
"""Key-value heads of the Llama model; all other models have as many as query heads."""

OUTPUTS = {
    "bert": "logits",
    "minilm": "last_hidden_state",
    "vit": "logits",
    "deit": "logits",
    "gpt2": "logits",
    "llama": "logits",
}


def path(name: str) -> Path:
    """The .onnx file of a zoo model, exported on first use and cached (safe with several test processes)."""
    _split(name)
    target = _folder() / f"{name}.onnx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            temporary = Path(scratch) / target.name
            _export(name, temporary)
            os.replace(temporary, target)
    return target


@lru_cache(maxsize=4)
def torch_model(name: str) -> Any:
    """The HF module that ``path(name)`` was exported from, in eval mode. Cached: put back what you change."""
    import torch

    architecture, attention, _ = _split(name)
    torch.manual_seed(ARCHITECTURES.index(architecture))
    module = _module(architecture, attention).eval()
    _randomise(module)
    return module


def feeds(name: str, batch: int = 3, seq: int = 11, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a zoo model. Rows of the text encoders are padded to different lengths (at least one token stays)."""
    architecture, _, _ = _split(name)
    rng = np.random.default_rng(seed)
    if architecture in ("vit", "deit"):
        return {"pixel_values": rng.standard_normal((batch, 3, IMAGE, IMAGE)).astype(np.float32)}
    ids = rng.integers(3, VOCABULARY, (batch, seq))
    mask = np.ones((batch, seq), np.int64)
    if architecture in ("gpt2", "llama"):
        return {"input_ids": ids, "attention_mask": mask}
    for row in range(1, batch):
        mask[row, max(1, seq - row) :] = 0
    segments = rng.integers(0, 2, (batch, seq))
    return {"input_ids": np.where(mask, ids, 0), "attention_mask": mask, "token_type_ids": np.where(mask, segments, 0)}


def forward(name: str, inputs: dict[str, np.ndarray]) -> Any:
    """The torch output tensor (with its autograd graph, if the caller made one) on numpy inputs."""
    import torch

    architecture, _, _ = _split(name)
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in inputs.items()}
    return getattr(torch_model(name)(**tensors, **_options(architecture)), OUTPUTS[architecture])


def _split(name: str) -> tuple[str, str, str]:
    if name not in NAMES:
        raise KeyError(f"no zoo model {name!r}; names look like {NAMES[0]!r}")
    architecture, attention, export = name.split("-")
    return architecture, attention, export


@lru_cache(maxsize=1)
def _folder() -> Path:
    if given := os.environ.get("ONNXPRUNE_TEST_CACHE"):
        return Path(given)
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{version('torch')} {version('transformers')} {version('onnxscript')}".encode())
    return Path(__file__).resolve().parents[1] / ".cache" / f"zoo-{digest.hexdigest()[:12]}"


def _options(architecture: str) -> dict[str, Any]:
    return {"use_cache": False} if architecture in ("gpt2", "llama") else {}


def _module(architecture: str, attention: str) -> Any:
    import transformers as hf

    hidden, heads, ffn = HIDDEN[architecture], HEADS[architecture], FFN[architecture]
    common = {"num_hidden_layers": LAYERS, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_SEQUENCE}
    config: Any
    match architecture:
        case "bert":
            config, kind = hf.BertConfig(**common, **text, num_labels=3), hf.BertForSequenceClassification
        case "minilm":
            config, kind = hf.BertConfig(**common, **text), hf.BertModel
        case "vit":
            config, kind = hf.ViTConfig(**common, image_size=IMAGE, patch_size=8, num_labels=5), hf.ViTForImageClassification
        case "deit":
            config, kind = hf.DeiTConfig(**common, image_size=IMAGE, patch_size=8, num_labels=2), hf.DeiTForImageClassification
        case "gpt2":
            sizes = {"n_embd": hidden, "n_layer": LAYERS, "n_head": heads, "n_inner": ffn}
            config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=MAX_SEQUENCE, bos_token_id=0, eos_token_id=0, **sizes)
            kind = hf.GPT2LMHeadModel
        case _:
            config, kind = hf.LlamaConfig(**common, **text, num_key_value_heads=KV_HEADS), hf.LlamaForCausalLM
    config._attn_implementation = attention
    # Only the last hidden state and its head matter here; BertModel without a pooler has one output.
    return kind(config, add_pooling_layer=False) if architecture == "minilm" else kind(config)


def _randomise(module: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                scale = 0.1 if name.endswith("bias") else 0.3
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + scale * torch.randn_like(parameter))
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                # HF's Conv1D keeps [in, out], Linear [out, in]; both have the smaller gain on their longer side.
                gain = 1.6 if any(part in name for part in ("query", "key", "q_proj", "k_proj", "c_attn")) else 1.0
                parameter.copy_(gain * parameter.shape[0 if "c_" in name else 1] ** -0.5 * torch.randn_like(parameter))


def _export(name: str, target: Path) -> None:
    import torch

    architecture, _, export = _split(name)
    module = torch_model(name)
    inputs = feeds(name, batch=2, seq=9)
    names = list(inputs)
    output = OUTPUTS[architecture]
    options = _options(architecture)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return getattr(self.inner(**dict(zip(names, tensors, strict=True)), **options), output)

    wrapper = Positional().eval()  # the exporter puts the mode it found back on every submodule
    tensors = tuple(torch.from_numpy(array) for array in inputs.values())
    axes = {0: "batch"} if "pixel_values" in inputs else {0: "batch", 1: "seq"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if export == "ts17":
            outputs = {output: axes if output == "last_hidden_state" or architecture in ("gpt2", "llama") else {0: "batch"}}
            torch.onnx.export(
                wrapper, tensors, str(target), dynamo=False, opset_version=17, input_names=names, output_names=[output],
                dynamic_axes={key: axes for key in names} | outputs,
            )  # fmt: skip
            return
        batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq", max=MAX_SEQUENCE)
        shapes = {0: batch} if "pixel_values" in inputs else {0: batch, 1: seq}
        program = torch.onnx.export(
            wrapper, tensors, dynamo=True, opset_version=int(export[2:]), input_names=names, output_names=[output],
            dynamic_shapes=(tuple(dict(shapes) for _ in names),), verbose=False,
        )  # fmt: skip
        program.save(str(target))
