"""Heads and FFNs found in full-size exports: six models x three exporters x two attention forms, and masked == sliced on each.

python -m benchmarks.sites                # all 36; about a quarter of an hour and 1 GB of scratch space
python -m benchmarks.sites --only bert    # names that contain a word
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.main_job import RESULTS

LAYERS = 12
SIZES = {
    "bert": (768, 12, 3072),
    "minilm": (384, 12, 1536),
    "vit": (768, 12, 3072),
    "deit": (384, 6, 1536),
    "gpt2": (768, 12, 3072),
    "llama": (768, 12, 2048),
}
KV_HEADS = 4


def full_size() -> Any:
    """The test zoo's builder, at the sizes above."""
    from tests import zoo

    zoo.LAYERS, zoo.KV_HEADS, zoo.IMAGE = LAYERS, KV_HEADS, 112
    zoo.HIDDEN = {name: size[0] for name, size in SIZES.items()}
    zoo.HEADS = {name: size[1] for name, size in SIZES.items()}
    zoo.FFN = {name: size[2] for name, size in SIZES.items()}
    return zoo


def check(zoo: Any, name: str) -> dict[str, Any]:
    """Counts of one export, and the worst difference between masked and sliced over three random decisions."""
    from onnxprune.graph.anatomy import study
    from onnxprune.graph.canonical import canonicalise
    from onnxprune.graph.instrument import mask_feeds, masked_model
    from onnxprune.graph.model import load
    from onnxprune.graph.slicing import slice_model
    from onnxprune.runtime.session import open_session, run

    model = load(zoo.path(name))
    start = time.process_time()
    anatomy = study(*canonicalise(model))
    seconds = time.process_time() - start
    architecture = name.split("-")[0]
    _, heads, ffn = SIZES[architecture]
    found = {kind: [site.units for site in anatomy.of_kind([kind])] for kind in ("heads", "ffn")}
    expected = {"heads": [KV_HEADS if architecture == "llama" else heads] * LAYERS, "ffn": [ffn] * LAYERS}
    feeds = zoo.feeds(name, batch=2, seq=16)
    masked = open_session(masked_model(anatomy))
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(3):
        kept = {site.name: np.flatnonzero(rng.random(site.units) < rng.random()) for site in anatomy.sites}
        meant = run(masked, {**feeds, **mask_feeds(anatomy.sites, kept)})[0]
        cut = run(open_session(slice_model(anatomy, kept)), feeds)[0]
        worst = max(worst, float(np.abs(meant - cut).max() / np.abs(meant).max()))
    return {
        "export": name,
        "nodes": len(model.proto.graph.node),
        "found": found == expected,
        "refusals": [refusal.code for refusal in anatomy.refusals],
        "masked_vs_sliced": worst,
        "cpu_s": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this word")
    args = parser.parse_args()
    rows = []
    zoo = full_size()
    for name in zoo.NAMES:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ONNXPRUNE_TEST_CACHE"] = folder
            zoo._folder.cache_clear()
            zoo.torch_model.cache_clear()
            rows.append(check(zoo, name))
        print(json.dumps(rows[-1]), flush=True)
    print(f"{sum(row['found'] for row in rows)} of {len(rows)} with true counts")
    RESULTS.mkdir(exist_ok=True)
    Path(RESULTS / "sites.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
