"""Ratings against hand-solved cases and a brute-force maximum of the likelihood; wins of several models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from diffalign.data.pictures import ImageRef
from diffalign.data.records import Score
from diffalign.evaluation.pairs import Pair, Shot
from diffalign.evaluation.ratings import POINTS, PRIOR, bradley_terry, standings
from diffalign.evaluation.report import Report, verdicts


def shot(prompt: int, value: float, *, higher: bool = True, seed: int = 0) -> Shot:
    score = Score(value, "share", "1", {"higher_is_better": higher})
    return Shot(
        f"p{prompt}-s{seed}", f"p{prompt}", f"prompt {prompt}", seed, ImageRef(Path("x.png")), {"s": score}
    )


def compared(base: list[float], models: dict[str, list[float]], *, higher: bool = True, per_prompt: int = 1):
    """The standing of scorer `s` on given scores."""

    def shots(values: list[float]) -> list[Shot]:
        return [
            shot(k // per_prompt, value, higher=higher, seed=k % per_prompt) for k, value in enumerate(values)
        ]

    pairs = {m: [Pair(*both) for both in zip(shots(base), shots(v), strict=True)] for m, v in models.items()}
    reports = {m: Report(1, [0], len(p), verdicts(p), {}, [], []) for m, p in pairs.items()}
    return standings(pairs, reports)["s"]


def test_two_models_differ_by_the_log_odds_of_the_win_rate() -> None:
    assert bradley_terry([[0, 30], [70, 0]], prior=0)[1] == pytest.approx(math.log(70 / 30), abs=1e-9)
    assert bradley_terry([[0, 30], [70, 0]])[1] == pytest.approx(math.log(70.5 / 30.5), abs=1e-9)
    assert POINTS * bradley_terry([[0, 1], [10, 0]], prior=0)[1] == pytest.approx(400)


def test_three_models_of_known_strength() -> None:
    """Wins that are exactly what strengths 1, 2 and 4 expect give these strengths back."""
    strength = np.array([1.0, 2.0, 4.0])
    wins = 600 * strength[:, None] / (strength[:, None] + strength[None, :])
    found = bradley_terry(wins, prior=0)  # the diagonal, 300, is not read
    assert found == pytest.approx([0, math.log(2), math.log(4)], abs=1e-9)


@pytest.mark.parametrize("prior", [0.0, PRIOR])
def test_the_likelihood_is_at_its_maximum(prior: float) -> None:
    wins = np.random.default_rng(3).integers(1, 40, (5, 5)).astype(float)

    def negative(free: np.ndarray) -> float:
        r = np.array([0.0, *free])
        gap = r[:, None] - r[None, :]
        return float(((wins + prior) * (1 - np.eye(5)) * np.logaddexp(0, -gap)).sum())

    best = minimize(negative, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    assert bradley_terry(wins, prior=prior)[1:] == pytest.approx(best.x, abs=1e-5)


def test_neither_the_order_of_models_nor_a_stack_of_tables_matters() -> None:
    wins = np.random.default_rng(0).integers(0, 9, (7, 4, 4)).astype(float)
    together = bradley_terry(wins)
    for one, ratings in zip(wins, together, strict=True):
        assert bradley_terry(one) == pytest.approx(ratings, abs=1e-8)
    order = [0, 3, 1, 2]
    assert bradley_terry(wins[0][np.ix_(order, order)]) == pytest.approx(together[0][order], abs=1e-8)
    assert bradley_terry([[0.0]]).tolist() == [0.0]


def test_a_model_that_always_wins_needs_the_prior() -> None:
    never_loses = [[0, 0, 3], [9, 0, 9], [2, 0, 0]]
    with pytest.raises(ValueError, match="never lose to the others"):
        bradley_terry(never_loses, prior=0)
    assert bradley_terry([[0, 0], [10**6, 0]])[1] == pytest.approx(math.log((10**6 + 0.5) / 0.5), abs=1e-6)
    found = bradley_terry(never_loses)
    assert np.isfinite(found).all() and found.argmax() == 1


@pytest.mark.parametrize("wins", [[[0, -1], [1, 0]], [[0, math.nan], [1, 0]], [0, 1], [[0, 1, 2], [0, 1, 2]]])
def test_counts_that_are_none_are_refused(wins: list) -> None:
    with pytest.raises(ValueError, match="wins"):
        bradley_terry(wins)


def test_standing_by_hand() -> None:
    """a beats base 3 of 4, b ties it everywhere; a beats b 3 of 4."""
    standing = compared([0, 0, 0, 0], {"a": [1, 1, 1, -1], "b": [0, 0, 0, 0]})
    assert standing.models == ["base", "a", "b"]
    assert standing.wins["a"]["base"].estimate == standing.wins["a"]["b"].estimate == 0.75
    assert standing.wins["b"]["base"].estimate == 0.5 and standing.wins["base"]["a"].estimate == 0.25
    points = {model: rating.estimate for model, rating in standing.ratings.items()}
    assert points["base"] == 0 and points["b"] == pytest.approx(0, abs=1e-6)
    assert points["a"] == pytest.approx(POINTS * math.log(3.5 / 1.5), abs=1e-6)
    assert standing.ratings["base"].low == standing.ratings["base"].high == 0
    assert standing.ratings["a"].low < points["a"] < standing.ratings["a"].high
    assert standing.unbeaten == []


def test_ties_are_half_a_win_for_either_side() -> None:
    """One win and three ties: 5/2 to 3/2, and the prior's 1/2 on both sides."""
    standing = compared([0, 0, 0, 0], {"a": [1, 0, 0, 0]})
    assert standing.ratings["a"].estimate == pytest.approx(POINTS * math.log(3 / 2), abs=1e-6)
    assert standing.wins["a"]["base"].estimate == 0.625


def test_lower_scores_win_where_the_scorer_says_so() -> None:
    standing = compared([1, 1], {"a": [0, 0]}, higher=False)
    assert standing.wins["a"]["base"].estimate == 1 and standing.unbeaten == [("a", "base")]
    assert standing.ratings["a"].estimate == pytest.approx(POINTS * math.log(2.5 / 0.5), abs=1e-6)


def test_scores_that_are_missing_are_no_games() -> None:
    standing = compared([0, 0, 0], {"a": [1, math.nan, 1], "b": [math.nan, 1, -1]})
    assert standing.wins["a"]["base"].n == 2 and standing.wins["a"]["b"].n == 1
    assert standing.ratings["a"].n == 2 and standing.ratings["base"].n == 3


def test_prompts_are_resampled_whole() -> None:
    """Eight seeds of one prompt are one trial: of other prompts nothing is known, so there is no width."""
    standing = compared([0] * 8, {"a": [1, 1, 1, 1, 1, 1, -1, -1]}, per_prompt=8)
    rating = standing.ratings["a"]
    assert rating.low == rating.high == pytest.approx(rating.estimate)
    spread = compared([0] * 8, {"a": [1, 1, 1, 1, 1, 1, -1, -1]}).ratings["a"]
    assert spread.high - spread.low > 100


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Win rate 2/3 over 60 prompts, that is 120 points; of 30 samples at least 26 cover it."""
    rng = np.random.default_rng(5)
    truth = POINTS * math.log(2)
    covered = 0
    for _ in range(30):
        rating = compared([0] * 60, {"a": np.where(rng.random(60) < 2 / 3, 1, -1).tolist()}).ratings["a"]
        covered += rating.low <= truth <= rating.high
    assert 26 <= covered <= 30
