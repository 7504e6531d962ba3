"""Channels of convolutional nets at 30 % of the multiply-adds: accuracy with and without the re-fit, and the latency that follows.

A small ResNet (batch norms, residual stages) and a small ConvNeXt (layer norms, so that its MLPs are pruned and its stream is not) are
trained on Fashion-MNIST, which needs the ``export`` extra and the four ``*.gz`` files of Debian's package ``dataset-fashion-mnist``::

    python -m benchmarks.channels --data /usr/share/datasets/fashion-mnist

Training takes a few minutes on one core, once: the models stay in ``.cache/tasks``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import onnxprune
from benchmarks.tasks import CACHE, hits
from samples.vision.train import SIDE, read, scale

RESULTS = Path(__file__).parent / "results"
DATA = Path("/usr/share/datasets/fashion-mnist")
TARGET = "30%"
CALIBRATION_ROWS = 1024
TRAINING_ROWS = 16_000
BATCH = 128


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norms and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    """Ten layers, 24 to 96 channels."""
    stem = [nn.Conv2d(1, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    blocks = [Block(24, 24, 1), Block(24, 48, 2), Block(48, 96, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def convnext() -> nn.Module:
    """Two stages of two blocks, 24 and 48 wide (Liu et al., CVPR 2022), as transformers builds them."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_channels=1,
        image_size=SIDE,
        patch_size=2,
        num_stages=2,
        hidden_sizes=[24, 48],
        depths=[2, 2],
        num_labels=10,
        layer_scale_init_value=1.0,
    )
    return Logits(ConvNextForImageClassification(config))


class Logits(nn.Module):
    """Pixels in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values).logits
        return logits


NETS = {"resnet": (resnet, ("channels",)), "convnext": (convnext, ("channels", "ffn"))}


def trained(name: str, data: Path, epochs: int, rows: int) -> Path:
    """Folder with model.onnx, calib.npz and test.npz, made on first use."""
    folder = CACHE / f"channels-{name}"
    if (folder / "model.onnx").exists():
        return folder
    torch.manual_seed(7)
    torch.set_num_threads(1)
    images, labels = read(data, "train")
    order = np.random.default_rng(7).permutation(len(images))
    held, kept = order[:CALIBRATION_ROWS], order[CALIBRATION_ROWS:][:rows]
    model = NETS[name][0]()
    train(model, scale(images[kept]), labels[kept], epochs)
    folder.mkdir(parents=True, exist_ok=True)
    test_images, test_labels = read(data, "t10k")
    np.savez_compressed(folder / "calib.npz", pixel_values=scale(images[held]))
    np.savez_compressed(folder / "test.npz", pixel_values=scale(test_images), labels=test_labels)
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 1, SIDE, SIDE),),
        folder / "model.onnx",
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    return folder


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """AdamW with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    per_epoch = len(images) // BATCH
    total = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / total))))
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images)).numpy()
        for step in range(per_epoch):
            rows = order[step * BATCH : (step + 1) * BATCH]
            loss = nn.functional.cross_entropy(model(torch.from_numpy(images[rows])), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)


def measure(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Accuracy of the dense model, of plain slicing and of slicing with re-fit at the same multiply-adds; speed of the latter."""
    with np.load(folder / "test.npz", allow_pickle=False) as archive:
        test = {key: archive[key] for key in archive.files}
    row: dict[str, Any] = {"net": name, "target": f"macs={TARGET}", "dense": float(hits(folder / "model.onnx", test).mean())}
    for compensation in ("none", "refit"):
        with tempfile.TemporaryDirectory() as place:
            result = onnxprune.prune(
                folder / "model.onnx",
                passes=NETS[name][1],
                calib=folder / "calib.npz",
                target_macs=TARGET,
                compensation=compensation,
                max_drop=0.99,
                output=Path(place) / "pruned.onnx",
                bench_seconds=seconds if compensation == "refit" else 0,
            )
            assert result.output is not None
            row[compensation] = float(hits(result.output, test).mean())
            row[f"{compensation}_seconds"] = result.record["wall_s"]
            if result.benchmark is not None:
                speedup = result.benchmark.variants["pruned"].speedup
                row |= {"speedup": speedup.median, "speedup_interval": [speedup.low, speedup.high]}
            target = result.record["target"]
            row["macs_share"] = target["measured"] / target["given"]
    row["recovered"] = (row["refit"] - row["none"]) / max(row["dense"] - row["none"], 1e-9)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four .gz files")
    parser.add_argument("--net", choices=tuple(NETS), action="append", help="only this net (repeatable)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=TRAINING_ROWS, help="images to train on")
    parser.add_argument("--seconds", type=float, default=20.0, help="most time of a paired benchmark")
    args = parser.parse_args()
    rows = [measure(name, trained(name, args.data, args.epochs, args.rows), args.seconds) for name in args.net or NETS]
    (RESULTS / "channels.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
