"""Importance from per-sample mask gradients: diagonal Fisher, and the block Fisher of Kwon et al. (NeurIPS 2022)."""

from __future__ import annotations

import numpy as np


def diagonal(gradients: np.ndarray) -> np.ndarray:
    """Diagonal empirical Fisher of the masks: mean over samples of the squared gradient, [samples, units] -> [units] (Kwon, eq. 8)."""
    return np.asarray(np.mean(np.square(gradients, dtype=np.float64), axis=0))


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
