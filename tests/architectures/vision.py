"""Networks of images with attention."""

from __future__ import annotations

from typing import Any

from onnxprune.export.signature import BATCH, Input
from tests.architectures.entry import FFN, HEADS, HIDDEN, IDS, IMAGES, LAYERS, MASK, POSITIONS, TOKEN_AXES, VOCABULARY, Architecture

IMAGE, PATCH = 16, 4
PIXELS = Input("pixel_values", "pixels", (BATCH, 3, IMAGE, IMAGE))
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN}
_IMAGE = {"image_size": IMAGE, "patch_size": PATCH}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LOGITS = {"logits": {0: BATCH}}
_STATES = {"last_hidden_state": {0: BATCH}}
_RATIO = 3
SWIN_DEPTHS, SWIN_HEADS, SWIN_WIDTH = (2, 1), (2, 4), 16


def _hf(kind: str, config: str, attention: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(attn_implementation=attention, **settings))


def _vit(attention: str) -> Any:
    return _hf("ViTForImageClassification", "ViTConfig", attention, **_SIZES, **_IMAGE, num_labels=5)


def _deit(attention: str) -> Any:
    return _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", attention, **_SIZES, **_IMAGE, num_labels=5)


def _beit(attention: str) -> Any:
    relative = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
    return _hf("BeitForImageClassification", "BeitConfig", attention, **_SIZES, **_IMAGE, **relative, num_labels=5)


def _swin(attention: str) -> Any:
    sizes = {"embed_dim": SWIN_WIDTH, "depths": list(SWIN_DEPTHS), "num_heads": list(SWIN_HEADS), "window_size": 4, "mlp_ratio": _RATIO}
    return _hf("SwinForImageClassification", "SwinConfig", attention, **sizes, image_size=32, patch_size=4, num_labels=5)


def _clip_text(attention: str) -> Any:
    return _hf("CLIPTextModelWithProjection", "CLIPTextConfig", attention, **_SIZES, **_TEXT, projection_dim=24)


def _clip_vision(attention: str) -> Any:
    return _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", attention, **_SIZES, **_IMAGE, projection_dim=24)


def _clip(attention: str) -> Any:
    towers = {"text_config": {**_SIZES, **_TEXT}, "vision_config": {**_SIZES, **_IMAGE}}
    model = _hf("CLIPModel", "CLIPConfig", attention, **towers, projection_dim=24)
    model.set_attn_implementation(attention)
    return model


def _dinov2(attention: str) -> Any:
    sizes = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    return _hf("Dinov2ForImageClassification", "Dinov2Config", attention, **sizes, **_IMAGE, mlp_ratio=_RATIO, num_labels=5)


def _dinov2_swiglu(attention: str) -> Any:
    sizes = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    return _hf("Dinov2Model", "Dinov2Config", attention, **sizes, **_IMAGE, mlp_ratio=_RATIO, use_swiglu_ffn=True)


def _dinov3(attention: str) -> Any:
    return _hf("DINOv3ViTModel", "DINOv3ViTConfig", attention, **_SIZES, **_IMAGE, num_register_tokens=3)


def _sam(attention: str) -> Any:
    sizes = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    windows = {"window_size": 3, "global_attn_indexes": [1], "mlp_dim": FFN, "output_channels": 24, "qkv_bias": True}
    return _hf("SamVisionModel", "SamVisionConfig", attention, **sizes, **_IMAGE, **windows, use_rel_pos=True)


_SWIN_WIDTHS = [SWIN_WIDTH << stage for stage, depth in enumerate(SWIN_DEPTHS) for _ in range(depth)]
_SWIN_SITES = {
    "heads": tuple(SWIN_HEADS[stage] for stage, depth in enumerate(SWIN_DEPTHS) for _ in range(depth)),
    "ffn": tuple(_RATIO * width for width in _SWIN_WIDTHS),
}
_DINO_SITES = {"heads": (HEADS,) * LAYERS, "ffn": (_RATIO * HIDDEN,) * LAYERS}
_SWIGLU_SITES = {"heads": (HEADS,) * LAYERS, "ffn": ((int(_RATIO * HIDDEN * 2 / 3) + 7) // 8 * 8,) * LAYERS}
_TWO_TOWERS = {"heads": (HEADS,) * (2 * LAYERS), "ffn": (FFN,) * (2 * LAYERS)}
_TEACHER = {name: {0: BATCH} for name in ("logits", "cls_logits", "distillation_logits")}

ENTRIES = (
    Architecture("vit", "vision", _vit, (PIXELS,), _LOGITS),
    Architecture("deit-teacher", "vision", _deit, (PIXELS,), _TEACHER),
    Architecture("beit", "vision", _beit, (PIXELS,), _LOGITS),
    Architecture("swin", "vision", _swin, (Input("pixel_values", "pixels", (BATCH, 3, 32, 32)),), _LOGITS, _SWIN_SITES),
    Architecture("clip-text", "vision", _clip_text, (IDS, MASK), {"text_embeds": {0: BATCH}, "last_hidden_state": TOKEN_AXES}),
    Architecture("clip-vision", "vision", _clip_vision, (PIXELS,), {"image_embeds": {0: BATCH}}),
    Architecture(
        "clip",
        "vision",
        _clip,
        (IDS, Input("pixel_values", "pixels", (IMAGES, 3, IMAGE, IMAGE)), MASK),
        {"logits_per_image": {0: IMAGES, 1: BATCH}},
        _TWO_TOWERS,
    ),
    Architecture("dinov2", "vision", _dinov2, (PIXELS,), _LOGITS, _DINO_SITES),
    Architecture("dinov2-swiglu", "vision", _dinov2_swiglu, (PIXELS,), _STATES, _SWIGLU_SITES),
    Architecture("dinov3", "vision", _dinov3, (PIXELS,), _STATES),
    Architecture("sam-encoder", "vision", _sam, (PIXELS,), _STATES),
)
