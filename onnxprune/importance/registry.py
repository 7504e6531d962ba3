"""The importance criteria by name, with what each needs and the unit it counts in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxprune.importance import fisher, local

Needs = Literal["curvature", "gradients", "classes", "measured", "covariance", "moments", "weights"]


@dataclass(frozen=True)
class Criterion:
    """How units are scored.

    ``score`` is the formula for one site, None where more than a formula is needed. It takes mask gradients [samples, units] (for
    ``classes`` also the class of every sample), or a matrix [positions, out], the mean or the covariance of what it reads, labels and the
    number of units. ``comparable``: scores of all sites are in one unit; otherwise sites are weighed by their parameters.
    """

    name: str
    needs: Needs
    summary: str
    source: str
    score: Callable[..., np.ndarray] | None = None
    comparable: bool = True


CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "kfac",
            "curvature",
            "loss after the best update of what stays, by Kronecker factors of its curvature, one unit after the other",
            "Martens and Grosse, ICML 2015; ZipLM, NeurIPS 2023; LLM Surgeon, ICLR 2024",
        ),
        Criterion(
            "fisher",
            "gradients",
            "mean squared per-sample gradient of the unit's mask: optimal brain damage",
            "LeCun et al., 1989; Kwon et al., NeurIPS 2022, eq. 8",
            fisher.diagonal,
        ),
        Criterion(
            "block-fisher",
            "gradients",
            "fisher, then the choice inside each layer rearranged by the block Fisher",
            "Kwon et al., eq. 10",
            fisher.diagonal,
        ),
        Criterion(
            "cap",
            "gradients",
            "loss under the full Fisher of the site's masks, one unit after the other, the others making up for it",
            "WoodFisher, NeurIPS 2020; CAP, NeurIPS 2023",
            fisher.eliminated,
        ),
        Criterion("taylor", "gradients", "mean size of the gradient of the unit's mask", "Michel et al., NeurIPS 2019", fisher.first_order),
        Criterion("taylor2", "gradients", "taylor with the second term of the expansion", "LLM-Pruner, NeurIPS 2023", fisher.second_order),
        Criterion(
            "classwise",
            "classes",
            "fisher of the class that needs the unit most, classes as the dense model predicts them",
            "after X-Pruner, CVPR 2023",
            fisher.worst_class,
        ),
        Criterion(
            "leave-one-out",
            "measured",
            "heads: measured growth of the divergence from the dense model when one goes; other sites: fisher",
            "after OPTIN, ICLR 2024",
            fisher.diagonal,
        ),
        Criterion("magnitude", "weights", "squared norm of the rows that read the unit", "classic", local.magnitude, comparable=False),
        Criterion("wanda", "moments", "sum of |weight| times the norm of what it reads", "Wanda, ICLR 2024", local.wanda, comparable=False),
        Criterion(
            "variance",
            "covariance",
            "variance of the activation times the squared norm of the rows that read it",
            "FLAP, AAAI 2024",
            local.variance,
            comparable=False,
        ),
        Criterion(
            "energy",
            "moments",
            "squared norm of what the unit adds to its layer's output",
            "KCM, K-prune: representational term",
            local.energy,
        ),
        Criterion("obs", "moments", "layer loss after the best update of the other rows", "ZipLM, NeurIPS 2023, one step", local.obs),
    )
}
