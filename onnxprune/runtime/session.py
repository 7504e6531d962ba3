"""onnxruntime sessions that fail loudly: the provider asked for really runs, and weights are shared instead of copied."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.errors import InputError, RuntimeUnavailable

if TYPE_CHECKING:
    import onnx
    import onnxruntime

    from onnxprune.graph.model import Model

log = logging.getLogger(__name__)

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RuntimeOptions:
    """How onnxruntime is asked to run. ``threads`` 0 leaves the choice to onnxruntime."""

    provider: str = "cpu"
    threads: int = 1

    @property
    def short_provider(self) -> str:
        """``cpu`` for CPUExecutionProvider, and so on; other names as they are."""
        known = {name.lower(): short for short, name in PROVIDERS.items()}
        return known.get(self.provider.lower(), self.provider.lower())


def require_onnxruntime() -> Any:
    """Import onnxruntime, or say exactly what to install or repair.

    Raises:
        RuntimeUnavailable: no distribution is installed, or two that overwrite each other are.
    """
    found = installed_distributions()
    if len(found) > 1:
        raise RuntimeUnavailable(
            f"{' and '.join(found)} are both installed and overwrite each other; "
            f"repair: pip uninstall -y {' '.join(found)}, then pip install 'onnxprune[cpu]' or 'onnxprune[gpu]'"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailable("onnxruntime is not installed; run: pip install 'onnxprune[cpu]' (or 'onnxprune[gpu]')") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeUnavailable("onnxruntime is damaged (another one was removed); run: pip install --force-reinstall onnxruntime")
    return onnxruntime


def installed_distributions() -> list[str]:
    """Names of the onnxruntime distributions that are installed."""
    found = []
    for name in _DISTRIBUTIONS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def open_session(
    model: Model | onnx.ModelProto | bytes | str,
    options: RuntimeOptions | None = None,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    optimize: bool = True,
    pack: bool = True,
) -> onnxruntime.InferenceSession:
    """Create a session on the provider asked for.

    Args:
        model: a :class:`Model` (its weights are shared with the session, not copied), a ModelProto, its bytes, or a path.
        weights: values for placeholder initializers when ``model`` is a skeleton ModelProto.
        optimize: False switches graph optimizations off, for graphs that run once.
        pack: False keeps matrices as they are instead of copying them into another order: slower runs, no memory of its own for weights.

    Raises:
        RuntimeUnavailable: the provider is unknown to this build or did not start.
        InputError: onnxruntime rejects the model.
    """
    ort = require_onnxruntime()
    options = options or RuntimeOptions()
    provider = PROVIDERS.get(options.provider.lower(), options.provider)
    if provider not in ort.get_available_providers():
        raise RuntimeUnavailable(
            f"execution provider {provider} is not in this onnxruntime build (it has {', '.join(ort.get_available_providers())}); "
            "for GPUs install 'onnxprune[gpu]', or use --provider cpu"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what goes wrong is raised; a line on stderr besides would only be noise
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not pack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    payload, shared = _payload(model, weights)
    if shared:
        names = list(shared)
        settings.add_external_initializers(names, [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(shared[name])) for name in names])
    providers = [provider] if provider == PROVIDERS["cpu"] else [provider, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(payload, settings, providers=providers)
    except Exception as error:  # onnxruntime raises a dozen pybind exception types with no common base
        raise InputError(f"onnxruntime cannot load the model: {str(error).strip().splitlines()[0]}") from error
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailable(
            f"{provider} was asked for but did not start: onnxruntime took {session.get_providers()[0]}; check driver and libraries"
        )
    return session


def _payload(model: Any, weights: Mapping[str, np.ndarray] | None) -> tuple[bytes | str, Mapping[str, np.ndarray]]:
    if isinstance(model, bytes | str):
        return model, weights or {}
    proto, shared = (model.proto, model.weights) if hasattr(model, "weights") else (model, weights or {})
    unread = shared.keys() - _read(proto.graph)
    if unread:  # onnxruntime drops what nothing reads before it takes the values
        proto, shared = _without(proto, unread), {name: array for name, array in shared.items() if name not in unread}
    inside = _read_in_bodies(proto.graph) & shared.keys()
    if inside:  # onnxruntime looks for the values of these before it knows the shared ones
        proto = _with_values(proto, {name: shared[name] for name in inside})
        shared = {name: array for name, array in shared.items() if name not in inside}
    return proto.SerializeToString(), shared


def _read_in_bodies(graph: onnx.GraphProto, inside: bool = False) -> set[str]:
    """Names that the bodies of a graph's If, Loop and Scan nodes read, at any depth."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input if inside else ())
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                names |= _read_in_bodies(body, True) | {value.name for value in body.output}
    return names


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes, their bodies or the outputs of a graph read."""
    return _read_in_bodies(graph) | {name for node in graph.node for name in node.input} | {value.name for value in graph.output}


def _without(proto: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy that lacks some initializers."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    left = [tensor for tensor in copy.graph.initializer if tensor.name not in names]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(left)
    return copy


def _with_values(proto: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy that holds some of its initializers itself."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = np.ascontiguousarray(values[tensor.name]).tobytes()
    return copy


def run(session: onnxruntime.InferenceSession, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
    """Run once; an error of onnxruntime becomes an :class:`InputError` that names the shapes fed."""
    try:
        return list(session.run(list(outputs) if outputs is not None else None, dict(feeds)))
    except Exception as error:
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
        raise InputError(f"onnxruntime failed on inputs {shapes}: {str(error).strip().splitlines()[0]}") from error
