"""``channels``: channels of convolutions."""

from onnxprune.passes.base import WidthPass

CHANNELS = WidthPass(
    name="channels",
    kind="channels",
    summary="remove channels of convolutions",
    detail=(
        "A channel is its filter in every convolution that makes it and its slice of every weight that reads it; channels that are added "
        "together go together, in a convolution of several groups whole groups go. Every layer keeps at least one. What reads the channels "
        "is re-fitted by least squares on patches of the calibration data."
    ),
)
