"""Random small transformers: a grammar of blocks, in which every operator that the axis rules know can stand on a pruned axis.

A model is a residual stream [batch, seq, width] with attentions and feed-forwards. Between two matrices the hidden axis of a block
meets *detours*: reshapes, splits, gathers, concatenations, expansions, norms, bodies, graph outputs. Every block says which of its nodes is
its heart, so that a test can ask what became of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.graph.net import Net

OPSETS = (11, 13, 17, 18, 20, 23)
LOCAL = "local"
T = TypeVar("T")


@dataclass
class Block:
    """One branch. ``nodes`` are the names of its nodes, ``quiet`` whether nothing need be said about it (its axis is mixed by a norm)."""

    kind: str
    nodes: set[str] = field(default_factory=set)
    heart: str = ""
    quiet: bool = False


class Writer(Net):
    """A net that draws what it is made of."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        super().__init__(self.pick(*OPSETS), seed=self.number(0, 99))
        self.heads_count, self.depth = self.number(1, 4), self.pick(2, 4)
        self.groups = self.pick(*(count for count in (1, 2, self.heads_count) if self.heads_count % count == 0))
        self.width = self.pick(6, 8, 12)
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", self.width])]
        self.blocks: list[Block] = []
        self.outputs: list[tuple[str, list[int | str]]] = []
        self.reused: dict[tuple[int, ...], list[str]] = {}
        self.functions: dict[str, onnx.FunctionProto] = {}

    # choices

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def pick(self, *options: T) -> T:
        return self.draw(st.sampled_from(options))

    # operators whose form depends on the opset

    def axes(self, op: str, x: str, axes: Sequence[int], since: int = 13, **attributes: Any) -> str:
        if self.opset < since:
            return str(self(op, x, axes=list(axes), **attributes))
        return str(self(op, x, self.ints(*axes), **attributes))

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        if self.opset < 13:
            return list(self("Split", x, outputs=len(sizes), axis=axis, split=list(sizes)))
        return list(self("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis))

    # pieces

    def matrix(self, *shape: int) -> str:
        """A weight, now and then one that another block uses already."""
        known = self.reused.setdefault(shape, [])
        if known and self.number(0, 5) == 0:
            return self.pick(*known)
        known.append(self.weight(*shape))
        return known[-1]

    def product(self, x: str, inputs: int, outputs: int) -> str:
        form = self.pick("MatMul", "MatMul", "Gemm", "Einsum", "Transpose")
        if form == "Einsum" and self.opset >= 12:
            return str(self("Einsum", x, self.matrix(inputs, outputs), equation="bsi,io->bso"))
        if form == "Gemm":
            flat = self("Reshape", x, self.ints(-1, inputs))
            extra = {"transB": 1} if self.maybe() else {}
            weight = self.matrix(outputs, inputs) if extra else self.matrix(inputs, outputs)
            bias = [self.weight(outputs)] if self.maybe() else []
            made = self("Gemm", flat, weight, *bias, **extra)
            return str(self("Reshape", made, self.target(x, outputs)))
        if form == "Transpose":
            return str(self("MatMul", x, self("Transpose", self.matrix(outputs, inputs), perm=[1, 0])))
        return str(self("MatMul", x, self.matrix(inputs, outputs)))

    def target(self, like: str, last: int) -> str:
        """Shape [batch, seq, last], the first two read from a tensor."""
        shape = self("Shape", like)
        return str(self("Concat", self("Slice", shape, self.ints(0), self.ints(2), self.ints(0)), self.ints(last), axis=0))

    def project(self, x: str, inputs: int, outputs: int) -> str:
        made = self.product(x, inputs, outputs)
        return str(self("Add", made, self.weight(outputs, scale=0.3))) if self.maybe() else made

    def act(self, x: str) -> str:
        names = "Relu Tanh Sigmoid Erf LeakyRelu Softplus Abs Elu Clip".split()
        names += ["HardSwish"] * (self.opset >= 14) + ["Gelu"] * (self.opset >= 20) + ["Swish", LOCAL]
        name = self.pick(*names)
        if name == "Swish":
            return str(self("Mul", x, self("Sigmoid", x)))
        if name == LOCAL:
            self.functions["Squash"] = helper.make_function(
                LOCAL,
                "Squash",
                ["a"],
                ["b"],
                [helper.make_node("Tanh", ["a"], ["t"]), helper.make_node("Mul", ["a", "t"], ["b"])],
                [helper.make_opsetid("", self.opset)],
            )
            return str(self("Squash", x, domain=LOCAL))
        return str(self(name, x))

    def norm(self, x: str, width: int) -> str:
        form = self.pick("layer", "rms", "spelled", "none")
        if form == "layer" and self.opset >= 17:
            return str(self("LayerNormalization", x, self.weight(width), self.weight(width), axis=-1))
        if form == "rms" and self.opset >= 23:
            return str(self("RMSNormalization", x, self.weight(width), axis=-1))
        if form == "none":
            return x
        mean = self.axes("ReduceMean", self("Mul", x, x), [-1], since=18)
        return str(self("Mul", self("Div", x, self("Sqrt", self("Add", mean, self.constant(np.float32(1))))), self.weight(width)))

    # --- detours of a hidden axis: (tensor [batch, seq, n], n) -> (tensor, n')

    def detour(self, x: str, n: int, block: Block) -> tuple[str, int]:
        way: Callable[[str, int, Block], tuple[str, int]] = self.pick(
            self._act,
            self._act,
            self._scale,
            self._gate,
            self._halves,
            self._slice,
            self._concat,
            self._fold,
            self._turn,
            self._gather,
            self._expand,
            self._tile,
            self._where,
            self._mixed,
            self._pad,
            self._output,
            self._body,
            self._again,
        )
        return way(x, n, block)

    def _act(self, x: str, n: int, block: Block) -> tuple[str, int]:
        return self.act(x), n

    def _scale(self, x: str, n: int, block: Block) -> tuple[str, int]:
        other = self.pick(self.weight(n), self.weight(1, 1, n), self.weight(1), self.constant(np.float32(0.5)))
        return str(self(self.pick("Mul", "Add", "Sub", "Max"), *([x, other] if self.maybe() else [other, x]))), n

    def _gate(self, x: str, n: int, block: Block) -> tuple[str, int]:
        return str(self("Mul", self.act(x), self.project(self.source, self.width, n))), n

    def _halves(self, x: str, n: int, block: Block) -> tuple[str, int]:
        if n % 2:
            return x, n
        a, b = self.split(x, [n // 2, n // 2])
        return (str(self("Mul", self.act(a), b)), n // 2) if self.maybe() else (str(self("Concat", b, self.act(a), axis=-1)), n)

    def _slice(self, x: str, n: int, block: Block) -> tuple[str, int]:
        start, step = self.number(0, n - 1), self.pick(1, 1, 1, 2, -1)
        end = self.number(start + 1, n) if step > 0 else self.pick(-(2**40), *range(-n, start - n))
        left = len(range(n)[start : None if end < -n else end : step])
        starts, ends, axes, steps = [start], [end], [self.pick(-1, 2)], [step]
        if step > 0 and end == n and self.maybe():
            ends = [2**40]
        if self.maybe():  # together with all rows
            starts, ends, axes, steps = [0, *starts], [2**40, *ends], [1, *axes], [1, *steps]
        more = [self.ints(*steps)] if step != 1 or self.maybe() else []
        return str(self("Slice", x, self.ints(*starts), self.ints(*ends), self.ints(*axes), *more)), left

    def _concat(self, x: str, n: int, block: Block) -> tuple[str, int]:
        more = self.number(1, 3)
        # Both parts are nonlinear: of a linear one alone, when the rest has gone, nobody would say that it is a feed-forward.
        other, more = (self.act(self.project(self.source, self.width, more)), more) if self.maybe() else (self("Mul", x, x), n)
        return str(self("Concat", x, other, axis=self.pick(2, -1))), n + more

    def _fold(self, x: str, n: int, block: Block) -> tuple[str, int]:
        """[.., n] as [.., a, b], something along one of them, and back."""
        factors = [size for size in range(2, n) if n % size == 0]
        if not factors:
            return x, n
        size = self.pick(*factors)
        y = self("Reshape", x, self.ints(0, 0, size, n // size))
        if self.maybe():
            y = self("Mul", y, self.pick(self.weight(size, 1), self.weight(n // size)))
        y = self.act(y)
        if self.maybe():
            y = self("Transpose", y, perm=[0, 1, 3, 2])
        return str(self("Reshape", y, self.ints(0, 0, self.pick(n, -1)))), n

    def _turn(self, x: str, n: int, block: Block) -> tuple[str, int]:
        turned = self.act(self("Transpose", x, perm=[2, 0, 1]))
        if self.maybe():
            turned = self.axes("Squeeze", self.act(self.axes("Unsqueeze", turned, [1])), [1])
        return str(self("Transpose", turned, perm=[1, 2, 0])), n

    def _gather(self, x: str, n: int, block: Block) -> tuple[str, int]:
        picked = self.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n + 2))
        return str(self("Gather", x, self.ints(*picked), axis=self.pick(2, -1))), len(picked)

    def _expand(self, x: str, n: int, block: Block) -> tuple[str, int]:
        wide = self("Expand", self.axes("Unsqueeze", x, [2]), self.ints(1, 1, 2, 1))
        if self.maybe():
            block.quiet = True  # a reduction, though not over this axis
            return self.axes("ReduceSum", self.act(wide), [2], keepdims=0), n
        return str(self("Reshape", wide, self.ints(0, 0, 2 * n))), 2 * n

    def _tile(self, x: str, n: int, block: Block) -> tuple[str, int]:
        return str(self("Tile", x, self.ints(1, 1, 2))), 2 * n

    def _where(self, x: str, n: int, block: Block) -> tuple[str, int]:
        return str(self("Where", self("Greater", x, self.weight(n)), x, self.constant(np.float32(-0.1)))), n

    def _mixed(self, x: str, n: int, block: Block) -> tuple[str, int]:
        """A norm, a softmax or a sum over the axis: its positions are not independent."""
        block.quiet = True
        form = self.pick("norm", "softmax", "mean")
        if form == "norm":
            return self.norm(x, n), n
        if form == "softmax":
            return str(self("Softmax", x, axis=2)), n
        return str(self("Sub", x, self.axes("ReduceMean", x, [-1], since=18))), n

    def _pad(self, x: str, n: int, block: Block) -> tuple[str, int]:
        return str(self("Pad", x, self.ints(0, 0, 0, 0, 0, 1))), n + 1

    def _output(self, x: str, n: int, block: Block) -> tuple[str, int]:
        self.outputs.append((x, ["batch", "seq", n]))
        return x, n

    def _body(self, x: str, n: int, block: Block) -> tuple[str, int]:
        """An If whose bodies read the tensor from outside."""
        name = f"inner.{len(self.nodes)}"
        body = helper.make_graph(
            [helper.make_node("Relu", [x], [name])], "body", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )
        other = helper.make_graph(
            [helper.make_node("Tanh", [x], [f"{name}.else"])],
            "other",
            [],
            [helper.make_tensor_value_info(f"{name}.else", TensorProto.FLOAT, None)],
        )
        flag = self("Greater", self("ReduceSum", self.source, keepdims=0), self.constant(np.float32(0)))
        return str(self("If", flag, then_branch=body, else_branch=other)), n

    def _again(self, x: str, n: int, block: Block) -> tuple[str, int]:
        return str(self("Add", x, self.act(x))), n

    # --- branches: from the stream to [batch, seq, width]

    source = "x"

    def ffn_branch(self, block: Block) -> str:
        n = self.pick(2, 3, 4, 6, 8)
        hidden = self.act(self.project(self.source, self.width, n))
        for _ in range(self.number(0, 3)):
            hidden, n = self.detour(hidden, n, block)
        made = self.project(hidden, n, self.width)
        if self.number(0, 5) == 0:
            made = str(self("Add", made, self.project(hidden, n, self.width)))
        return made

    def attention_branch(self, block: Block) -> str:
        heads, groups, depth = self.heads_count, self.groups, self.depth
        q = self.project(self.source, self.width, heads * depth)
        if self.maybe():
            k, v = (self.project(self.source, self.width, groups * depth) for _ in range(2))
        else:
            k, v = self.split(self.project(self.source, self.width, 2 * groups * depth), [groups * depth] * 2)
        forms = ["plain", "plain", "merged"] + ["fused"] * (self.opset >= 23) + ["ms", "packed"] * (groups == heads)
        context = self._context(self.pick(*forms), q, k, v, block)
        return self.project(context, heads * depth, self.width)

    def _context(self, form: str, q: str, k: str, v: str, block: Block) -> str:
        heads, groups, depth = self.heads_count, self.groups, self.depth
        if form == "ms":
            context = self.ms("MultiHeadAttention", q, k, v, num_heads=heads)
        elif form == "packed":
            size = heads * depth
            context = self.ms("Attention", self.source, self.matrix(self.width, 3 * size), self.weight(3 * size), num_heads=heads)
        elif form == "fused" and self.maybe():
            context = self("Attention", q, k, v, q_num_heads=heads, kv_num_heads=groups, is_causal=self.number(0, 1))
        else:
            return self._spelled(form, q, k, v, block)
        block.heart = self.nodes[-1].name
        return str(context)

    def _spelled(self, form: str, q: str, k: str, v: str, block: Block) -> str:
        heads, groups, depth = self.heads_count, self.groups, self.depth
        q, k, v = (self._headed(name, count) for name, count in ((q, heads), (k, groups), (v, groups)))
        if form == "fused":
            context = self("Attention", q, k, v)
            block.heart = self.nodes[-1].name
            return str(self("Reshape", self("Transpose", context, perm=[0, 2, 1, 3]), self.ints(0, 0, heads * depth)))
        if groups < heads:
            k, v = (self._repeated(name) for name in (k, v))
        if form == "merged":
            q, k, v = (self("Reshape", name, self("Concat", self.ints(-1), self.middle(name), axis=0)) for name in (q, k, v))
        order = [0, 2, 1] if form == "merged" else [0, 1, 3, 2]
        scores = self("Mul", self("MatMul", q, self("Transpose", k, perm=order)), self.constant(np.float32(depth**-0.5)))
        if self.maybe() and form != "merged":
            scores = self("Add", scores, self.weight(1, heads, 1, 1))
        weights = self("Softmax", scores, axis=len(order) - 1)
        block.heart = self.nodes[-1].name
        if self.number(0, 7) == 0:
            self.outputs.append((weights, ["batch x heads", "seq", "seq"] if form == "merged" else ["batch", heads, "seq", "seq"]))
        context = self("MatMul", weights, v)
        if form == "merged":
            context = self("Reshape", context, self("Concat", self.ints(-1, heads), self.middle(context), axis=0))
        if self.number(0, 3) == 0:
            context = self("Mul", context, self.pick(self.weight(heads, 1, 1), self.weight(depth)))
        return str(self("Reshape", self("Transpose", context, perm=[0, 2, 1, 3]), self.ints(0, 0, heads * depth)))

    def middle(self, x: str) -> str:
        """Length of the last but one axis and of the last, of [.., seq, depth]."""
        return str(self("Slice", self("Shape", x), self.ints(-2), self.ints(2**40), self.ints(0)))

    def _headed(self, x: str, count: int) -> str:
        y = self("Transpose", self("Reshape", x, self.ints(0, 0, count, self.depth)), perm=[0, 2, 1, 3])
        if self.number(0, 3) == 0:  # rotary embedding by halves, the same angle everywhere
            a, b = self.split(y, [self.depth // 2] * 2)
            turned = self("Concat", self("Neg", b), a, axis=-1)
            y = self("Add", self("Mul", y, self.weight(self.depth)), self("Mul", turned, self.weight(self.depth)))
        return str(y)

    def _repeated(self, x: str) -> str:
        """[B, G, S, D] -> [B, H, S, D], each group as often as it has heads."""
        times = self.heads_count // self.groups
        wide = self("Tile", self.axes("Unsqueeze", x, [2]), self.ints(1, 1, times, 1, 1))
        return str(self("Reshape", wide, self("Concat", self.ints(0, self.heads_count), self.middle(x), axis=0)))

    def branch(self) -> str:
        kind = self.pick("attention", "ffn", "ffn")
        block = Block(kind)
        first = len(self.nodes)
        made = self.ffn_branch(block) if kind == "ffn" else self.attention_branch(block)
        block.nodes = {node.name for node in self.nodes[first:]}
        self.blocks.append(block)
        if self.number(0, 4) == 0:
            made = str(self(self.pick("Mul", "Add"), made, self.weight(self.width)))
        if self.number(0, 4) == 0:
            made = self.norm(made, self.width)
        return made

    def model(self) -> onnx.ModelProto:
        stream = "x"
        for _ in range(self.number(1, 3)):
            self.source = self.norm(stream, self.width)
            branches = [self.branch() for _ in range(self.pick(1, 1, 2))]
            if len(branches) == 1 and self.number(0, 9) == 0:
                stream = branches[0]  # no residual at all
                continue
            if len(branches) == 2 and self.maybe():  # as parallel blocks are written: x + (attention + ffn)
                branches = [str(self("Add", *branches))]
            stream = str(self(self.pick("Sum", "Add") if len(branches) == 1 else "Sum", stream, *branches))
        outputs = list(dict((*self.outputs, (stream, ["batch", "seq", self.width]))).items())
        declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, declared, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid(LOCAL, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(self.functions.values()))


@st.composite
def transformers(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[Block]]:
    """A model that onnxruntime runs, and its blocks."""
    writer = Writer(draw)
    return writer.model(), writer.blocks
