"""Files of the entries as exporters write them, made on first use and kept."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.architectures.entry import Architecture, feeds, network
from tests.architectures.registry import ARCHITECTURES

EXPORTERS: Mapping[str, tuple[bool, int]] = {"do18": (True, 18), "do23": (True, 23), "ts14": (False, 14), "ts17": (False, 17)}
"""Name -> (dynamo instead of TorchScript, opset)."""

VARIANTS = tuple(f"{exporter}-{form}" for exporter in EXPORTERS for form in ("sdpa", "eager"))
_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


class ExportFails(Exception):
    """The exporter does not write this network; the message is its first line."""


def variants_of(architecture: Architecture) -> tuple[str, ...]:
    """Those with a form of attention that the network has."""
    return tuple(variant for variant in VARIANTS if variant.split("-")[1] in architecture.forms)


def path(name: str, variant: str = "do18-sdpa") -> Path:
    """The .onnx file of an entry, exported on first use (safe with several processes).

    Raises:
        ExportFails: torch cannot write it so; this is remembered as well.
    """
    architecture = ARCHITECTURES[name]
    if variant not in variants_of(architecture):
        raise KeyError(f"no variant {variant!r} of {name}; there are {', '.join(variants_of(architecture))}")
    folder = _folder(architecture)
    target, failure = folder / f"{name}-{variant}.onnx", folder / f"{name}-{variant}.failed"
    if failure.exists():
        raise ExportFails(failure.read_text())
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            try:
                _export(architecture, variant, made)
            except Exception as error:  # torch raises hundreds of kinds where it meets an operator that it cannot write
                failure.write_text(first_line(error))
                raise ExportFails(first_line(error)) from error
            os.replace(made, target)
    return target


def first_line(error: BaseException) -> str:
    """What began it: torch wraps errors in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _folder(architecture: Architecture) -> Path:
    """One folder for each state of the files that describe an entry, and of the packages that build and write it."""
    build: Any = architecture.build
    maker = sys.modules[getattr(build, "func", build).__module__].__file__
    digest = hashlib.sha256()
    for file in (Path(__file__), Path(__file__).with_name("entry.py"), Path(str(maker))):
        digest.update(file.read_bytes())
    digest.update(" ".join(version(package) for package in ("torch", "transformers", "onnxscript")).encode())
    root = Path(os.environ.get("ONNXPRUNE_TEST_CACHE") or Path(__file__).resolve().parents[2] / ".cache")
    return root / f"architectures-{digest.hexdigest()[:12]}"


def _export(architecture: Architecture, variant: str, target: Path) -> None:
    import torch

    from onnxprune.export.extra import quiet

    exporter, form = variant.split("-")
    dynamo, opset = EXPORTERS[exporter]
    with quiet(), torch.no_grad():
        module = network(architecture, form)
        # Sizes that occur nowhere else, or the exporter takes two dimensions for one; none is 0 or 1, which it takes for constants.
        tensors = tuple(torch.from_numpy(array) for array in feeds(architecture, batch=2, tokens=9, past=6).values())
        names = [item.name for item in architecture.inputs]
        options: dict[str, Any] = {"opset_version": opset, "input_names": names, "output_names": list(architecture.outputs)}
        if not dynamo:
            axes = {item.name: item.axes for item in architecture.inputs} | {
                name: dict(dims) for name, dims in architecture.outputs.items()
            }
            torch.onnx.export(module, tensors, str(target), dynamo=False, dynamic_axes=axes, **options)
            return
        shapes = (tuple(item.axes for item in architecture.inputs),)
        program = torch.onnx.export(module, tensors, dynamo=True, verbose=False, dynamic_shapes=shapes, **options)
    assert program is not None
    for node in program.model.graph.all_nodes():
        for key in _TRACES:
            node.metadata_props.pop(key, None)
    program.save(target, external_data=False)
