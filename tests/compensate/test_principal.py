"""Principal bases: orthonormal up to their scale, best for the energy they hold, and free of means where norms remove them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.compensate.principal import left_out, principal_basis


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [2, 7, 12])
def test_rows_keep_the_mean_square_of_their_projection(centred: bool, width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 12))
    rows = rows - rows.mean(1, keepdims=True) if centred else rows
    basis = principal_basis(rows.T @ rows, width, centred=centred).astype(np.float64)
    inside = rows @ basis
    projected = inside @ basis.T * (12 / width)
    np.testing.assert_allclose((inside**2).mean(1), (projected**2).mean(1), rtol=1e-5, atol=1e-9)
    if centred:
        np.testing.assert_allclose(inside.mean(1), 0, atol=1e-5)
    if width == 12:
        np.testing.assert_allclose(projected, rows, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_a_stream_in_few_directions_is_held_by_as_many(centred: bool) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((80, 3)) @ rng.standard_normal((3, 12))
    rows = rows - rows.mean(1, keepdims=True) if centred else rows
    moment = rows.T @ rows
    width = 4 if centred else 3
    assert left_out(moment, principal_basis(moment, width, centred=centred), centred=centred) < 1e-5
    assert left_out(moment, principal_basis(moment, width - 1, centred=centred), centred=centred) > 1e-3
