"""The spectral norm, against NumPy's singular values."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from darex_jax.core.spectrum import spectral_norm


@pytest.mark.parametrize("of", [np.asarray, csr_matrix], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (30, 8)])
def test_the_largest_singular_value(shape, of):
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=shape) * np.linspace(1, 3, shape[1]) * (rng.random(shape) < 0.5)).astype(
        np.float32
    )
    assert spectral_norm(of(matrix)) == pytest.approx(np.linalg.norm(matrix, 2), rel=0.03)
    assert spectral_norm(of(matrix)) == spectral_norm(of(matrix))
    matrix[3, 2] = np.inf
    assert np.isnan(spectral_norm(of(matrix)))
