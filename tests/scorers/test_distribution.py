"""The Vendi score: limits, hand-worked numbers, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffalign.scorers import vendi_score


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
