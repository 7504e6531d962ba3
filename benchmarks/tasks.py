"""The two trained tasks that every benchmark prunes: ``text`` and ``vision``.

By default the vision task is the embedded sample and the text task is made from public packages on first use. A folder of ready-made
models (``text`` with config.json and model.safetensors, ``vision`` with model.onnx; both with calib.npz and test.npz) saves the training.
Run it to see what the dense models score::

    python -m benchmarks.tasks --models FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "tasks"
NAMES = ("text", "vision")

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """A model and its rows: arrays named as the graph inputs, samples first, plus int64 ``labels``. No row was trained on."""

    name: str
    model_path: Path
    calib: Rows
    test: Rows

    @property
    def calib_path(self) -> Path:
        return self.model_path.with_name("calib.npz")

    @property
    def test_path(self) -> Path:
        return self.model_path.with_name("test.npz")


def task(name: str, models: Path | None = None) -> Task:
    """The task ``name`` ("text" or "vision"), from the folder ``models`` or, if None, from the project's samples.

    The first call for "text" exports, and without ``models`` trains: minutes. Later calls load from ``.cache/tasks``.

    Raises:
        ValueError: no such task.
        FileNotFoundError: ``models`` lacks a file.
        subprocess.CalledProcessError: training or export failed; it has told why on stderr.
    """
    if name == "text":
        folder = _text(models)
    elif name == "vision":
        folder = models / "vision" if models else ROOT / "samples" / "vision"
    else:
        raise ValueError(f"no task {name!r}; there are {', '.join(NAMES)}")
    return Task(name, folder / "model.onnx", _load(folder / "calib.npz"), _load(folder / "test.npz"))


def hits(model: Path, rows: Rows, batch: int = 64, threads: int = 1) -> np.ndarray:
    """Which rows the model classifies right, bool [rows]; compare two models on the same rows pairwise.

    Padded text is scored in order of length and cut to the longest row of each batch.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    lengths = rows["attention_mask"].sum(1) if "attention_mask" in rows else None
    order = np.arange(len(rows["labels"])) if lengths is None else np.argsort(lengths, kind="stable")
    right = np.zeros(len(order), bool)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        feeds = {name: rows[name][chosen] for name in names}
        if lengths is not None:
            feeds = {name: array[:, : int(lengths[chosen].max())] for name, array in feeds.items()}
        right[chosen] = session.run(None, feeds)[0].argmax(1) == rows["labels"][chosen]
    return right


def _text(models: Path | None) -> Path:
    """Folder with the exported text model, made on first use."""
    source = models / "text" if models else None
    # One cache entry per source, so that ready-made and self-trained models never mix.
    key = "text" if source is None else f"text-{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]}"
    folder = CACHE / key
    done = folder / "done"
    if not done.exists():
        command = [sys.executable, str(ROOT / "samples" / "text_classifier" / "make_model.py"), "--out", str(folder)]
        if source is not None:
            if not (source / "model.safetensors").is_file():
                raise FileNotFoundError(f"no model.safetensors in {source}; --models names the folder that holds text/ and vision/")
            command += ["--from-dir", str(source)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        done.touch()
    return folder


def _load(path: Path) -> Rows:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the dense models on their test rows, in onnxruntime.")
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=NAMES, action="append", help="only this task (repeatable)")
    args = parser.parse_args()
    for name in args.task or NAMES:
        chosen = task(name, args.models)
        right = hits(chosen.model_path, chosen.test)
        error = float(np.sqrt(right.mean() * (1 - right.mean()) / len(right)))
        size = chosen.model_path.stat().st_size / 1e6
        print(
            f"{name:7} {right.mean():.4f} +- {error:.4f} on {len(right)} rows, {len(chosen.calib['labels'])} for calibration, {size:.1f} MB"
        )


if __name__ == "__main__":
    main()
