"""Small but structurally real networks with random weights, one entry per architecture, and the files that exporters make of them.

Every entry says how many sites its configuration holds, so that what is found in a file can be compared with what is there.
"""

from tests.architectures.entry import Architecture, feeds, network
from tests.architectures.registry import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "feeds", "network"]
