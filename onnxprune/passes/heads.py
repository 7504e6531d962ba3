"""``heads``: whole attention heads."""

from onnxprune.passes.base import WidthPass

HEADS = WidthPass(
    name="heads",
    kind="heads",
    summary="remove whole attention heads",
    detail=(
        "A head is its columns of the query, key and value projections with their biases and its rows of the output projection. "
        "Query heads that share a key/value head go together. A layer that keeps no head adds the constant its output projection computes."
    ),
)
