"""The spectral norm of a matrix in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SMALL = 32  # rows or columns below which all singular values are computed


def spectral_norm(matrix: Any) -> float:
    """The largest singular value of a matrix [m, n], dense or SciPy's sparse, to some percent: by Lanczos's
    method from a fixed start. NaN if entries are not finite, or it does not converge.
    """
    from scipy.sparse import issparse
    from scipy.sparse.linalg import ArpackError, svds

    if not np.isfinite(matrix.data if issparse(matrix) else matrix).all():
        return math.nan
    if min(matrix.shape) < SMALL:
        return float(np.linalg.norm(matrix.toarray() if issparse(matrix) else matrix, 2))
    start = np.random.default_rng(0).normal(size=min(matrix.shape)).astype(np.float32)
    try:
        return float(svds(matrix, k=1, tol=0.05, v0=start, return_singular_vectors=False)[0])
    except ArpackError:
        return math.nan
