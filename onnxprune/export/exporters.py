"""The two exporters of torch, driven alike: dynamic batch and lengths, named inputs and outputs, one file in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from onnxprune.errors import InputError
from onnxprune.export.network import Network, attention, tensors
from onnxprune.export.signature import Signature, made_up, trace_case
from onnxprune.graph.model import Model, load

DYNAMO_OPSET = 18
TORCHSCRIPT_OPSET = 17
LARGE_BYTES = 1_500_000_000
"""Above this, weights go into a file of their own: protobuf ends at 2 GiB."""

_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
"""What torch notes at every node: paths of this machine, and a tenth of a small file."""


def export_dynamo(network: Network, signature: Signature, opset: int, folder: Path) -> Model:
    """``torch.export``, from the fused form of attention where the network has it."""
    target = folder / "dynamo.onnx"
    with attention(network, "sdpa"), torch.no_grad():
        program = torch.onnx.export(
            network,
            tensors(network, made_up(signature, trace_case(signature))),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(signature.names),
            output_names=list(signature.outputs),
            dynamic_shapes=(tuple(item.axes for item in signature.inputs),),
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        for key in _TRACES:
            node.metadata_props.pop(key, None)
    program.save(target, external_data=_bytes(network) > LARGE_BYTES)
    return _named(load(target), signature)


def export_torchscript(network: Network, signature: Signature, opset: int, folder: Path) -> Model:
    """The tracer. It reads shapes off one run, so only plain attention is followed faithfully."""
    target = folder / "torchscript.onnx"
    axes = {item.name: item.axes for item in signature.inputs} | {name: dict(dims) for name, dims in signature.outputs.items()}
    with torch.no_grad():
        torch.onnx.export(
            network,
            tensors(network, made_up(signature, trace_case(signature))),
            str(target),
            dynamo=False,
            opset_version=opset,
            input_names=list(signature.names),
            output_names=list(signature.outputs),
            dynamic_axes=axes,
        )
    return _named(load(target), signature)


EXPORTERS: Mapping[str, tuple[Callable[[Network, Signature, int, Path], Model], int]] = {
    "dynamo": (export_dynamo, DYNAMO_OPSET),
    "torchscript": (export_torchscript, TORCHSCRIPT_OPSET),
}
"""Name -> the function and its default opset, in order of preference."""


def _bytes(network: Network) -> int:
    parameters: Any = network.parameters()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _named(model: Model, signature: Signature) -> Model:
    """
    Raises:
        InputError: an input or output was dropped, merged or renamed.
    """
    wanted = signature.names, tuple(signature.outputs)
    found = model.input_names, model.output_names
    if found != wanted:
        lost = [name for expected, there in zip(wanted, found, strict=True) for name in expected if name not in there]
        raise InputError(f"the exporter left out {', '.join(lost) or 'no name but changed their order'}; the graph would not be usable")
    return model
