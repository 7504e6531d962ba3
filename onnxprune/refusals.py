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

_OTHER_OUTPUT = (
    "The output whose quality is kept does not depend on it, as in a model of two towers with an output each. Nothing would tell what the "
    "other output loses, so all of it would go."
)
_OTHER_REASON = "output text_embeds, which is to be preserved, does not depend on it"
_CHOOSE_OUTPUT = "name the other output with --output to prune what leads to it, in a run of its own"

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
            "OP105",
            "depth under rotary embeddings",
            "Rotary embeddings turn pairs of dimensions of queries and keys by an angle that depends on the position. Another basis of the "
            "heads would have to pass that turn, and it does not.",
            "queries and keys: rotary embeddings turn pairs of its dimensions by position (at /layers.0/self_attn/Add)",
            "vo can do its part; heads and ffn work beside rotary embeddings",
        ),
        Code(
            "OP106",
            "depth under a norm",
            "Queries or keys are normalised head by head before they meet (query-key norm), which no other basis of the heads would pass.",
            "queries and keys: every head is normalised over its dimensions (at /layers.0/self_attn/q_norm/Mul)",
            "vo can do its part; heads and ffn work beside such norms",
        ),
        Code(
            "OP107",
            "depth that cannot be turned",
            "Between the projections and the product of two activations lies something other than biases, scales and layout (a gate, a "
            "cache, an operator without a rule), or something else reads what lies there, or the weight is not a float matrix.",
            "values: Mul(/layers.0/attn/Mul_3) stands between the projection and the product",
            "leave it; heads and ffn need less",
        ),
        Code(
            "OP108",
            "depth inside a fused operator",
            "The operator holds heads and their depth in one axis (com.microsoft MultiHeadAttention and its relatives, opset-23 Attention "
            "on three axes).",
            "queries and keys: MultiHeadAttention(Attention_0) holds heads and depth in one axis",
            "prune the file before it is optimised for onnxruntime; fuse-attention fuses it afterwards",
        ),
        Code(
            "OP109",
            "depth of shared weights",
            "Layers with the same weights (ALBERT) would need one basis for all of them, or the file would hold a copy for each.",
            "values: its weight v.weight is read in several places",
            "leave it; heads and ffn cut such layers together",
        ),
        Code("OP110", "heads of another output", _OTHER_OUTPUT, _OTHER_REASON, _CHOOSE_OUTPUT),
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
        Code("OP206", "neurons of another output", _OTHER_OUTPUT, _OTHER_REASON, _CHOOSE_OUTPUT),
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
        Code("OP305", "channels of another output", _OTHER_OUTPUT, _OTHER_REASON, _CHOOSE_OUTPUT),
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
            "OP501",
            "token ids are computed",
            "A table of words is looked up by ids that the graph computes from its inputs, so the data do not tell which rows it reads.",
            "its ids are computed from decoder_input_ids (at /decoder/embed/Gather)",
            "feed the ids themselves: re-export the model with them as an input",
        ),
        Code(
            "OP502",
            "one input, tables of several sizes",
            "The same ids look up in tables of different numbers of rows.",
            "input_ids look up in tables of [30522, 50265] rows",
            "leave it, or re-export the model with one input for each vocabulary",
        ),
        Code(
            "OP503",
            "tied word table",
            "The table is also the weight of an output layer, which makes a score for every word. The layer must stay whole, so a smaller "
            "copy for the lookup would make the file larger.",
            "table wte.weight is also the weight of an output layer, or read as a whole (at /lm_head/Transpose)",
            "nothing to save; drop the output layer if only the hidden states are used",
        ),
        Code(
            "OP504",
            "output layer over the words",
            "Scores of words are told by their place in the output, so the layer that makes them keeps all. The lookup table is cut.",
            "it makes a score for each of 30522 words: its outputs are told by their place",
            "drop the output layer if only the hidden states are used",
        ),
        Code(
            "OP505",
            "the map of ids stays in the graph",
            "With `--vocab-map file` ids change before they are fed. Another node reads them as well: a comparison with the id of "
            "padding, say.",
            "Equal(/Equal) reads the ids of input_ids as well, so that they must stay as they are: the map goes into the graph",
            "nothing to do; the map costs four bytes a word",
        ),
        Code(
            "OP506",
            "no rows to lose",
            "No table of more than 512 rows is looked up by the ids of an integer input, or all of its rows occur in the data.",
            "no table of more than 512 rows whose rows the ids of a graph input pick has rows to lose",
            "leave vocab out of --passes, or check that the data are those of your domain",
        ),
        Code(
            "OP601",
            "experts",
            "A router scores all experts and keeps the best few of every token. Without one expert, tokens that chose it take another one, "
            "with other weights: no mask of the model as it is says what that computes, so nothing could be proved.",
            "its experts (layers.0.mlp.experts.gate_up_proj) are chosen token by token, and their scores compete",
            "leave them; an expert that no token chooses costs memory, not time",
        ),
        Code(
            "OP602",
            "post-norm network",
            "Every sum is normalised, with a scale for each position, before the next sublayer adds to it. Such a scale does not commute "
            "with a rotation, so there is no stream that could be turned into the basis of its principal directions.",
            "each of 13 sums is normalised before anything else is added to it",
            "leave hidden out; heads and ffn prune post-norm networks",
        ),
        Code(
            "OP603",
            "residual stream cannot be rotated",
            "Something other than a constant matrix or a norm over the whole width writes or reads the residual stream: a norm on each "
            "branch, a graph output, a sum whose mean is needed. The message names the first one.",
            "5 places read or write the stream by no constant matrix (Mul(/h.0/norm/Mul_1) writes it)",
            "leave hidden out; heads and ffn need no rotation",
        ),
        Code(
            "OP604",
            "too little is left of the stream",
            "On calibration rows that chose no direction, the model with narrow streams was compared with the model as given. Its outputs "
            "say hardly what they said, and no later step would repair that.",
            "with 128 of 256 directions the outputs are off by 2.1 nats of divergence, more than 0.5",
            "keep more with --hidden-keep, or leave hidden out; heads and ffn remove less important numbers",
        ),
        Code(
            "OP605",
            "no width to lose",
            "Widths of streams are multiples of 16, as narrower steps save no time. The share asked for rounds to the width there is.",
            "97% of a width of 192 rounds to all of it (widths are multiples of 16)",
            "keep less with --hidden-keep",
        ),
        Code(
            "OP701",
            "opset too old for fewer tokens",
            "Tokens are chosen and gathered by operators, and in forms of them, that opsets before 13 do not have.",
            "the file is of opset 11; tokens can leave from opset 13 on",
            "export with opset 13 or newer, or convert the file with onnx.version_converter",
        ),
        Code(
            "OP702",
            "no place where tokens can leave",
            "Behind an attention of tokens among themselves there must be one tensor [batch, tokens, width] that all features pass "
            "through. Caches, windows and skip connections around blocks leave none, and so does a network without attention.",
            "no attention is followed by one tensor [batch, tokens, width] that all features pass through",
            "leave tokens out; heads and ffn do not need it",
        ),
        Code(
            "OP703",
            "a row of the output for each token",
            "Tokens that left come back in front of the head, as they were. They cannot where an output is made of tokens before the last "
            "block, or where no token may know of later ones, as in language models: which of them leave would tell.",
            "output logits has a row for each token, and tokens that may not know of later ones",
            "leave out outputs of earlier blocks, or prune heads and ffn",
        ),
        Code(
            "OP704",
            "tokens are told apart by their places",
            "A window, a grid, a convolution or a fixed place that is read makes tokens more than a set, so that none can leave.",
            "Reshape(/layers.0/Reshape_3) mixes tokens or picks them by their places",
            "prune heads, ffn or channels instead",
        ),
        Code(
            "OP705",
            "something that meets the tokens cannot follow them",
            "A mask or a table of positions is laid out in a way that cannot be gathered along with the tokens, or sizes are computed in "
            "a form that cannot change.",
            "val_160 holds positions, which a package of tokens does not have",
            "choose another policy with --token-policy, or prune heads and ffn",
        ),
        Code(
            "OP706",
            "fewer tokens are not faster",
            "Choosing tokens takes time as well: with few tokens, or few blocks behind the place where they leave, more than they take.",
            "the best of 8 schedules runs at 0.98x of the speed with all tokens, for a request of 16 tokens",
            "leave tokens out; longer texts and larger images gain more",
        ),
        Code(
            "OP707",
            "all tokens stay",
            "Fewer tokens would be faster, but the other passes meet the target with less loss while all tokens are there; or, without "
            "a target, even the mildest schedule loses too much.",
            "all tokens serve this target best: the 2 of 12 schedules that promise most lose more or miss the goal",
            "leave tokens out, or ask for a faster model",
        ),
        Code(
            "OP801",
            "no sublayer can be replaced",
            "A sublayer reads one residual stream and nothing else, writes no output of the graph, holds constant matrices, and is added "
            "to that stream row by row. Networks without such branches, or whose branches are all protected, keep their depth.",
            "no sublayer can be replaced: no branch reads one residual stream and is added to it",
            "leave layers out; heads and ffn need no residual stream",
        ),
        Code(
            "OP802",
            "too large to try without its sublayers",
            "A model above 1.5 GiB is read from disk piece by piece: every sublayer and substitute would take a pass over all of it.",
            "the model is too large to try it without each of its sublayers",
            "leave layers out and use heads, ffn and int8",
        ),
        Code(
            "OP803",
            "all sublayers stay",
            "Of two searches, with all sublayers and without those that lose least, the better one is kept, and that was the first.",
            "the model loses less with all of its sublayers",
            "leave layers out, which takes half of the time",
        ),
        Code(
            "OP901",
            "too large to train",
            "A model above 1.5 GiB is read from disk piece by piece. An optimiser would need all its weights three times over.",
            "the model is read from disk piece by piece, and its optimiser would need all of it",
            "leave polish out; the re-fit works on models of any size",
        ),
        Code(
            "OP902",
            "no gradient of the weights",
            "An operator between the weights and the output has no rule of differentiation, or no weight is a float matrix or bias.",
            "operator Foo (node foo_1) has no gradient rule",
            "leave polish out; the re-fit needs no gradients",
        ),
        Code(
            "OP903",
            "nothing to learn",
            "What lost nothing cannot come nearer to the model it was made from; int8 comes after polish.",
            "the model lost nothing, so that there is nothing to learn",
            "leave polish out, or ask for a smaller or faster model",
        ),
    )
}
