"""What a run costs: CPU seconds of the decision against plain forwards over the same samples, and peak memory, each in a fresh process.

python -m benchmarks.cost --threads 2     # a BERT-base of random weights (440 MB), made on first use
python -m benchmarks.cost --model M.onnx --calib data.npz --samples 256
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.main_job import RESULTS

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "cost"

_EXPORT = """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = BertForSequenceClassification(BertConfig(num_labels=4, attn_implementation="sdpa")).eval()
    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
example = (torch.randint(0, 999, (2, 16)), torch.tensor([[1] * 16, [1] * 9 + [0] * 7]))
batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=512)
program = torch.onnx.export(Wrapped(), example, dynamo=True, opset_version=18, input_names=["input_ids", "attention_mask"],
                            output_names=["logits"], dynamic_shapes=({0: batch, 1: tokens},) * 2, verbose=False)
program.save(sys.argv[1])
"""

_FORWARD = """
import json, sys, time
from onnxprune.calibration.source import load_calibration
from onnxprune.graph.model import load
from onnxprune.runtime.session import RuntimeOptions, open_session, run
model = load(sys.argv[1])
data = load_calibration(sys.argv[2], model).take(slice(0, int(sys.argv[3])))
session = open_session(model, RuntimeOptions(threads=int(sys.argv[4])))
batches = list(data.batches(8, trim=True))
run(session, batches[-1].feeds)
start, wall = time.process_time(), time.time()
for batch in batches:
    run(session, batch.feeds)
print(json.dumps({"cpu_s": time.process_time() - start, "wall_s": time.time() - wall}))
"""

_PRUNE = """
import json, resource, sys, time
import onnxprune
start, wall = time.process_time(), time.time()
samples, rounds, threads = map(int, sys.argv[3:6])
result = onnxprune.prune(sys.argv[1], calib=sys.argv[2], samples=samples, rounds=rounds, threads=threads, target_macs="50%", dry_run=True)
print(json.dumps({"cpu_s": time.process_time() - start, "wall_s": time.time() - wall, "rows": result.record["calibration"]["rows"],
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def _python(code: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return dict(json.loads(printed.splitlines()[-1])) if printed.startswith("{") or "\n{" in printed else {}


def bert_base(samples: int, tokens: int) -> tuple[Path, Path]:
    """A BERT-base classifier of random weights and random token rows, both cached."""
    CACHE.mkdir(parents=True, exist_ok=True)
    model, calib = CACHE / "bert-base.onnx", CACHE / f"rows-{samples}x{tokens}.npz"
    if not model.is_file():
        _python(_EXPORT, model)
    rng = np.random.default_rng(0)
    np.savez(
        calib,
        input_ids=rng.integers(1000, 20000, (samples, tokens)),
        attention_mask=(np.arange(tokens) < rng.integers(tokens // 2, tokens + 1, (samples, 1))).astype(np.int64),
    )
    return model, calib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    name = args.model.stem if args.model else "bert-base"
    model, calib = (args.model, args.calib) if args.model else bert_base(round(args.samples / 0.75), args.tokens)
    pruned = _python(_PRUNE, model, calib, args.samples, args.rounds, args.threads)
    forward = _python(_FORWARD, model, calib, int(pruned["rows"]), args.threads)
    row = {
        "model_mb": round(model.stat().st_size / 1e6),
        "rows": pruned["rows"],
        "rounds": args.rounds,
        "threads": args.threads,
        "forward_cpu_s": forward["cpu_s"],
        "forward_wall_s": forward["wall_s"],
        "decision_cpu_s": pruned["cpu_s"],
        "decision_wall_s": pruned["wall_s"],
        "forwards": pruned["cpu_s"] / forward["cpu_s"],
        "forwards_by_wall": pruned["wall_s"] / forward["wall_s"],
        "peak_mb": pruned["peak_mb"],
    }
    print(json.dumps(row, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cost_{name}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
