"""The importance criteria by name, with what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Needs = Literal["curvature", "gradients", "moments", "weights"]


@dataclass(frozen=True)
class Criterion:
    name: str
    needs: Needs
    summary: str
    source: str


CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "kfac",
            "curvature",
            "loss after the best update of what stays, by Kronecker factors of its curvature, one unit after the other",
            "Martens and Grosse, ICML 2015; ZipLM, NeurIPS 2023; LLM Surgeon, ICLR 2024",
        ),
        Criterion("fisher", "gradients", "mean squared per-sample gradient of the unit's mask", "Kwon et al., NeurIPS 2022, eq. 8"),
        Criterion(
            "block-fisher", "gradients", "fisher, then the choice inside each layer rearranged by the block Fisher", "Kwon et al., eq. 10"
        ),
        Criterion("magnitude", "weights", "squared norm of the rows that read the unit", "classic"),
        Criterion("energy", "moments", "squared norm of what the unit adds to its layer's output", "KCM, K-prune: representational term"),
        Criterion("obs", "moments", "layer loss after the best update of the other rows", "ZipLM, NeurIPS 2023, one step"),
    )
}
