"""``ffn``: intermediate neurons of feed-forward blocks."""

from onnxprune.passes.base import WidthPass

FFN = WidthPass(
    name="ffn",
    kind="ffn",
    summary="remove intermediate neurons of feed-forward blocks",
    detail=(
        "A neuron is its column of the first matrix (of both, in a gated block), its bias and its row of the second matrix. "
        "Widths are rounded to what the runtime's kernels pay for."
    ),
)
