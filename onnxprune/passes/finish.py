"""The parts of ``finish``: exact rewrites of the float graph, each kept only if it makes the model faster here.

Each part is a pass of its own, so that a plan says which ones ran; naming one in ``--passes`` runs it without asking the clock.
"""

from onnxprune.graph.clean import clean
from onnxprune.graph.fuse_attention import fuse_attention
from onnxprune.graph.gelu import fusable_gelu
from onnxprune.graph.residual import residual_sum
from onnxprune.passes.base import RewritePass, Stage

CLEAN = RewritePass(
    name="clean",
    apply=clean,
    summary="drop dead nodes, unused and repeated initializers",
    detail="Nodes and initializers that no output depends on go, and of bit-identical initializers one stays. The numbers stay the same.",
    finishing=("cpu", "cuda", "tensorrt"),
)
RESIDUAL_SUM = RewritePass(
    name="residual-sum",
    apply=residual_sum,
    summary="write Add before LayerNormalization as Sum (faster on the CPU provider)",
    detail=(
        "onnxruntime fuses Add + LayerNormalization into SkipLayerNormalization, which costs several times more than the two on its CPU "
        "provider and does not shrink with pruning. The numbers stay the same. Tried by default on the cpu provider, and reported apart: "
        "its gain is never counted as pruning."
    ),
    finishing=("cpu",),
)
FUSABLE_GELU = RewritePass(
    name="fusable-gelu",
    apply=fusable_gelu,
    summary="spell GELU so that onnxruntime recognises it",
    detail=(
        "Dynamo exports below opset 20 write GELU as five operators in an order that onnxruntime does not fuse. Moving a factor of one "
        "half to the end lets every session fuse it, with the bias before it. Exact: a half only shifts exponents."
    ),
    finishing=("cpu", "cuda", "tensorrt"),
)
FUSE_ATTENTION = RewritePass(
    name="fuse-attention",
    apply=fuse_attention,
    summary="write attention as one MultiHeadAttention with each layer's own head count",
    detail=(
        "The fused operator saves transpositions. The runtime's own optimizer takes one head count for the whole model, which after "
        "pruning is wrong for most layers; here the count is read from each layer, and what is not certain to be attention stays."
    ),
    stage=Stage.FUSED,
    finishing=("cpu", "cuda"),
)
