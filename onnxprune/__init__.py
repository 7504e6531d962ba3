"""Make transformer ONNX files smaller and faster after training, and prove it in onnxruntime.

>>> import onnxprune
>>> result = onnxprune.prune("model.onnx", passes=["heads", "ffn"], target_latency="60%", calib="data.npz", output="small.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onnxprune.api import PruneResult, apply, bench, inspect, plan, prune, verify
    from onnxprune.errors import OnnxPruneError, Refusal
    from onnxprune.export.job import export_model
    from onnxprune.graph.model import Model, load
    from onnxprune.nested import Family, family
    from onnxprune.search.plan import Plan, load_plan

_HOMES = {
    "PruneResult": "onnxprune.api",
    "apply": "onnxprune.api",
    "bench": "onnxprune.api",
    "inspect": "onnxprune.api",
    "plan": "onnxprune.api",
    "prune": "onnxprune.api",
    "verify": "onnxprune.api",
    "export_model": "onnxprune.export.job",
    "Family": "onnxprune.nested",
    "family": "onnxprune.nested",
    "OnnxPruneError": "onnxprune.errors",
    "Refusal": "onnxprune.errors",
    "Model": "onnxprune.graph.model",
    "load": "onnxprune.graph.model",
    "Plan": "onnxprune.search.plan",
    "load_plan": "onnxprune.search.plan",
}

__all__ = [
    "Family",
    "Model",
    "OnnxPruneError",
    "Plan",
    "PruneResult",
    "Refusal",
    "__version__",
    "apply",
    "bench",
    "export_model",
    "family",
    "inspect",
    "load",
    "load_plan",
    "plan",
    "prune",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that ``import onnxprune`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxprune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
