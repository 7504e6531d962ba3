"""What cannot be pruned is said, with the reason and the place; nothing is skipped in silence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxprune.errors import InputError, Refusal
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.canonical import check_prunable
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from tests.architectures import exports
from tests.architectures.entry import LAYERS
from tests.graph.net import DEPTH, FFN, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of


def only(anatomy: Anatomy) -> Refusal:
    assert anatomy.sites == ()
    assert len(anatomy.refusals) == 1, [str(refusal) for refusal in anatomy.refusals]
    return anatomy.refusals[0]


def test_attention_maps_as_outputs_block_the_heads() -> None:
    net = Net()
    model = net.done(
        net.add("x", net.attention("x")), next(n.output[0] for n in net.nodes if n.op_type == "Softmax"), **{"Softmax.18.0": []}
    )
    probabilities = model.graph.output[1].name
    model.graph.output[1].type.tensor_type.ClearField("shape")
    refusal = only(anatomy_of(model))
    assert refusal.code == "OP101"
    assert f"graph output {probabilities}" in refusal.reason
    assert "attention-map" in refusal.hint


def quantized_linear(net: Net, x: str, inputs: int, outputs: int) -> str:
    weight = net.constant(net.rng.integers(-127, 128, (inputs, outputs)).astype(np.int8))
    return str(net("MatMul", x, net("DequantizeLinear", weight, net.constant(np.float32(0.01)))))


def test_quantized_weights_are_named() -> None:
    net = Net()
    hidden = net("Relu", quantized_linear(net, "x", WIDTH, FFN))
    refusal = only(anatomy_of(net.done(net.add("x", quantized_linear(net, hidden, FFN, WIDTH)))))
    assert refusal.code == "OP204"
    assert "DequantizeLinear" in refusal.reason
    assert "float model first" in refusal.hint


def test_quantized_attention_is_refused_once() -> None:
    net = Net()
    q, k, v = (net.heads(quantized_linear(net, "x", WIDTH, WIDTH)) for _ in range(3))
    refusal = only(anatomy_of(net.done(net.add("x", quantized_linear(net, net.attend(q, k, v), WIDTH, WIDTH)))))
    assert refusal.code == "OP104"


@pytest.mark.parametrize("after", [True, False])
def test_an_operator_without_a_rule_is_named(after: bool) -> None:
    net = Net()
    hidden = net.linear("x", WIDTH, FFN)
    hidden = net("CumSum", net("Relu", hidden), net.constant(np.int64(2))) if after else net("Relu", net("CumSum", hidden, net.ints(2)))
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(hidden, FFN, WIDTH)))))
    assert refusal.code == "OP201"
    assert "CumSum" in refusal.reason


def test_an_operator_without_a_rule_inside_an_attention_is_named() -> None:
    net = Net()
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    v = net("CumSum", v, net.constant(np.int64(1)))
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(net.attend(q, k, v))))))
    assert refusal.code == "OP101"
    assert "CumSum" in refusal.reason


def test_neurons_that_are_normalised_together_are_named() -> None:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    hidden = net("LayerNormalization", hidden, net.weight(FFN), axis=-1)
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(hidden, FFN, WIDTH)))))
    assert refusal.code == "OP201"
    assert "LayerNormalization normalises over this axis" in refusal.reason


def test_neurons_under_a_response_norm_are_named() -> None:
    """ConvNeXt V2 divides what each neuron sees of the image by the mean over all neurons."""
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    size = net("ReduceL2", hidden, net.ints(1))
    response = net("Mul", hidden, net("Div", size, net("ReduceMean", size, net.ints(2))))
    hidden = net.add(hidden, net("Mul", response, net.weight(FFN)))
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(hidden, FFN, WIDTH)))))
    assert refusal.code == "OP201"
    assert "ReduceMean reduces over this axis" in refusal.reason


def test_the_width_of_a_normalised_stream_is_no_feed_forward_block() -> None:
    """Whatever branches add, a norm in front of a matrix reads the stream, and nobody asks why that is left alone."""
    net = Net()
    y = net.add("x", net("Relu", net.linear("x")))
    y = net("LayerNormalization", y, net.weight(WIDTH))
    assert anatomy_of(net.done(net.linear(y))).refusals == ()


def test_softmax_over_heads_by_the_old_default_axis_blocks_them() -> None:
    net = Net(11)
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    context = net("MatMul", net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2]))), v)
    context = net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH))
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(context)))))
    assert refusal.code == "OP101"
    assert "Softmax runs over this axis" in refusal.reason


def test_layers_without_a_residual_sum_are_explained() -> None:
    net = Net()
    y = net.linear(net("Relu", net.linear(net("Relu", net.linear("x", WIDTH, FFN)), FFN, FFN + 1)), FFN + 1, WIDTH)
    anatomy = anatomy_of(net.done(y))
    assert anatomy.sites == ()
    assert [refusal.code for refusal in anatomy.refusals] == ["OP202", "OP202"]
    assert all("residual" in refusal.reason for refusal in anatomy.refusals)


def test_heads_that_are_normalised_together_are_not_told_to_be_exported_anew() -> None:
    """OLMo 2 normalises its queries over all heads."""
    net = Net()
    q = net.heads(net("LayerNormalization", net.linear("x"), net.weight(WIDTH)))
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(net.attend(q, net.heads(net.linear("x")), net.heads(net.linear("x"))))))))
    assert refusal.code == "OP101"
    assert "LayerNormalization normalises over this axis" in refusal.reason
    assert "leave them" in refusal.hint


def test_a_second_reader_outside_the_residual_stream_is_named() -> None:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    side = net("Softmax", net.linear(hidden, FFN, WIDTH), axis=2)
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(hidden, FFN, WIDTH)), side)))
    assert refusal.code == "OP202"
    assert "as well, whose result does not end in a residual branch" in refusal.reason
    assert "classifier" not in refusal.hint


def lenet() -> onnx.ModelProto:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    lenet (float[N, 1, 12, 12] image) => (float[N, 4] logits)
    <float[3, 1, 3, 3] c1, float[75, 6] w1, float[6] b1, float[6, 4] w2, float[4] b2> {
        a = Conv (image, c1)
        r = Relu (a)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
        f = Flatten (p)
        h = Gemm (f, w1, b1)
        t = Relu (h)
        logits = Gemm (t, w2, b2)
    }"""
    text = text.replace("<float[3, 1, 3, 3] c1, float[75, 6] w1, float[6] b1, float[6, 4] w2, float[4] b2> ", "")
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {"c1": (3, 1, 3, 3), "w1": (75, 6), "b1": (6,), "w2": (6, 4), "b2": (4,)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


def test_a_convolutional_network_has_channels_and_says_why_it_has_no_ffn() -> None:
    anatomy = anatomy_of(lenet())
    assert {site.name: site.units for site in anatomy.sites} == {"conv.0.channels": 3}
    assert "OP202" in {refusal.code for refusal in anatomy.refusals}


def test_one_neuron_or_one_head_is_left_alone() -> None:
    net = Net()
    refusal = only(anatomy_of(net.done(net.add("x", net.ffn("x", width=1)))))
    assert (refusal.code, "only one neuron" in refusal.reason) == ("OP203", True)
    net = Net(23)
    context = net("Attention", *(net.linear("x", WIDTH, DEPTH) for _ in range(3)), q_num_heads=1, kv_num_heads=1)
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(context, DEPTH, WIDTH)))))
    assert (refusal.code, "only one head" in refusal.reason) == ("OP103", True)
    net = Net()
    q, k, v = (net.heads(net.linear("x", WIDTH, DEPTH), 1) for _ in range(3))
    context = net("Squeeze", net("MatMul", net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2]))), v), net.ints(1))
    refusal = only(anatomy_of(net.done(net.add("x", net.linear(context, DEPTH, WIDTH)))))
    assert (refusal.code, "only one head" in refusal.reason) == ("OP103", True)


def test_refused_parts_do_not_hide_the_others() -> None:
    net = Net()
    y = net.add("x", net.attention("x"))
    hidden = net("CumSum", net("Relu", net.linear(y, WIDTH, FFN)), net.constant(np.int64(2)))
    anatomy = anatomy_of(net.done(net.add(y, net.linear(hidden, FFN, WIDTH))))
    assert [site.name for site in anatomy.sites] == ["layer.0.heads"]
    assert [refusal.code for refusal in anatomy.refusals] == ["OP201"]


def test_a_weight_read_by_a_control_flow_body_does_not_stop_the_rest() -> None:
    net = Net()
    y = net.add("x", net.ffn("x"))
    shift = net.weight(WIDTH)
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", [y, shift], ["out"])],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    flag = net("Greater", net("ReduceSum", "x", keepdims=0), net.constant(np.float32(0)))
    anatomy = anatomy_of(net.done(net("If", flag, then_branch=body, else_branch=body)))
    assert [site.units for site in anatomy.sites] == [FFN]
    Comparison(anatomy).check({"layer.0.ffn": np.arange(4)})


def test_unknown_sites_and_units_are_input_errors() -> None:
    net = Net()
    anatomy = anatomy_of(net.done(net.add("x", net.ffn("x"))))
    with pytest.raises(InputError, match=r"no site 'layer\.7\.ffn'; it has layer\.0\.ffn"):
        slice_model(anatomy, {"layer.7.ffn": np.arange(2)})
    for wrong in ([0, 0], [1, 0], [-1, 2], [0, FFN]):
        with pytest.raises(InputError, match="ascending numbers from 0 to 9"):
            slice_model(anatomy, {"layer.0.ffn": np.array(wrong)})


def test_half_precision_and_integer_models_are_input_errors() -> None:
    for dtype, word in ((np.float16, "half-precision"), (np.int8, "quantized")):
        net = Net()
        net.constant(np.zeros((4, 4), dtype))
        net.initializers[:] = net.initializers[-1:]
        with pytest.raises(InputError, match=word):
            check_prunable(load(net.done(net("Relu", "x"))))


def test_random_numbers_on_the_way_to_an_output_are_an_input_error() -> None:
    net = Net()
    noise = net("RandomNormalLike", "x")
    with pytest.raises(InputError, match=r"draws random numbers \(RandomNormalLike"):
        check_prunable(load(net.done(net.add("x", noise))))
    check_prunable(load(net.done(net("Relu", "x"))))


@pytest.mark.parametrize(("name", "variant"), [("mixtral", "do18-sdpa"), ("qwen3-moe", "ts17-eager")])
def test_experts_and_their_neurons_are_refused_once_a_layer(name: str, variant: str) -> None:
    """GatherND and Gather: one refusal for the two stacks that one choice of experts reads."""
    anatomy = anatomy_of(load(exports.path(name, variant)))
    assert [site.kind for site in anatomy.sites] == ["heads"] * LAYERS
    codes = [refusal.code for refusal in anatomy.refusals]
    assert codes == ["OP601", "OP205"] * LAYERS
    assert all("experts" in refusal.reason for refusal in anatomy.refusals if refusal.code == "OP601")


def test_a_table_that_is_looked_up_is_no_expert() -> None:
    net = Net()
    ids = net.input("ids", ["batch", "seq"], onnx.TensorProto.INT64)
    x = net.add("x", net("Gather", net.weight(7, WIDTH), ids))
    codes = {refusal.code for refusal in anatomy_of(net.done(net.add(x, net.ffn(x)))).refusals}
    assert not codes
