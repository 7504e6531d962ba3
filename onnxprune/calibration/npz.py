"""Read npz archives without ever running what is in them."""

from __future__ import annotations

import os
import zipfile
import zlib

import numpy as np

from onnxprune.errors import InputError


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an existing npz file. Pickled objects are refused: loading them could run code.

    Raises:
        InputError: the file is unreadable, truncated, something else, or holds pickled objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"{path} holds a single array; wanted an .npz with named arrays (numpy.savez)")
        with archive:
            return {name: archive[name] for name in archive.files}
    # zipfile raises RuntimeError for encrypted members and NotImplementedError for unknown compression.
    except (ValueError, EOFError, OSError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) or "pickled" in str(error):
            raise InputError(
                f"{path} holds pickled Python objects, or is not an .npz; pickles can run code and are never loaded: "
                "save numeric arrays with numpy.savez"
            ) from error
        raise InputError(f"{path} is not a readable .npz, or it is truncated: {error}") from error
