"""Rewards of whole sets of features, as pure functions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def vendi_score(x: Any) -> float:
    """Returns the Vendi score of a set: the effective number of different items in it, in [1, n].

    The exponential of the Shannon entropy of the eigenvalues of K / n, K the cosine kernel of the rows
    (Friedman and Dieng, "The Vendi Score", TMLR 2023, q = 1). n orthogonal rows give n, n equal rows give 1.

    Args:
        x: features [n, d], array or tensor, of any scale (rows are normalised here), n >= 1.

    Convention: q = 1 and natural logarithms; the cosine kernel, so features must not be centred.

    Raises:
        ValueError: not 2-D, empty, not finite, or a row of zeros (its direction is undefined).
    """
    features = _as_float64(x)
    norms = np.linalg.norm(features, axis=1)
    if (norms == 0).any():
        raise ValueError(f"row {int(np.argmin(norms))} of the features is zero: its cosine is undefined")
    unit = features / norms[:, None]
    # X X^T and X^T X share their nonzero eigenvalues: take the smaller of the two.
    kernel = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    eigenvalues = np.linalg.eigvalsh(kernel / len(unit))
    positive = eigenvalues[eigenvalues > 0]  # rounding leaves tiny negatives where the exact value is 0
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _as_float64(x: Any) -> np.ndarray:
    """Returns features as a finite float64 array [n, d]."""
    detached = x.detach().cpu().double().numpy() if hasattr(x, "detach") else x
    features = np.asarray(detached, dtype=np.float64)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(f"features must have shape [n, d] with n, d >= 1, got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError(
            f"row {int(np.argmin(np.isfinite(features).all(axis=1)))} of the features is not finite"
        )
    return features
