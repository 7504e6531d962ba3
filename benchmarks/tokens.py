"""Fewer tokens: what every policy costs and gains on the tasks, and how fast it makes image transformers of full size.

``--part tasks`` takes the schedules that the pass tries on a task; texts of a class are joined to 64 real tokens and more, and the
request is the shortest of them. ``--part places`` lets every policy keep the same shares behind the same three places. ``--part sizes``
times random networks of the size of ViT-S/16 and DINOv2-S/14 with seven tenths of the tokens kept behind three places.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.main_job import RESULTS
from benchmarks.tasks import NAMES, Rows, Task, outputs, task
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import choose_objective
from onnxprune.calibration.source import load_calibration
from onnxprune.errors import Refusal
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import Model, load
from onnxprune.graph.token_cut import cut_tokens, study_tokens
from onnxprune.graph.token_plan import POLICIES, RANKING, CannotCut, Policy
from onnxprune.passes.apply import finish
from onnxprune.passes.base import finishing
from onnxprune.passes.int8 import timed
from onnxprune.passes.tokens import Planner, choose_schedules
from onnxprune.runtime.measure import clock_for, ratio, time_sessions
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import Yardstick

OPTIONS = RuntimeOptions(threads=1)
KEEP = 0.7
SHARES = (0.8, 0.65, 0.5)
NEARLY = 1.02
JUDGES = {"vision": 512, "text": 128}
LEAST = 64
"""Real tokens of a joined text."""


def of_task(chosen: Task, policies: Sequence[Policy]) -> dict[str, Any]:
    """Schedules of every policy that are neither slower nor worse than another one: divergence, accuracy, time.

    Accuracy by labels, and ``same``: the share of test rows that the dense model answers alike.
    """
    chosen, given, model, data, yardstick = _prepared(chosen)
    rewrites = finishing("cpu")
    request = _shortest(data)
    dense = _answers(given, chosen)
    result: dict[str, Any] = {"dense": float((dense == chosen.test["labels"]).mean()), "rows": len(dense), "tokens": _lengths(chosen)}
    calibration = data.take(slice(JUDGES[chosen.name], None))
    for policy in policies:
        found = choose_schedules(model, rewrites, yardstick, calibration, request, OPTIONS, policy=policy)
        if isinstance(found, Refusal):
            result[policy] = str(found)
            continue
        rows = []
        for schedule in found:
            answers = _answers(finish(cut_tokens(model, schedule.plan), rewrites), chosen)
            found_ = {"accuracy": float((answers == chosen.test["labels"]).mean()), "same": float((answers == dense).mean())}
            rows.append({**schedule.as_dict(), **found_})
            print(policy, schedule.plan.score, f"{1 / schedule.share:.2f}x", f"{schedule.error:.2g}", found_, flush=True)
        result[policy] = rows
    return result


def of_places(chosen: Task) -> dict[str, dict[str, float]]:
    """Divergence of every policy and score with the same shares of tokens kept three times, by share and policy."""
    chosen, _, model, data, yardstick = _prepared(chosen)
    axis = study_tokens(model)
    assert not isinstance(axis, Refusal)
    places = len(axis.places)
    planner = Planner(model, axis, data.take(slice(JUDGES[chosen.name], None)), OPTIONS)
    stages = sorted({places // 4, places // 2, 3 * places // 4})
    found: dict[str, dict[str, float]] = {}
    for keep in (0.8, 0.7, 0.6):
        shares = [keep ** sum(place >= stage for stage in stages) for place in range(places)]
        for policy in POLICIES:
            for predicted in (False, True) if policy in RANKING else (False,):
                try:
                    plan = planner.plan(policy, predicted, shares)
                    error = yardstick(finish(cut_tokens(model, plan), finishing("cpu")))
                except CannotCut:
                    continue
                found.setdefault(f"{keep}", {})[f"{policy} by {plan.score}"] = error
                print(keep, policy, plan.score, f"{error:.3g}", flush=True)
    return found


def _prepared(chosen: Task) -> tuple[Task, Model, Model, CalibrationData, Yardstick]:
    """The task, with texts joined; the model as given and canonical; all rows, and what judges on the first of them."""
    if "attention_mask" in chosen.test:
        chosen = replace(chosen, calib=joined(chosen.calib), test=joined(chosen.test))
    given = load(chosen.model_path)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(path := Path(folder) / "calib.npz", **chosen.calib)
        data = load_calibration(path, given)
    model, profile = canonicalise(given)
    objective = choose_objective(study(model, profile), None, data.labels, None)
    return chosen, given, model, data, Yardstick(given, data.take(slice(0, JUDGES[chosen.name])), objective, OPTIONS)


def joined(rows: Rows) -> Rows:
    """Texts of one class behind each other, each with its separator, until there are :data:`LEAST` real tokens. The rest goes."""
    texts: list[list[int]] = []
    labels: list[int] = []
    for label in np.unique(rows["labels"]):
        parts: list[int] = []
        for row in np.flatnonzero(rows["labels"] == label):
            ids = rows["input_ids"][row][rows["attention_mask"][row] > 0].tolist()
            parts += ids[1:] if parts else ids
            if len(parts) >= LEAST:
                texts.append(parts)
                labels.append(int(label))
                parts = []
    order = np.random.default_rng(0).permutation(len(texts))
    longest = max(map(len, texts))
    ids = np.array([texts[row] + [0] * (longest - len(texts[row])) for row in order])
    mask = np.arange(longest) < np.array([len(texts[row]) for row in order])[:, None]
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": 0 * ids, "labels": np.array(labels)[order]}


def _shortest(data: CalibrationData) -> Rows:
    """The row with the fewest real tokens, and no padding: leaving that out is no achievement."""
    row = 0 if data.token_mask is None else int(data.token_mask.sum(axis=1).argmin())
    return dict(next(data.take([row]).batches(1, trim=True)).feeds)


def _lengths(chosen: Task) -> list[int] | None:
    """Real tokens of test rows, least and most."""
    mask = chosen.test.get("attention_mask")
    return None if mask is None else [int(mask.sum(axis=1).min()), int(mask.sum(axis=1).max())]


def _answers(model: Model, chosen: Task) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        return outputs(model.save(Path(folder) / "model.onnx"), chosen.test).argmax(1)


def networks(folder: Path) -> Iterator[tuple[str, Path]]:
    """Networks of random weights at 224 pixels: ViT-S/16 (197 tokens), DINOv2-S/14 with layer scale and a resized table (257)."""
    import torch
    from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "num_labels": 100}
    vit = ViTForImageClassification(ViTConfig(intermediate_size=1536, patch_size=16, image_size=224, **small))
    dino = Dinov2ForImageClassification(Dinov2Config(mlp_ratio=4, patch_size=14, image_size=518, **small))
    for name, network in (("ViT-S/16", vit), ("DINOv2-S/14", dino)):
        path = folder / f"{name.replace('/', '-')}.onnx"
        pixels = torch.randn(1, 3, 224, 224)
        torch.onnx.export(
            network.eval(), (pixels,), str(path), input_names=["pixel_values"], output_names=["logits"], opset_version=14, dynamo=False
        )
        yield name, path


def of_sizes() -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in networks(Path(folder)):
            model, _ = canonicalise(load(path))
            rewrites = finishing("cpu")
            axis = study_tokens(model)
            if isinstance(axis, Refusal):
                rows.append({"network": name, "refused": str(axis)})
                continue
            request = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
            models: dict[str, Model] = {"all tokens": finish(model, rewrites)}
            images = np.random.default_rng(1).standard_normal((32, 3, 224, 224)).astype(np.float32)
            planner = Planner(model, axis, CalibrationData({"pixel_values": images}, None, "noise", fixed_rows=1), OPTIONS)
            shares = [KEEP ** sum(block >= start for start in (2, 5, 8)) for block in range(len(axis.places))]
            for policy in POLICIES:
                try:
                    models[policy] = finish(cut_tokens(model, planner.plan(policy, False, shares)), rewrites)
                except CannotCut as error:
                    rows.append({"network": name, "policy": policy, "refused": str(error)})
            calls = {key: timed(value, request, OPTIONS) for key, value in models.items()}
            timings = time_sessions(calls, clock=clock_for(OPTIONS), rounds=41, max_seconds=120.0)
            for policy in list(models)[1:]:
                found = ratio(timings, "all tokens", policy)
                rows.append(
                    {"network": name, "tokens": axis.count, "policy": policy, "speedup": found.median, "interval": [found.low, found.high]}
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(found: dict[str, Any]) -> str:
    """The best schedule of every policy at 80, 65 and 50 % of the time, or less."""
    lines = ["| policy | 80 % | 65 % | 50 % |", "|---|---|---|---|"]
    for policy in POLICIES:
        cells = []
        for share in SHARES:
            rows = [row for row in found[policy] if row["share"] <= share * NEARLY] if isinstance(found.get(policy), list) else []
            best = min(rows, key=lambda row: row["error"], default=None)
            told = "" if best is None else f"{100 * best['share']:.0f} %: {100 * best['accuracy']:.1f} %, KL {best['error']:.2g}"
            cells.append(told or "out of reach")
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ready-made models (default: the project's samples)")
    parser.add_argument("--task", choices=NAMES, default="vision")
    parser.add_argument("--part", choices=["tasks", "places", "sizes"], default="tasks")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="only this policy of the tasks (repeatable)")
    args = parser.parse_args()
    if args.part == "places":
        target = RESULTS / "tokens_places.json"
        known = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps({**known, args.task: of_places(task(args.task, args.models))}, indent=1) + "\n")
        return
    name = f"tokens_{args.task}" if args.part == "tasks" else "tokens_sizes"
    found = of_task(task(args.task, args.models), args.policy or POLICIES) if args.part == "tasks" else of_sizes()
    target = RESULTS / f"{name}.json"
    if args.policy and target.exists():
        found = {**json.loads(target.read_text()), **found}
    target.write_text(json.dumps(found, indent=1) + "\n")
    if args.part == "tasks":
        print(table(found))


if __name__ == "__main__":
    main()
