"""What votes say of themselves: whether people agree, and whether one person's votes run in a circle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.common.statistics import Interval, bootstrap_interval

__all__ = ["Agreement", "agreement", "cycles"]

RESAMPLES = 1000
"""Enough for an interval that is read to two digits; a million pairs take seconds."""


@dataclass(frozen=True)
class Agreement:
    """How well people agree about the same pairs of pictures.

    Attributes:
        votes: all votes of the pairs that two people or more voted on.
        pairwise: for two votes on one pair, the chance that they are equal, its mean over the pairs.
        alpha: Krippendorff's alpha for nominal data: 1 full agreement, 0 as by chance; None where every vote
            is a tie, since nothing can differ then.
    """

    votes: int
    pairwise: Interval
    alpha: float | None


def agreement(ballots: Sequence[tuple[int, int, int]]) -> Agreement | None:
    """Returns the agreement of `(first preferred, second preferred, tie)` counts, one for each pair.

    Of m votes on a pair, n_c for choice c, the share of equal pairs of votes is
    A = sum_c n_c (n_c - 1) / (m (m - 1)). With N votes in all, alpha = 1 - D_o / D_e, where
    D_o = sum over pairs m (1 - A) / N and D_e = sum over c != k of N_c N_k / (N (N - 1)) (Krippendorff,
    Computing Krippendorff's Alpha-Reliability, 2011).

    Convention: which picture of a pair comes first means nothing, so N_first = N_second = half of the
    decided votes; other codes count them in whatever order the file has.

    Ballots of fewer than two votes are left out; None without any.
    """
    counts = np.array([ballot for ballot in ballots if sum(ballot) > 1], dtype=np.float64).reshape(-1, 3)
    if not len(counts):
        return None
    sizes = counts.sum(axis=1)
    equal = (counts * (counts - 1)).sum(axis=1) / (sizes * (sizes - 1))
    total = sizes.sum()
    ties = counts[:, 2].sum()
    half = (total - ties) / 2
    expected = 2 * (half * half + 2 * half * ties) / (total * (total - 1))
    observed = (sizes * (1 - equal)).sum() / total
    return Agreement(
        int(total),
        bootstrap_interval(equal, num_resamples=RESAMPLES),
        1 - float(observed / expected) if expected else None,
    )


def cycles(
    voters: NDArray[np.uint64], winners: NDArray[np.intp], losers: NDArray[np.intp]
) -> list[NDArray[np.intp]]:
    """Returns the votes that lie on circles (a beats b, b beats c, c beats a), one array a circle.

    Vote i of `[n]` says that for voter `voters[i]` picture `winners[i]` beats `losers[i]`. What is returned
    are the ascending indices of the votes inside each strongly connected component of three pictures or
    more. Two votes on one pair that contradict each other are no circle by themselves.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(voters)
    if not n:
        return []
    # A picture is another node for each voter.
    ends = np.stack(
        [np.concatenate([voters, voters]).astype(np.uint64), np.r_[winners, losers].astype(np.uint64)]
    )
    order = np.lexsort(ends)
    ends = ends[:, order]
    new = np.append(True, (ends[:, 1:] != ends[:, :-1]).any(axis=0))
    nodes = np.empty(2 * n, dtype=np.intp)
    nodes[order] = np.cumsum(new) - 1
    start, end = nodes[:n], nodes[n:]
    size = int(nodes.max()) + 1
    graph = coo_array((np.ones(n, dtype=bool), (start, end)), shape=(size, size))
    labels = connected_components(graph, directed=True, connection="strong")[1]
    inside = np.flatnonzero((labels[start] == labels[end]) & (np.bincount(labels)[labels[start]] > 2))
    inside = inside[np.argsort(labels[start[inside]], kind="stable")]
    cuts = np.flatnonzero(np.diff(labels[start[inside]])) + 1
    return sorted((part for part in np.split(inside, cuts) if part.size), key=lambda part: int(part[0]))
