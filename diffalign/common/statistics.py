"""Intervals and paired tests (numpy only).

All intervals but the jackknife's and that of a share are percentile bootstrap intervals: resample with
replacement, take the statistic, read the quantiles (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13).
Values that belong together (the seeds of a prompt) are named by `clusters` and resampled as a block. NaN and
infinities are refused with ValueError everywhere: callers drop such pairs and count them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ELEMENTS_PER_CHUNK = 4_000_000
Statistic = Callable[..., Any]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: the statistic of the whole sample.
        low: lower end.
        high: upper end.
        n: number of values (pairs for paired measures); with clusters still the number of values.
        level: share of repeated samples whose interval would cover the truth, for example 0.95.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float

    def as_dict(self) -> dict[str, float | int]:
        """Returns the fields as a plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def bootstrap_interval(
    values: ArrayLike,
    *,
    clusters: Sequence[object] | NDArray[Any] | None = None,
    statistic: Statistic = np.mean,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns the percentile bootstrap interval of a statistic.

    Args:
        values: `[n]` finite numbers.
        clusters: `[n]` labels; values with one label are drawn together. None: every value on its own.
        statistic: called as `statistic(resamples, axis=-1)`, like np.mean or np.median.
        num_resamples: how often to resample.
        level: coverage in (0, 1).
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: no values, a value that is not finite, or labels of another length.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    sample = _finite(values, "values")
    blocks = _blocks(sample, clusters)
    rng = np.random.default_rng(seed)
    if statistic is np.mean:
        resampled = _resample_means(blocks, num_resamples, rng)
    else:
        resampled = _resample(blocks, statistic, num_resamples, rng)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(sample, axis=-1)), float(low), float(high), len(sample), level)


def share_interval(count: int, n: int, *, level: float = 0.95) -> Interval:
    """Returns `count / n` with its Wilson score interval, which stays in [0, 1] and needs no resampling.

    With z the normal quantile its centre is (p + z^2 / 2n) / (1 + z^2 / n), its half width
    z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n) (Wilson, J. Am. Stat. Assoc. 22, 1927).

    Raises:
        ValueError: not 0 <= count <= n, or n is 0.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is no share")
    share, z = count / n, NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n, level)


def jackknife_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    *,
    clusters: Sequence[object] | NDArray[Any],
    level: float = 0.95,
) -> Interval:
    """Returns the normal interval of a statistic of rows by leaving out one cluster at a time.

    For statistics of a whole set (a Frechet distance, a diversity): a bootstrap sample holds copies, which a
    set does not, and that alone shifts such a statistic. With G clusters the squared standard error is
    (G - 1) / G times the sum of squares of the G values about their mean (Efron and Tibshirani, chapter 11).

    Args:
        statistic: called with the indices of the rows to keep, smooth in every row; G + 1 times.
        clusters: `[n]` labels; rows with one label are left out together.
        level: coverage in (0, 1).

    Raises:
        ValueError: fewer than two clusters, or a value that is not finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    labels, owner = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(labels)
    if count < 2:
        raise ValueError(f"a jackknife needs two clusters or more, got {count}")
    estimate = float(statistic(np.arange(len(owner))))
    without = np.array([statistic(np.flatnonzero(owner != cluster)) for cluster in range(count)])
    _finite(np.append(without, estimate), "values of the statistic")
    error = math.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(estimate, estimate - reach, estimate + reach, len(owner), level)


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    *,
    tie_epsilon: float = 0.0,
    clusters: Sequence[object] | NDArray[Any] | None = None,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns how often `a` beats `b` (higher is better), ties counting one half, with its interval.

    Args:
        a: `[n]` scores.
        b: `[n]` scores of the same items.
        tie_epsilon: differences of at most this size are ties.
        clusters: see `bootstrap_interval`.
        num_resamples: see `bootstrap_interval`.
        level: see `bootstrap_interval`.
        seed: see `bootstrap_interval`.
    """
    outcome = (_signs(a, b, tie_epsilon) + 1) / 2
    return bootstrap_interval(outcome, clusters=clusters, num_resamples=num_resamples, level=level, seed=seed)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[object] | NDArray[Any] | None = None,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns the mean of `a - b` over paired items, with its interval (arguments as in `win_rate`)."""
    difference = _difference(a, b)
    return bootstrap_interval(
        difference, clusters=clusters, num_resamples=num_resamples, level=level, seed=seed
    )


def sign_test(a: ArrayLike, b: ArrayLike, *, tie_epsilon: float = 0.0) -> float:
    """Returns the two-sided p-value that wins and losses are equally likely (exact binomial, ties dropped).

    It treats items as independent: with several items per prompt average them first. 1.0 without a
    decided item.
    """
    signs = _signs(a, b, tie_epsilon)
    wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
    n, k = wins + losses, min(wins, losses)
    if n == 0 or wins == losses:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Returns the values as float64 `[n]`, n >= 1, all finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {array.shape}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} numbers that are not finite: drop and count them first")
    return array


def _difference(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    left, right = _finite(a, "a"), _finite(b, "b")
    if len(left) != len(right):
        raise ValueError(f"a and b must pair up, got {len(left)} and {len(right)} values")
    return left - right


def _signs(a: ArrayLike, b: ArrayLike, tie_epsilon: float) -> NDArray[np.float64]:
    """Returns 1 for a win of `a`, -1 for a loss, 0 for a tie."""
    if not tie_epsilon >= 0:
        raise ValueError(f"tie_epsilon must be >= 0, got {tie_epsilon}")
    difference = _difference(a, b)
    return np.where(np.abs(difference) <= tie_epsilon, 0.0, np.sign(difference))


def _blocks(
    sample: NDArray[np.float64], clusters: Sequence[object] | NDArray[Any] | None
) -> list[NDArray[np.float64]]:
    """Returns the values grouped by label, in order of first appearance."""
    if clusters is None:
        return [sample[i : i + 1] for i in range(len(sample))]
    if len(clusters) != len(sample):
        raise ValueError(f"clusters must label every value: {len(clusters)} labels, {len(sample)} values")
    members: dict[object, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    return [sample[indices] for indices in members.values()]


def _resample_means(
    blocks: list[NDArray[np.float64]], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns `[num_resamples]` means; a mean needs only each block's sum and size."""
    sums = np.array([block.sum() for block in blocks])
    sizes = np.array([len(block) for block in blocks], dtype=np.float64)
    means = np.empty(num_resamples)
    for start, picks in _picks(len(blocks), len(blocks), num_resamples, rng):
        means[start : start + len(picks)] = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    return means


def _resample(
    blocks: list[NDArray[np.float64]], statistic: Statistic, num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns `[num_resamples]` values of any statistic."""
    results = np.empty(num_resamples)
    same_size = len({len(block) for block in blocks}) == 1
    stacked = np.stack(blocks) if same_size else None
    for start, picks in _picks(len(blocks), sum(map(len, blocks)), num_resamples, rng):
        if stacked is not None:
            drawn = stacked[picks].reshape(len(picks), -1)
            results[start : start + len(picks)] = statistic(drawn, axis=-1)
            continue
        for offset, pick in enumerate(picks):
            results[start + offset] = statistic(np.concatenate([blocks[i] for i in pick]), axis=-1)
    return results


def _picks(
    count: int, elements: int, num_resamples: int, rng: np.random.Generator
) -> Any:  # an iterator of (start, picks [chunk, count])
    """Yields block numbers drawn with replacement, in chunks that bound the memory used."""
    step = max(1, _ELEMENTS_PER_CHUNK // max(1, elements))
    for start in range(0, num_resamples, step):
        chunk = min(step, num_resamples - start)
        yield start, rng.integers(0, count, size=(chunk, count))
