"""Mask gradients of a model that is walked piece by piece: one way up, one way back.

On the way up, what crosses from one piece to the next goes to a file for every batch. On the way back each piece is computed again, this
time with its gradients, from the adjoints that the piece above it left. The result is that of one gradient graph over the whole model; in
memory are the weights of one piece and the adjoints of one cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from onnx import helper

from onnxprune.calibration.objective import Objective, Targets
from onnxprune.errors import InputError
from onnxprune.graph.autodiff.gradient import GRADIENT, Tap
from onnxprune.graph.autodiff.piece import Backward, piece_gradient
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.cutting import cut_piece
from onnxprune.graph.lowering import lower
from onnxprune.graph.model import Model
from onnxprune.graph.paged import Segment, run_segment, segments
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.storage import Scratch, release
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import RuntimeOptions, open_session, run

Crossing = Mapping[str, np.ndarray]


def sweep(
    model: Model, taps: Sequence[Tap], objective: Objective, targets: Targets, draw: int, options: RuntimeOptions
) -> Iterator[tuple[int, dict[str, list[np.ndarray]]]]:
    """Yield, from the last piece to the first, the pieces still to come and the gradients [rows, units] of every batch by tap.

    Raises:
        InputError: as :func:`onnxprune.graph.autodiff.gradient_model`.
    """
    lowered = lower(model)
    feeds = [cut_feeds(model, batch.feeds) for batch in targets.batches]
    profile = take_profile(lowered, feeds[0])
    view = GraphView(lowered)
    parts = segments(view, [objective.tensor, *(tap.tensor for tap in taps)])
    crossings = _upwards(view, parts, feeds, options)
    adjoints: list[dict[str, np.ndarray]] = [{} for _ in feeds]
    for number in reversed(range(len(parts))):
        known = [{**fed, **crossing} for fed, crossing in zip(feeds, crossings, strict=True)]
        here, back = _backward(view, parts[number], profile, taps, objective, known[0], adjoints[0])
        names = [*(GRADIENT + tap.name for tap in here), *back.adjoints.values()]
        if not names:  # in front of the first mask: what is left decides nothing
            yield number, {}
            continue
        session = open_session(back.model, options)
        found: dict[str, list[np.ndarray]] = {tap.name: [] for tap in here}
        for position, batch in enumerate(known):
            batch |= {name: adjoints[position].pop(tensor) for tensor, name in back.seeds.items()}
            batch |= targets.feeds(position, draw)
            values = dict(zip(names, run(session, {name: batch[name] for name in back.model.input_names}, names), strict=True))
            for tap in here:
                found[tap.name].append(values[GRADIENT + tap.name])
            for tensor, name in back.adjoints.items():
                before = adjoints[position].get(tensor)
                adjoints[position][tensor] = values[name] if before is None else before + values[name]
        del session
        release(back.model.weights.values())
        release(array for crossing in crossings for array in crossing.values())
        yield number, found


def _upwards(view: GraphView, parts: Sequence[Segment], feeds: Sequence[Crossing], options: RuntimeOptions) -> list[dict[str, np.ndarray]]:
    """What crosses any cut, by batch; the last piece only runs on the way back."""
    scratch = Scratch()
    known = [dict(batch) for batch in feeds]
    names: list[str] = []
    for part in parts[:-1]:
        new = [name for name in part.live if name not in names]
        for number, values in enumerate(run_segment(view, part, known, options)):
            for name in new:
                scratch.add(f"{number} {name}", values[name])
        names += new
    arrays = scratch.close()
    return [{name: arrays[f"{number} {name}"] for name in names} for number in range(len(feeds))]


def _backward(
    view: GraphView, part: Segment, profile: Profile, taps: Sequence[Tap], objective: Objective, known: Crossing, adjoints: Crossing
) -> tuple[list[Tap], Backward]:
    """The taps of one piece, and its gradient graph."""
    made = {name for index in part.nodes for name in view.nodes[index].outputs if name}
    here = [tap for tap in taps if tap.tensor in made]
    loss = (objective.tensor, objective.link) if objective.tensor in made else None
    leaving = sorted(name for name in adjoints if name in made)
    piece = cut_piece(view, list(part.nodes), {*leaving, *part.live, *(tap.tensor for tap in here)}, known)
    if piece.model is None:
        raise InputError(
            f"a piece of the model makes nothing that is read (node {view.nodes[part.nodes[0]]}); score with --importance energy"
        )
    masked = {tap.tensor for tap in taps}
    moving = masked | {name for index in view.descendants(masked) for name in view.nodes[index].outputs}
    entering = [name for name in piece.inputs if name in moving and known[name].dtype.kind == "f"]
    model = _led_by_samples(piece.model, view.model, known)
    return here, piece_gradient(model, profile, here, leaving, entering, loss)


def _led_by_samples(piece: Model, whole: Model, known: Crossing) -> Model:
    """The piece with an input of the whole model that counts samples as its first one."""
    name = next((name for name in whole.input_names if known[name].ndim), None)
    if name is None:
        raise InputError("no input of the model has a sample axis, so gradients cannot be told apart by sample")
    proto = piece.copy_proto()
    others = [value for value in proto.graph.input if value.name != name]
    kind = helper.np_dtype_to_tensor_dtype(known[name].dtype)
    first = helper.make_tensor_value_info(name, kind, [f"{name}.{axis}" for axis in range(known[name].ndim)])
    del proto.graph.input[:]
    proto.graph.input.extend([first, *others])
    return piece.with_proto(proto)
