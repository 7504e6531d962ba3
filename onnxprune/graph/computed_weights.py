"""Weights that the graph computes from other constants, computed once: weight norms, standardised convolutions (BiT), scales put off.

Exporters leave such arithmetic in the file and every runtime folds it when a session starts; what is pruned are the numbers it makes.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.graph.cutting import cut_piece
from onnxprune.graph.initializers import INLINE_BYTES
from onnxprune.graph.model import Model
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run

_READERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_INTEGERS = frozenset({"DequantizeLinear", "MatMulNBits"})


def fold_computed_weights(model: Model) -> Model:
    """The model with float weights of products and convolutions as initializers; itself if all are, or if it is larger than memory.

    What is made from integers stays as it is, and so does what is made from a weight that others read too: the file would grow.
    """
    view = GraphView(model)
    wanted = [] if model.paged else [name for name in dict.fromkeys(_computed(view)) if _alone(view, name)]
    if not wanted:
        return model
    piece = cut_piece(view, sorted(view.ancestors(wanted)), wanted, {})
    assert piece.model is not None
    made = dict(zip(piece.outputs, run(open_session(piece.model, optimize=False), {}), strict=True))
    surgeon = Surgeon(model)
    for name, values in made.items():
        constant = surgeon.constant(values, name)
        for reader, slot in view.consumers[name]:
            surgeon.nodes[reader.index].inputs[slot] = constant
    return surgeon.close()


def _computed(view: GraphView) -> Iterator[str]:
    """Weights that are constant, and no initializer."""
    for node in view.nodes:
        if node.op in _READERS and not node.domain and not view.is_constant(node.inputs[0]):
            name = node.inputs[1]
            if name in view.producer and view.is_constant(name) and view.value(name) is None:
                yield name


def _alone(view: GraphView, name: str) -> bool:
    """Whether nothing but ``name`` is made from the weights it is made from, and no integers are among them."""
    makers = view.ancestors([name])
    if any(view.nodes[index].op in _INTEGERS for index in makers) or any(slot < 0 for _, slot in view.consumers[name]):
        return False
    sources = {source for index in makers for source in view.nodes[index].inputs if source and source not in view.producer}
    large = [source for source in sources if (array := view.value(source)) is not None and array.nbytes > INLINE_BYTES]
    return all(reader.index in makers for source in large for reader, _ in view.consumers[source])
