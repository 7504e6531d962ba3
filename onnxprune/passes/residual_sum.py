"""``residual-sum``: the residual addition written so that onnxruntime does not fuse it into a slow operator."""

from onnxprune.graph.residual import residual_sum
from onnxprune.passes.base import RewritePass

RESIDUAL_SUM = RewritePass(
    name="residual-sum",
    apply=residual_sum,
    summary="write Add before LayerNormalization as Sum (faster on the CPU provider)",
    detail=(
        "onnxruntime fuses Add + LayerNormalization into SkipLayerNormalization, which costs several times more than the two on its CPU "
        "provider and does not shrink with pruning. The numbers stay the same. Runs by default on the cpu provider, and is reported apart: "
        "its gain is never counted as pruning."
    ),
)
