"""All entries by name."""

from collections.abc import Mapping

from tests.architectures import convolution, decoders, text, vision
from tests.architectures.entry import Architecture

ARCHITECTURES: Mapping[str, Architecture] = {
    entry.name: entry for entry in (*text.ENTRIES, *vision.ENTRIES, *decoders.ENTRIES, *convolution.ENTRIES)
}
