"""The Frechet distance as a reward of sets, fast enough to ask for every swap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import _distribution as sets
from diffalign.scorers._distribution import Floats
from diffalign.scorers._set_base import SetReward

CLEAR = 1e-9
"""Expected error, relative to the distance, up to which roots of eigenvalues stand for singular values."""

ROUNDING = 2 * float(np.finfo(np.float64).eps)
"""Error of an eigenvalue, relative to the norms of what its matrix is a sum of. The error of the sum of roots
that follows is at least 5 times what was measured wherever that was above 1e-12 of the distance: n from 16 to
256, standard deviations of features from equal to 1/k^2, near-duplicates."""


class Frechet(SetReward):
    """Minus the squared Frechet distance to the exemplars.

    With F [r, d], r = min(m, d), the triangular factor of the exemplars' covariance (F^T F = S_y, by QR of
    the centred exemplars, never by squaring), the nuclear norm of Xc Yc^T / sqrt(m - 1) is that of
    image = C X F^T [n, r], C the centring (its transpose where n > r, so that image is k x l with k <= l).
    A swap adds a matrix of rank one to it, and a sum of three to its Gram matrix, k x k: O(d^2 + k l + k^3).

    The roots of the Gram matrix's eigenvalues are the singular values, but a small one loses up to half of
    its digits: where the error expected of the sum is not far below the distance (sets with duplicates, very
    steep spectra), singular values proper are taken, of a matrix k x (k + 1) in a basis made once a state.
    """

    name = "frechet"

    def __init__(self, exemplars: Floats) -> None:
        self._exemplars = exemplars
        self._mean = exemplars.mean(0)
        self._factor = sets.triangle(exemplars - self._mean) / np.sqrt(len(exemplars) - 1)
        self._trace = float(np.square(self._factor).sum())

    def __call__(self, x: Any) -> float:
        """Returns minus `frechet_distance(x, exemplars)`; n >= 2."""
        return -sets.frechet_distance(x, self._exemplars)

    def of_views(self, x: Floats) -> float:
        """Returns the reward of one picture's views [p, d]; a single view counts as covariance 0."""
        gap = x.mean(0) - self._mean
        value = float(gap @ gap) + self._trace
        if len(x) > 1:
            centred = x - x.mean(0)
            value += float(np.square(centred).sum()) / (len(x) - 1)
            value -= 2.0 * sets.nuclear_norm(centred @ self._factor.T) / np.sqrt(len(x) - 1)
        return -max(0.0, value)

    def _start(self) -> float:
        if len(self._rows) < 2:
            raise UserError("set reward frechet: a set of 1 picture has no covariance: use 2 or more")
        sets.two_sets(self._rows, self._exemplars)
        self._projected = (self._rows - self._mean) @ self._factor.T
        self._center()
        rest = self._rest(self._rows)
        return -max(0.0, rest - self._cross(sets.nuclear_norm(self._image.numpy())))

    def _center(self) -> None:
        """Makes the state of a set out of its rows and their projections."""
        image = self._projected - self._projected.mean(0)
        self._by_rows = len(image) <= image.shape[1]
        self._image = torch.from_numpy(image if self._by_rows else image.T)
        with one_thread():
            self._gram = self._image @ self._image.T
        self._basis: torch.Tensor | None = None

    def _swapped(self, i: int, row: Floats) -> float:
        trial = self._rows.copy()
        trial[i] = row
        rest = self._rest(trial)
        with one_thread():
            self._fresh = torch.mv(torch.from_numpy(self._factor), torch.from_numpy(row - self._mean)).numpy()
            change = self._fresh - self._projected[i]
            n = len(trial)
            moved = np.full(n, -1.0 / n)  # centred, a change of row i moves all rows
            moved[i] += 1.0
            sides = (moved, change) if self._by_rows else (change, moved)
            left, right = map(torch.from_numpy, sides)  # image + left right^T
            nuclear, doubt = self._by_roots(left, right)
            if not self._cross(doubt) <= CLEAR * (rest - self._cross(nuclear)):
                nuclear = self._by_singular_values(left, right)
        return -max(0.0, rest - self._cross(nuclear))

    def _rest(self, rows: Floats) -> float:
        """Returns the distance but for its last term; all of it anew, for an outlier to leave no rounding."""
        mean = rows.mean(0)
        gap = mean - self._mean
        return float(gap @ gap) + float(np.square(rows - mean).sum()) / (len(rows) - 1) + self._trace

    def _cross(self, nuclear: float) -> float:
        return 2.0 * nuclear / float(np.sqrt(len(self._rows) - 1))

    def _by_roots(self, left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
        """Returns the nuclear norm of image + left right^T, and the error to expect of rounding."""
        along = self._image @ right
        square = right @ right
        gram = self._gram + torch.outer(left, along + square * left) + torch.outer(along, left)
        # Centred rows add up to 0, so one eigenvalue is 0 but for rounding: it is left out.
        eigenvalues = torch.linalg.eigvalsh(gram)[int(self._by_rows) :]
        if len(eigenvalues) == 0 or eigenvalues[0] <= 0.0:
            return 0.0, np.inf
        roots = eigenvalues.sqrt()
        length = left.norm()
        size = self._gram.norm() + 2.0 * length * along.norm() + square * length**2
        # Each root errs by its eigenvalue's error over 2 roots, one independently of another.
        return float(roots.sum()), float(ROUNDING * size * (0.5 / roots).norm())

    def _by_singular_values(self, left: torch.Tensor, right: torch.Tensor) -> float:
        """Returns the nuclear norm of image + left right^T, exact for any rank."""
        if self._basis is None:
            self._basis, factor = torch.linalg.qr(self._image.T)
            self._small = factor.T  # image = small basis^T
        inside = self._basis.T @ right
        outside = right - self._basis @ inside
        again = self._basis.T @ outside  # a second pass: the first leaves a trace of the basis
        length = (outside - self._basis @ again).norm()
        update = torch.column_stack([self._small + torch.outer(left, inside + again), length * left])
        return float(torch.linalg.svdvals(update).sum())

    def _accept(self, i: int) -> None:
        self._projected[i] = self._fresh
        self._center()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in this thread alone.

    A swap's matrices are too small to gain from more, and hundreds of times a call threads would wait for
    one another: where the cores are busy, a swap took up to 50 times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
