"""Small graphs built node by node: the spellings of attention and FFN that exporters, converters and people write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, DEPTH, WIDTH, FFN = 3, 4, 12, 10
"""Heads, head size, hidden width (heads x head size) and FFN width of every graph here, unless a test says otherwise."""


class Net:
    """A graph under construction. Calling it adds a node and returns the name of its output (a list if it has several)."""

    def __init__(self, opset: int = 18, seed: int = 0, batch: int | str = "batch", seq: int | str = "seq") -> None:
        self.opset, self.batch, self.seq = opset, batch, seq
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, seq, WIDTH])]

    def __call__(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"{op}.{len(self.nodes)}.{position}" for position in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{op}.{len(self.nodes)}", domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def ms(self, op: str, *inputs: str, **attributes: Any) -> Any:
        return self(op, *inputs, domain="com.microsoft", **attributes)

    def weight(self, *shape: int, scale: float = 0.0) -> str:
        array = self.rng.standard_normal(shape) * (scale or max(shape[0], 1) ** -0.5)
        return self.constant(array.astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def input(self, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    # pieces

    def linear(self, x: str, inputs: int = WIDTH, outputs: int = WIDTH, bias: bool = True) -> str:
        product: str = self("MatMul", x, self.weight(inputs, outputs))
        return self("Add", product, self.weight(outputs, scale=0.3)) if bias else product

    def heads(self, x: str, count: int = HEADS) -> str:
        """[B, S, H*D] -> [B, H, S, D]"""
        return str(self("Transpose", self("Reshape", x, self.ints(0, 0, count, DEPTH)), perm=[0, 2, 1, 3]))

    def attend(self, q: str, k: str, v: str, bias: str = "") -> str:
        """Context [B, S, H*D] of q, k, v [B, H, S, D]."""
        scores = self("Mul", self("MatMul", q, self("Transpose", k, perm=[0, 1, 3, 2])), self.constant(np.float32(DEPTH**-0.5)))
        if bias:
            scores = self("Add", scores, bias)
        context = self("MatMul", self("Softmax", scores, axis=3), v)
        return str(self("Reshape", self("Transpose", context, perm=[0, 2, 1, 3]), self.ints(0, 0, HEADS * DEPTH)))

    def attention(self, x: str, bias: str = "") -> str:
        """The plain spelling: three projections, heads, context, output projection."""
        q, k, v = (self.heads(self.linear(x)) for _ in range(3))
        return self.linear(self.attend(q, k, v, bias))

    def add(self, *operands: str) -> str:
        return str(self("Add", *operands))

    def ffn(self, x: str, act: str = "Tanh", width: int = FFN) -> str:
        return self.linear(self(act, self.linear(x, WIDTH, width)), width, WIDTH)

    def done(self, *outputs: str, **shapes: list[int | str]) -> onnx.ModelProto:
        declared = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes.get(name, [self.batch, self.seq, WIDTH])) for name in outputs
        ]
        for index, value in enumerate(declared):
            if outputs[index] in shapes and not shapes[outputs[index]]:
                declared[index] = helper.make_empty_tensor_value_info(outputs[index])
                declared[index].type.tensor_type.elem_type = TensorProto.FLOAT
                del value
        graph = helper.make_graph(self.nodes, "net", self.inputs, declared, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
