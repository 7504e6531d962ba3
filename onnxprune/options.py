"""What the user asks for, checked and put into one value."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from onnxprune.calibration.objective import LossSource, Purpose
from onnxprune.calibration.tokenizer import read_words
from onnxprune.errors import InputError
from onnxprune.graph.token_plan import POLICIES
from onnxprune.graph.vocabulary import VocabMap
from onnxprune.importance.registry import CRITERIA
from onnxprune.passes.int8 import Int8Choice
from onnxprune.passes.scope import Settings
from onnxprune.passes.tokens import TokenPolicy
from onnxprune.passes.workbench import Recipe
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search.target import Target, parse_target

PASSES = ("heads", "ffn")
PRESETS = {"fastformers": ("heads", "ffn", "int8")}
"""Pipelines from the literature by name: passes, with equal numbers of units in every layer.

``fastformers``: Kim and Hassan 2020, heads and neurons by gradient, then int8; least squares take the place of its second distillation.
"""


def settings(
    passes: Iterable[str] | None = None,
    *,
    preset: str | None = None,
    target_latency: str | None = None,
    target_macs: str | None = None,
    target_params: str | None = None,
    target_size: str | None = None,
    keep: Sequence[str] = (),
    exclude: Sequence[str] = (),
    samples: int = 1024,
    max_drop: float | str | None = None,
    output_name: str | None = None,
    loss: LossSource = "sampled",
    importance: str = "kfac",
    compensation: str = "refit",
    rounds: int = 4,
    seed: int = 0,
    threads: int = 1,
    provider: str = "cpu",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    purpose: Purpose | None = None,
    finishing: bool = True,
    int8: Int8Choice = "auto",
    keep_ids: str | os.PathLike[str] | None = None,
    vocab_map: VocabMap = "graph",
    token_policy: TokenPolicy = "auto",
    hidden_keep: float | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    uniform: bool = False,
    protect_classes: bool = False,
) -> Settings:
    """Check options and put them into one value.

    Args:
        passes: names, or one string of names with commas; None takes those of ``preset``, or heads and ffn.
        preset: a name in :data:`PRESETS`; it sets ``passes`` and ``uniform``.

    Raises:
        InputError: an option is out of range or contradicts another one, or more than one target is given.
    """
    passes, uniform = _pipeline(passes, preset, uniform)
    given = {"latency": target_latency, "macs": target_macs, "params": target_params, "size": target_size}
    targets = [parse_target(quantity, text) for quantity, text in given.items() if text is not None]  # type: ignore[arg-type]
    if len(targets) > 1:
        raise InputError(f"give one target, not {len(targets)}: {', '.join(map(str, targets))}")
    if importance not in CRITERIA:
        raise InputError(f"unknown importance {importance!r}; known: {', '.join(CRITERIA)}")
    if int8 not in ("auto", "dynamic", "static"):
        raise InputError(f"unknown int8 scheme {int8!r}; known: auto, dynamic, static")
    if compensation not in ("refit", "scale", "none"):
        raise InputError(f"unknown compensation {compensation!r}; known: refit, scale, none")
    for name, value, least in (("samples", samples, 8), ("rounds", rounds, 1), ("threads", threads, 0)):
        if value < least:
            raise InputError(f"--{name} {value} is too small; at least {least}")
    if vocab_map not in ("graph", "file"):
        raise InputError(f"unknown place of the vocabulary map {vocab_map!r}; known: graph, file")
    if (keep_ids is not None or vocab_map != "graph") and "vocab" not in passes:
        raise InputError(f"--keep-ids and --vocab-map say how, but vocab is not among the passes: --passes {','.join((*passes, 'vocab'))}")
    if token_policy not in ("auto", *POLICIES):
        raise InputError(f"unknown token policy {token_policy!r}; known: auto, {', '.join(POLICIES)}")
    if token_policy != "auto" and "tokens" not in passes:
        raise InputError(
            f"--token-policy {token_policy} says how, but tokens is not among the passes: --passes {','.join((*passes, 'tokens'))}"
        )
    if tokenizer is not None:
        if "tokens" not in passes:
            raise InputError(
                f"--tokenizer names tokens that leave, but tokens is not among the passes: --passes {','.join((*passes, 'tokens'))}"
            )
        read_words(Path(tokenizer))  # before hours of search
    if int8 != "auto" and "int8" not in passes:
        raise InputError(f"--int8 {int8} says how, but int8 is not among the passes; add it: --passes {','.join((*passes, 'int8'))}")
    if protect_classes and (not targets or targets[0].auto):
        raise InputError("--protect-classes compares two models of one target: give a target with a value, such as --target-latency 60%")
    return Settings(
        passes=passes,
        target=targets[0] if targets else Target("latency", None),
        keep=tuple(keep),
        exclude=tuple(exclude),
        samples=samples,
        max_drop=parse_share(max_drop, "--max-drop"),
        output=output_name,
        loss=loss,
        recipe=Recipe(importance=importance, compensation=compensation, rounds=rounds, seed=seed, uniform=uniform),
        runtime=RuntimeOptions(provider=provider, threads=threads),
        input_shapes={name: tuple(shape) for name, shape in (input_shapes or {}).items()},
        purpose=purpose,
        finishing=finishing,
        int8=int8,
        keep_ids=Path(keep_ids) if keep_ids is not None else None,
        vocab_map=vocab_map,
        token_policy=token_policy,
        protect_classes=protect_classes,
        hidden_keep=_hidden_keep(hidden_keep, passes),
        tokenizer=Path(tokenizer) if tokenizer is not None else None,
    )


def _pipeline(passes: Iterable[str] | None, preset: str | None, uniform: bool) -> tuple[tuple[str, ...], bool]:
    """Names of the passes, and whether all layers keep equal numbers."""
    if preset is None:
        names = PASSES if passes is None else passes.split(",") if isinstance(passes, str) else passes
        return tuple(name.strip() for name in names), uniform
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if passes is not None:
        raise InputError(f"--preset {preset} stands for --passes {','.join(PRESETS[preset])} with equal layers; give one of the two")
    return PRESETS[preset], True


def _hidden_keep(value: float | str | None, passes: Iterable[str]) -> float:
    """The share of directions that stay, three quarters if nothing is said."""
    share = parse_share(value, "--hidden-keep")
    if share is None:
        return 0.75
    if "hidden" not in passes:
        raise InputError(f"--hidden-keep {value} says how, but hidden is not among the passes: --passes {','.join((*passes, 'hidden'))}")
    if not share:
        raise InputError("--hidden-keep 0% leaves nothing; write a share such as 75%")
    return share


def parse_share(value: float | str | None, option: str) -> float | None:
    """``1%`` or 0.01 as a share in [0, 1)."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise InputError(f"{option} {value!r} is not a share; write 1% or 0.01") from None
    if not 0 <= share < 1:
        raise InputError(f"{option} {value!r} is out of range; write a share such as 1% or 0.01")
    return share
