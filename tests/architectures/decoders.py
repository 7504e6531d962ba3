"""Decoders, each with and without inputs and outputs for the keys and values of earlier tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from onnxprune.export.signature import BATCH, PAST, TOTAL, Input
from tests.architectures.entry import FFN, HEADS, HIDDEN, IDS, LAYERS, MASK, POSITIONS, TOKEN_AXES, VOCABULARY, Architecture

KV_HEADS = 2
EXPERTS = 4
_MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    **_MARKS,
}
_GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FFN, "n_positions": POSITIONS, "vocab_size": VOCABULARY, **_MARKS}
_OPT = {
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_dim": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    **_MARKS,
}
_WIDTH = {"head_dim": HIDDEN // HEADS}


def _hf(kind: str, config: str, settings: dict[str, Any], attention: str) -> Any:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(attn_implementation=attention, **settings))


def _decoder(name: str, kind: str, config: str, settings: dict[str, Any], heads: int, **further: Any) -> Architecture:
    """``heads``: units of an attention, which are query heads, or the groups of them that share keys and values."""
    sites = {"heads": (heads,) * LAYERS, "ffn": (FFN,) * LAYERS}
    return Architecture(name, "decoder", partial(_hf, kind, config, settings), (IDS, MASK), {"logits": TOKEN_AXES}, sites, **further)


def _gqa(**settings: Any) -> dict[str, Any]:
    return {**_LLAMA, "num_key_value_heads": KV_HEADS, **settings}


_WINDOW = {"sliding_window": 4}
_GEMMA = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": HIDDEN // HEADS, **_WIDTH}
# The form of experts that exporters can write: every token gathers the weights of its own.
_GATHERED = {"experts_implementation": "batched_mm", "num_experts_per_tok": 2}
_EXPERTS = {"num_local_experts": EXPERTS, **_GATHERED}
_QWEN_EXPERTS = {"num_experts": EXPERTS, "moe_intermediate_size": FFN, **_GATHERED}

PLAIN = (
    _decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, HEADS),
    _decoder("opt", "OPTForCausalLM", "OPTConfig", _OPT, HEADS),
    _decoder("llama-mha", "LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "num_key_value_heads": HEADS}, HEADS),
    _decoder("llama-gqa", "LlamaForCausalLM", "LlamaConfig", _gqa(), KV_HEADS),
    _decoder("llama-mqa", "LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "num_key_value_heads": 1}, HEADS),
    _decoder("mistral", "MistralForCausalLM", "MistralConfig", _gqa(**_WINDOW), KV_HEADS),
    _decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _gqa(), KV_HEADS),
    _decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _gqa(**_WIDTH), KV_HEADS),
    _decoder("gemma", "GemmaForCausalLM", "GemmaConfig", _gqa(**_WIDTH), KV_HEADS),
    _decoder("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _gqa(**_GEMMA), KV_HEADS, forms=("eager",)),
    _decoder("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _gqa(**_GEMMA), KV_HEADS),
    _decoder("phi", "PhiForCausalLM", "PhiConfig", {**_LLAMA, "partial_rotary_factor": 0.5}, HEADS),
    _decoder("phi3", "Phi3ForCausalLM", "Phi3Config", _gqa(), KV_HEADS),
    _decoder("mixtral", "MixtralForCausalLM", "MixtralConfig", _gqa(**_EXPERTS), KV_HEADS),
    _decoder("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _gqa(**_WIDTH, **_QWEN_EXPERTS), KV_HEADS),
)


def _with_cache(plain: Architecture) -> Architecture:
    settings: dict[str, Any] = plain.build.args[2]  # type: ignore[attr-defined]
    heads = settings.get("num_key_value_heads", HEADS)
    past = tuple(
        Input(f"past_key_values.{layer}.{word}", "past", (BATCH, heads, PAST, HIDDEN // HEADS))
        for layer in range(LAYERS)
        for word in ("key", "value")
    )
    mask = Input("attention_mask", "mask", (BATCH, TOTAL))
    presents = {item.name.replace("past_key_values", "present"): {0: BATCH, 2: TOTAL} for item in past}
    return replace(plain, name=f"{plain.name}-cache", inputs=(IDS, mask, *past), outputs={**plain.outputs, **presents}, cached=True)


ENTRIES = (*PLAIN, *(_with_cache(entry) for entry in PLAIN))
