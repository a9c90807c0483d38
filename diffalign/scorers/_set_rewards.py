"""Rewards of sets of pictures, and of one picture against a set, over any encoder's features.

What such a reward is, see `_set_base.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffalign.common.errors import UserError, unknown
from diffalign.scorers import _distribution as sets
from diffalign.scorers._distribution import Floats
from diffalign.scorers._set_base import SetReward

if TYPE_CHECKING:
    from diffalign.scorers._set_frechet import Frechet

NEIGHBOURS = 3
"""k of precision and recall."""


class MMD(SetReward):
    """Minus the squared maximum mean discrepancy to the exemplars, unbiased; kid: with the cubic kernel.

    The exemplars' own mean is computed once; a swap costs one row of each kernel matrix, O((n + m) d).
    """

    def __init__(self, exemplars: Floats, name: str, kernel: str) -> None:
        self.name = name
        self._kernel, self._shift = sets.kernel_function(kernel, exemplars)
        self._exemplars = exemplars - self._shift
        self._own = sets.own_mean(self._exemplars, self._kernel, True)

    def __call__(self, x: Any) -> float:
        """Returns minus `mmd(x, exemplars)`; n >= 2."""
        x = sets.two_sets(x, self._exemplars, smallest=2)[0] - self._shift
        cross = sets.cross_sums(x, self._exemplars, self._kernel).sum()
        return self._reward(sets.own_mean(x, self._kernel, True) * len(x) * (len(x) - 1), cross, len(x))

    def _start(self) -> float:
        sets.two_sets(self._rows, self._exemplars, smallest=2)
        self._rows -= self._shift
        self._between = self._kernel(self._rows, self._rows)
        np.fill_diagonal(self._between, 0.0)
        self._cross = sets.cross_sums(self._rows, self._exemplars, self._kernel)
        return self._reward(self._between.sum(), self._cross.sum(), len(self._rows))

    def _checked(self, row: Any) -> Floats:
        return super()._checked(row) - self._shift

    def _swapped(self, i: int, row: Floats) -> float:
        self._fresh = self._kernel(row[None], self._rows)[0]
        self._fresh[i] = 0.0
        self._fresh_cross = float(self._kernel(row[None], self._exemplars).sum())
        between = self._between.sum() + 2.0 * (self._fresh.sum() - self._between[i].sum())
        return self._reward(between, self._cross.sum() + self._fresh_cross - self._cross[i], len(self._rows))

    def _accept(self, i: int) -> None:
        self._between[i] = self._between[:, i] = self._fresh
        self._cross[i] = self._fresh_cross

    def _reward(self, between: float, cross: float, n: int) -> float:
        m = len(self._exemplars)
        return -float(between / (n * (n - 1)) + self._own - 2.0 * cross / (n * m))


class Vendi(SetReward):
    """The Vendi score: variety, with no exemplars. A swap costs the eigenvalues of min(n, d) x min(n, d)."""

    name = "vendi"

    def __call__(self, x: Any) -> float:
        """Returns `vendi_score(x)`."""
        return sets.vendi_score(x)

    def _start(self) -> float:
        self._unit = sets.unit_rows(self._rows)
        self._regram()
        return sets.effective_number(self._gram / len(self._unit))

    def _regram(self) -> None:
        self._by_rows = len(self._unit) <= self._unit.shape[1]
        self._gram = self._unit @ self._unit.T if self._by_rows else self._unit.T @ self._unit

    def _swapped(self, i: int, row: Floats) -> float:
        self._fresh = sets.unit_rows(row[None])[0]
        gram = self._gram.copy()
        if self._by_rows:
            gram[i] = gram[:, i] = self._unit @ self._fresh
            gram[i, i] = 1.0
        else:
            gram += np.outer(self._fresh, self._fresh) - np.outer(self._unit[i], self._unit[i])
        return sets.effective_number(gram / len(self._unit))

    def _accept(self, i: int) -> None:
        self._unit[i] = self._fresh
        self._regram()


class Precision(SetReward):
    """Share of the set that lies in the exemplars' manifold: a sum over rows, of which a swap changes one."""

    name = "precision"

    def __init__(self, exemplars: Floats) -> None:
        self._shift = exemplars.mean(0)
        self._exemplars = exemplars - self._shift
        self._norms = np.square(self._exemplars).sum(1)
        self._reach = sets.squared_radii(self._exemplars, NEIGHBOURS)

    def _inside(self, rows: Floats) -> NDArray[np.bool_]:
        away = sets.squared_distances(rows - self._shift, self._exemplars, sets.SLACK, self._norms)
        return np.asarray((away <= self._reach).any(1))

    def __call__(self, x: Any) -> float:
        """Returns `precision(x, exemplars)`."""
        return float(self._inside(sets.two_sets(x, self._exemplars)[0]).mean())

    def _start(self) -> float:
        sets.two_sets(self._rows, self._exemplars)
        self._hits = self._inside(self._rows)
        return float(self._hits.mean())

    def _swapped(self, i: int, row: Floats) -> float:
        self._fresh = bool(self._inside(row[None])[0])
        return (int(self._hits.sum()) - int(self._hits[i]) + int(self._fresh)) / len(self._hits)

    def _accept(self, i: int) -> None:
        self._hits[i] = self._fresh


class Recall(SetReward):
    """Share of the exemplars that lies in the set's manifold.

    A swap costs one row of distances, O((n + m) d), and a look at the n x m distances that are kept.
    """

    name = "recall"

    def __init__(self, exemplars: Floats) -> None:
        self._shift = exemplars.mean(0)
        self._exemplars = exemplars - self._shift
        self._norms = np.square(self._exemplars).sum(1)

    def __call__(self, x: Any) -> float:
        """Returns `recall(x, exemplars)`; n > 3."""
        x = sets.two_sets(x, self._exemplars)[0]
        return sets.covered_share(self._exemplars, x - self._shift, NEIGHBOURS)

    def _start(self) -> float:
        sets.two_sets(self._rows, self._exemplars)
        self._rows -= self._shift
        self._reach = sets.squared_radii(self._rows, NEIGHBOURS)
        self._between = sets.squared_distances(self._rows, self._rows)
        np.fill_diagonal(self._between, np.inf)
        self._away = sets.squared_distances(self._rows, self._exemplars, sets.SLACK)
        return self._share(self._away <= self._reach[:, None])

    def _checked(self, row: Any) -> Floats:
        return super()._checked(row) - self._shift

    def _swapped(self, i: int, row: Floats) -> float:
        between = self._between.copy()
        fresh = sets.squared_distances(row[None], self._rows)[0]
        fresh[i] = np.inf
        between[i] = between[:, i] = fresh
        reach = np.partition(between, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]
        away = sets.squared_distances(row[None], self._exemplars, sets.SLACK, self._norms)[0]
        self._fresh = (fresh, away)
        covers = self._away <= reach[:, None]
        covers[i] = away <= reach[i]
        return self._share(covers)

    def _share(self, covers: NDArray[np.bool_]) -> float:
        return float(covers.any(0).mean())

    def _accept(self, i: int) -> None:
        fresh, self._away[i] = self._fresh
        self._between[i] = self._between[:, i] = fresh


def _frechet(exemplars: Floats) -> Frechet:
    from diffalign.scorers._set_frechet import Frechet  # imports torch

    return Frechet(exemplars)


SET_MEASURES: dict[str, Callable[[Floats], SetReward]] = {
    "frechet": _frechet,
    "kid": lambda exemplars: MMD(exemplars, "kid", "polynomial"),
    "mmd": lambda exemplars: MMD(exemplars, "mmd", "rbf"),
    "vendi": lambda exemplars: Vendi(),
    "precision": Precision,
    "recall": Recall,
}
EXEMPLAR_MEASURES = ("mean_cosine", "nearest", "frechet")


def set_reward(name: str, exemplars: Any = None) -> SetReward:
    """Returns the reward of sets of features, higher being better.

    Convention: distances count negative. frechet, kid, mmd (unbiased, rbf with the exemplars' median
    distance), precision and recall (k = 3) are held against exemplars; vendi is not.

    Args:
        name: frechet | kid | mmd | vendi | precision | recall.
        exemplars: features [m, d], m >= 2 (precision: m >= 4); not used by vendi.

    Raises:
        UserError: unknown name, no or too few exemplars, or features that cannot be used.
    """
    if name not in SET_MEASURES:
        raise unknown("measure of a set", name, SET_MEASURES)
    known = np.zeros((0, 1)) if name == "vendi" else _exemplars(name, exemplars)
    return SET_MEASURES[name](known)


def exemplar_reward(name: str, exemplars: Any) -> Callable[[Any], Floats]:
    """Returns the reward of each picture against a set of exemplars: [n, d] -> float64 [n], higher is better.

    mean_cosine: mean cosine to the exemplars, in [-1, 1].
    nearest: cosine to the nearest exemplar, in [-1, 1].
    frechet: minus the squared Frechet distance of the picture's views to the exemplars; takes [n, p, d] too,
        p views (crops, patches) of every picture. With p = 1 this is -(|x - mean|^2 + tr S).

    Reconstruction: that DRAGON (arXiv 2504.15217) compares the embeddings *inside* one sample with the
    statistics of the exemplars is known (per-song FAD); views of a picture in the place of a song's frames,
    and both cosine measures, are this project's. Exemplars may be texts when the encoder embeds both.

    Args:
        name: mean_cosine | nearest | frechet.
        exemplars: features [m, d], m >= 2.

    Raises:
        UserError: unknown name, no or too few exemplars, or features that cannot be used.
    """
    if name not in EXEMPLAR_MEASURES:
        raise unknown("measure of a picture against exemplars", name, EXEMPLAR_MEASURES)
    known = _exemplars(name, exemplars)
    if name == "frechet":
        return _views_reward(known)
    directions = sets.unit_rows(known)
    if name == "mean_cosine":
        directions = directions.mean(0, keepdims=True)

    def cosines(x: Any) -> Floats:
        rows = sets.two_sets(x, directions)[0]
        best: Floats = (sets.unit_rows(rows) @ directions.T).max(1)
        return best

    return cosines


def _views_reward(known: Floats) -> Callable[[Any], Floats]:
    frechet = _frechet(known)

    def rewards(x: Any) -> Floats:
        several = [views[None] if views.ndim == 1 else views for views in x]
        rows = [sets.two_sets(views, known)[0] for views in several]
        return np.array([frechet.of_views(views) for views in rows])

    return rewards


def _exemplars(name: str, exemplars: Any) -> Floats:
    """Returns the exemplars as checked features [m, d], m >= 2."""
    count = 0 if exemplars is None else len(exemplars)
    if count < 2:
        raise UserError(f"measure {name} needs exemplars to compare with, and has {count}: give 2 or more")
    return sets.as_features(exemplars, "exemplars")
