"""Passes that change the numbers a model computes in."""

from onnxprune.graph.four_bit import to_four_bit
from onnxprune.graph.half import to_float16
from onnxprune.passes.base import RewritePass, Stage, WholePass

INT8 = WholePass(
    name="int8",
    kind="integers",
    summary="compute matrix products in int8, where that is faster and accurate",
    detail=(
        "Dynamic and static forms, per channel and per tensor, are measured on this machine and the best is taken. Products whose error "
        "is worth less than their time stay in float: with a target, the search that removes heads and neurons decides that too."
    ),
)
INT4 = RewritePass(
    name="int4",
    apply=to_four_bit,
    summary="weights in 4 bits, products in float (MatMulNBits; for large decoders)",
    detail=(
        "Product weights shrink to an eighth, embedding tables stay. Faster where reading weights is what takes the time: single tokens "
        "through large matrices, as decoders do."
    ),
    stage=Stage.NUMBERS,
    exact=False,
)
FP16 = RewritePass(
    name="fp16",
    apply=to_float16,
    summary="half precision, inputs and outputs stay float32 (for GPU providers)",
    detail=(
        "Halves the file, and the time on GPUs with half-precision units; on the CPU provider it brings no speed. Normalisations "
        "and angles that would overflow stay in float32."
    ),
    stage=Stage.NUMBERS,
    exact=False,
)
