"""The tasks that benchmarks prune: two trained classifiers, ``text`` and ``vision``, and ``embedding``, which has no classes.

``embedding`` is all-MiniLM-L6-v2 as published, on the rows of ``text``: :func:`cosines` says without labels how much of the dense model is
left, :func:`centroid_hits` what that means for telling classes apart.

By default the vision task is the embedded sample and the others are made from public packages on first use. A folder of ready-made models
(``text`` with config.json and model.safetensors, ``vision`` with model.onnx; both with calib.npz and test.npz) saves the training.
Run it to see what the dense models score::

    python -m benchmarks.tasks --models FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "tasks"
NAMES = ("text", "vision")
"""The classifiers."""

EMBEDDING = "embedding"

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
    """The task ``name`` ("text", "vision" or "embedding"), from the folder ``models`` or, if None, from the project's samples.

    The first call for "text" or "embedding" exports, and without ``models`` trains: minutes. Later calls load from ``.cache/tasks``.

    Raises:
        ValueError: no such task.
        FileNotFoundError: ``models`` lacks a file.
        subprocess.CalledProcessError: training or export failed; it has told why on stderr.
    """
    if name == "text":
        folder = _text(models)
    elif name == "vision":
        folder = models / "vision" if models else ROOT / "samples" / "vision"
    elif name == EMBEDDING:
        folder = _embedding(models)
    else:
        raise ValueError(f"no task {name!r}; there are {', '.join((*NAMES, EMBEDDING))}")
    return Task(name, folder / "model.onnx", _load(folder / "calib.npz"), _load(folder / "test.npz"))


def hits(model: Path, rows: Rows, batch: int = 64, threads: int = 1) -> np.ndarray:
    """Which rows a classifier gets right, bool [rows]; compare two models on the same rows pairwise."""
    return np.asarray(outputs(model, rows, batch, threads).argmax(1) == rows["labels"])


def cosines(model: Path, task: Task) -> np.ndarray:
    """Cosine of every test row's embedding to the dense model's, float32 [rows]."""
    return np.asarray(np.einsum("rw,rw->r", _unit(outputs(model, task.test)), _unit(_dense(task)["test"])))


def centroid_hits(model: Path, task: Task) -> np.ndarray:
    """Which test rows lie nearest to the centroid of their own class, bool [rows].

    The centroids are the mean directions of the dense model's embeddings of the calibration rows: what an index built before pruning holds.
    """
    labels = task.calib["labels"]
    members = np.eye(int(labels.max()) + 1, dtype=np.float32)[labels]
    centroids = _unit(members.T @ _unit(_dense(task)["calib"]))
    return np.asarray((outputs(model, task.test) @ centroids.T).argmax(1) == task.test["labels"])


def outputs(model: Path, rows: Rows, batch: int = 64, threads: int = 1) -> np.ndarray:
    """First output of the model for all rows, [rows, width].

    Padded text is run in order of length and cut to the longest row of each batch.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    lengths = rows["attention_mask"].sum(1) if "attention_mask" in rows else None
    order = np.arange(len(rows["labels"])) if lengths is None else np.argsort(lengths, kind="stable")
    parts = []
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        feeds = {name: rows[name][chosen] for name in names}
        if lengths is not None:
            feeds = {name: array[:, : int(lengths[chosen].max())] for name, array in feeds.items()}
        parts.append(session.run(None, feeds)[0])
    found = np.concatenate(parts)
    found[order] = found.copy()
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _dense(task: Task) -> Rows:
    """The dense model's embeddings of the ``calib`` and ``test`` rows, made with the task."""
    return _load(task.model_path.with_name("dense.npz"))


def _text(models: Path | None) -> Path:
    """Folder with the exported text model, made on first use."""
    source = models / "text" if models else None
    folder = _folder("text", source)
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


def _embedding(models: Path | None) -> Path:
    """Folder with the sentence-embedding model and the rows of the text task, made on first use."""
    folder = _folder(EMBEDDING, models / "text" if models else None)
    done = folder / "done"
    if not done.exists():
        rows = _text(models)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("calib.npz", "test.npz"):
            shutil.copyfile(rows / name, folder / name)
        model = folder / "model.onnx"
        subprocess.run([sys.executable, "-m", "benchmarks.make_embedding", "--out", str(model)], check=True, stdout=sys.stderr, cwd=ROOT)
        np.savez(folder / "dense.npz", **{name: outputs(model, _load(folder / f"{name}.npz")) for name in ("calib", "test")})
        done.touch()
    return folder


def _folder(name: str, source: Path | None) -> Path:
    """One cache entry per source, so that ready-made and self-trained models never mix."""
    return CACHE / (name if source is None else f"{name}-{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]}")


def _load(path: Path) -> Rows:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the dense models on their test rows, in onnxruntime.")
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=(*NAMES, EMBEDDING), action="append", help="only this task (repeatable)")
    args = parser.parse_args()
    for name in args.task or (*NAMES, EMBEDDING):
        chosen = task(name, args.models)
        right = centroid_hits(chosen.model_path, chosen) if name == EMBEDDING else hits(chosen.model_path, chosen.test)
        error = float(np.sqrt(right.mean() * (1 - right.mean()) / len(right)))
        size = chosen.model_path.stat().st_size / 1e6
        calib = len(chosen.calib["labels"])
        print(f"{name:9} {right.mean():.4f} +- {error:.4f} on {len(right)} rows, {calib} for calibration, {size:.1f} MB")


if __name__ == "__main__":
    main()
