"""Measures of whole sets of features, as pure functions in float64.

Everywhere x [n, d] is the set that is judged (generated pictures) and y [m, d] the one it is held against
(exemplars, real pictures); arrays or tensors of any float type, rows are items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.common.errors import UserError, unknown

Floats = NDArray[np.float64]
Kernel = Callable[[Floats, Floats], Floats]
"""[a, d] and [b, d] -> [a, b]."""

KERNELS = ("polynomial", "rbf", "linear")

ROWS_AT_A_TIME = 1024
"""Rows of a kernel or distance matrix that are held at once: with 10,000 columns 80 MB."""

MEDIAN_ROWS = 1000
"""Rows that the median heuristic looks at."""

SLACK = 1e-12
"""Relative to |a|^2 + |b|^2: how far outside a ball a point may lie by rounding and still count as inside."""


def frechet_distance(x: Any, y: Any) -> float:
    """Returns the squared Frechet distance of the normal distributions fitted to two sets, >= 0.

    |mean_x - mean_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) (Dowson and Landau 1982; on Inception
    features this is the FID, Heusel et al. 2017, arXiv 1706.08500). The last trace is the nuclear norm of
    Xc Yc^T / sqrt((n - 1)(m - 1)), Xc and Yc the centred sets: it holds for sets smaller than d, where
    S_x S_y has no full rank and the roots of its eigenvalues lose half of the digits.

    Its error is about 1e-14 of the sum of the four terms, so a distance far below them has fewer digits.

    Args:
        x: features [n, d], n >= 2.
        y: features [m, d], m >= 2.

    Convention: squared, as FID and FAD are; covariances divide by n - 1 as in np.cov and
    mseitz/pytorch-fid, not by n. The value depends on n: compare only sets of one size.

    Raises:
        UserError: not 2-D, fewer than 2 rows, not finite, or different d.
    """
    x, y = two_sets(x, y, smallest=2)
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)
    gap = x.mean(0) - y.mean(0)
    x_trace = np.square(x_centred).sum() / (len(x) - 1)
    y_trace = np.square(y_centred).sum() / (len(y) - 1)
    if min(len(x), len(y)) > x.shape[1]:  # both tall: what orthonormal columns leave is d x d
        x_centred, y_centred = triangle(x_centred), triangle(y_centred)
    cross = nuclear_norm(x_centred @ y_centred.T) / np.sqrt((len(x) - 1) * (len(y) - 1))
    return max(0.0, float(gap @ gap + x_trace + y_trace - 2.0 * cross))


def triangle(matrix: Floats) -> Floats:
    """Returns R [min(a, b), b] of the QR factors of a matrix [a, b]: R^T R is the matrix's Gram matrix."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def nuclear_norm(matrix: Floats) -> float:
    """Returns the sum of the singular values of a matrix [a, b]."""
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    if len(tall) > 2 * tall.shape[1]:
        tall = triangle(tall)  # far cheaper than the singular values of a long matrix
    return float(np.linalg.svd(tall, compute_uv=False).sum())


def mmd(x: Any, y: Any, *, kernel: str, unbiased: bool = True, bandwidth: float | None = None) -> float:
    """Returns the squared maximum mean discrepancy of two sets: unscaled, never clamped.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) (Gretton et al. 2012, JMLR 13, section 2.2). The
    unbiased estimate leaves k(x_i, x_i) out and can be below 0. The error is about 1e-14 of the three means.

    Args:
        x: features [n, d], n >= 2 (1 when not unbiased).
        y: features [m, d], m likewise.
        kernel: "polynomial": (x.y / d + 1)^3, which makes this the KID (Binkowski et al. 2018, arXiv
            1801.01401); "rbf": exp(-|x - y|^2 / (2 bandwidth^2)); "linear": x.y.
        unbiased: the U-statistic; otherwise the V-statistic, which is >= 0.
        bandwidth: of "rbf", in units of the features, > 0; None takes `median_distance(y)`.

    Convention: all rows at once, where public KID codes average 100 subsets of 1000 rows, and without
    their factors of 100 or 1000. The median is that of y alone, not of both sets: x must not change the
    ruler it is measured with.

    Raises:
        UserError: unknown kernel, bandwidth <= 0, not 2-D, too few rows, not finite, or different d.
    """
    x, y = two_sets(x, y, smallest=2 if unbiased else 1)
    function, shift = kernel_function(kernel, y, bandwidth)
    x, y = x - shift, y - shift
    cross = cross_sums(x, y, function).sum() / (len(x) * len(y))
    return float(own_mean(x, function, unbiased) + own_mean(y, function, unbiased) - 2.0 * cross)


def kernel_function(name: str, y: Floats, bandwidth: float | None = None) -> tuple[Kernel, Floats]:
    """Returns the kernel as a function of two sets, and the shift [d] to take from every row first.

    The shift keeps the digits of distances; it is 0 for kernels that depend on the origin.
    """
    if bandwidth is not None and (name != "rbf" or not bandwidth > 0):
        raise UserError(f"bandwidth={bandwidth} with kernel {name}: give a number above 0, to rbf alone")
    if name == "linear":
        return (lambda a, b: a @ b.T), np.zeros(y.shape[1])
    if name == "polynomial":
        return _cubic, np.zeros(y.shape[1])
    if name != "rbf":
        raise unknown("kernel", name, KERNELS)
    width = median_distance(y) if bandwidth is None else bandwidth

    def rbf(a: Floats, b: Floats) -> Floats:
        return np.exp(squared_distances(a, b) / (-2.0 * width * width))

    return rbf, y.mean(0)


def _cubic(a: Floats, b: Floats) -> Floats:
    base = a @ b.T / a.shape[1] + 1.0
    return base * base * base


def median_distance(y: Any) -> float:
    """Returns the median Euclidean distance between two different rows, > 0.

    Of more than `MEDIAN_ROWS` rows, those at equal steps through the set are taken.

    Raises:
        UserError: fewer than 2 rows, or half of the pairs are equal rows.
    """
    rows = as_features(y, "features", smallest=2)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MEDIAN_ROWS)).round().astype(np.int64)]
    between = squared_distances(rows - rows.mean(0), rows - rows.mean(0))
    median = float(np.sqrt(np.median(between[np.triu_indices(len(rows), 1)])))
    if median == 0.0:
        raise UserError("the median distance of the features is 0: most rows are equal; give a bandwidth")
    return median


def own_mean(x: Floats, kernel: Kernel, unbiased: bool) -> float:
    """Returns the mean of k over pairs of rows of one set: of different rows only when unbiased."""
    between = diagonal = 0.0
    for start in range(0, len(x), ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, len(x))
        block = kernel(x[start:stop], x[start:])  # k is symmetric: nothing left of the diagonal block
        trace = float(np.trace(block))
        square = float(block[:, : stop - start].sum())
        between += square - trace + 2.0 * (float(block.sum()) - square)
        diagonal += trace
    n = len(x)
    return between / (n * (n - 1)) if unbiased else (between + diagonal) / (n * n)


def cross_sums(x: Floats, y: Floats, kernel: Kernel) -> Floats:
    """Returns for every row of x the sum of k over all rows of y, [n]."""
    starts = range(0, len(x), ROWS_AT_A_TIME)
    return np.concatenate([kernel(x[start : start + ROWS_AT_A_TIME], y).sum(1) for start in starts])


def precision(x: Any, y: Any, k: int = 3) -> float:
    """Returns the share of x that lies in the manifold of y, in [0, 1]: what looks like the exemplars.

    The manifold of a set is the union of balls around its rows, each reaching to the row's k-th nearest other
    row (Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    Args:
        x: features [n, d].
        y: features [m, d], m > k.
        k: neighbours, >= 1.

    Convention: k = 3 as in the paper and its code; a point on a ball's surface is inside, up to rounding
    (`SLACK`).

    Raises:
        UserError: k < 1 or m <= k, not 2-D, not finite, or different d.
    """
    x, y = two_sets(x, y)
    shift = y.mean(0)
    return covered_share(x - shift, y - shift, k)


def recall(x: Any, y: Any, k: int = 3) -> float:
    """Returns the share of y that lies in the manifold of x, in [0, 1]: how much of the exemplars is reached.

    As `precision` with the sets exchanged; here n > k is needed.
    """
    x, y = two_sets(x, y)
    shift = y.mean(0)
    return covered_share(y - shift, x - shift, k)


def covered_share(points: Floats, centres: Floats, k: int) -> float:
    """Returns the share of points [a, d] that lie in one of the balls around centres [b, d]."""
    reach = squared_radii(centres, k)
    starts = range(0, len(points), ROWS_AT_A_TIME)
    blocks = [squared_distances(points[s : s + ROWS_AT_A_TIME], centres, SLACK) for s in starts]
    return float(np.concatenate([(block <= reach).any(1) for block in blocks]).mean())


def squared_radii(y: Floats, k: int) -> Floats:
    """Returns for every row the squared distance to its k-th nearest other row, [m]."""
    if k < 1:
        raise UserError(f"k is {k}: use 1 neighbour or more")
    if len(y) <= k:
        raise UserError(f"{len(y)} features have no {k} neighbours each: give more than k, or lower k")
    found = []
    for start in range(0, len(y), ROWS_AT_A_TIME):
        block = squared_distances(y[start : start + ROWS_AT_A_TIME], y)
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf  # a row is no neighbour of itself
        found.append(np.partition(block, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def squared_distances(a: Floats, b: Floats, slack: float = 0.0, b_norms: Floats | None = None) -> Floats:
    """Returns squared distances [rows of a, rows of b], not below 0 before the slack is taken off.

    Args:
        a: [rows, d].
        b: [rows, d].
        slack: relative to |a|^2 + |b|^2, taken off every distance.
        b_norms: |b|^2 of every row, where they are known.
    """
    norms = np.square(a).sum(1)[:, None] + (np.square(b).sum(1) if b_norms is None else b_norms)
    distances: Floats = np.maximum(norms - 2.0 * (a @ b.T), 0.0)
    return distances - slack * norms if slack else distances


def vendi_score(x: Any) -> float:
    """Returns the Vendi score of a set: the effective number of different items in it, in [1, n].

    The exponential of the Shannon entropy of the eigenvalues of K / n, K the cosine kernel of the rows
    (Friedman and Dieng, "The Vendi Score", TMLR 2023, q = 1). n orthogonal rows give n, n equal rows give 1.

    Args:
        x: features [n, d], array or tensor, of any scale (rows are normalised here), n >= 1.

    Convention: q = 1 and natural logarithms; the cosine kernel, so features must not be centred.

    Raises:
        UserError: not 2-D, empty, not finite, or a row of zeros (its direction is undefined).
    """
    unit = unit_rows(as_features(x, "features"))
    # X X^T and X^T X share their nonzero eigenvalues: take the smaller of the two.
    kernel = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    return effective_number(kernel / len(unit))


def effective_number(kernel: Floats) -> float:
    """Returns the exponential of the entropy of the eigenvalues of a symmetric matrix of trace 1."""
    eigenvalues = np.linalg.eigvalsh(kernel)
    positive = eigenvalues[eigenvalues > 0]  # rounding leaves tiny negatives where the exact value is 0
    return float(np.exp(-(positive * np.log(positive)).sum()))


def unit_rows(features: Floats) -> Floats:
    """Returns the rows [n, d] at length 1.

    Raises:
        UserError: a row is zero.
    """
    norms = np.linalg.norm(features, axis=1)
    if (norms == 0).any():
        raise UserError(f"row {int(np.argmin(norms))} of the features is zero: its cosine is undefined")
    return features / norms[:, None]


def two_sets(x: Any, y: Any, smallest: int = 1) -> tuple[Floats, Floats]:
    """Returns two sets of features of one dimension, each with at least so many rows."""
    x, y = as_features(x, "features x", smallest), as_features(y, "features y", smallest)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features x have {x.shape[1]} columns, features y {y.shape[1]}: use one encoder")
    return x, y


def as_features(x: Any, what: str, smallest: int = 1) -> Floats:
    """Returns features as a finite float64 array [n, d].

    Raises:
        UserError: not 2-D, empty, fewer than `smallest` rows, or not finite.
    """
    detached = x.detach().cpu().double().numpy() if hasattr(x, "detach") else x
    features: Floats = np.asarray(detached, dtype=np.float64)
    if features.ndim != 2 or features.size == 0:
        raise UserError(f"{what} must have shape [n, d] with n, d >= 1, got {list(features.shape)}")
    if len(features) < smallest:
        raise UserError(f"{what}: {len(features)} row, but this needs {smallest} or more: give more")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(f"row {int(np.argmin(finite))} of the {what} is not finite")
    return features
