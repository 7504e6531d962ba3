"""Fewer tokens: at each place some leave, and everything behind it works on those that stay.

Which they are is decided for each sample, in the graph, by the attention in front of the place or by how alike tokens are. Of padded texts
each keeps its own share of real tokens, so that neither padding nor other rows of a batch change what stays. Keys that stand for several
tokens weigh as many: the logarithm of their size is added to their scores, and means count them as often. Where the output has a row for
each token, all are back in front of the head.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from onnx import NodeProto, TensorProto

from onnxprune.errors import Refusal
from onnxprune.graph.axis_rules import MEASURES
from onnxprune.graph.clean import without_dead
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.lowering import COVERED, lower
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.token_axis import Along, TokenAxis, token_axis, values_behind
from onnxprune.graph.token_padding import depends_on_sample, masks_of, real_tokens
from onnxprune.graph.token_plan import MERGING, CannotCut, TokenCut, TokenPlan
from onnxprune.graph.token_policy import GONE, Choice, Stretch
from onnxprune.graph.token_return import Return
from onnxprune.graph.token_score import Attention
from onnxprune.graph.token_trace import Trace
from onnxprune.graph.uniform import uniform_value
from onnxprune.graph.view import GraphView, Node

MINIMUM_OPSET = 13
_ATTENTION = frozenset(key for key in COVERED if "Attention" in key[1] or "Rotary" in key[1])
_END = 2**62


def spelled_out(model: Model) -> Model:
    """The model with attention in primitives: fused operators know neither sizes of tokens nor angles of each sample."""
    present = {("" if node.domain == "ai.onnx" else node.domain, node.op_type) for node in model.proto.graph.node}
    return lower(model, set(_ATTENTION & present)) if _ATTENTION & present else model


def study_tokens(model: Model) -> TokenAxis | Refusal:
    """Where tokens of a canonical model can leave, its attention spelled out.

    Raises:
        InputError: its attention cannot be spelled out, or it does not run on made-up inputs.
    """
    if model.opset() < MINIMUM_OPSET:
        return Refusal("OP701", "tokens", f"the file is of opset {model.opset()}; tokens can leave from opset {MINIMUM_OPSET} on")
    plain = spelled_out(model)
    return token_axis(GraphView(plain), take_profile(plain))


def present_in(model: Model, plan: TokenPlan) -> TokenPlan:
    """The cuts whose attention a model has: one that lost all heads tells nothing about tokens."""
    axis = study_tokens(model) if plan.cuts else None
    if axis is None or isinstance(axis, Refusal):
        return TokenPlan(plan.policy, ())
    there = {(place.tensor, place.softmax.name) for place in axis.places}
    return TokenPlan(plan.policy, tuple(cut for cut in plan.cuts if (cut.place, cut.softmax) in there))


def cut_tokens(model: Model, plan: TokenPlan, *, traced: bool = False) -> Model:
    """The model with fewer tokens behind each place of the plan.

    Args:
        traced: with further outputs that tell which they are: see :data:`onnxprune.graph.token_trace.TRACE`.

    Raises:
        CannotCut: something in the model cannot follow, or the plan does not fit it.
    """
    if not plan.cuts:
        return model
    model = spelled_out(model)
    profile = take_profile(model)
    axis = token_axis(GraphView(model), profile)
    if isinstance(axis, Refusal):
        raise CannotCut(str(axis))
    return _Cutter(model, profile, axis, plan, traced).run()


class _Cutter:
    """Emits the graph anew; every node belongs to the stretch behind the last place that its values depend on."""

    def __init__(self, model: Model, profile: Profile, axis: TokenAxis, plan: TokenPlan, traced: bool) -> None:
        self.e = Emitter(model, profile, prefix="onnxprune.tok")
        self.view, self.profile, self.axis, self.plan = self.e.view, profile, axis, plan
        order = [place.tensor for place in axis.places]
        unknown = [cut.place for cut in plan.cuts if cut.place not in order]
        if unknown:
            raise CannotCut(f"tokens cannot leave at {unknown[0]!r} in this model; the plan was made for another file")
        self.cuts = {cut.place: cut for cut in plan.cuts}
        behind = [values_behind(self.view, [place]) for place in sorted(self.cuts, key=order.index)]
        head = values_behind(self.view, [axis.returned]) if axis.returned else set()
        self.stretch_of = {node.index: 0 if node.index in head else sum(node.index in part for part in behind) for node in self.view.nodes}
        self.maps = {node.name: node for node in self.view.nodes if node.op == "Softmax"}
        self.versions: dict[tuple[str, int], str] = {}
        self.biases: dict[tuple[int, int], str] = {}
        self.bias_slots = dict(self._bias_slot(self.view.nodes[index]) for index in sorted(axis.attentions))
        self.masks = masks_of(self.view, axis)
        if plan.policy in (*MERGING, "grid") and (self.masks or any(uniform_value(self.view, name) is None for name in axis.sides)):
            raise CannotCut("tokens cannot merge where masks or positions meet them")
        if plan.policy == "package" and axis.returned:
            raise CannotCut("a package of tokens has no row of its own in the output")
        self.batch_size, first = (profile.shape(order[0]) or (0,))[0], order[0]
        batch, count = self.e.size_of(first, 0), self.e.size_of(first, 1)
        self.stretches = [Stretch(count)]
        self.left = 1.0
        self.positions: np.ndarray | None = None
        self.joined: np.ndarray | None = None
        self.attention = Attention(self.e, self.view, profile, axis, self._version_for, self.biases)
        self._sizes = batch, count
        self.returning = Return(self.e, batch) if axis.returned else None
        self._choice: Choice | None = None
        self._traced = traced
        self._first, self._measures = first, self.e.nodes[:]
        del self.e.nodes[:]

    @property
    def choice(self) -> Choice:
        """Made where tokens leave first: masks must have been emitted."""
        if self._choice is None:
            batch, count = self._sizes
            real = real_tokens(self.e, self.profile, self.axis, self.masks, batch, count)
            self._choice = Choice(self.e, self.axis.leading, self.axis.count, count, batch, real)
            if self.plan.policy == "threshold" and self._choice.real is None:
                self._choice.real = self._choice.all_real()
        return self._choice

    @cached_property
    def trace(self) -> Trace | None:
        return Trace(self.e, self.choice, *self._sizes) if self._traced else None

    def run(self) -> Model:
        if self._first not in self.view.producer:
            self.e.nodes.extend(self._measures)
        for node in self.view.nodes:
            self._emit(node)
            if self._first in node.outputs:  # what is measured there can be known from here on
                self.e.nodes.extend(self._measures)
            for name in node.outputs:
                if name in self.cuts:
                    self._cut(self.cuts[name])
        proto = self.e.proto
        del proto.graph.node[:]
        proto.graph.node.extend(self.e.nodes)
        del proto.graph.value_info[:]
        result = self.e.model.with_proto(proto)
        return without_dead(self.trace.told_by(result) if self.trace else result)

    def _cut(self, cut: TokenCut) -> None:
        before = self.stretches[-1]
        policy = self.plan.policy
        features, after, steps = cut.place, before, []
        if policy == "static":
            features, after = self.choice.keep(features, self._fixed(cut))
            steps.append(after)
        elif policy == "grid":
            features, after = self.choice.join(features, *self._joins(cut))
            steps.append(after)
        elif policy != "merge":
            if cut.softmax not in self.maps:
                raise CannotCut(f"the attention {cut.softmax!r} is not in this model; the plan was made for another file")
            scores = self._scores(cut, before)
            share = (self.left + cut.share) / 2 if policy == "drop-merge" else cut.share
            if cut.threshold is not None:
                features, after = self.choice.select_above(features, scores, cut.threshold, before)
            else:
                features, after = self.choice.select(features, scores, share, before, package=policy == "package")
            steps.append(after)
        if policy in MERGING:
            features, after = self.choice.merge(features, cut.share, after)
            steps.append(after)
        if self.returning:
            self.returning.pass_place(cut.place, before, *steps)
        if self.trace:
            self.trace.pass_place(*steps)
        self.left = cut.share
        self.stretches.append(after)
        self.versions[cut.place, len(self.stretches) - 1] = features

    def _scores(self, cut: TokenCut, before: Stretch) -> str:
        """Float [B, N], none negative."""
        if not cut.predictor:
            return self.attention.received(self.maps[cut.softmax], self._sizes[0], before.count, before.sizes or self.choice.real)
        if len(cut.predictor) != self.profile.dim(cut.place, 2):
            raise CannotCut(f"the features at {cut.place!r} are not {len(cut.predictor)} wide; the plan was made for another file")
        return self.attention.expected(cut.place, cut.predictor)

    def _fixed(self, cut: TokenCut) -> np.ndarray:
        """Where tokens that stay are among those that are there, int64 [K]."""
        if self.axis.count is None or depends_on_sample(self.e, self.masks):
            raise CannotCut("the same positions cannot stay in every sample: tokens are not as many in all, or some are padding")
        there = np.arange(self.axis.count) if self.positions is None else self.positions
        self.positions = np.array(cut.positions, np.int64)
        if not set(range(self.axis.leading)) < set(cut.positions) <= set(there.tolist()) or (np.diff(self.positions) < 1).any():
            raise CannotCut(f"the positions that stay at {cut.place!r} are not there in this model; the plan was made for another file")
        return np.searchsorted(there, self.positions)

    def _joins(self, cut: TokenCut) -> tuple[np.ndarray, np.ndarray]:
        """What each token that is there becomes part of, int64 [N], and for how many it stands, [N]."""
        if self.axis.count is None:
            raise CannotCut("lines of a grid cannot merge: tokens are not as many in all samples")
        before = np.arange(self.axis.count) if self.joined is None else self.joined
        told = set(cut.joins)
        fits = len(cut.joins) == len(before) and told == set(range(len(told)))
        lead, joins = self.axis.leading, np.array(cut.joins if fits else (), np.int64)
        if not fits or not np.array_equal(joins[:lead], np.arange(lead)) or (joins[lead:] < lead).any():
            raise CannotCut(f"what tokens become part of at {cut.place!r} does not fit this model; the plan is damaged or for another file")
        step = joins[np.unique(before, return_index=True)[1]]
        if not np.array_equal(step[before], joins):
            raise CannotCut(f"tokens that have become one are told apart at {cut.place!r}; the plan is damaged")
        self.joined = joins
        return step, np.bincount(before)

    # Nodes.

    def _emit(self, node: Node) -> None:
        stretch = self.stretch_of[node.index]
        if node.op in MEASURES:
            self._emit_measure(node)
            return
        if not stretch:
            self.e.nodes.append(node.proto)
            return
        proto = NodeProto()
        proto.CopyFrom(node.proto)
        for slot, name in enumerate(node.inputs):
            if name:
                proto.input[slot] = self._version(name, stretch, node)
        if node.index in self.bias_slots:
            slot = self.bias_slots[node.index]
            proto.input[slot] = self._biased(node, slot, proto.input[slot], stretch)
        if node.index in self.axis.pools:
            proto.input[0] = self._weighted(node, proto.input[0], stretch)
        if node.op in ("Reshape", "Expand"):
            proto.input[1] = self._resized(node, proto.input[1], stretch)
        if node.op in ("Gather", "Split") and self._emit_parts(node, proto.input[0]):
            return
        self.e.nodes.append(proto)
        if self.returning and node.outputs[0] == self.axis.returned:
            proto.output[0] = self.e.fresh("there")
            self.returning.all_back(proto.output[0], node.outputs[0])

    def _emit_parts(self, node: Node, tensor: str) -> bool:
        """Tokens from one on, where they were told by number."""
        axis = node.attrs.get("axis", 0) % self.e.rank(node.inputs[0])
        along = self.axis.along.get((node.inputs[0], axis))
        if along is None or (node.outputs[-1], axis) not in self.axis.along:
            return False
        e, start = self.e, 0
        for name in node.outputs[:-1]:
            size = self.profile.dim(name, axis)
            assert size is not None
            e.slice(tensor, axis, e.int64([start]), e.int64([start + size]), output=name)
            start += size
        start = self.axis.along[node.outputs[-1], axis].start - along.start
        e.slice(tensor, axis, e.int64([start]), e.int64([_END]), output=node.outputs[-1])
        return True

    def _emit_measure(self, node: Node) -> None:
        """Sizes are told as they were before tokens left: what is made from them is told anew where it is used."""
        name = node.inputs[0]
        maker = self.view.producer.get(name)
        axes = self.axis.axes(name)
        if maker is None or not self.stretch_of[maker.index] or not axes:
            self.e.nodes.append(node.proto)
            return
        if node.op != "Shape" or any(self.axis.along[name, axis].factors for axis in axes):
            raise CannotCut(f"{node} measures tokens in a form that cannot change")
        measured = range(self.e.rank(name))[slice(node.attrs.get("start"), node.attrs.get("end"))]
        now = self.e.op("Shape", name, **node.attrs)
        for axis in axes:
            now = self.e.op("Where", self.e.array(np.array(measured) == axis), self._size(0, self.axis.along[name, axis]), now)
        self.e.op("Identity", now, output=node.outputs[0])

    def _resized(self, node: Node, told: str, stretch: int) -> str:
        """The sizes a node is told, for the tokens that are left."""
        made = node.outputs[0]
        target = self.e.constant(node.inputs[1])
        for axis in self.axis.axes(made):
            along = self.axis.along[made, axis]
            if target is not None and target[axis] <= 0 and node.op == "Reshape":
                continue
            size = self._size(stretch, along)
            if along.factors is not None:
                if target is None or (np.asarray(target) == -1).any():
                    raise CannotCut(f"{node} is told its sizes in a form that cannot change")
                size = self.e.int64([-1])
            told = self.e.op("Where", self.e.array(np.arange(self.e.rank(made)) == axis), size, told)
        return told

    def _size(self, stretch: int, along: Along) -> str:
        count = self.stretches[stretch].count
        return self.e.op("Sub", count, self.e.int64([along.start])) if along.start else count

    # Tensors as later nodes read them.

    def _version_for(self, name: str, reader: Node) -> str:
        return self._version(name, self.stretch_of[reader.index], reader)

    def _version(self, name: str, stretch: int, reader: Node) -> str:
        if not stretch:
            return name
        if (name, stretch) not in self.versions and name in self.axis.sides:
            self.versions[name, stretch] = self._side(name, stretch, reader)
        if (name, stretch) in self.versions:
            return self.versions[name, stretch]
        maker = self.view.producer.get(name)
        if maker is not None and self.axis.axes(name) and self.stretch_of[maker.index] != stretch:
            raise CannotCut(f"{reader} reads {name} from before tokens left")
        return name

    def _side(self, name: str, stretch: int, reader: Node) -> str:
        """What comes from elsewhere, for the tokens that are left."""
        e, axes = self.e, self.axis.sides[name]
        same = uniform_value(self.view, name)
        if same is not None:
            return e.array(np.full((1,) * max(e.rank(name), 1), same))
        if (fixed := self.stretches[stretch].fixed) is not None:
            tensor = self._version(name, stretch - 1, reader)
            for axis in axes:
                start = self.axis.along[name, axis].start
                tensor = e.op("Gather", tensor, e.array(fixed[fixed >= start] - start), axis=axis)
            return tensor
        array = self.view.value(name)
        own = self.profile.shape(name) if array is None else array.shape
        assert own is not None
        rank = max(e.rank(output) for output in reader.outputs if output)
        missing = rank - len(own)
        shape = (1,) * missing + tuple(own)
        if (0 in axes and not missing) or shape[0] not in (1, self.batch_size):
            raise CannotCut(f"{name} meets tokens in a layout that cannot follow them")
        batched = stretch > 1 or shape[0] > 1
        tensor = self._version(name, stretch - 1, reader)
        if stretch == 1 and missing:
            tensor = e.unsqueeze(tensor, *range(missing))
        state = self.stretches[stretch]
        assert state.index is not None
        for axis in axes:
            index = self._places(state.index, self.axis.along[name, axis])
            tensor = self._gathered(tensor, rank, axis + missing, index, batched=batched)
            batched = True
            if state.packages:
                if any(size != 1 for other, size in enumerate(shape) if other and other - missing not in axes):
                    raise CannotCut(f"{name} holds positions, which a package of tokens does not have")
                tensor = self._with_package(name, tensor, axis + missing)
        return tensor

    def _gathered(self, tensor: str, rank: int, axis: int, index: str, *, batched: bool) -> str:
        """Positions [B, K] along an axis of a tensor [B or 1, ...], for each sample its own."""
        e = self.e
        others = [other for other in range(1, rank) if other != axis]
        order = [0, axis, *others]
        if batched:
            rows = self.choice.take(e.op("Transpose", tensor, perm=order), index)
        else:
            rows = e.op("Gather", e.squeeze(tensor, 0), index, axis=axis - 1)  # [..., B, K, ...]
            rows = e.op("Transpose", rows, perm=[axis - 1, axis, *(other for other in range(rank) if other not in (axis - 1, axis))])
        return e.op("Transpose", rows, perm=[order.index(place) for place in range(rank)])

    def _places(self, index: str, along: Along) -> str:
        """Places along an axis that begins with a later token."""
        if not along.start:
            return index
        start = self.e.int64([along.start])
        return self.e.op("Sub", self.e.slice(index, 1, start, self.e.int64([_END])), start)

    def _with_package(self, name: str, mask: str, axis: int) -> str:
        """A package is hidden no more than the token that is hidden least."""
        if self.e.type_of(name) != TensorProto.BOOL:
            return self.e.op("Concat", mask, self.e.reduce("ReduceMax", mask, [axis], keepdims=True), axis=axis)
        numbers = self.e.op("Cast", mask, to=TensorProto.FLOAT)
        reduction = "ReduceMax" if self.masks.get(name, True) else "ReduceMin"
        least = self.e.op("Cast", self.e.reduce(reduction, numbers, [axis], keepdims=True), to=TensorProto.BOOL)
        return self.e.op("Concat", mask, least, axis=axis)

    # Sizes of tokens.

    def _bias_slot(self, softmax: Node) -> tuple[int, int]:
        """(node, input slot) where the sizes of keys join their scores: with the mask, so that there is one addition, or at the Softmax."""
        maker = self.view.producer.get(softmax.inputs[0])
        if maker is not None and maker.op == "Add" and len(self.view.consumers[maker.outputs[0]]) == 1:
            for slot, name in enumerate(maker.inputs):
                if name in self.axis.sides and not self.view.is_constant(name):
                    return maker.index, slot
        return softmax.index, 0

    def _biased(self, node: Node, slot: int, tensor: str, stretch: int) -> str:
        sizes = self.stretches[stretch].sizes
        if sizes is None:
            return tensor
        e = self.e
        if e.rank(node.outputs[0]) != 4:
            raise CannotCut(f"{node} has heads and batch on one axis")
        if self.plan.policy not in (*MERGING, "grid"):  # where tokens merge, all are there
            sizes = e.op("Max", sizes, e.array(np.array(GONE, np.float32)))
        bias = e.unsqueeze(e.op("Log", sizes), 1, 2)
        with_mask = e.op("Add", tensor, bias) if uniform_value(self.view, node.inputs[slot]) != 0 else bias
        self.biases[node.index, slot] = bias if node.op == "Softmax" else with_mask
        return with_mask

    def _weighted(self, node: Node, tensor: str, stretch: int) -> str:
        """A mean or sum over tokens counts each for as many as it stands for."""
        weights = self.stretches[stretch].weights
        assert weights is not None
        e, axis = self.e, self.axis.pools[node.index]
        along = self.axis.along[node.inputs[0], axis]
        if along.start:
            weights = e.slice(weights, 1, e.int64([along.start]), e.int64([_END]))
        if node.op == "ReduceMean":
            now, before = (e.op("Cast", self._size(number, along), to=TensorProto.FLOAT) for number in (stretch, 0))
            weights = e.op("Mul", weights, e.op("Div", now, before))
        return e.op("Mul", tensor, e.unsqueeze(weights, *(other for other in range(e.rank(node.inputs[0])) if other not in (0, axis))))
