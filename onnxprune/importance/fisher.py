"""Importance from per-sample mask gradients: Taylor terms, diagonal and full Fisher of a site, the Fisher of each class.

A mask of 1 that goes to 0 changes the loss of a sample by about -g + h / 2, and the square of g stands for h (Fisher). With drawn labels
the mean of g is zero, so terms of single samples count here, never their mean before the absolute value.
"""

from __future__ import annotations

import numpy as np

from onnxprune.importance.elimination import eliminate

_RIDGE = 1e-2

_PRIOR_SAMPLES = 8
"""A class of few samples is taken to be like all of them, as if it had this many more."""


def diagonal(gradients: np.ndarray) -> np.ndarray:
    """Diagonal empirical Fisher of the masks: mean over samples of the squared gradient, [samples, units] -> [units] (Kwon, eq. 8)."""
    return np.asarray(np.mean(np.square(gradients, dtype=np.float64), axis=0))


def first_order(gradients: np.ndarray) -> np.ndarray:
    """Mean size of the first Taylor term, [samples, units] -> [units] (Michel et al., NeurIPS 2019; summed over weights: LLM-Pruner)."""
    return np.asarray(np.abs(gradients).mean(axis=0, dtype=np.float64))


def second_order(gradients: np.ndarray) -> np.ndarray:
    """Mean size of the Taylor expansion up to its second term, |g - g^2 / 2|, [samples, units] -> [units] (LLM-Pruner's mixed form)."""
    g = gradients.astype(np.float64)
    return np.asarray(np.abs(g - np.square(g) / 2).mean(axis=0))


def eliminated(gradients: np.ndarray) -> np.ndarray:
    """Loss of taking masks away one by one when the other masks move to make up for it, [samples, units] -> [units].

    Optimal brain surgeon on masks of 1 under the full empirical Fisher of the site: the matrix of WoodFisher (Singh and Alistarh, NeurIPS
    2020), the greedy order and the summed losses of CAP (Kuznedelev et al., NeurIPS 2023).
    """
    g = gradients.astype(np.float64)
    units = g.shape[1]
    return eliminate(g.T @ g / len(g), np.ones((units, 1)), np.arange(units), units, _RIDGE).saliency


def worst_class(gradients: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Diagonal Fisher of the class that needs the unit most, [samples, units] -> [units].

    Args:
        classes: class of every sample, int64 [samples].
    """
    squares = np.square(gradients, dtype=np.float64)
    prior = _PRIOR_SAMPLES * squares.mean(axis=0)
    means = [(squares[classes == name].sum(axis=0) + prior) / ((classes == name).sum() + _PRIOR_SAMPLES) for name in np.unique(classes)]
    return np.asarray(np.max(means, axis=0))


def rearrange(gradients: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Kwon's mask rearrangement: swap units of one layer so that the summed gradient of the removed ones is least (their eq. 10).

    One pass over the kept units, most expendable first: take the unit in, put back the removed one whose return lowers the block Fisher
    most. The norm is updated instead of rebuilt, so a pass costs O(units x removed x samples).

    Args:
        gradients: [samples, units] mask gradients.
        removed: indices of the units a search removed.

    Returns:
        Sorted indices of as many removed units, with a block Fisher that is not larger.
    """
    chosen = [int(unit) for unit in removed]
    if not chosen or len(chosen) == gradients.shape[1]:
        return np.array(sorted(chosen), np.int64)
    g = gradients.astype(np.float64)
    norms = np.einsum("su,su->u", g, g)
    total = g[:, chosen].sum(axis=1)
    taken = set(chosen)
    for unit in np.argsort(norms, kind="stable"):
        if int(unit) in taken:
            continue
        members = [*chosen, int(unit)]
        extended = total + g[:, unit]
        # |G - g_k|^2 = |G|^2 - 2 g_k.G + |g_k|^2; the first term is common to all k.
        gain = norms[members] - 2 * (extended @ g[:, members])
        back = members[int(np.argmin(gain))]
        if back != int(unit):
            chosen = [member for member in members if member != back]
            total = extended - g[:, back]
            taken = set(chosen)
    return np.array(sorted(chosen), np.int64)
