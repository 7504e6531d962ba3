"""A folder of images to pixels, by the image processor of the model's folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from onnxprune.errors import InputError
from onnxprune.export.folder import ModelFolder
from onnxprune.export.signature import Signature

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BATCH = 64


def find_images(folder: Path) -> list[Path]:
    """
    Raises:
        InputError: there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise InputError(f"no images in {folder}; wanted {', '.join(ENDINGS)}")
    return found


def encode(folder: ModelFolder, signature: Signature, images: Sequence[Path]) -> dict[str, np.ndarray]:
    """float32 ``[images, channels, height, width]``.

    Raises:
        InputError: there is no image processor, it makes other sizes than the network takes, or an image is damaged.
    """
    if not folder.has_image_processor:
        raise InputError(f"no preprocessor_config.json in {folder.path}; without it nobody knows how images are scaled")
    loader: Any = AutoImageProcessor  # carries no types
    try:
        processor = loader.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the damaged file leads to
        raise InputError(f"the image processor in {folder.path} cannot be loaded: {error}") from error
    (item,) = signature.inputs
    wanted = item.dims[1:]
    parts = list(_pixels(processor, images, "L" if wanted[0] == 1 else "RGB"))
    for part in parts:
        if part.shape[1:] != wanted:
            raise InputError(f"the image processor in {folder.path} makes {list(part.shape[1:])}; the network takes {list(wanted)}")
    return {item.name: np.concatenate(parts)}


def _pixels(processor: Any, images: Sequence[Path], mode: str) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _BATCH):
        opened = [_open(path, mode) for path in images[start : start + _BATCH]]
        yield np.asarray(processor(images=opened, return_tensors="np")["pixel_values"], np.float32)


def _open(path: Path, mode: str) -> Any:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image: {error}") from error
