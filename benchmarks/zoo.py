"""What every width pass finds in every architecture as every exporter writes it, and whether slices compute what masks say.

python -m benchmarks.zoo                  # cells that are missing or not fully pruned; others keep their result
python -m benchmarks.zoo --again          # all cells; about half an hour
python -m benchmarks.zoo --only llama     # rows or columns whose name contains a word, those that have a result as well
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.main_job import RESULTS
from onnxprune.errors import InputError, OnnxPruneError, Refusal
from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise, check_float
from onnxprune.graph.model import Model, atomic_file, load
from onnxprune.passes.base import WidthPass, registry
from onnxprune.runtime.session import open_session, run
from tests.architectures import ARCHITECTURES, Architecture, derived, exports, feeds
from tests.graph.pruning import Comparison, corner_cases, random_kept

MASKS = 18
CODES = {"heads": ("OP1",), "ffn": ("OP2", "OP6"), "channels": ("OP3",), "vocab": ("OP5",)}
"""What refusals of a kind begin with; experts are FFNs."""
Cell = dict[str, Any]


def columns_of(architecture: Architecture) -> tuple[str, ...]:
    return (*exports.variants_of(architecture), *derived.variants_of(architecture))


def check(architecture: Architecture, variant: str) -> Cell:
    """One cell: ``state`` is ``export fails``, ``error`` or ``studied``, with what was found and compared."""
    cell: Cell = {"architecture": architecture.name, "family": architecture.family, "variant": variant}
    started = time.process_time()
    try:
        file = derived.path(architecture.name, variant) if variant in derived.MAKERS else exports.path(architecture.name, variant)
    except exports.ExportFails as error:
        return {**cell, "state": "export fails", "reason": str(error)}
    model, inputs = load(file), feeds(architecture)
    try:
        check_float(model)
        anatomy = study(*canonicalise(model))
    except OnnxPruneError as error:
        problem = _trouble(model, inputs)
        if problem:
            return {**cell, "state": "export fails", "reason": f"onnxruntime cannot run the file: {problem}"}
        return {**cell, "state": "error", "reason": str(error)}
    cell |= {"state": "studied", "kinds": _kinds(architecture, anatomy), "changed_by_canonical": _changed(model, anatomy.model, inputs)}
    cell |= _compared(anatomy, inputs, f"{architecture.name} {variant}") if anatomy.sites else {"masks": 0, "troubles": []}
    return {**cell, "cpu_s": round(time.process_time() - started, 1)}


def _kinds(architecture: Architecture, anatomy: Anatomy) -> dict[str, Any]:
    result = {}
    for kind in (item.kind for item in registry().values() if isinstance(item, WidthPass) and item.kind in CODES):
        expected = architecture.sites.get(kind, ())
        sites = anatomy.of_kind([kind])
        found = [site.units for site in sites for _ in site.consumers]
        refusals = [refusal for refusal in anatomy.refusals if refusal.code.startswith(CODES[kind])]
        result[kind] = {
            "expected": len(expected),
            "as_expected": sum((Counter(expected) & Counter(found)).values()),
            "found": found,
            "sites": len(sites),
            "refusals": [_told(refusal) for refusal in refusals],
        }
    return result


def _told(refusal: Refusal) -> dict[str, str]:
    return {"code": refusal.code, "site": refusal.site, "reason": refusal.reason}


def _trouble(model: Model, inputs: Mapping[str, np.ndarray]) -> str:
    try:
        run(open_session(model), {name: inputs[name] for name in model.input_names})
    except InputError as error:
        return str(error)
    return ""


def _changed(model: Model, canonical: Model, inputs: Mapping[str, np.ndarray]) -> float | None:
    """Largest difference of an output from the canonical form, over its largest value; None where the original does not run."""
    try:
        before = run(open_session(model, optimize=False), {name: inputs[name] for name in model.input_names})
    except InputError:
        return None
    after = run(open_session(canonical, optimize=False), {name: inputs[name] for name in canonical.input_names})
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in zip(after, before, strict=True))


def _compared(anatomy: Anatomy, inputs: Mapping[str, np.ndarray], name: str) -> Cell:
    """Corner cases, random choices over all sites, and over those of each kind alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kinds = sorted({site.kind for site in anatomy.sites})
    cases = corner_cases(anatomy.sites)
    while len(cases) < MASKS:
        turn = len(cases) % (1 + len(kinds))
        cases.append(random_kept(anatomy.sites if turn == 0 else anatomy.of_kind([kinds[turn - 1]]), rng))
    compare = Comparison(anatomy, dict(inputs))
    troubles = []
    for number, kept in enumerate(cases):
        try:
            compare.check(kept, optimize=number % 3 == 0)
        except AssertionError as error:
            troubles.append(f"masked and sliced differ: {str(error).splitlines()[0] if str(error) else 'assertion'}")
        except Exception as error:  # a slice that cannot be made, or that onnxruntime does not load: the table counts them
            troubles.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return {"masks": len(cases), "troubles": troubles}


def complete(cell: Cell) -> bool:
    """Everything that the configuration holds was found, and every slice computed what its mask says."""
    if cell["state"] != "studied" or cell["troubles"]:
        return False
    return all(kind["as_expected"] == kind["expected"] == len(kind["found"]) for kind in cell["kinds"].values())


def main() -> None:
    from benchmarks.zoo_table import write_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="architectures or variants whose name contains this word")
    parser.add_argument("--again", action="store_true", help="cells that have a result as well")
    args = parser.parse_args()
    target = Path(RESULTS / "zoo.json")
    cells: dict[tuple[str, str], Cell] = {}
    if target.exists():
        cells = {(cell["architecture"], cell["variant"]): cell for cell in json.loads(target.read_text())}
    wanted = [(entry, variant) for entry in ARCHITECTURES.values() for variant in columns_of(entry)]
    cells = {(entry.name, variant): cells[entry.name, variant] for entry, variant in wanted if (entry.name, variant) in cells}
    for entry, variant in wanted:
        key = entry.name, variant
        if not any(args.only in word for word in key) or (not (args.again or args.only) and key in cells and complete(cells[key])):
            continue
        cells[key] = check(entry, variant)
        print(json.dumps(cells[key]), flush=True)
        with atomic_file(target) as temporary:
            ordered = [cells[entry.name, name] for entry, name in wanted if (entry.name, name) in cells]
            temporary.write_text("[\n" + ",\n".join(json.dumps(cell) for cell in ordered) + "\n]\n")
    write_page(list(cells.values()))


if __name__ == "__main__":
    main()
