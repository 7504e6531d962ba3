"""Every refusal code: what it means, what it looks like and the way out. ``docs/refusals.md`` is generated from this table (``make docs``).

Codes are stable: one that is no longer used keeps its number. The first digit is the family: 1 heads, 2 feed-forward neurons, 3 channels,
4 int8, 5 vocabulary, 6 experts and hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """One kind of refusal.

    ``example`` is a reason as it stands in a message, ``hint`` the way out that a refusal names unless it knows a better one.
    """

    code: str
    title: str
    explanation: str
    example: str
    hint: str


_BOUNDARY = (
    "They reach a graph input or output that is no cache (attention maps), an operator without a rule, or the body of a loop. The message "
    "names the operator and the place."
)
_QUANTIZED = "A constant that would have to be cut is stored as integers or made by other operators, so there is no float matrix to cut."
_FLOAT_FIRST = "prune the float model first and quantize afterwards"
_LEAVE = "nothing to choose from; leave it"
_NO_RESIDUAL = (
    "What is removed must end in the sum of a residual branch, so that an empty branch still leaves a working model. Usually this is the "
    "pooler or the classifier behind the layers."
)

CODES: dict[str, Code] = {
    entry.code: entry
    for entry in (
        Code(
            "OP101",
            "heads cannot be followed",
            f"An attention whose heads could not be followed from the scores to a projection with a constant weight. {_BOUNDARY}",
            "the axis reaches the graph output attentions.0 (at /h.0/attn/Softmax)",
            "re-export with the plain attention of the framework, or without attention-map outputs",
        ),
        Code(
            "OP102",
            "heads outside the residual stream",
            _NO_RESIDUAL,
            "the heads do not end in a residual branch",
            "it is usually the pooler or the classifier, a small share of the time; nothing to do",
        ),
        Code(
            "OP103",
            "one head",
            "The attention has one head, or one group of query heads that share their keys and values.",
            "only one head is left",
            _LEAVE,
        ),
        Code(
            "OP104",
            "quantized or computed weight of heads",
            _QUANTIZED,
            "its weight q.weight_dequantized is computed by DequantizeLinear, not a float initializer",
            _FLOAT_FIRST,
        ),
        Code(
            "OP201",
            "neurons cannot be followed",
            "The neurons of a feed-forward block pass an operator that has no rule, or a graph boundary, between the two matrices.",
            "operator CumSum has no axis rule (at /layer.3/CumSum)",
            "exclude it, or re-export the model without that operator between the two matrices",
        ),
        Code(
            "OP202",
            "neurons outside the residual stream",
            _NO_RESIDUAL,
            "the neurons do not end in a residual branch",
            "it is usually the pooler or the classifier, a small share of the time; nothing to do",
        ),
        Code("OP203", "one neuron", "The feed-forward block is one neuron wide.", "only one neuron is left", _LEAVE),
        Code(
            "OP204",
            "quantized or computed weight of neurons",
            _QUANTIZED,
            "its weight fc1.weight_dequantized is computed by DequantizeLinear, not a float initializer",
            _FLOAT_FIRST,
        ),
        Code(
            "OP205",
            "neurons of experts",
            "Every token multiplies with the weights of its own experts, which are gathered from a stack of all of them. Such a product "
            "has no constant matrix whose rows or columns could go.",
            "the weights of its neurons (layers.0.mlp.experts.gate_up_proj) are gathered for every token",
            "leave them; heads, int4 and fp16 work beside experts",
        ),
        Code(
            "OP301",
            "channels cannot be followed",
            "Channels reach a normalisation over them (the width of a transformer's or ConvNeXt's stream), the boundary of the model, or "
            "an operator without a rule; or no constant weight both makes and reads them.",
            "the axis reaches the graph output features (at /stage.3/Relu)",
            "channels at the model's boundary must stay; elsewhere, re-export the model without that operator",
        ),
        Code(
            "OP302",
            "channels inside an attention",
            "Two activations are multiplied along the channels, so they are the heads or the depth of an attention.",
            "two activations are multiplied along the channels (at /attn/MatMul)",
            "they are part of an attention; leave them",
        ),
        Code(
            "OP303",
            "one channel",
            "The convolution has one channel, or one group of channels that go together.",
            "only one channel, or one group of them, is left",
            _LEAVE,
        ),
        Code(
            "OP304",
            "quantized or computed weight of channels",
            _QUANTIZED,
            "its weight conv1.weight_dequantized is computed by DequantizeLinear, not a float initializer",
            _FLOAT_FIRST,
        ),
        Code(
            "OP401",
            "int8 is not faster",
            "On this machine, with this onnxruntime, at this request; the message names the best form tried and its speed.",
            "int8 is not faster than float here: the best form tried (dynamic) runs at 0.93x of its speed",
            "deploy in float, or decide on the machine that will serve",
        ),
        Code(
            "OP402",
            "int8 loses too much",
            "With no target, int8 loses more than `--max-drop` on judging rows even with half of the products in float.",
            "int8 loses more than 1% even with half of the products in float",
            "allow a larger --max-drop, or give a target, which mixes the precisions as it needs",
        ),
        Code(
            "OP601",
            "experts",
            "A router scores all experts and keeps the best few of every token. Without one expert, tokens that chose it take another one, "
            "with other weights: no mask of the model as it is says what that computes, so nothing could be proved.",
            "its experts (layers.0.mlp.experts.gate_up_proj) are chosen token by token, and their scores compete",
            "leave them; an expert that no token chooses costs memory, not time",
        ),
    )
}
