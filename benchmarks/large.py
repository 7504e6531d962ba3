"""A model above two gigabytes pruned in bounded memory: peak of the whole process, seconds and sizes.

python -m benchmarks.large                          # 30 layers of width 1280, 2.4 GB of random weights
python -m benchmarks.large --layers 4 --width 256   # a small one, to see that it runs

The model is written block by block, so making it takes as little memory as pruning it. Everything lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.main_job import RESULTS

VOCABULARY, CLASSES, HEAD = 8192, 4, 64

_PRUNE = """
import json, logging, resource, sys, time
import onnxprune
model, calib, output, target, rounds = sys.argv[1:6]
phases, start = [], time.time()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def progress(what, done, total):
    if not phases or phases[-1]["phase"] != what:
        phases.append({"phase": what, "at_s": round(time.time() - start, 1)})
    phases[-1]["peak_bytes"] = peak()
options = dict(target_macs=target, rounds=int(rounds), threads=int(sys.argv[6]))
result = onnxprune.prune(model, calib=calib, output=output, progress=progress, **options)
phases.append({"phase": "end", "at_s": round(time.time() - start, 1), "peak_bytes": peak()})
record = result.record
print(json.dumps({"wall_s": round(time.time() - start, 1), "cpu_s": round(time.process_time(), 1), "peak_bytes": peak(), "phases": phases,
                  "verification": record["verification"], "target": record["target"]}))
"""


class _Writer:
    """A BERT-like classifier; weights go to the data file as they are drawn."""

    def __init__(self, folder: Path, width: int, seed: int) -> None:
        self.width, self.rng = width, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.data = (folder / "model.onnx.data").open("wb")

    def weight(self, name: str, *shape: int, scale: float) -> str:
        array = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        entries = {"location": "model.onnx.data", "offset": self.data.tell(), "length": array.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(array.data)
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, output: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def linear(self, name: str, x: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
        product = self.node("MatMul", f"{name}.product", x, self.weight(f"{name}.weight", inputs, outputs, scale=gain * inputs**-0.5))
        return self.node("Add", name, product, self.constant(f"{name}.bias", np.zeros(outputs, np.float32)))

    def norm(self, name: str, x: str) -> str:
        ones, zeros = np.ones(self.width, np.float32), np.zeros(self.width, np.float32)
        return self.node(
            "LayerNormalization", name, x, self.constant(f"{name}.scale", ones), self.constant(f"{name}.shift", zeros), axis=-1
        )

    def heads(self, name: str, x: str, perm: list[int]) -> str:
        split = self.node("Reshape", f"{name}.split", x, self.constant(f"{name}.shape", np.array([0, 0, self.width // HEAD, HEAD])))
        return self.node("Transpose", f"{name}.heads", split, perm=perm)

    def attention(self, name: str, x: str, bias: str) -> str:
        q, k, v = (self.linear(f"{name}.{part}", x, self.width, self.width, 2.0 if part != "v" else 1.0) for part in "qkv")
        scores = self.node("MatMul", f"{name}.scores", self.heads(f"{name}.q", q, [0, 2, 1, 3]), self.heads(f"{name}.k", k, [0, 2, 3, 1]))
        scaled = self.node("Mul", f"{name}.scaled", scores, self.constant(f"{name}.scale", np.float32(HEAD**-0.5)))
        shares = self.node("Softmax", f"{name}.shares", self.node("Add", f"{name}.masked", scaled, bias), axis=-1)
        context = self.node("MatMul", f"{name}.context", shares, self.heads(f"{name}.v", v, [0, 2, 1, 3]))
        back = self.node("Transpose", f"{name}.back", context, perm=[0, 2, 1, 3])
        joined = self.node("Reshape", f"{name}.joined", back, self.constant(f"{name}.flat", np.array([0, 0, self.width])))
        return self.linear(f"{name}.out", joined, self.width, self.width)

    def feed_forward(self, name: str, x: str) -> str:
        up = self.linear(f"{name}.up", x, self.width, 4 * self.width)
        scaled = self.node("Div", f"{name}.scaled", up, self.constant(f"{name}.root", np.float32(2**0.5)))
        plus = self.node("Add", f"{name}.plus", self.node("Erf", f"{name}.erf", scaled), self.constant(f"{name}.one", np.float32(1)))
        product = self.node("Mul", f"{name}.times", up, plus)
        gelu = self.node("Mul", f"{name}.gelu", product, self.constant(f"{name}.half", np.float32(0.5)))
        return self.linear(f"{name}.down", gelu, 4 * self.width, self.width)


def write_model(folder: Path, layers: int, width: int, seed: int = 0) -> Path:
    """A classifier of random weights, ``model.onnx`` with its weights in ``model.onnx.data``."""
    writer = _Writer(folder, width, seed)
    table = writer.weight("words", VOCABULARY, width, scale=1.0)
    x = writer.node("Gather", "embedded", table, "input_ids")
    hidden = writer.node("Sub", "hidden", writer.constant("one", np.float32(1)), writer.node("Cast", "mask", "attention_mask", to=1))
    far = writer.node("Mul", "far", hidden, writer.constant("lowest", np.float32(-1e4)))
    bias = writer.node("Unsqueeze", "bias", far, writer.constant("axes", np.array([1, 2])))
    for layer in range(layers):
        name = f"layer{layer}"
        attended = writer.attention(f"{name}.attention", writer.norm(f"{name}.norm1", x), bias)
        x = writer.node("Add", f"{name}.middle", x, attended)
        x = writer.node("Add", f"{name}.result", x, writer.feed_forward(f"{name}.ffn", writer.norm(f"{name}.norm2", x)))
    first = writer.node("Gather", "first", writer.norm("last", x), writer.constant("zero", np.array(0)), axis=1)
    writer.node("Identity", "logits", writer.linear("classes", first, width, CLASSES, 2.0))
    writer.data.close()
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
    graph = helper.make_graph(writer.nodes, "large", inputs, outputs, writer.initializers)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def write_rows(folder: Path, rows: int, tokens: int, seed: int = 0) -> Path:
    """Random tokens of mixed lengths."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(tokens) < rng.integers(tokens // 2, tokens + 1, rows)[:, None]).astype(np.int64)
    path = folder / "calib.npz"
    np.savez(path, input_ids=rng.integers(1, VOCABULARY, (rows, tokens)) * mask, attention_mask=mask)
    return path


def file_bytes(model: Path) -> int:
    """Bytes of a model and its external data."""
    return sum(file.stat().st_size for file in (model, model.with_name(model.name + ".data")) if file.exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 30), ("width", 1280), ("rows", 32), ("tokens", 32), ("rounds", 2), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--target", default="65%")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder, chosen.layers, chosen.width)
        calib = write_rows(folder, chosen.rows, chosen.tokens)
        output = folder / "pruned.onnx"
        command = [sys.executable, "-c", _PRUNE, model, calib, output, chosen.target, chosen.rounds, chosen.threads]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
        result = {**vars(chosen), "bytes_before": file_bytes(model), "bytes_after": file_bytes(output), **json.loads(done.stdout)}
    text = json.dumps(result, indent=1)
    if (chosen.layers, chosen.width) == (30, 1280):
        (RESULTS / "large.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
