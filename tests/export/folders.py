"""Folders of tiny random transformers models, as save_pretrained leaves them, with tokenizers and image settings."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "the a red blue green old new big small house tree car dog cat bird runs sleeps eats sings and".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = len(SPECIAL) + len(WORDS)
CLASSES = ("calm", "loud", "odd")
IMAGE = 16
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def save(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """A model of ``kind``: classifier, tokens, answers, encoder, embedding, vit, siglip, experts, gpt2 or llama."""
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
    bert = {**TEXT, "max_position_embeddings": 40, **changes}
    model: Any
    match kind:
        case "classifier":
            model = hf.BertForSequenceClassification(hf.BertConfig(**bert, **names))
        case "tokens":
            model = hf.BertForTokenClassification(hf.BertConfig(**bert, **names))
        case "answers":
            model = hf.BertForQuestionAnswering(hf.BertConfig(**bert))
        case "encoder" | "embedding":
            model = hf.BertModel(hf.BertConfig(**bert), add_pooling_layer=False)
        case "vit":
            sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
            model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, **names, image_size=IMAGE, patch_size=4, **changes))
        case "siglip":
            vision = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": IMAGE, "patch_size": 4}
            model = hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=vision, **names))
        case "experts":
            sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
            model = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**TEXT, **sizes, num_key_value_heads=2, max_position_embeddings=40))
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0}
            model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, **sizes, **changes))
        case _:
            config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=40, pad_token_id=0, **changes)
            model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # attention and classes that differ visibly between inputs
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif not name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if kind in ("vit", "siglip"):
        save_image_processor(folder)
    else:
        save_tokenizer(folder, with_marks=kind not in ("gpt2", "llama", "experts"))
    if kind == "embedding":
        save_pooling(folder, "mean")
    return folder


def save_tokenizer(folder: Path, with_marks: bool = True) -> None:
    """One token per word of :data:`WORDS`; with ``[CLS]`` and ``[SEP]`` around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(tokens, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_marks:
        marks = [("[CLS]", tokens["[CLS]"]), ("[SEP]", tokens["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    # On the left, as decoders are often saved: calibration data is padded on the right all the same.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, padding_side="left", **names).save_pretrained(folder)


def save_image_processor(folder: Path) -> None:
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": IMAGE, "width": IMAGE}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def save_pooling(folder: Path, mode: str, further: tuple[str, ...] = ("Normalize",)) -> None:
    """modules.json and 1_Pooling/config.json of sentence-transformers; ``mode`` is mean, cls or max."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", **{name: f"{index}_{name}" for index, name in enumerate(further, 2)}}
    modules = [{"idx": n, "path": path, "type": f"sentence_transformers.models.{name}"} for n, (name, path) in enumerate(paths.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    content = {"word_embedding_dimension": 32} | {flag: name == mode for name, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))


def texts(count: int = 60, seed: int = 0, longest: int = 14) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, longest))) for _ in range(count)]


def write_csv(path: Path, count: int = 60) -> Path:
    """Columns ``text`` and ``mood``, a name of :data:`CLASSES`."""
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "mood"])
        rows.writerows([text, CLASSES[index % 3]] for index, text in enumerate(texts(count)))
    return path


def write_images(folder: Path, count: int = 24) -> Path:
    """Random images in subfolders named as classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / CLASSES[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(place / f"{index:03}.png")
    return folder
