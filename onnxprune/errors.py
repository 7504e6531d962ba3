"""Errors and refusals: the only two ways in which onnxprune says no.

An :class:`OnnxPruneError` stops the command and carries the exit code the shell sees. A :class:`Refusal` is a value: it says why one
site is left as it is, and travels with the plan and the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from onnxprune.refusals import CODES


class OnnxPruneError(Exception):
    """Base of every error a user can act on. ``exit_code`` is what the command line returns.

    ``record`` holds what was found before it failed, in the form of run.json, if the work got that far.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, record: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.record = record


class InputError(OnnxPruneError):
    """The model, the data or an option is wrong; nothing was run."""

    exit_code = 2


class TargetError(OnnxPruneError):
    """No model of this graph reaches the target asked for."""

    exit_code = 3


class GateError(OnnxPruneError):
    """The pruned model failed verification or lost more accuracy than allowed."""

    exit_code = 4


class NothingPrunable(OnnxPruneError):
    """The graph has no site for the passes asked for."""

    exit_code = 5


class RuntimeUnavailable(OnnxPruneError):
    """onnxruntime, or the execution provider asked for, is missing or did not start."""

    exit_code = 6


@dataclass(frozen=True)
class Refusal:
    """Why a site that looks prunable is left alone.

    ``code`` stands in :data:`onnxprune.refusals.CODES`; ``hint`` says what a user can do about it, by default the way out named there.

    Raises:
        ValueError: the code is not registered.
    """

    code: str
    site: str
    reason: str
    hint: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"refusal code {self.code!r} is not registered")
        if not self.hint:
            object.__setattr__(self, "hint", CODES[self.code].hint)

    def __str__(self) -> str:
        return f"{self.code} {self.site}: {self.reason}; {self.hint}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
