"""What the export needs beyond the core, and keeping it quiet."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnxprune.errors import InputError

PACKAGES = ("torch", "transformers", "safetensors")
_NOISY = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


def require_extra() -> None:
    """
    Raises:
        InputError: a package of the ``export`` extra is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"export needs {', '.join(missing)}, which {_is(missing)} not installed; run: pip install 'onnxprune[export]'")


def require_pillow() -> None:
    """
    Raises:
        InputError: Pillow is missing, which reads images.
    """
    if importlib.util.find_spec("PIL") is None:
        raise InputError("a folder of images needs Pillow, which is not installed; run: pip install pillow")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, progress bars and log lines of torch and transformers: what matters is checked, and becomes an error."""
    from transformers import utils

    told: Any = utils.logging  # its functions carry no types
    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    told.set_verbosity_error()
    told.disable_progress_bar()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
