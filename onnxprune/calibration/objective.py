"""What is being preserved: the output that matters, the loss that measures it, and targets that need no labels.

The loss against the dense model's own distribution has no gradient at the dense model. Labels drawn from that distribution do (their
squared gradients are the true Fisher information), and so does a random displacement of an embedding; both need no annotation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.calibration.checks import check_labels, nearest
from onnxprune.calibration.data import IGNORED_LABEL, Batch, CalibrationData
from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.view import GraphView

Link = Literal["softmax", "identity"]
Purpose = Literal["classes", "vector"]
LossSource = Literal["sampled", "labels"]

TOKEN_DRAWS = 4
"""Label draws kept per token; rounds take them in turn."""

_CLASSES = re.compile(r"logit|score|prob|class|label|start|end", re.IGNORECASE)
_FEATURES = re.compile(r"embed|hidden|pool|feature|sentence|vector|representation", re.IGNORECASE)


@dataclass(frozen=True)
class Objective:
    """``tensor`` (the graph output ``output``, or what enters its final Softmax) is compared through ``link``.

    ``width`` is the number of classes or values, None if it varies (a score for every token position, as in question answering).
    ``token_level``: one prediction per token ([batch, tokens, classes]); ``first_token``: the output depends on the first token's row
    alone at the end of the network; ``why`` explains the choice to the user.
    """

    output: str
    tensor: str
    link: Link
    width: int | None
    token_level: bool
    first_token: bool
    why: str


def choose_objective(
    anatomy: Anatomy, output: str | None = None, labels: np.ndarray | None = None, purpose: Purpose | None = None
) -> Objective:
    """Pick the output to preserve and the loss for it.

    Args:
        output: name of a graph output; None chooses one.
        labels: labels of the data, a hint at what the output means.
        purpose: what the output means, where its name or the layer that makes it would mislead.

    Raises:
        InputError: there is no output of that name, or it is not a float tensor of rank 2 or more.
    """
    model, view, profile = anatomy.model, anatomy.view, anatomy.profile
    candidates = {value.name: value for value in model.proto.graph.output}
    if output is not None and output not in candidates:
        raise InputError(f"the model has no output {output!r}{nearest(output, candidates)}; it has {', '.join(candidates)}")
    name, why = (output, "chosen by --output") if output is not None else _default_output(anatomy)
    shape = profile.shape(name) or ()
    if len(shape) < 2 or candidates[name].type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
        raise InputError(
            f"output {name!r} has shape {list(shape)}; onnxprune needs a float output [batch, ..., values]; choose one with --output"
        )
    tensor = name
    link: Link
    maker = view.producer[name]
    if maker.op in ("Softmax", "LogSoftmax"):
        tensor = maker.inputs[0]
    if purpose is not None:
        link, reason = ("softmax", "classes as asked") if purpose == "classes" else ("identity", "a vector as asked")
    else:
        link, reason = _link(view, name, shape, labels, maker.op in ("Softmax", "LogSoftmax"))
    others = [other for other in candidates if other != name]
    if others:
        reason += f"; not looked at: {', '.join(others)}"
    return Objective(name, tensor, link, profile.dim(name, -1), len(shape) > 2, reads_first_token(anatomy, name), f"{why}; {reason}")


def _default_output(anatomy: Anatomy) -> tuple[str, str]:
    """Among the float outputs that depend on the most sites (an echo of an input or an early layer does not): by name, else the first."""
    outputs, view = anatomy.model.proto.graph.output, anatomy.view
    known = [value.name for value in outputs if value.name in view.producer]
    if not known:
        raise InputError("no output of the model is computed by it; nothing can be preserved")
    if len(known) == 1:
        return known[0], "the only output"
    floats = [value.name for value in outputs if value.name in known and _is_float_matrix(anatomy, value)]
    depends = {name: _sites_behind(anatomy, name) for name in floats or known}
    usable = [name for name, count in depends.items() if count == max(depends.values())]
    if len(usable) == 1:
        return usable[0], f"of {len(known)} outputs the one at the end of the model"
    for pattern, word in (
        (re.compile("logit", re.IGNORECASE), "named like logits"),
        (re.compile("sentence|embed", re.IGNORECASE), "named like an embedding"),
    ):
        for name in usable:
            if pattern.search(name):
                return name, f"{word}, first of {len(usable)} outputs"
    return usable[0], f"the first of {len(usable)} outputs (choose another with --output)"


def _is_float_matrix(anatomy: Anatomy, value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type.elem_type
    return len(anatomy.profile.shape(value.name) or ()) > 1 and kind in (TensorProto.FLOAT, TensorProto.UNDEFINED)


def _sites_behind(anatomy: Anatomy, name: str) -> int:
    """How many sites an output depends on."""
    behind = anatomy.view.ancestors([name])
    return sum(any(consumer.leaf.node.index in behind for consumer in site.consumers) for site in anatomy.sites)


def _link(view: GraphView, name: str, shape: tuple[int, ...], labels: np.ndarray | None, softmax: bool) -> tuple[Link, str]:
    if softmax:
        return "softmax", "it ends in a Softmax, so classes are preserved"
    if shape[-1] == 1:
        return "identity", "one value per sample, so the value itself is preserved"
    if _CLASSES.search(name):
        return "softmax", "its name says classes"
    if _FEATURES.search(name):
        return "identity", "its name says features, so the vector itself is preserved"
    if labels is not None and labels.dtype.kind == "i":
        return "softmax", "integer labels were given"
    if _ends_in_matrix(view, name):
        return "softmax", "it ends in a linear layer, so it is taken for class scores"
    return "identity", "it does not end in a linear layer, so it is taken for a vector"


def _ends_in_matrix(view: GraphView, name: str) -> bool:
    node = view.producer.get(name)
    for _ in range(4):
        if node is None:
            return False
        if node.op in ("MatMul", "Gemm"):
            return any(view.is_constant(operand) for operand in node.inputs[:2])
        if node.op not in ("Add", "Identity", "Cast", "Squeeze", "Reshape"):
            return False
        activations = [operand for operand in node.inputs if not view.is_constant(operand)]
        node = view.producer.get(activations[0]) if activations else None
    return False


def reads_first_token(anatomy: Anatomy, output: str) -> bool:
    """Whether the output sees the last sublayer's result only through a selection of token 0."""
    view, profile = anatomy.view, anatomy.profile
    if not anatomy.sites:
        return False
    last = max(anatomy.sites, key=lambda site: site.order).consumers[0].output
    selections = [
        node
        for node in view.nodes
        if node.op in ("Gather", "Slice")
        and not view.is_constant(node.inputs[0])
        and _selects_first(view, node, profile.shape(node.inputs[0]))
    ]
    if not selections:
        return False
    blocked = {node.index for node in selections}
    pending, seen = [last], set()
    while pending:
        name = pending.pop()
        if name == output:
            return False
        for node, _ in view.consumers.get(name, ()):
            if node.index not in seen and node.index not in blocked and node.op != "Shape":
                seen.add(node.index)
                pending.extend(node.outputs)
    return True


def _selects_first(view: GraphView, node, shape: tuple[int, ...] | None) -> bool:  # type: ignore[no-untyped-def]
    if shape is None or len(shape) != 3:
        return False
    if node.op == "Gather":
        indices = view.value(node.inputs[1])
        return node.attrs.get("axis", 0) == 1 and indices is not None and indices.size == 1 and int(indices.reshape(-1)[0]) == 0
    operands = [view.value(name) if name else None for name in node.inputs[1:4]]
    if len(operands) < 3 or any(array is None for array in operands):
        return False
    starts, ends, axes = (np.atleast_1d(array) for array in operands if array is not None)
    return any(int(axis) % 3 == 1 and int(start) == 0 and int(end) == 1 for start, end, axis in zip(starts, ends, axes, strict=True))


class Targets:
    """Targets of every batch, from the dense model's outputs (or from labels); drawn anew, reproducibly, for each round.

    Add the dense output of every batch in order, then ask for :meth:`feeds`. Outputs of one row per sample are kept; of one row per token
    only the labels drawn from them, :data:`TOKEN_DRAWS` for each token, as a vocabulary of scores per token would not fit in memory.
    """

    def __init__(self, objective: Objective, batches: Sequence[Batch], source: LossSource, seed: int) -> None:
        self.objective, self.batches, self.source, self.seed = objective, batches, source, seed
        self._kept: list[np.ndarray] = []
        self._widths: list[int] = []
        self._drawn_early = objective.link == "softmax" and objective.token_level
        self._sums = np.zeros(3)

    def add(self, output: np.ndarray) -> None:
        """The dense model's output [rows, ..., width] for the next batch."""
        number = len(self._kept)
        values = self._scored(output.astype(np.float32), number)
        self._widths.append(values.shape[-1])
        self._sums += (values.size, values.sum(dtype=np.float64), np.square(values, dtype=np.float64).sum())
        if self._drawn_early:
            self._kept.append(np.stack([_draw(values, [self.seed, draw, number]) for draw in range(TOKEN_DRAWS)]).astype(np.int32))
        else:
            self._kept.append(values)

    def _scored(self, values: np.ndarray, number: int) -> np.ndarray:
        """Scores of token positions: padding is no candidate."""
        mask = self.batches[number].token_mask
        if self.objective.link == "softmax" and self.objective.width is None and mask is not None and mask.shape == values.shape:
            return np.where(mask, values, np.float32(-1e9)).astype(np.float32)
        return values

    @property
    def spread(self) -> float:
        """Standard deviation of the dense outputs: the size of the displacement that probes a vector."""
        count, total, squares = self._sums
        return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))

    def feeds(self, number: int, draw: int) -> dict[str, np.ndarray]:
        """``onnxprune.target`` and ``onnxprune.weight`` of batch ``number`` in draw ``draw``."""
        batch, dense = self.batches[number], self._kept[number]
        shape = dense.shape[1:] if self._drawn_early else dense.shape[:-1]
        weight = self._weight(batch, shape)
        if self.objective.link == "identity":
            rng = np.random.default_rng([self.seed, draw, number])
            target = dense + np.float32(self.spread) * rng.standard_normal(dense.shape, dtype=np.float32)
            return {"onnxprune.target": target, "onnxprune.weight": weight}
        if self.source == "labels":
            labels, weight = self._labels(batch, weight)
        elif self._drawn_early:
            labels = dense[draw % TOKEN_DRAWS]
        else:
            labels = _draw(dense, [self.seed, draw, number])
        target = np.zeros((*shape, self._widths[number]), np.float32)
        np.put_along_axis(target, labels[..., None].astype(np.int64), 1, axis=-1)
        return {"onnxprune.target": target, "onnxprune.weight": weight}

    def classes(self) -> np.ndarray:
        """The class that the dense model predicts for every sample, int64 [samples], in the order of the batches.

        Raises:
            InputError: the output is not one prediction per sample among a fixed number of classes.
        """
        objective = self.objective
        if objective.link != "softmax" or objective.token_level or objective.width is None:
            raise InputError(
                f"importance by class needs one class per sample, and output {objective.output!r} has none ({objective.why}); "
                "take another --importance, or leave out --protect-classes"
            )
        rows = zip(self._kept, self.batches, strict=True)
        return np.concatenate([scores.argmax(axis=-1)[batch.valid] for scores, batch in rows])

    def _weight(self, batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
        weight = np.ones(shape, np.float32) * batch.valid.reshape([-1] + [1] * (len(shape) - 1))
        if len(shape) == 2 and batch.token_mask is not None and batch.token_mask.shape == shape:
            weight = weight * batch.token_mask
        return np.asarray(weight, np.float32)

    def _labels(self, batch: Batch, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert batch.labels is not None
        ignored = batch.labels == IGNORED_LABEL
        return np.where(ignored, 0, batch.labels).astype(np.int64), weight * ~ignored


def _draw(scores: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """One label per row, from the softmax of ``scores`` (Gumbel maximum, in float32: a vocabulary of scores is large)."""
    uniform = np.random.default_rng(seed).random(scores.shape, dtype=np.float32)
    return np.asarray((scores - np.log(-np.log(np.clip(uniform, 1e-20, 1 - 1e-7)))).argmax(axis=-1))


def check_loss(objective: Objective, data: CalibrationData, source: LossSource) -> None:
    """Labels can only be the loss when there are labels that fit.

    Raises:
        InputError: no labels, or labels that are not classes of this output.
    """
    if source != "labels":
        return
    if data.labels is None:
        raise InputError(f"--loss labels needs a 'labels' array in {data.origin}; drop the option to prune without labels")
    if objective.link != "softmax":
        raise InputError(f"--loss labels needs class scores, but output {objective.output!r} is taken for a vector; drop the option")
    check_labels(data.labels, objective.width if objective.width is not None else np.iinfo(np.int64).max)


def check_labels_of(objective: Objective, data: CalibrationData) -> None:
    """Labels that come with the data must fit the output, whatever they are used for.

    Raises:
        InputError: a label is no class of the output, or the labels have another shape than its predictions.
    """
    if data.labels is None or objective.link != "softmax" or data.labels.dtype.kind != "i" or objective.width is None:
        return
    check_labels(data.labels, objective.width)
    wanted = 2 if objective.token_level else 1
    if data.labels.ndim != wanted:
        shape = "[rows, tokens]" if objective.token_level else "[rows]"
        raise InputError(f"labels have shape {list(data.labels.shape)}, but output {objective.output!r} makes predictions {shape}")
