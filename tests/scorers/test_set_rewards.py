"""Set rewards: incremental path, plain path and pure functions agree; rewards against exemplars."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import (
    exemplar_reward,
    frechet_distance,
    mmd,
    precision,
    recall,
    set_reward,
    vendi_score,
)
from diffalign.scorers._set_rewards import SET_MEASURES

PURE = {
    "frechet": lambda x, y: -frechet_distance(x, y),
    "kid": lambda x, y: -mmd(x, y, kernel="polynomial"),
    "mmd": lambda x, y: -mmd(x, y, kernel="rbf"),
    "vendi": lambda x, y: vendi_score(x),
    "precision": precision,
    "recall": recall,
}
SHAPES = {
    "fewer items than columns": (12, 30, 100),
    "more items than columns": (40, 8, 100),
    "as many items as columns": (16, 16, 40),
    "fewer exemplars than items": (30, 20, 9),
    "fewer exemplars than columns": (8, 40, 20),
}


def sets(shape: tuple[int, int, int], *, power: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sets [n, d] and exemplars [m, d]; column k has the standard deviation k^-power."""
    n, d, m = shape
    rng = np.random.default_rng(n)
    scale = np.arange(1.0, d + 1.0) ** -power
    a, b, y = (rng.normal(size=(rows, d)) * scale for rows in (n, n, m))
    return a * 1.2 + 0.2 * scale, b, y


def compare_paths(name: str, x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> None:
    """Tries every row of `rows` in its place, keeps every other one, and asks all three ways each time."""
    reward: Any = set_reward(name, y)
    current = x.copy()
    expected = PURE[name](x, y)
    assert reward.start(x) == pytest.approx(expected, rel=1e-8, abs=1e-14)
    assert reward(x) == pytest.approx(expected, rel=1e-8, abs=1e-14)
    for i in np.random.default_rng(0).permutation(len(x)):
        trial = current.copy()
        trial[i] = rows[i]
        assert reward.try_swap(i, rows[i]) == pytest.approx(PURE[name](trial, y), rel=1e-8, abs=1e-14)
        if i % 2:
            reward.commit()
            current = trial
    # A state that swaps led to is that of the set it stands for.
    left = reward.try_swap(0, current[0])
    assert left == pytest.approx(reward(current), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", SET_MEASURES)
def test_fast_and_plain_paths_agree(name: str, shape: tuple[int, int, int]) -> None:
    compare_paths(name, *sets(shape))


@pytest.mark.parametrize("name", SET_MEASURES)
def test_they_agree_with_duplicates(name: str) -> None:
    """Half of the set is one row, one row is an exemplar, and rows come in that are there already."""
    x, rows, y = sets((20, 30, 50))
    x[10:] = x[0]
    x[1] = y[0]
    rows[3], rows[4], rows[15] = x[0], y[1], x[0]
    compare_paths(name, x, rows, y)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(64, 100, 300), (100, 64, 300)])
def test_frechet_agrees_for_steep_spectra(shape: tuple[int, int, int], power: float) -> None:
    """Standard deviations down to 1e-4: roots of eigenvalues alone miss by up to 1e-4 of the distance."""
    compare_paths("frechet", *sets(shape, power=power))


def test_frechet_agrees_far_from_the_origin_and_beside_an_outlier() -> None:
    """An outlier 1e5 times as far is taken out again: its rounding must not stay."""
    x, rows, y = sets((20, 30, 50))
    compare_paths("frechet", x + 1000, rows + 1000, y + 1000)
    outlying = x.copy()
    outlying[1] *= 1e5
    compare_paths("frechet", outlying, rows, y)


@pytest.mark.parametrize("name", SET_MEASURES)
def test_only_a_commit_changes_the_set(name: str) -> None:
    x, rows, y = sets((12, 5, 40))
    reward: Any = set_reward(name, y)
    kept = x.copy(), y.copy()
    reward.start(x)
    first = reward.try_swap(2, rows[2])
    reward.try_swap(5, 3 * rows[5])
    reward(rows)
    assert reward.try_swap(2, rows[2]) == first
    reward.commit()
    with pytest.raises(RuntimeError, match="before a try_swap"):
        reward.commit()
    assert reward.try_swap(2, x[2]) == pytest.approx(PURE[name](x, y), rel=1e-10)
    assert np.array_equal(x, kept[0]) and np.array_equal(y, kept[1])


@pytest.mark.parametrize("name", SET_MEASURES)
def test_tensors_are_as_good_as_arrays(name: str) -> None:
    x, rows, y = sets((12, 5, 40))
    tensors: Any = set_reward(name, torch.from_numpy(y))
    arrays: Any = set_reward(name, y)
    assert tensors.name == name == arrays.name
    assert tensors.start(torch.from_numpy(x)) == arrays.start(x)
    assert tensors.try_swap(1, torch.from_numpy(rows)[1]) == arrays.try_swap(1, rows[1])
    assert tensors(torch.from_numpy(x)) == arrays(x)
    half = torch.from_numpy(x).half()  # features of a network in half precision are read as they are
    assert tensors(half) == arrays(half.double().numpy())


@pytest.mark.parametrize("name", [name for name in SET_MEASURES if name != "vendi"])
def test_nearer_sets_are_worth_more(name: str) -> None:
    _, near, y = sets((40, 5, 200))
    reward = set_reward(name, y)
    assert reward(near) > reward(near + 4.0) and reward(near) > reward(0.05 * near + 2.5)


def test_cosines_by_hand() -> None:
    """Exemplars along (1, 0) and (0, 1); (3, 4) has the cosines 0.6 and 0.8, (0, -2) has 0 and -1."""
    exemplars, x = [[2.0, 0.0], [0.0, 5.0]], [[3.0, 4.0], [0.0, -2.0]]
    assert exemplar_reward("mean_cosine", exemplars)(x).tolist() == pytest.approx([0.7, -0.5])
    assert exemplar_reward("nearest", exemplars)(x).tolist() == pytest.approx([0.8, 0.0])


def test_frechet_of_one_picture_by_hand() -> None:
    """One view: -(|x - mean|^2 + tr S), here mean (0, 0), S = diag(2, 8)/3: -(25 + 10/3).

    Two views +-(1, 0): S_x = diag(2, 0), so -(2 + 10/3 - 2 sqrt(2 * 2/3)).
    """
    exemplars = [[1, 0], [-1, 0], [0, 2], [0, -2]]
    reward = exemplar_reward("frechet", exemplars)
    assert reward([np.array([3.0, 4.0])]).tolist() == pytest.approx([-25 - 10 / 3])
    views = np.array([[[1.0, 0.0], [-1.0, 0.0]]])
    assert reward(views).tolist() == pytest.approx([-(2 + 10 / 3 - 2 * math.sqrt(4 / 3))])
    x = np.random.default_rng(0).normal(size=(6, 9, 2))
    assert reward(torch.from_numpy(x)).tolist() == pytest.approx(
        [-frechet_distance(one, exemplars) for one in x]
    )


@pytest.mark.parametrize("name", ["frechet", "kid", "mmd", "precision", "recall"])
@pytest.mark.parametrize("exemplars", [None, np.ones((1, 4))])
def test_fewer_than_two_exemplars_are_refused(name: str, exemplars: Any) -> None:
    count = 0 if exemplars is None else 1
    with pytest.raises(UserError, match=f"measure {name} needs exemplars .* has {count}: give 2 or more"):
        set_reward(name, exemplars)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: set_reward("frechett", y), "unknown measure of a set 'frechett': did you mean 'frechet'"),
        (lambda y: exemplar_reward("cosine", y), "unknown measure .* 'cosine': did you mean 'mean_cosine'"),
        (lambda y: exemplar_reward("nearest", y[:1]), "measure nearest needs exemplars .* has 1"),
        (lambda y: set_reward("precision", y[:3]), "3 features have no 3 neighbours"),
        (lambda y: set_reward("kid", y * math.nan), "row 0 of the exemplars is not finite"),
        (lambda y: set_reward("frechet", y).start(y[:1]), "set of 1 picture has no covariance"),
        (lambda y: set_reward("frechet", y).start(y[:, :2]), "2 columns, features y 3"),
        (lambda y: set_reward("kid", y)(y[:1]), "features x: 1 row"),
        (lambda y: set_reward("vendi").start(0 * y), "row 0 of the features is zero"),
        (lambda y: set_reward("vendi").start(y * math.nan), "row 0 of the features is not finite"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(np.random.default_rng(0).normal(size=(6, 3)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SET_MEASURES)
def test_a_row_of_another_width_or_without_value_is_refused(name: str) -> None:
    x, rows, y = sets((12, 5, 40))
    reward = set_reward(name, y)
    reward.start(x)
    with pytest.raises(UserError, match="4 columns"):
        reward.try_swap(0, rows[0, :4])
    with pytest.raises(UserError, match="not finite"):
        reward.try_swap(0, rows[0] * math.nan)
