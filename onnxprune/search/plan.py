"""The decision as a file: what goes, why, and what was predicted. Applying it needs no data and gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.calibration.npz import read_npz
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.caches import CacheCut
from onnxprune.graph.layers import Substitute
from onnxprune.graph.model import atomic_file
from onnxprune.graph.token_plan import TokenPlan
from onnxprune.graph.vocabulary import VocabMap, Vocabulary
from onnxprune.quantize.form import Int8Form

SCHEMA = "onnxprune.plan/1"
_FACTORS, _INTEGERS, _READS, _BASIS, _STREAM, _MAP, _CONSTANT = "factors", "integers", "reads", "basis", "stream", "map", "constant"
_KINDS = (_FACTORS, _INTEGERS, _READS, _BASIS, _STREAM, _MAP, _CONSTANT)
Changes = Mapping[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class Plan:
    """A pruning decision.

    ``kept[site]`` are the units that stay, of ``units[site]``; ``rewrites`` the graph passes that follow, in order;
    ``caches`` the inputs for keys and values of a decoder that lose heads; ``int8`` what computes in integers, and how (None: nothing
    does); ``vocabularies`` the rows that stay in tables of words, and ``vocab_map`` who maps ids to them;
    ``tokens`` which tokens leave where (None: none); ``example`` the shapes of inputs
    the model is known to run on; ``changes`` the compensated constants by (node name, input slot); ``bases`` the turns inside attention
    heads, of which ``kept`` counts the directions, by site; ``streams`` the bases of narrow residual streams, [width before, width after];
    ``layers`` what stands in for sublayers, by name, in the order in which they went. These, the smoothing factors and rounded weights of
    ``int8`` and the rows that ids read are stored beside the JSON file as ``<name>.weights.npz`` and covered by a hash in it.
    """

    version: str
    input_sha256: str
    passes: tuple[str, ...]
    rewrites: tuple[str, ...]
    kept: Mapping[str, tuple[int, ...]]
    units: Mapping[str, int]
    target: str
    predicted: Mapping[str, float]
    recipe: Mapping[str, Any]
    objective: Mapping[str, Any]
    refusals: tuple[Refusal, ...]
    caches: Mapping[str, CacheCut] = field(default_factory=dict)
    int8: Int8Form | None = None
    vocabularies: tuple[Vocabulary, ...] = ()
    vocab_map: VocabMap = "graph"
    tokens: TokenPlan | None = None
    example: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    changes: Changes = field(default_factory=dict, compare=False, repr=False)
    bases: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    streams: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    layers: Mapping[str, Substitute] = field(default_factory=dict, compare=False, repr=False)

    @property
    def removed(self) -> dict[str, int]:
        """Units removed per site."""
        return {site: self.units[site] - len(kept) for site, kept in self.kept.items()}

    def explain(self) -> str:
        """The decision in plain text, one line a site."""
        width = max((len(site) for site in self.units), default=4)
        lines = [f"target {self.target}; passes {', '.join(self.passes)}; then {', '.join(self.rewrites) or 'nothing'}"]
        for site, units in self.units.items():
            kept = len(self.kept[site])
            lines.append(f"{site:<{width}}  keeps {kept:>5} of {units:>5}  {'#' * round(20 * kept / units):<20}")
        lines += [
            f"{', '.join(words.inputs)}: {len(words.kept):,} of {words.rows:,} rows of word tables stay, ids are mapped "
            f"{'in the graph' if self.vocab_map == 'graph' else 'by the tokenizer'}"
            for words in self.vocabularies
        ]
        if self.tokens is not None and self.tokens.cuts:
            lines.append(f"tokens ({self.tokens.policy}): {self.tokens.describe()}")
        lines += [f"{name}: {basis.shape[1]:,} of {basis.shape[0]:,} directions stay" for name, basis in self.streams.items()]
        lines += [f"{name}: replaced by {stand_in.describe()}" for name, stand_in in self.layers.items()]
        if self.int8 is not None:
            tables = f" and {len(self.int8.tables)} embedding tables" if self.int8.tables else ""
            lines.append(f"{len(self.int8.products)} products{tables} in int8: {self.int8.describe()}")
        lines += [str(refusal) for refusal in self.refusals]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        content = {name: value for name, value in asdict_shallow(self).items() if name not in ("changes", "bases", "streams")}
        content["refusals"] = [refusal.as_dict() for refusal in self.refusals]
        content["kept"] = {site: list(units) for site, units in self.kept.items()}
        content["example"] = {name: list(shape) for name, shape in self.example.items()}
        content["caches"] = {name: asdict(cut) for name, cut in self.caches.items()}
        content["int8"] = None if self.int8 is None else self.int8.as_dict()
        content["tokens"] = None if self.tokens is None else self.tokens.as_dict()
        content["layers"] = {name: len(stand_in.factors) for name, stand_in in self.layers.items()}
        content["vocabularies"] = [
            {"inputs": list(words.inputs), "lookups": list(words.lookups), "rows": words.rows, "kept": len(words.kept)}
            for words in self.vocabularies
        ]
        return {"schema": SCHEMA, **content, "compensation_sha256": digest(self.arrays)}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that is stored beside the JSON file: compensated constants, bases of heads and streams, maps, factors, integers, ids."""
        constants = {f"{node}:{slot}": array for (node, slot), array in self.changes.items()}
        constants |= {f"{number}:{_READS}": words.reads for number, words in enumerate(self.vocabularies)}
        constants |= {f"{site}:{_BASIS}": basis for site, basis in self.bases.items()}
        constants |= {f"{name}:{_STREAM}": basis for name, basis in self.streams.items()}
        for name, stand_in in self.layers.items():
            constants |= {f"{name}/{number}:{_MAP}": factor for number, factor in enumerate(stand_in.factors)}
            constants |= {f"{name}:{_CONSTANT}": stand_in.bias} if stand_in.bias is not None else {}
        if self.int8 is None:
            return constants
        factors = {f"{tensor}:{_FACTORS}": array for tensor, array in self.int8.factors.items()}
        integers = {f"{node}:{_INTEGERS}": array for node, array in self.int8.integers.items()}
        return constants | factors | integers

    @property
    def sha256(self) -> str:
        """Identity of the decision, compensation included."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path`` (JSON) and, if there are compensated weights, ``<path without suffix>.weights.npz`` beside it.

        Raises:
            InputError: the path cannot be written.
        """
        target = Path(path)
        try:
            if arrays := self.arrays:
                with atomic_file(weights_beside(target)) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, **arrays)  # type: ignore[arg-type]
            with atomic_file(target) as temporary:
                temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write the plan to {target}: {error.strerror or error}") from error
        return target


def id_maps(plan: Plan) -> dict[str, Any]:
    """What a tokenizer needs: by vocabulary, the id after (``map``) of every id before, and the id before (``kept``) of every row."""
    return {
        "schema": "onnxprune.vocab/1",
        "plan_sha256": plan.sha256,
        "applied_by": "graph" if plan.vocab_map == "graph" else "tokenizer",
        "vocabularies": [
            {"inputs": list(words.inputs), "map": words.map.tolist(), "kept": words.kept.tolist()} for words in plan.vocabularies
        ],
    }


def save_id_maps(plan: Plan, path: Path) -> None:
    """Write :func:`id_maps` as JSON, if the plan cuts a vocabulary.

    Raises:
        InputError: the path cannot be written.
    """
    if not plan.vocabularies:
        return
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(id_maps(plan)) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the map of ids to {path}: {error.strerror or error}") from error


def maps_beside(model: Path) -> Path:
    """Where the map of ids of a model lies: ``model.onnx`` has ``model.vocab.json``."""
    return model.parent / f"{model.stem}.vocab.json"


def weights_beside(plan: Path) -> Path:
    """Where the compensated weights of a plan file lie: ``plan.json`` has ``plan.weights.npz``."""
    return plan.parent / f"{plan.stem}.weights.npz"


def asdict_shallow(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def digest(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Hash of named arrays, None if there are none."""
    if not arrays:
        return None
    result = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        result.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan and its compensated weights.

    Raises:
        InputError: missing, malformed, of another schema, or its weights do not match it.
    """
    source = Path(path)
    try:
        content = json.loads(source.read_text())
    except FileNotFoundError:
        raise InputError(f"plan not found: {source}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{source} is not a plan: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(
            f"{source} is not a plan of schema {SCHEMA} (found {content.get('schema') if isinstance(content, dict) else 'no object'})"
        )
    wanted = content.pop("compensation_sha256", None)
    content.pop("schema")
    try:
        constants, named = _read_arrays(weights_beside(source)) if wanted else ({}, {kind: {} for kind in _KINDS})
        plan = Plan(
            **{
                **content,
                "passes": tuple(content["passes"]),
                "rewrites": tuple(content["rewrites"]),
                "kept": {site: tuple(int(unit) for unit in units) for site, units in content["kept"].items()},
                "refusals": tuple(Refusal(**refusal) for refusal in content["refusals"]),
                "example": {name: tuple(int(size) for size in shape) for name, shape in content["example"].items()},
                "caches": {name: CacheCut.from_dict(cut) for name, cut in content["caches"].items()},
                "int8": Int8Form.from_dict(content["int8"], named[_FACTORS], named[_INTEGERS]) if content["int8"] is not None else None,
                "vocabularies": tuple(
                    Vocabulary(tuple(words["inputs"]), tuple(words["lookups"]), named[_READS][str(number)])
                    for number, words in enumerate(content["vocabularies"])
                ),
                "vocab_map": content["vocab_map"],
                "tokens": TokenPlan.from_dict(content["tokens"]) if content["tokens"] is not None else None,
                "changes": constants,
                "bases": named[_BASIS],
                "streams": named[_STREAM],
                "layers": {
                    name: Substitute(tuple(named[_MAP][f"{name}/{number}"] for number in range(factors)), named[_CONSTANT].get(name))
                    for name, factors in content["layers"].items()
                },
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source} is damaged: {type(error).__name__} {error}") from error
    if digest(plan.arrays) != wanted:
        raise InputError(
            f"{weights_beside(source)} does not hold the weights that {source.name} was saved with; keep both files of one run together"
        )
    return plan


def _read_arrays(path: Path) -> tuple[dict[tuple[str, int], np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Compensated constants by (node, slot); by kind factors by tensor, integers by node, rows of ids, bases and maps."""
    if not path.is_file():
        raise InputError(f"the plan needs its weights: {path} is missing; copy it next to the plan")
    constants: dict[tuple[str, int], np.ndarray] = {}
    named: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in _KINDS}
    for key, array in read_npz(path).items():
        name, slot = key.rsplit(":", 1)
        if slot in named:
            named[slot][name] = array
        else:
            constants[name, int(slot)] = array
    return constants, named


def recipe_dict(recipe: Any) -> dict[str, Any]:
    return asdict(recipe)
