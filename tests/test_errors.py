"""What a user gets wrong: one clear line, the documented exit code, the same as JSON, and nothing written, half or whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import api
from onnxprune.errors import GateError, InputError, NothingPrunable, OnnxPruneError, Refusal, RuntimeUnavailable, TargetError
from onnxprune.graph.model import load
from tests import zoo
from tests.cli.cases import QUICK, contents, fill, run
from tests.passes.cases import BERT, VIT, arrays

ROWS = arrays(VIT)["pixel_values"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(folder: Path, code: int, message: str, *words: str) -> str:
    """Run with ``--json``: exit code, one error line, the same message as JSON, nothing changed on disk. Returns the message."""
    before = contents(folder)
    result = run(*words, "--json")
    assert result.exit_code == code, result.stderr
    error = json.loads(result.stdout)["error"]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0] == f"error: {error['message'].splitlines()[0]}"
    assert error["exit_code"] == code
    assert message in error["message"], error["message"]
    assert "Traceback" not in result.stderr
    assert contents(folder) == before
    return str(error["message"])


def prune(*words: str) -> tuple[str, ...]:
    """``words`` after a complete command, so that they win."""
    return ("model.onnx", "--calib", "data.npz", *QUICK, *words)


# --- the model ---------------------------------------------------------------------------------------------------------------------


def save(graph_nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[Any], path: Path) -> None:
    """A model from ``x`` to ``y``."""
    graph = helper.make_graph(
        graph_nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def mlp(path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b"], ["y"]),
    ]
    save(nodes, {"a": draw(16, 32), "b": draw(32, 10)}, [16], path)


def lenet(path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], kernel_shape=[5, 5]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["y"]),
    ]
    save(nodes, {"k": draw(6, 1, 5, 5), "w": draw(6 * 12 * 12, 10)}, [1, 28, 28], path)


def test_a_model_that_is_not_there(folder: Path) -> None:
    fails(folder, 2, "model not found: absent.onnx", "absent.onnx", "--calib", "data.npz")


def test_a_folder_as_model(folder: Path) -> None:
    (folder / "folder.onnx").mkdir()
    fails(folder, 2, "cannot read model folder.onnx", "folder.onnx", "--calib", "data.npz")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_model(folder: Path, share: float) -> None:
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in fails(folder, 2, "model.onnx", *prune())


def test_a_file_that_is_no_model(folder: Path) -> None:
    (folder / "model.onnx").write_text("# a README, not a model\n" * 40)
    fails(folder, 2, "model.onnx is not an ONNX file", *prune())


def test_external_data_that_is_missing(folder: Path) -> None:
    load(folder / "model.onnx").save(folder / "apart.onnx", external_data=True)
    (folder / "apart.onnx.data").unlink()
    assert "copy it next to the model" in fails(folder, 2, "apart.onnx.data", "apart.onnx", "--calib", "data.npz", *QUICK)


@pytest.mark.parametrize(("make", "shape", "found"), [(mlp, (16,), "2 Gemm"), (lenet, (1, 28, 28), "1 Conv")])
def test_a_graph_without_transformer_blocks_says_what_it_has(
    folder: Path, make: Callable[[Path], None], shape: tuple[int, ...], found: str
) -> None:
    make(folder / "other.onnx")
    np.savez(folder / "rows.npz", x=draw(16, *shape))
    message = fails(folder, 5, "nothing to prune for ffn, heads", "other.onnx", "--calib", "rows.npz", *QUICK)
    assert found in message


def test_a_quantized_model(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.int8), "quantized"))
    scales = [numpy_helper.from_array(np.array(1, np.float32), "scale")]
    proto.graph.initializer.extend(scales)
    proto.graph.node.append(helper.make_node("DequantizeLinear", ["quantized", "scale"], ["unused"]))
    onnx.save(proto, folder / "model.onnx")
    assert "prune the float model" in fails(folder, 2, "quantized", *prune())


def test_a_model_in_half_precision(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(proto, folder / "model.onnx")
    assert "prune the float32 model" in fails(folder, 2, "half-precision", *prune())


# --- the data ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Calibration data that is wrong, and words of the message."""

    name: str
    arrays: dict[str, np.ndarray]
    message: str
    words: tuple[str, ...] = ()


def spoilt(value: float) -> np.ndarray:
    array = ROWS.copy()
    array[3, 0, 0, 0] = value
    return array


LABELS = np.zeros(len(ROWS), np.int64)
WRONG = [
    Rows("another key", {"pixel_value": ROWS}, "no array 'pixel_values'"),
    Rows("a key too many", {"pixel_values": ROWS, "mask": ROWS}, "'mask' that is no input of the model"),
    Rows("text", {"pixel_values": np.array(["a cat"] * 8)}, "wanted a rectangular array of numbers"),
    Rows("a rank too few", {"pixel_values": ROWS[:, 0, 0]}, "has shape [32, 32]"),
    Rows("another size", {"pixel_values": ROWS[:, :1]}, "fixes axis 1 to 3"),
    Rows("NaN", {"pixel_values": spoilt(np.nan)}, "NaN or infinity, first in row 3"),
    Rows("infinity", {"pixel_values": spoilt(np.inf)}, "NaN or infinity, first in row 3"),
    Rows("no rows", {"pixel_values": ROWS[:0]}, "empty"),
    Rows("a single row", {"pixel_values": ROWS[:1]}, "1 calibration row found"),
    Rows("labels of another length", {"pixel_values": ROWS, "labels": LABELS[:5]}, "'labels' has shape [5]"),
    Rows("labels out of range", {"pixel_values": ROWS, "labels": LABELS + 99}, "label 99 of row 0 is outside", ("--loss", "labels")),
    Rows("no labels", {"pixel_values": ROWS}, "needs a 'labels' array", ("--loss", "labels")),
]


@pytest.mark.parametrize("rows", WRONG, ids=lambda rows: rows.name)
def test_wrong_calibration_data(folder: Path, rows: Rows) -> None:
    np.savez(folder / "data.npz", **rows.arrays)  # type: ignore[arg-type]
    fails(folder, 2, rows.message, *prune(*rows.words))


def test_a_type_that_does_not_fit(folder: Path) -> None:
    inputs = arrays(BERT)
    np.savez(folder / "text.npz", **{**inputs, "input_ids": inputs["input_ids"] + 0.5})  # type: ignore[arg-type]
    fails(folder, 2, "'input_ids' is float64, the model wants int64", str(zoo.path(BERT)), "--calib", "text.npz", "-o", "out.onnx", *QUICK)


@pytest.mark.parametrize(("content", "message"), [(b"PK\x03\x04 and no more", "not a readable .npz"), (None, "calibration data not found")])
def test_data_that_cannot_be_read(folder: Path, content: bytes | None, message: str) -> None:
    (folder / "data.npz").unlink()
    if content is not None:
        (folder / "data.npz").write_bytes(content)
    fails(folder, 2, message, *prune())


def test_without_data_the_message_says_how_to_make_some(folder: Path) -> None:
    message = fails(folder, 2, "no calibration data", "model.onnx", *QUICK)
    assert "model.calib.npz does not exist" in message
    assert "np.savez" in message


def test_data_beside_the_model_is_taken_and_named(folder: Path) -> None:
    (folder / "data.npz").rename(folder / "model.calib.npz")
    result = run("model.onnx", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "model.calib.npz (found beside the model)" in result.stderr


# --- targets and gates -------------------------------------------------------------------------------------------------------------


def test_an_impossible_target_names_what_is_reachable(folder: Path) -> None:
    message = fails(folder, 3, "cannot be met", *prune("--target-macs", "1%"))
    assert "of the file as given" in message
    assert "Ask for at least" in message


def test_passes_that_remove_nothing_are_refused(folder: Path) -> None:
    fails(folder, 2, "removes nothing and cannot reach a target", *prune("--passes", "residual-sum", "--target-macs", "50%"))


def test_a_target_that_is_met_is_said_and_nothing_is_written(folder: Path) -> None:
    result = run(*prune("--target-macs", "100%"))
    assert result.exit_code == 0, result.stderr
    assert "Already met" in result.stderr
    assert not (folder / "model.pruned.onnx").exists()
    assert (folder / "model.pruned.run" / "run.json").exists()


def test_a_target_that_is_met_writes_a_copy_when_asked(folder: Path) -> None:
    result = run(*prune("--target-macs", "100%", "--write-unpruned"))
    assert result.exit_code == 0, result.stderr
    assert load(folder / "model.pruned.onnx").parameters == load(folder / "model.onnx").parameters


@pytest.mark.parametrize("keep", [False, True])
def test_a_gate_that_fails_writes_a_model_only_with_keep_best(folder: Path, keep: bool) -> None:
    words = ("--target-macs", "20%", "--max-drop", "0%", *(["--keep-best"] if keep else []))
    result = run(*prune(*words), "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == content["error"]["exit_code"] == 4
    assert "more than the 0% allowed" in content["error"]["message"]
    assert content["record"]["gates"][0]["passed"] is False
    assert "Gate failed" in result.stderr
    assert (folder / "model.pruned.onnx").exists() is keep
    assert (folder / "model.pruned.run" / "report.html").exists()


# --- options -----------------------------------------------------------------------------------------------------------------------

OPTIONS = [
    (("--passes", "heds"), "did you mean 'heads'?"),
    (("--passes", ","), "no pass named"),
    (("--importance", "fischer"), "unknown importance 'fischer'"),
    (("--exclude", "layer.99"), "--exclude 'layer.99' matches no site"),
    (("--keep", "("), "is not a regular expression"),
    (("--target-params", "50%"), "give one target, not 2"),
    (("--target-macs", "5ms"), "the unknown unit 'ms'"),
    (("--max-drop", "much"), "is not a share"),
    (("--samples", "3"), "--samples 3 is too small"),
    (("--output", "logit"), "did you mean 'logits'?"),
    (("--input-shape", "pixels:1x3x32x32"), "--input-shape names 'pixels'"),
    (("--input-shape", "pixel_values=1"), "is not a shape"),
    (("--rounds", "0"), "--rounds"),
    (("--taget-latency", "5ms"), "did you mean"),
    (("--loss", "squared"), "'squared' is not one of"),
    (("-o",), "requires an argument"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_wrong_options(folder: Path, words: tuple[str, ...], message: str) -> None:
    # An option without its argument would take --json as it, so that goes first.
    before = contents(folder)
    result = run("--json", *prune(*words))
    assert result.exit_code == 2, result.stderr
    assert message.lower() in json.loads(result.stdout)["error"]["message"].lower()
    assert contents(folder) == before


def test_everything_protected_is_nothing_prunable(folder: Path) -> None:
    fails(folder, 5, "protect all", *prune("--exclude", "layer"))


# --- where it is written -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "model.onnx"), "never overwrites its input"),
        (("-o", "data.npz"), "never overwrites its input"),
        (("-o", "absent/out.onnx"), "directory of the output does not exist: absent"),
        (("-o", "."), "is a directory"),
        (("--run-dir", "data.npz"), "data.npz is a file"),
    ],
)
def test_outputs_that_cannot_be(folder: Path, words: tuple[str, ...], message: str) -> None:
    fails(folder, 2, message, *prune(*words))


@pytest.mark.parametrize("target", [".", "absent/plan.json", "data.npz"])
def test_plans_that_cannot_be(folder: Path, target: str) -> None:
    fails(folder, 2, "output", "plan", "model.onnx", "--calib", "data.npz", *QUICK[:-1], "-o", target)


def test_a_folder_that_is_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: mode != os.W_OK and allowed(path, mode, **more))
    fails(folder, 2, "is not writable", *prune())


def test_a_full_disk_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(folder, 2, "No space left on device", *prune())


# --- the runtime -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [prune(), ("doctor",)])
def test_two_runtimes_that_overwrite_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setattr("onnxprune.runtime.session.installed_distributions", lambda: ["onnxruntime", "onnxruntime-gpu"])
    assert "pip uninstall" in fails(folder, 6, "overwrite each other", *command)


def test_no_runtime_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fails(folder, 6, "pip install 'onnxprune[cpu]'", *prune())


@pytest.mark.parametrize("provider", ["tensorrt", "abacus"])
def test_a_provider_that_is_not_there(folder: Path, provider: str) -> None:
    fails(folder, 6, "is not in this onnxruntime build", *prune("--provider", provider))


# --- accidents ---------------------------------------------------------------------------------------------------------------------


def test_control_c_is_no_accident(folder: Path) -> None:
    """A real interrupt in a real process, in the middle of reading the data."""
    # A background job of a shell starts with interrupts ignored; the process here shall not.
    source = "import os, signal, time\n\ndef rows():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(30)\n"
    (folder / "rows.py").write_text(source)
    heard = "import signal, onnxprune.cli; signal.signal(signal.SIGINT, signal.default_int_handler); onnxprune.cli.main()"
    before = contents(folder)
    words = [sys.executable, "-c", heard, "model.onnx", "--calib", "rows.py:rows", *QUICK]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing was written half" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(folder) == before


def test_an_unexpected_error_is_called_a_bug(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a screw is loose")

    monkeypatch.setattr(api, "decide_depth", broken)
    fails(folder, 1, "RuntimeError: a screw is loose", *prune())
    result = run(*prune("-v"))
    assert result.exit_code == 1
    assert "this is a bug" in result.stderr
    assert "Traceback" in result.stderr


def test_exit_codes_are_as_documented() -> None:
    codes = {kind: kind.exit_code for kind in (OnnxPruneError, InputError, TargetError, GateError, NothingPrunable, RuntimeUnavailable)}
    assert list(codes.values()) == [1, 2, 3, 4, 5, 6]


def test_a_refusal_reads_as_one_line() -> None:
    refusal = Refusal("OP101", "/layer.3/attention", "two nodes read it", "exclude it")
    assert str(refusal) == "OP101 /layer.3/attention: two nodes read it; exclude it"
    assert Refusal(**refusal.as_dict()) == refusal
