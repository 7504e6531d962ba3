"""From a plan to the file it describes: no data, no randomness, the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.canonical import with_fresh_shapes
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.integer import to_int8
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.token_cut import cut_tokens
from onnxprune.graph.view import GraphView
from onnxprune.graph.vocabulary import without_map
from onnxprune.passes.base import RewritePass, select
from onnxprune.quantize.form import Int8Form
from onnxprune.search.plan import Changes, Plan


def finish(model: Model, rewrites: Sequence[str], form: Int8Form | None = None) -> Model:
    """Run the rewrites in order, integers where ``rewrites`` says so, then infer shapes anew.

    Args:
        form: how int8 is done, if it is; products that the model does not have (any more) are passed over.
    """
    for item in select(rewrites) if rewrites else ():
        if isinstance(item, RewritePass):
            model, _ = item.apply(model)
        elif form is not None:
            present = {node.name for node in model.proto.graph.node}
            model = to_int8(model, form.present_in(present))
    return with_fresh_shapes(model)


def install(model: Model, changes: Changes) -> Model:
    """Put compensated constants into a sliced model."""
    if not changes:
        return model
    index_of = {node.name: node.index for node in GraphView(model).nodes}
    missing = [node for node, _ in changes if node not in index_of]
    if missing:
        raise InputError(f"the plan compensates node {missing[0]!r}, which this model does not have; it was made for another file")
    return replace_constants(model, {(index_of[node], slot): array for (node, slot), array in changes.items()}, "~refit")


def execute(anatomy: Anatomy, plan: Plan, *, traced: bool = False) -> Model:
    """The model a plan describes: sliced, compensated, finished, stamped.

    Args:
        traced: with further outputs that tell which tokens stay where (:mod:`onnxprune.graph.token_trace`).

    Raises:
        InputError: the plan does not fit this model.
    """
    units = {site.name: site.units for site in anatomy.sites}
    for site, count in plan.units.items():
        if units.get(site) != count:
            found = units.get(site, "no such site")
            raise InputError(f"the plan expects {count} units at {site}, the model has {found}; it was made for another file")
    kept = {site: np.array(indices, np.int64) for site, indices in plan.kept.items()}
    model = install(slice_model(anatomy, kept), plan.changes)
    model = model if plan.tokens is None else cut_tokens(model, plan.tokens, traced=traced)
    model = finish(model, plan.rewrites, plan.int8)
    return _stamp(model, plan)


def shipped(model: Model, plan: Plan) -> Model:
    """What is written of an executed plan: without the map of ids, if the tokenizer applies it."""
    return with_fresh_shapes(without_map(model)) if plan.vocabularies and plan.vocab_map == "file" else model


def _stamp(model: Model, plan: Plan) -> Model:
    proto = model.copy_proto()
    stamp = {
        "onnxprune.version": plan.version,
        "onnxprune.plan_sha256": plan.sha256,
        "onnxprune.input_sha256": plan.input_sha256,
        **({"onnxprune.vocab_map": plan.vocab_map} if plan.vocabularies else {}),
        "onnxprune.kept": json.dumps({site: len(units) for site, units in plan.kept.items()}),
    }
    kept = [entry for entry in proto.metadata_props if entry.key not in stamp]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for key, value in stamp.items():
        proto.metadata_props.add(key=key, value=value)
    return model.with_proto(proto)
