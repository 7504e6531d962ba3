"""Half of the heads, and half of the feed-forward neurons, by two tools that prune ONNX files: what came back.

python -m pip install onnxsim==0.8.1      # not a dependency of the project
python -m benchmarks.rival                # 24 small exports; some minutes

Each function of onnxsim is called with its defaults (half of the units) on the file as exported and on the file that ``onnxsim.simplify``
makes of it, in its Python and its C++ form. A result is judged by three questions: does it hold fewer parameters; does onnxruntime load and
run it; does it compute what its input computes when the removed rows and columns are set to zero. onnxprune slices the first half of the
units of every site without re-fitting anything, and is judged by the same questions (the third one by its own masked model).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.main_job import RESULTS
from onnxprune.errors import OnnxPruneError
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from tests import zoo
from tests.graph.pruning import Comparison

PINNED = "0.8.1"
MODELS = tuple(
    f"{family}-{attention}-{export}"
    for family in ("bert", "vit", "gpt2", "llama")
    for attention in ("sdpa", "eager")
    for export in ("ts17", "do18", "do23")
)
TOLERANCE = 1e-3
"""Largest difference, relative to the largest output."""
KINDS = ("heads", "ffn")
OUTCOMES = ("pruned", "unchanged", "refused", "not loaded", "other numbers", "raised")
"""``refused``: nothing was pruned and a reason was given; ``unchanged``: nothing was pruned and nothing was said."""

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]


def arrays_of(model: onnx.ModelProto) -> Arrays:
    """Initializers and Constant nodes by the name of their tensor."""
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def parameters(model: onnx.ModelProto) -> int:
    return sum(array.size for array in arrays_of(model).values() if array.dtype == np.float32)


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    return list(session.run(None, {name: array for name, array in feeds.items() if name in wanted}))


def kept_of(before: np.ndarray, after: np.ndarray) -> tuple[int, np.ndarray] | None:
    """(axis, positions) that lead from one array to the other, if it was cut along one axis."""
    axes = [axis for axis in range(before.ndim) if after.ndim == before.ndim and before.shape[axis] != after.shape[axis]]
    if len(axes) != 1:
        return None
    old, new = (np.moveaxis(array, axes[0], 0).reshape(array.shape[axes[0]], -1) for array in (before, after))
    rows = {row.tobytes(): index for index, row in enumerate(np.ascontiguousarray(old))}
    found = [rows.get(row.tobytes(), -1) for row in np.ascontiguousarray(new)]
    return (axes[0], np.array(found)) if -1 not in found else None


def zeroed(model: onnx.ModelProto, pruned: onnx.ModelProto) -> onnx.ModelProto | None:
    """``model`` with the rows and columns at zero that ``pruned`` lacks; None where they cannot be told from the names of the weights."""
    left = arrays_of(pruned)
    meant = onnx.ModelProto()
    meant.CopyFrom(model)
    for tensor in meant.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or tensor.name not in left or left[tensor.name].shape == array.shape:
            continue
        cut = kept_of(array, left[tensor.name])
        if cut is None:
            return None
        mask = np.zeros(array.shape[cut[0]], np.float32)
        mask[cut[1]] = 1
        shape = [1] * array.ndim
        shape[cut[0]] = -1
        tensor.CopyFrom(onnx.numpy_helper.from_array(array * mask.reshape(shape), tensor.name))
    return meant


def judged(model: onnx.ModelProto, pruned: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Result:
    before, after = parameters(model), parameters(pruned)
    if after >= before:
        return {"outcome": "unchanged"}
    result: Result = {"outcome": "pruned", "parameters": round(after / before, 3)}
    try:
        actual = run(pruned, feeds)
    except Exception as error:  # onnxruntime raises its own kinds
        return {**result, "outcome": "not loaded", "message": str(error).splitlines()[0][:300]}
    meant = zeroed(model, pruned)
    if meant is None:
        return {**result, "difference": None}
    expected = run(meant, feeds)
    error = max(float(np.abs(want - got).max() / np.abs(want).max()) for want, got in zip(expected, actual, strict=True))
    return {**result, "difference": error, "outcome": "pruned" if error <= TOLERANCE else "other numbers"}


def theirs(model: onnx.ModelProto, function: Callable[..., Any], feeds: Mapping[str, np.ndarray]) -> Result:
    given = onnx.ModelProto()
    given.CopyFrom(model)
    try:
        return judged(model, function(given), feeds)
    except Exception as error:  # whatever the other tool raises is a result
        return {"outcome": "raised", "message": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def ours(path: Path, kind: str, feeds: Mapping[str, np.ndarray]) -> Result:
    given = load(path)
    try:
        anatomy = study(*canonicalise(given))
        codes = {"heads": "OP1", "ffn": "OP2"}[kind]
        refused = [str(refusal) for refusal in anatomy.refusals if refusal.code.startswith(codes)]
        kept = {site.name: np.arange(site.units // 2) for site in anatomy.sites if site.kind == kind}
        if not kept:
            return {"outcome": "refused" if refused else "unchanged", "message": "; ".join(refused)}
        sliced = Comparison(anatomy, feeds).check(kept)
    except (OnnxPruneError, AssertionError) as error:
        return {"outcome": "raised", "message": f"{type(error).__name__}: {error}"}
    share = parameters(sliced.to_proto()) / parameters(onnx.load(path))
    return {"outcome": "pruned", "parameters": round(share, 3), "sites": len(kept)}


def measure() -> Result:
    import onnxsim

    functions: dict[str, dict[str, Callable[..., Any]]] = {
        "heads": {"Python": onnxsim.apply_attention_head_pruning, "C++": onnxsim.apply_attention_head_pruning_cpp},
        "ffn": {"Python": onnxsim.apply_structured_pruning, "C++": onnxsim.apply_structured_pruning_cpp},
    }
    rows = []
    for name in MODELS:
        path, feeds = zoo.path(name), zoo.feeds(name, batch=1)  # rotary caches as exported run at one row only
        raw = onnx.load(path)
        forms = {"as exported": raw, "simplified": onnxsim.simplify(raw)[0]}
        for model in forms.values():
            run(model, feeds)  # a file that did not run before proves nothing
        for kind in KINDS:
            rows.append({"model": name, "kind": kind, "tool": "onnxprune", "form": "as exported", **ours(path, kind, feeds)})
            for form, model in forms.items():
                for language, function in functions[kind].items():
                    found = theirs(model, function, feeds)
                    rows.append({"model": name, "kind": kind, "tool": f"onnxsim, {language}", "form": form, **found})
                    print(name, kind, form, language, found, flush=True)
    versions = {package: version(package) for package in ("onnxsim", "onnx", "onnxruntime", "torch", "transformers")}
    return {"versions": versions, "tolerance": TOLERANCE, "table": table(rows), "rows": rows}


def table(rows: list[Result]) -> list[Result]:
    """Outcomes counted by kind, tool and form of the file."""
    cells: dict[tuple[str, str, str], Counter[str]] = {}
    for row in rows:
        cells.setdefault((row["kind"], row["tool"], row["form"]), Counter())[row["outcome"]] += 1
    return [
        {
            "kind": kind,
            "tool": tool,
            "form": form,
            **{outcome: counts[outcome] for outcome in OUTCOMES},
            "left": _left(rows, kind, tool, form),
        }
        for (kind, tool, form), counts in sorted(cells.items(), key=lambda item: (item[0][0] != "heads", item[0]))
    ]


def _left(rows: list[Result], kind: str, tool: str, form: str) -> list[float]:
    """Smallest and largest share of the parameters left in pruned models."""
    shares = [row["parameters"] for row in rows if (row["kind"], row["tool"], row["form"], row["outcome"]) == (kind, tool, form, "pruned")]
    return [min(shares), max(shares)] if shares else []


def markdown(found: Result) -> str:
    lines = [f"| | tool | file | {' | '.join(OUTCOMES)} | parameters left |", f"|---|---|---|{'---|' * len(OUTCOMES)}---|"]
    for row in found["table"]:
        left = " to ".join(f"{100 * share:.0f}%" for share in row["left"])
        lines.append(
            f"| {row['kind']} | {row['tool']} | {row['form']} | {' | '.join(str(row[outcome]) for outcome in OUTCOMES)} | {left} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if version("onnxsim") != PINNED:
        print(f"onnxsim {version('onnxsim')} is installed; the published table is of {PINNED}")
    found = measure()
    (RESULTS / "rival.json").write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
