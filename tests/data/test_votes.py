"""Agreement by hand, and circles in votes."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.data.votes import agreement, cycles


def test_agreement_by_hand() -> None:
    """Two votes each on three pairs: equal, opposite, both ties; and one vote alone, which says nothing.

    Equal pairs of votes: 1, 0, 1. Of N = 6 votes 4 are decided, half of them for either side, and 2 are
    ties: D_e = 2 (2 x 2 + 2 x 2 x 2) / (6 x 5) = 24 / 30, D_o = 2 / 6.
    """
    found = agreement([(2, 0, 0), (1, 1, 0), (0, 0, 2), (1, 0, 0)])
    assert found is not None
    assert (found.votes, found.pairwise.n) == (6, 3)
    assert found.pairwise.estimate == pytest.approx(2 / 3)
    assert found.alpha == pytest.approx(1 - (2 / 6) / (24 / 30))
    assert found.pairwise.low < 2 / 3 < found.pairwise.high


def test_agreement_of_many_votes_on_one_pair() -> None:
    """Of 10 pairs out of 5 votes, 3 to 2, 3 + 1 are equal."""
    found = agreement([(3, 2, 0)])
    assert found is not None and found.pairwise.estimate == pytest.approx(0.4)
    # D_o = 5 x 0.6 / 5, D_e = 2 x 2.5 x 2.5 / 20
    assert found.alpha == pytest.approx(1 - 0.6 / 0.625)


def test_full_agreement_chance_and_no_choice() -> None:
    full = agreement([(2, 0, 0), (0, 3, 0)])
    assert full is not None and full.alpha == 1.0 and full.pairwise.estimate == 1.0
    rng = np.random.default_rng(0)
    chance = agreement([(int(k), 4 - int(k), 0) for k in rng.binomial(4, 0.5, 4000)])
    assert chance is not None and abs(chance.alpha or 1.0) < 0.03
    assert chance.pairwise.low < 0.5 < chance.pairwise.high
    ties = agreement([(0, 0, 2)])
    assert ties is not None and ties.alpha is None and ties.pairwise.estimate == 1.0
    assert agreement([(1, 0, 0)]) is None and agreement([]) is None


def test_which_picture_is_first_does_not_matter() -> None:
    one = agreement([(3, 1, 0), (2, 0, 1), (0, 4, 0)])
    other = agreement([(1, 3, 0), (0, 2, 1), (0, 4, 0)])
    assert one is not None and other is not None and one.alpha == other.alpha


def circles(*found: tuple[int, int, int]) -> list[list[int]]:
    voters, winners, losers = zip(*found, strict=True)
    parts = cycles(np.array(voters, dtype=np.uint64), np.array(winners), np.array(losers))
    return [part.tolist() for part in parts]


def test_a_circle_is_found_and_what_hangs_on_it_is_not_part() -> None:
    votes = [(7, 0, 1), (7, 1, 2), (7, 2, 0), (7, 2, 3), (7, 4, 0)]
    assert circles(*votes) == [[0, 1, 2]]


def test_a_line_and_a_contradiction_are_no_circles() -> None:
    assert circles((7, 0, 1), (7, 1, 2), (7, 0, 2)) == []
    assert circles((7, 0, 1), (7, 1, 0)) == []


def test_each_voter_has_a_circle_of_his_own() -> None:
    assert circles((7, 0, 1), (7, 1, 2), (8, 2, 0)) == []  # two people
    big = 2**64 - 1
    assert circles((big, 0, 1), (3, 0, 1), (big, 1, 2), (3, 1, 2), (3, 2, 0), (big, 2, 0)) == [
        [0, 2, 5],
        [1, 3, 4],
    ]


def test_circles_that_share_a_picture_are_one() -> None:
    votes = [(1, 0, 1), (1, 1, 2), (1, 2, 0), (1, 0, 3), (1, 3, 4), (1, 4, 0)]
    assert circles(*votes) == [[0, 1, 2, 3, 4, 5]]


def test_no_votes() -> None:
    none = np.array([], dtype=np.intp)
    assert cycles(none.astype(np.uint64), none, none) == []
