"""Intervals and tests against hand-worked numbers and known coverage."""

import math

import numpy as np
import pytest

from diffalign.common.statistics import (
    Interval,
    bootstrap_interval,
    jackknife_interval,
    paired_difference,
    share_interval,
    sign_test,
    win_rate,
)


def test_win_rate_counts_ties_half() -> None:
    interval = win_rate([3, 1, 2, 5], [1, 1, 4, 4])  # win, tie, loss, win
    assert interval.estimate == pytest.approx(2.5 / 4) and interval.n == 4 and interval.level == 0.95
    assert win_rate([1.0, 2.0], [1.1, 1.0], tie_epsilon=0.2).estimate == pytest.approx(0.75)


def test_paired_difference_is_the_mean_difference() -> None:
    interval = paired_difference([3, 5], [1, 1])
    assert interval.estimate == 3.0 and interval.low == 2.0 and interval.high == 4.0


def test_two_values_by_hand() -> None:
    """Of {0, 1} a resample has mean 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    interval = bootstrap_interval([0, 1], level=0.4)  # quantiles 0.3 and 0.7 both fall on 1/2
    assert (interval.low, interval.high) == (0.5, 0.5)
    interval = bootstrap_interval([0, 1], level=0.6)  # quantiles 0.2 and 0.8
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_one_value_has_no_width() -> None:
    assert bootstrap_interval([2.0]) == Interval(2.0, 2.0, 2.0, 1, 0.95)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.06)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.06)


def test_copies_of_a_value_add_nothing_when_they_are_one_cluster() -> None:
    values = np.random.default_rng(1).normal(size=60)
    copied, labels = np.repeat(values, 8), np.repeat(np.arange(60), 8)
    alone = bootstrap_interval(values)
    together = bootstrap_interval(copied, clusters=labels)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert together.n == 480
    naive = bootstrap_interval(copied)
    assert (naive.high - naive.low) < 0.45 * (alone.high - alone.low)  # 1/sqrt(8) = 0.354


def test_clusters_of_unequal_size_weigh_by_size() -> None:
    interval = bootstrap_interval([1, 1, 1, 0], clusters=["a", "a", "a", "b"], level=0.4)
    assert interval.estimate == 0.75 and (interval.low, interval.high) == (0.75, 0.75)


def test_any_statistic_agrees_with_the_quick_way_for_the_mean() -> None:
    values, labels = [1.0, 2, 4, 8, 16, 32], ["a", "a", "b", "c", "c", "c"]

    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis)

    for clusters in (None, labels, ["a", "a", "b", "b", "c", "c"]):
        quick = bootstrap_interval(values, clusters=clusters, num_resamples=200)
        slow = bootstrap_interval(values, clusters=clusters, num_resamples=200, statistic=mean)
        assert slow.as_dict() == pytest.approx(quick.as_dict())
    assert bootstrap_interval([1, 2, 9], statistic=np.median).estimate == 2.0


def test_seed_repeats() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_coverage_of_the_win_rate() -> None:
    """95 % intervals contain the true rate 0.6 in about 95 % of repeated experiments of n = 150."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        wins = rng.random(150) < 0.6
        interval = win_rate(wins, ~wins, num_resamples=400)
        hits += interval.low <= 0.6 <= interval.high
    assert 0.91 <= hits / 300 <= 0.98


def test_sign_test_by_hand() -> None:
    assert sign_test([1, 1, 1, 1, 0], [0, 0, 0, 0, 0]) == pytest.approx(2 / 16)  # 4 wins, a tie dropped
    assert sign_test([1, 1, 1, 0], [0, 0, 0, 1]) == pytest.approx(2 * (1 + 4) / 16)
    assert sign_test([1, 0], [0, 1]) == 1.0 and sign_test([1], [1]) == 1.0
    assert sign_test([1, 5], [0, 0], tie_epsilon=2) == 1.0  # one decided item
    many = sign_test(np.ones(10_000), np.r_[np.zeros(5_100), np.full(4_900, 2.0)])
    assert many == pytest.approx(0.0466, abs=0.001)  # z = 199 / 100 with continuity correction


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 numbers that are not finite"):
        win_rate([1, math.nan], [0, 0])
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="pair up"):
        paired_difference([1, 2], [1])
    with pytest.raises(ValueError, match="clusters must label"):
        bootstrap_interval([1, 2], clusters=["a"])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1, 2], level=95)
    with pytest.raises(ValueError, match="tie_epsilon"):
        win_rate([1], [1], tie_epsilon=-1)


def test_interval_reads_well() -> None:
    interval = Interval(0.71, 0.645, 0.7704, 250, 0.95)
    assert str(interval) == "0.710 [0.645, 0.770] (n=250)"
    assert interval.as_dict() == {"estimate": 0.71, "low": 0.645, "high": 0.7704, "n": 250, "level": 0.95}


def test_the_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    """Of single values the jackknife's standard error of the mean is s / sqrt(n), by hand."""
    values = np.array([1.0, 2.0, 4.0, 5.0])
    found = jackknife_interval(lambda keep: float(values[keep].mean()), clusters=range(4))
    reach = 1.959964 * math.sqrt(np.var(values, ddof=1) / 4)
    assert found.estimate == 3.0 and found.n == 4
    assert [found.low, found.high] == pytest.approx([3.0 - reach, 3.0 + reach], rel=1e-6)


def test_the_jackknife_leaves_out_whole_clusters() -> None:
    values = np.array([1.0, 1.0, 5.0, 5.0])
    found = jackknife_interval(lambda keep: float(values[keep].mean()), clusters=["a", "a", "b", "b"])
    assert found.high - found.estimate == pytest.approx(1.959964 * 2.0, rel=1e-6)
    with pytest.raises(ValueError, match="two clusters"):
        jackknife_interval(lambda keep: 0.0, clusters=["a", "a"])


def test_share_by_hand() -> None:
    """With z = 2 (level 0.9545): 5 of 10 is 0.5 +- 2 sqrt(0.25 / 10 + 4 / 400) / (1 + 4 / 10)."""
    interval = share_interval(5, 10, level=math.erf(math.sqrt(2)))
    half = 2 * math.sqrt(0.025 + 0.01) / 1.4
    assert (interval.estimate, interval.n) == (0.5, 10)
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half))
    # 0 of n ends at z^2 / (n + z^2).
    edge = share_interval(0, 4, level=math.erf(math.sqrt(2)))
    assert (edge.low, edge.high) == pytest.approx((0.0, 4 / 8))
    assert share_interval(4, 4).high == 1.0


def test_share_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for count in rng.binomial(50, 0.3, 2000):
        interval = share_interval(int(count), 50)
        inside += interval.low <= 0.3 <= interval.high
    assert abs(inside / 2000 - 0.95) < 0.02


@pytest.mark.parametrize(("count", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_share_of_nothing(count: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{count} of {n} is no share"):
        share_interval(count, n)
