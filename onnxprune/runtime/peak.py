"""Peak memory of loading and running a model, measured in a process of its own.

Run as ``python -m onnxprune.runtime.peak MODEL FEEDS.npz PROVIDER THREADS``: prints the high-water mark of the process in bytes.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np

from onnxprune.runtime.session import RuntimeOptions, open_session, run

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_TIMEOUT_SECONDS = 300


def peak_memory_bytes(model: Path, feeds: Path, options: RuntimeOptions) -> int | None:
    """High-water mark of resident memory, in bytes, of a fresh Python process that loads ``model`` and runs it twice.

    It includes the interpreter, numpy and onnxruntime (some tens of MB), the same for every model. None where Linux's ``/proc`` is
    missing or the process failed.

    Args:
        feeds: npz of the model's inputs.
    """
    if not _STATUS.exists():
        return None
    command = [sys.executable, "-m", "onnxprune.runtime.peak", str(model), str(feeds), options.provider, str(options.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("peak memory of %s could not be measured: %s", model, error)
        return None


def _main(model: str, feeds: str, provider: str, threads: str) -> None:
    session = open_session(model, RuntimeOptions(provider, int(threads)))
    with np.load(feeds, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for _ in range(2):
        run(session, arrays)
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    sys.stdout.write(f"{int(line.split()[1]) * 1024}\n")


if __name__ == "__main__":
    _main(*sys.argv[1:5])
