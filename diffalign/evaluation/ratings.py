"""Several models at once: who beats whom, and one number for each that sums it up.

Ratings are those of Bradley and Terry (Biometrika 39, 1952): model i beats j with probability
sigmoid(r_i - r_j), r by maximum likelihood over all comparisons at once, so that their order does not matter
(an Elo score, which is updated game by game, depends on it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.common.statistics import Interval, win_rate
from diffalign.evaluation.pairs import Pair
from diffalign.evaluation.report import Report

POINTS = 400 / math.log(10)
"""Rating points of one unit of log-odds. Convention: as in chess, 400 points are odds of 10 to 1, so that 100
points are a win rate of 64 %; others report the log-odds themselves.
"""

PRIOR = 0.5
"""Wins added for either side between every two models."""

_RESAMPLES = 2000
_STEPS, _CLOSE = 200, 1e-10


@dataclass
class Standing:
    """What one scorer says of several models.

    Attributes:
        models: their names, base first.
        ratings: model -> points above base, with the interval over prompts; base is 0 by definition.
        wins: model -> other model -> how often it beats the other, ties half, with the interval over prompts.
    """

    models: list[str]
    ratings: dict[str, Interval]
    wins: dict[str, dict[str, Interval]]

    @property
    def unbeaten(self) -> list[tuple[str, str]]:
        """Pairs of models of which the first won every comparison: how far they are apart is not known."""
        return [(a, b) for a, row in self.wins.items() for b, rate in row.items() if rate.estimate == 1]


def bradley_terry(wins: ArrayLike, *, prior: float = PRIOR) -> NDArray[np.float64]:
    """Returns the ratings `[..., K]` in units of log-odds, those of the first model 0.

    Without a prior the likelihood has no maximum when a group of models never loses to the rest (Ford,
    American Mathematical Monthly 64, 1957). With one, every two models have drawn `2 prior` comparisons more:
    of two models the difference is log((w + prior) / (l + prior)), which at 1/2 is the log-odds with the
    smallest bias (Haldane, Annals of Human Genetics 20, 1956).

    Args:
        wins: `[..., K, K]`, at [i, j] how often i beat j, a tie 1/2 for both; the diagonal is not read.
        prior: wins added for either side between every two models; 0: none.

    Raises:
        ValueError: counts that are negative or not finite, or without a prior a maximum that does not exist.
    """
    counts = np.asarray(wins, dtype=np.float64)
    size = counts.shape[-1] if counts.ndim >= 2 else 0
    if size < 1 or counts.shape[-2] != size:
        raise ValueError(f"wins must be [..., K, K], got shape {counts.shape}")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and prior >= 0):
        raise ValueError("wins and prior must be finite numbers of at least 0")
    counts = (counts + prior) * (1 - np.eye(size))
    if not _all_reach_all(counts):
        raise ValueError("some models never lose to the others: their ratings are infinite; use a prior")
    games = counts + counts.swapaxes(-1, -2)
    ratings = np.zeros(counts.shape[:-1])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(ratings[..., None, :] - ratings[..., :, None]))
        slope = (counts - games * chance).sum(axis=-1)
        curve = games * chance * (1 - chance)
        information = np.eye(size) * curve.sum(axis=-1)[..., None] - curve
        step = np.linalg.solve(information[..., 1:, 1:], slope[..., 1:, None])[..., 0]
        longest = np.abs(step).max(axis=-1, keepdims=True, initial=0)
        ratings[..., 1:] += step / np.maximum(longest, 1)  # Newton's own step may overshoot far from the top
        if longest.max(initial=0) < _CLOSE:
            return ratings
    raise ValueError(f"the ratings did not settle in {_STEPS} steps")


def _all_reach_all(counts: NDArray[np.float64]) -> bool:
    """Whether in every matrix each model leads to each other one along wins."""
    size = counts.shape[-1]
    reach = (counts > 0) | np.eye(size, dtype=bool)
    for _ in range(size):
        reach = reach @ reach
    return bool(reach.all())


def standings(
    pairs: Mapping[str, Sequence[Pair]],
    reports: Mapping[str, Report],
    *,
    tie_epsilon: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Standing]:
    """Returns scorer -> standing of base and all models, for the scorers that every report has.

    Args:
        pairs: model -> its pairs with base, all in one order.
        reports: model -> its report.
        tie_epsilon: scores that differ by at most this are a tie.
        level: of the intervals.
        seed: of the bootstrap.
    """
    first = next(iter(pairs.values()))
    prompts = [pair.base.prompt for pair in first]
    found = {}
    for name, reward in next(iter(reports.values())).rewards.items():
        if not all(name in report.rewards for report in reports.values()):
            continue
        sign = 1.0 if reward.higher_is_better else -1.0
        columns = {"base": [pair.base.value(name) for pair in first]}
        columns |= {model: [pair.aligned.value(name) for pair in own] for model, own in pairs.items()}
        values = {model: sign * np.array(column) for model, column in columns.items()}
        settings: dict[str, Any] = {"tie_epsilon": tie_epsilon, "level": level, "seed": seed}
        found[name] = Standing(
            models=list(values),
            ratings=_ratings(values, prompts, **settings),
            wins=_wins(values, prompts, settings),
        )
    return found


def _wins(
    values: Mapping[str, NDArray[np.float64]], prompts: Sequence[str], settings: dict[str, Any]
) -> dict[str, dict[str, Interval]]:
    """Returns how often each model beats each other one, where both have a score."""
    found: dict[str, dict[str, Interval]] = {model: {} for model in values}
    for a, left in values.items():
        for b, right in values.items():
            both = np.isfinite(left) & np.isfinite(right)
            if a != b and both.any():
                clusters = [prompt for prompt, has in zip(prompts, both, strict=True) if has]
                found[a][b] = win_rate(left[both], right[both], clusters=clusters, **settings)
    return found


def _ratings(
    values: Mapping[str, NDArray[np.float64]],
    prompts: Sequence[str],
    *,
    tie_epsilon: float,
    level: float,
    seed: int,
) -> dict[str, Interval]:
    """Returns each model's points above the first, with the percentile interval over resampled prompts."""
    table = np.stack(list(values.values()), axis=1)
    gaps = table[:, :, None] - table[:, None, :]
    known = np.isfinite(gaps)
    outcome = np.where(np.abs(gaps) <= tie_epsilon, 0.5, gaps > 0)
    outcome = np.where(known, outcome, 0.0)
    owner = np.unique(np.asarray(prompts), return_inverse=True)[1]
    count, size = int(owner.max()) + 1, len(values)
    blocks = np.zeros((count, size, size))
    np.add.at(blocks, owner, outcome)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    resampled = (drawn @ blocks.reshape(count, -1)).reshape(-1, size, size)
    low, high = np.quantile(
        POINTS * bradley_terry(resampled), [(1 - level) / 2, (1 + level) / 2], axis=0, method="linear"
    )
    points = POINTS * bradley_terry(blocks.sum(axis=0))
    games = np.isfinite(table).sum(axis=0)
    return {
        model: Interval(float(points[k]), float(low[k]), float(high[k]), int(games[k]), level)
        for k, model in enumerate(values)
    }
