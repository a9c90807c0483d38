"""Measures of sets: closed forms, hand-worked numbers, limits, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import frechet_distance, mmd, precision, recall, vendi_score


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_orthonormal_rows_count_fully():
    assert vendi_score(np.eye(7)) == pytest.approx(7, abs=1e-12)
    assert vendi_score(np.eye(5, 9) * 3.0) == pytest.approx(5, abs=1e-12)


def test_duplicates_count_once():
    assert vendi_score(np.ones((6, 4))) == pytest.approx(1, abs=1e-9)
    assert vendi_score([[1.0, 2.0]]) == pytest.approx(1, abs=1e-12)


def test_two_rows_by_hand():
    # cosine 0.6: the kernel [[1, .6], [.6, 1]] / 2 has eigenvalues 0.8 and 0.2.
    expected = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert vendi_score([[1, 0], [0.6, 0.8]]) == pytest.approx(expected, abs=1e-12)
    # Opposite rows are one direction: eigenvalues 1 and 0.
    assert vendi_score([[1, 0], [-1, 0]]) == pytest.approx(1, abs=1e-9)


def test_groups_by_hand():
    # Three copies of one row and one orthogonal row: eigenvalues 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert vendi_score([[1, 0], [1, 0], [1, 0], [0, 1]]) == pytest.approx(expected, abs=1e-12)


def test_many_rows_and_many_columns_take_the_same_value():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(20, 30))
    padded = np.concatenate([wide, np.zeros((20, 5))], axis=1)
    tall = np.concatenate(
        [wide] * 3
    )  # 60 rows of 30: the other product is used; copies do not change the score
    assert vendi_score(padded) == pytest.approx(vendi_score(wide), rel=1e-10)
    assert vendi_score(tall) == pytest.approx(vendi_score(wide), rel=1e-10)


def test_order_and_scale_do_not_matter():
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    expected = vendi_score(rows)
    assert 1 < expected < 5
    assert vendi_score(rows.flip(0) * torch.arange(1, 13)[:, None]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], "row 1 .* zero"),
        ([[1.0, 0.0], [math.nan, 0.0]], "row 1 .* not finite"),
        (np.zeros((0, 3)), "shape"),
        (np.ones(3), "shape"),
    ],
)
def test_what_has_no_score_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        vendi_score(x)


def test_frechet_of_two_lines_by_hand():
    """Means 0 and 5, variances 2 and 32 (N - 1): 25 + (sqrt 2 - sqrt 32)^2 = 25 + (3 sqrt 2)^2 = 43."""
    assert frechet_distance([[-1.0], [1.0]], [[1.0], [9.0]]) == pytest.approx(43, abs=1e-12)


def test_frechet_of_axes_by_hand():
    """Covariances diag(2, 8)/3 and diag(8, 2)/3, gap (3, 4): 25 + 2 (sqrt(8/3) - sqrt(2/3))^2 = 25 + 4/3."""
    x = np.array([[1, 0], [-1, 0], [0, 2], [0, -2]])
    assert frechet_distance(x, x[:, ::-1] + [3, 4]) == pytest.approx(25 + 4 / 3, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 5), (6, 200, 5), (300, 12, 5)])
def test_frechet_is_the_formula_with_a_matrix_root(n, m, d):
    x, y = normal(0, n, d) @ normal(1, d, d), normal(2, m, d) + 0.5
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s_x @ s_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x + s_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(torch.from_numpy(x), y) == frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_fewer_items_than_columns():
    """Two rows c +- v: S_x = 2 v v^T has rank 1, so tr (S_x S_y)^(1/2) = sqrt(2 v^T S_y v)."""
    v, c, y = normal(0, 30), normal(1, 30), normal(2, 20, 30)
    s_y = np.cov(y.T)
    gap = c - y.mean(0)
    expected = gap @ gap + 2 * v @ v + np.trace(s_y) - 2 * math.sqrt(2 * v @ s_y @ v)
    assert frechet_distance([c + v, c - v], y) == pytest.approx(expected, rel=1e-13)


def test_frechet_of_a_set_with_itself_moved_and_scaled():
    """|t|^2 for a shift by t, (1 - s)^2 tr S for a scaling by s about the mean, 0 for nothing."""
    for x in (normal(0, 8, 20), normal(0, 50, 6)):
        mean, trace = x.mean(0), np.trace(np.cov(x.T))
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12 * trace)
        assert frechet_distance(x, x[::-1] + 2.0) == pytest.approx(4.0 * x.shape[1], rel=1e-12)
        assert frechet_distance(x, mean + 3 * (x - mean)) == pytest.approx(4 * trace, rel=1e-12)
        assert frechet_distance(x + 1e6, 2 * x - mean + 1e6) == pytest.approx(trace, rel=1e-6)


def test_frechet_does_not_see_empty_columns_or_rotations():
    """With 100 columns of zeros the sets are shorter than d, without them longer: two ways of computing."""
    x, y = normal(0, 40, 6), normal(1, 30, 6) * 2
    turn = np.linalg.qr(normal(2, 6, 6))[0]
    expected = frechet_distance(x, y)
    assert frechet_distance(np.pad(x, ((0, 0), (0, 100))), np.pad(y, ((0, 0), (0, 100)))) == pytest.approx(
        expected, rel=1e-12
    )
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-12)


def test_kid_by_hand():
    """k(a, b) = (ab + 1)^3 on x = {0, 1}, y = {2, 3}: k(0,1) = 1, k(2,3) = 343, the cross mean (1+1+27+64)/4.

    Unbiased 1 + 343 - 2 * 23.25 = 297.5; with k(0,0) = 1, k(1,1) = 8, k(2,2) = 125, k(3,3) = 1000:
    (1 + 8 + 2)/4 + (125 + 1000 + 686)/4 - 46.5 = 409.
    """
    x, y = [[0.0], [1.0]], [[2.0], [3.0]]
    assert mmd(x, y, kernel="polynomial") == pytest.approx(297.5, abs=1e-12)
    assert mmd(x, y, kernel="polynomial", unbiased=False) == pytest.approx(409, abs=1e-12)
    # In two dimensions the product is halved: (0 + 0)/2 + 1 and (1*2 + 1*2)/2 + 1 = 3.
    doubled = mmd(np.repeat(x, 2, axis=1), np.repeat(y, 2, axis=1), kernel="polynomial")
    assert doubled == pytest.approx(297.5, abs=1e-12)


def test_linear_mmd_is_the_gap_of_the_means():
    """Biased |mean x - mean y|^2; unbiased tr S_x / n + tr S_y / m less, not clamped when that is below 0."""
    x, y = normal(0, 20, 3), normal(1, 30, 3)
    gap = np.square(x.mean(0) - y.mean(0)).sum()
    own = np.trace(np.cov(x.T)) / 20 + np.trace(np.cov(y.T)) / 30
    assert mmd(x, y, kernel="linear", unbiased=False) == pytest.approx(gap, rel=1e-12)
    assert mmd(x, y, kernel="linear") == pytest.approx(gap - own, rel=1e-12)
    assert mmd([[0.0], [1.0]], [[0.0], [1.0]], kernel="linear") == -0.5


def test_rbf_mmd_by_hand():
    """Points 0, 1 and 0, 2 at bandwidth 2: exp(-d^2/8) of the distances 1; 2; and 0, 2, 1, 1."""
    x, y = [[0.0], [1.0]], [[0.0], [2.0]]
    one, four = math.exp(-1 / 8), math.exp(-1 / 2)
    expected = one + four - 2 * (1 + four + 2 * one) / 4
    assert mmd(x, y, kernel="rbf", bandwidth=2.0) == pytest.approx(expected, abs=1e-15)
    # Without a bandwidth it is the median distance of y alone: here its only one, 2.
    assert mmd(x, y, kernel="rbf") == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kernel", ["polynomial", "rbf", "linear"])
def test_mmd_in_blocks_is_mmd_at_once(kernel):
    """More rows than are held at once, against the sums over the whole matrices."""
    x, y = normal(0, 1100, 2), normal(1, 2100, 2) + 0.3
    kernels = {
        "polynomial": lambda a, b: (a @ b.T / 2 + 1) ** 3,
        "rbf": lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 2),
        "linear": lambda a, b: a @ b.T,
    }
    xx, yy, xy = (kernels[kernel](*pair) for pair in ((x, x), (y, y), (x, y)))
    expected = (
        (xx.sum() - np.trace(xx)) / (1100 * 1099) + (yy.sum() - np.trace(yy)) / (2100 * 2099) - 2 * xy.mean()
    )
    bandwidth = 1.0 if kernel == "rbf" else None
    assert mmd(x, y, kernel=kernel, bandwidth=bandwidth) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_unbiased():
    """Two sets of one distribution: the mean over 400 pairs of sets lies within 4 standard errors of 0."""
    values = [mmd(normal(k, 5, 2), normal(10**6 + k, 7, 2), kernel="polynomial") for k in range(400)]
    error = np.std(values) / 20
    assert abs(np.mean(values)) < 4 * error
    biased = [
        mmd(normal(k, 5, 2), normal(10**6 + k, 7, 2), kernel="polynomial", unbiased=False) for k in range(400)
    ]
    assert min(biased) >= 0 and np.mean(biased) > 10 * error


def test_precision_and_recall_by_hand():
    """With k = 1 the balls around 0, 1, 2, 10 are [-1, 1], [0, 2], [1, 3] and [2, 18]."""
    y = [[0.0], [1.0], [2.0], [10.0]]
    x = [[-1.0], [-1.1], [3.5], [18.0], [18.1]]  # the first and the fourth lie on a surface: inside
    assert precision(x, y, k=1) == 3 / 5
    # Two neighbours: radii 2, 1, 2 and 9, so that -1.1 is inside [-2, 2] and 18.1 inside [1, 19].
    assert precision(x, y, k=2) == 1.0
    # Around x with k = 1: [-1.1, -0.9], [-1.2, -1], [-1.1, 8.1], [17.9, 18.1], [18, 18.2]: all y but 10.
    assert recall(x, y, k=1) == 3 / 4 == precision(y, x, k=1)


def test_a_collapsed_set_has_precision_and_no_recall():
    y = normal(0, 300, 4)
    one_corner = y[:1] + 0.01 * normal(1, 50, 4)
    assert precision(one_corner, y) == 1.0 and recall(one_corner, y) == 1 / 300
    assert precision(y, y) == recall(y, y) == 1.0
    far = y + 100.0
    assert precision(far, y) == recall(far, y) == 0.0


def test_precision_far_from_the_origin_and_in_blocks():
    """Distances keep their digits: 1,500 integer points give the same counts at the origin and 2^20 away."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 60, (1500, 2)).astype(float), rng.integers(0, 60, (1200, 2)) * 1.0
    distances = ((x[:, None] - y[None]) ** 2).sum(-1)
    between = ((y[:, None] - y[None]) ** 2).sum(-1)
    reach = np.sort(between, axis=1)[:, 3]  # the first is the point itself
    expected = (distances <= reach).any(1).mean()
    assert 0.1 < expected < 1
    assert precision(x, y) == pytest.approx(expected, abs=1e-15)
    assert precision(x + 2**20, y + 2**20) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance([[1.0, 2.0]], normal(0, 5, 2)), "features x: 1 row.* 2 or more"),
        (lambda: frechet_distance(normal(0, 5, 3), normal(0, 5, 2)), "3 columns, features y 2"),
        (
            lambda: frechet_distance([[1.0], [math.inf]], [[1.0], [2.0]]),
            "row 1 of the features x is",
        ),
        (lambda: mmd([[1.0], [2.0]], [[1.0], [2.0]], kernel="cubic"), "unknown kernel 'cubic'"),
        (lambda: mmd([[1.0], [2.0]], [[1.0], [2.0]], kernel="rbf", bandwidth=0.0), "bandwidth=0"),
        (lambda: mmd([[1.0], [2.0]], [[1.0], [2.0]], kernel="linear", bandwidth=1.0), "bandwidth=1.0"),
        (lambda: mmd([[1.0], [2.0]], [[1.0], [1.0]], kernel="rbf"), "median distance of the features is 0"),
        (lambda: mmd([[1.0]], [[1.0], [1.0]], kernel="linear"), "features x: 1 row"),
        (lambda: precision([[1.0]], [[1.0], [2.0], [3.0]]), "3 features have no 3 neighbours"),
        (lambda: recall([[1.0]], [[1.0], [2.0]], k=0), "k is 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
