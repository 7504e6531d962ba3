"""From a model folder to a file that computes the same: export, compare, choose, write."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from onnxprune.errors import GateError, InputError
from onnxprune.export.choose import Race, faster
from onnxprune.export.data import Source, collect, save
from onnxprune.export.extra import quiet, require_extra
from onnxprune.export.folder import open_folder
from onnxprune.export.parity import TOLERANCE, Parity, Proof, compare
from onnxprune.export.signature import Signature, made_up, proof_cases, request_case
from onnxprune.export.tasks import AUTO, choose_task
from onnxprune.graph.model import Model, load
from onnxprune.outputs import model_output
from onnxprune.runtime.session import require_onnxruntime

if TYPE_CHECKING:
    from onnxprune.export.network import Network

log = logging.getLogger(__name__)

Exporter = Literal["auto", "dynamo", "torchscript"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Attempt:
    """What one exporter made: a model and how near it is, or ``failure``, why it made none."""

    exporter: str
    opset: int
    model: Model | None
    parity: Parity | None
    failure: str

    @property
    def usable(self) -> bool:
        return self.parity is not None and self.parity.holds

    def as_dict(self) -> dict[str, Any]:
        parity = self.parity.as_dict() if self.parity else None
        return {"exporter": self.exporter, "opset": self.opset, "parity": parity, "failure": self.failure}


@dataclass(frozen=True, eq=False)
class ExportResult:
    """What :func:`export_model` did. ``race`` is None where only one exporter gave a usable graph; ``calibration`` the file written."""

    model: Model
    task: str
    exporter: str
    attempts: tuple[Attempt, ...]
    race: Race | None
    output: Path | None
    calibration: Path | None
    calibration_shapes: Mapping[str, tuple[int, ...]]
    wall_s: float

    @property
    def parity(self) -> Parity:
        """Of the model that was taken."""
        found = next(attempt.parity for attempt in self.attempts if attempt.exporter == self.exporter)
        assert found is not None
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "task": self.task,
            "exporter": self.exporter,
            "opset": self.model.opset(),
            "parameters": self.model.parameters,
            "inputs": list(self.model.input_names),
            "outputs": list(self.model.output_names),
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "timing": self.race.as_dict() if self.race else None,
            "output": str(self.output) if self.output else None,
            "calibration": str(self.calibration) if self.calibration else None,
            "calibration_shapes": {name: list(shape) for name, shape in self.calibration_shapes.items()},
            "wall_s": self.wall_s,
        }


def export_model(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    task: str = AUTO,
    cache: bool = False,
    exporter: Exporter = "auto",
    opset: int | None = None,
    calib_from: str | os.PathLike[str] | None = None,
    columns: Sequence[str] = (),
    label_column: str | None = None,
    samples: int = 2048,
    max_length: int | None = None,
    seed: int = 0,
    external_data: bool | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a local transformers model, and write it only if onnxruntime computes what torch does.

    Args:
        folder: config.json and safetensors, as ``save_pretrained`` writes them. Nothing is downloaded and no code of it is run.
        output: where to write; None writes nothing.
        task: a name in :data:`onnxprune.export.tasks.TASKS`; ``auto`` reads it off config.json.
        cache: for ``causal-lm``, keys and values of earlier tokens as inputs ``past_key_values.N.key`` and outputs ``present.N.key``.
        exporter: ``auto`` runs both of torch and takes the graph that onnxruntime runs faster here.
        opset: of the dynamo exporter, which it then asks for; by default 18, and 17 for TorchScript.
        calib_from: texts (.txt, .csv, .jsonl) or a folder of images, written as ``<output>.calib.npz`` under the names of the inputs.
        columns: one text column of it (default ``text``), or two that are encoded as a pair.
        label_column: classes, by number or by name, written as ``labels``.
        samples: most rows of it, chosen at random by ``seed``.
        max_length: most tokens of a row; by default what the folder says, at most 512.
        external_data: see :meth:`onnxprune.graph.model.Model.save`.

    Raises:
        InputError: the folder, an option or the data is wrong, or no exporter can write this network.
        GateError: the graph differs from the network by more than 1e-4 of the largest output; nothing is written.
        RuntimeUnavailable: there is no onnxruntime.
    """
    started = time.time()
    _check_exporter(exporter, opset)
    data = Source(Path(calib_from), columns, label_column, samples, max_length, seed) if calib_from is not None else None
    if data is None and (columns or label_column or max_length is not None):
        raise InputError("--column, --label-column and --max-length say how to read --calib-from, which is not given")
    if data is not None and output is None:
        raise InputError("calib_from is written beside the model; give output as well")
    source = open_folder(folder)
    chosen = choose_task(source, task)
    if cache and chosen.name != "causal-lm":
        raise InputError(f"--cache keeps the past of a decoder; --task {chosen.name} has none")
    target = model_output(output, source.files()) if output is not None else None
    require_extra()
    require_onnxruntime()
    from onnxprune.export.network import compute, load_network

    tell = progress or (lambda what, done, total: None)
    with quiet(), tempfile.TemporaryDirectory(prefix="onnxprune-export-") as workplace:
        tell("loading", 0, 1)
        network, signature = load_network(source, chosen, cache)
        tell("loading", 1, 1)
        arrays = collect(data, source, chosen, signature, network.model.config) if data else {}
        cases = proof_cases(signature)
        feeds = [made_up(signature, case, seed + index) for index, case in enumerate(cases)]
        proofs = [Proof(case, made, compute(network, made)) for case, made in zip(cases, feeds, strict=True)]
        attempts = _attempts(exporter, opset, network, signature, proofs, Path(workplace), tell)
        usable = {attempt.exporter: attempt.model for attempt in attempts if attempt.usable and attempt.model is not None}
        if not usable:
            raise _failure(attempts)
        race = None
        if len(usable) > 1:
            tell("timing", 0, 1)
            race = faster(usable, made_up(signature, request_case(signature), seed))
            tell("timing", 1, 1)
        winner = race.winner if race else next(iter(usable))
        model = usable[winner]
        kept = load(model.save(target, external_data)) if target is not None else _in_memory(model)
        beside = None
        if target is not None and arrays:
            beside = target.with_suffix(".calib.npz")
            save(arrays, beside)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    return ExportResult(kept, chosen.name, winner, attempts, race, target, beside, shapes, round(time.time() - started, 2))


def _check_exporter(exporter: str, opset: int | None) -> None:
    if exporter not in get_args(Exporter):
        raise InputError(f"unknown exporter {exporter!r}; known: {', '.join(get_args(Exporter))}")
    if opset is not None and exporter == "torchscript":
        raise InputError("--opset is of the dynamo exporter; TorchScript writes opset 17")
    if opset is not None and opset < 18:
        raise InputError(f"--opset {opset} is too old for the dynamo exporter, which writes 18 and later; --exporter torchscript writes 17")


def _attempts(
    exporter: Exporter,
    opset: int | None,
    network: Network,
    signature: Signature,
    proofs: Sequence[Proof],
    workplace: Path,
    tell: Progress,
) -> tuple[Attempt, ...]:
    """Run the exporters asked for. One that fails is no reason to stop while there is another."""
    from onnxprune.export.exporters import EXPORTERS

    wanted = ["dynamo"] if opset is not None else list(EXPORTERS) if exporter == "auto" else [exporter]
    attempts = []
    for name in wanted:
        tell(f"export by {name}", 0, 1)
        function, usual = EXPORTERS[name]
        version = opset or usual
        try:
            model = function(network, signature, version, workplace)
            parity = compare(model, proofs)
            attempts.append(Attempt(name, version, model, parity, parity.reason))
        except Exception as error:  # torch raises hundreds of kinds where it meets an operator that it cannot write
            log.debug("export by %s failed", name, exc_info=True)
            attempts.append(Attempt(name, version, None, None, _reason(error)))
        if attempts[-1].failure and len(wanted) > 1:
            log.info("export by %s is left out: %s", name, attempts[-1].failure)
        tell(f"export by {name}", 1, 1)
    return tuple(attempts)


def _reason(error: BaseException) -> str:
    """The first line of what began it: torch wraps errors in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _in_memory(model: Model) -> Model:
    """The model apart from the temporary files it was read from."""
    return replace(model, weights={name: np.array(array) for name, array in model.weights.items()}, source=None)


def _failure(attempts: Sequence[Attempt]) -> GateError | InputError:
    reasons = "; ".join(f"{attempt.exporter}: {attempt.failure}" for attempt in attempts)
    record = {"attempts": [attempt.as_dict() for attempt in attempts]}
    if any(attempt.parity is not None for attempt in attempts):
        return GateError(f"no graph computes what torch computes to {TOLERANCE:g} ({reasons}); nothing was written", record)
    return InputError(f"torch cannot export this network ({reasons}); nothing was written", record)
