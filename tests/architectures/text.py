"""Encoders of text, and encoder-decoders."""

from __future__ import annotations

from typing import Any

from onnxprune.export.signature import BATCH, TOKENS, Input
from tests.architectures.entry import (
    FFN,
    HEADS,
    HIDDEN,
    IDS,
    LAYERS,
    MASK,
    POSITIONS,
    TARGET,
    TOKEN_AXES,
    TYPES,
    VOCABULARY,
    Architecture,
)

LARGE_VOCABULARY = 5003
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
_STATES = {"last_hidden_state": TOKEN_AXES}


def _hf(kind: str, config: str, attention: str, *words: Any, **settings: Any) -> Any:
    import transformers

    made = getattr(transformers, config)(attn_implementation=attention, **settings)
    return getattr(transformers, kind)(made, *words)


def _bert(attention: str) -> Any:
    return _hf("BertForSequenceClassification", "BertConfig", attention, **_SIZES, **_TEXT, num_labels=3)


def _distilbert(attention: str) -> Any:
    sizes = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FFN}
    return _hf("DistilBertForSequenceClassification", "DistilBertConfig", attention, **sizes, **_TEXT)


def _roberta(attention: str) -> Any:
    return _hf("RobertaForTokenClassification", "RobertaConfig", attention, **_SIZES, **_TEXT, type_vocab_size=1, num_labels=5)


def _albert(attention: str) -> Any:
    return _hf("AlbertModel", "AlbertConfig", attention, False, **_SIZES, **_TEXT, embedding_size=24)


def _electra(attention: str) -> Any:
    return _hf("ElectraForSequenceClassification", "ElectraConfig", attention, **_SIZES, **_TEXT, embedding_size=24)


def _mpnet(attention: str) -> Any:
    return _hf("MPNetModel", "MPNetConfig", attention, False, **_SIZES, **_TEXT)


def _deberta(attention: str) -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
    return _hf("DebertaV2Model", "DebertaV2Config", attention, **_SIZES, **_TEXT, **relative, share_att_key=True, type_vocab_size=0)


def _xlmr(attention: str) -> Any:
    text = {**_TEXT, "vocab_size": LARGE_VOCABULARY}
    return _hf("XLMRobertaModel", "XLMRobertaConfig", attention, False, **_SIZES, **text, type_vocab_size=1)


def _modernbert(attention: str) -> Any:
    text = {**_TEXT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return _hf("ModernBertModel", "ModernBertConfig", attention, **_SIZES, **text, local_attention=4, global_attn_every_n_layers=2)


def _t5_config() -> dict[str, Any]:
    sizes = {"d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": FFN, "num_layers": LAYERS, "num_heads": HEADS}
    return {**sizes, "vocab_size": VOCABULARY, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}


def _t5_encoder(attention: str) -> Any:
    return _hf("T5EncoderModel", "T5Config", attention, **_t5_config(), feed_forward_proj="gated-gelu")


def _t5(attention: str) -> Any:
    return _hf("T5ForConditionalGeneration", "T5Config", attention, **_t5_config(), num_decoder_layers=LAYERS)


def _bart(attention: str) -> Any:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (
        ("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", FFN))}  # fmt: skip
    return _hf("BartForConditionalGeneration", "BartConfig", attention, d_model=HIDDEN, **sizes, **_TEXT)


def _whisper(attention: str) -> Any:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": HIDDEN, "encoder_layers": LAYERS, "encoder_attention_heads": HEADS, "encoder_ffn_dim": FFN}
    config = transformers.WhisperConfig(attn_implementation=attention, num_mel_bins=8, max_source_positions=12, **sizes)
    return WhisperEncoder(config)


_TARGET_IDS = Input("decoder_input_ids", "ids", (BATCH, TARGET), VOCABULARY)
_SEQUENCES = {"logits": {0: BATCH, 1: TARGET}}
_BOTH_SIDES = {"heads": (HEADS,) * (3 * LAYERS), "ffn": (FFN,) * (2 * LAYERS)}
_PLAIN = ("eager",)

ENTRIES = (
    Architecture("bert", "encoder", _bert, (IDS, MASK, TYPES), {"logits": {0: BATCH}}),
    Architecture("distilbert", "encoder", _distilbert, (IDS, MASK), {"logits": {0: BATCH}}),
    Architecture("roberta", "encoder", _roberta, (IDS, MASK), {"logits": TOKEN_AXES}, pad=1),
    Architecture("albert", "encoder", _albert, (IDS, MASK, TYPES), _STATES),
    Architecture("electra", "encoder", _electra, (IDS, MASK, TYPES), {"logits": {0: BATCH}}),
    Architecture("mpnet", "encoder", _mpnet, (IDS, MASK), _STATES, pad=1, forms=_PLAIN),
    Architecture("deberta-v2", "encoder", _deberta, (IDS, MASK), _STATES, forms=_PLAIN),
    Architecture("xlm-r", "encoder", _xlmr, (Input("input_ids", "ids", (BATCH, TOKENS), LARGE_VOCABULARY), MASK), _STATES, pad=1),
    Architecture("modernbert", "encoder", _modernbert, (IDS, MASK), _STATES),
    Architecture("t5-encoder", "encoder", _t5_encoder, (IDS, MASK), _STATES),
    Architecture(
        "whisper-encoder", "encoder", _whisper, (Input("input_features", "pixels", (BATCH, 8, 24)),), {"last_hidden_state": {0: BATCH}}
    ),
    Architecture("t5", "encoder-decoder", _t5, (IDS, MASK, _TARGET_IDS), _SEQUENCES, _BOTH_SIDES),
    Architecture("bart", "encoder-decoder", _bart, (IDS, MASK, _TARGET_IDS), _SEQUENCES, _BOTH_SIDES, pad=1),
)
