"""Train the embedded vision sample: a small vision transformer on Fashion-MNIST, exported to ONNX with calibration and test rows.

Needs the ``export`` extra (torch, transformers) and the four ``*.gz`` files of Fashion-MNIST, for example from Debian's package
``dataset-fashion-mnist``. One core trains it in about 40 minutes::

    python samples/vision/train.py --data /usr/share/datasets/fashion-mnist --out samples/vision
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

SIDE = 28
CLASSES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CALIBRATION_ROWS = 1024
TEST_ROWS = 2000
BATCH = 64
KEPT_PATCHES = 20


class Stem(nn.Conv2d):
    """Two overlapping stride-2 convolutions in place of the 4 x 4 patch cut: they spare a small model learning what an edge is.

    Being the second convolution itself, it keeps the ``weight`` that transformers looks at for the data type.
    """

    def __init__(self, width: int) -> None:
        super().__init__(8, width, kernel_size=3, stride=2, padding=1)
        self.first = nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.relu(self.first(input)))


class Logits(nn.Module):
    """The exported module: pixels in, one tensor out."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def build() -> ViTForImageClassification:
    """6 layers of width 128 with 4 heads and 512 FFN neurons; 7 x 7 patches and a class token."""
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    model = ViTForImageClassification(config)
    model.vit.embeddings.patch_embeddings.projection = Stem(config.hidden_size)
    return model


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [rows, 1, 28, 28] and labels int64 [rows] of ``part`` ("train" or "t10k"), from the IDX files."""
    images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return images.reshape(-1, 1, SIDE, SIDE), labels.astype(np.int64)


def scale(images: np.ndarray) -> np.ndarray:
    """Pixels as the graph wants them: float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and move each by up to two pixels; [rows, 1, 28, 28] in and out."""
    rows = len(images)
    flipped = torch.where((torch.rand(rows, generator=generator) < 0.5)[:, None, None, None], images.flip(3), images)
    padded = nn.functional.pad(flipped, (2, 2, 2, 2))[:, 0]
    start = torch.randint(0, 5, (2, rows, 1), generator=generator)
    y, x = start + torch.arange(SIDE)
    return padded[torch.arange(rows)[:, None, None], y[:, :, None], x[:, None, :]][:, None]


class TokenDropout:
    """Hook on the embeddings that keeps a random subset of patches per image while ``keep`` is set.

    Early epochs on 20 of 49 patches cost 40 % of the time (PatchDropout, Liu et al., WACV 2023, section 3).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.keep: int | None = None
        self.generator = generator

    def __call__(self, module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
        if self.keep is None or not module.training:
            return tokens
        rows, count, width = tokens.shape
        chosen = torch.rand(rows, count - 1, generator=self.generator).argsort(1)[:, : self.keep] + 1
        chosen = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), chosen], 1)
        return tokens.gather(1, chosen[..., None].expand(-1, -1, width))


def accuracy(model: ViTForImageClassification, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows classified right."""
    model.eval()
    with torch.inference_mode():
        hits = [
            (
                model(pixel_values=torch.from_numpy(scale(images[start : start + 256]))).logits.argmax(1).numpy()
                == labels[start : start + 256]
            ).sum()
            for start in range(0, len(images), 256)
        ]
    model.train()
    return float(np.sum(hits)) / len(labels)


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own optimizer, warm-up and cosine decay. The last ``full_epochs`` see every patch."""

    epochs: int
    full_epochs: int
    rate: float
    augmented: bool


STAGES = (Stage(8, 2, 1e-3, True), Stage(1, 1, 3e-4, False))


def train(model: ViTForImageClassification, images: np.ndarray, labels: np.ndarray, stage: Stage, dropout: TokenDropout) -> None:
    """AdamW over one stage."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=stage.rate, betas=(0.9, 0.98), fused=True
    )
    per_epoch = len(images) // BATCH
    total = per_epoch * stage.epochs
    warm_up = max(1, min(400, total // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, total - warm_up))))
    )
    model.train()
    started, order = time.monotonic(), torch.arange(0)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=dropout.generator)
        dropout.keep = KEPT_PATCHES if step < total - stage.full_epochs * per_epoch else None
        rows = order[step % per_epoch * BATCH :][:BATCH].numpy()
        pixels = torch.from_numpy(scale(images[rows]))
        if stage.augmented:
            pixels = augment(pixels, dropout.generator)
        loss = nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.from_numpy(labels[rows]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {total}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def export(model: ViTForImageClassification, path: Path) -> None:
    """Opset 18 with a dynamic batch. Stack traces that the exporter notes on every node are dropped: they name local files."""
    program = torch.onnx.export(
        Logits(model).eval(),
        (torch.zeros(2, 1, SIDE, SIDE),),
        dynamo=True,
        verbose=False,
        opset_version=18,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
    )
    proto = program.model_proto
    for item in (
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
        proto.graph,
    ):
        item.ClearField("metadata_props")
    onnx.save(proto, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder with the four .gz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rows", type=int, help="train on so many images only (to try the script out)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = read(args.data, "train")
    order = np.random.default_rng(args.seed).permutation(len(images))
    held_out, kept = order[:CALIBRATION_ROWS], order[CALIBRATION_ROWS:][: args.rows]
    test_images, test_labels = read(args.data, "t10k")
    model = build()
    dropout = TokenDropout(torch.Generator().manual_seed(args.seed))
    model.vit.embeddings.register_forward_hook(dropout)
    for stage in STAGES:
        train(model, images[kept], labels[kept], stage, dropout)

    export(model, args.out / "model.onnx")
    np.savez_compressed(args.out / "calib.npz", pixel_values=scale(images[held_out]), labels=labels[held_out])
    np.savez_compressed(args.out / "test.npz", pixel_values=scale(test_images[:TEST_ROWS]), labels=test_labels[:TEST_ROWS])
    figures = {
        "accuracy_test_10000": accuracy(model, test_images, test_labels),
        "accuracy_test_npz": accuracy(model, test_images[:TEST_ROWS], test_labels[:TEST_ROWS]),
        "accuracy_calib_npz": accuracy(model, images[held_out], labels[held_out]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
