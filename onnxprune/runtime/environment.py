"""What a result was measured on: machine, versions, and execution providers that really start."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxprune.errors import OnnxPruneError, RuntimeUnavailable
from onnxprune.runtime.session import RuntimeOptions, installed_distributions, open_session, require_onnxruntime, run

_DISTRIBUTIONS = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "onnxscript", "onnx-graphsurgeon", "onnx-ir")


def describe() -> dict[str, Any]:
    """Facts for a report, ready for JSON; nothing here raises.

    ``memory_bytes`` is physical memory, ``cores`` those this process may use, ``conflicts`` what is wrong with the installation, in words.
    """
    conflicts: list[str] = []
    available: list[str] = []
    version = None
    try:
        runtime = require_onnxruntime()
        version, available = runtime.__version__, list(runtime.get_available_providers())
    except RuntimeUnavailable as error:
        conflicts.append(str(error))
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_bytes": _memory_bytes(),
        "onnx": onnx.__version__,
        "onnxruntime": version,
        "providers_available": available,
        "runtime_distributions": installed_distributions(),
        "distributions": {name: found for name in _DISTRIBUTIONS if (found := _version(name))},
        "conflicts": conflicts,
    }


def providers_that_start() -> dict[str, str]:
    """Execution provider -> ``ok``, or the reason why a one-node model does not run on it.

    onnxruntime lists providers whose libraries may be missing and falls back without an error, so only a session tells.

    Raises:
        RuntimeUnavailable: onnxruntime itself is missing or damaged.
    """
    found = {}
    for provider in require_onnxruntime().get_available_providers():
        try:
            session = open_session(_one_node(), RuntimeOptions(provider))
            run(session, {}, ["y"])
            found[provider] = "ok"
        except OnnxPruneError as error:
            found[provider] = str(error)
    return found


def _one_node() -> onnx.ModelProto:
    one = helper.make_tensor("one", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([helper.make_node("MatMul", ["one", "one"], ["y"])], "probe", [], [output], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
