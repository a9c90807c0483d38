"""What a reward of sets is: one object with two ways to the same number, to a relative 1e-8.

    reward = set_reward("frechet", exemplars)   # [m, d]
    reward(x)                                   # plain: a whole set [n, d]
    value = reward.start(x)                     # incremental: a set, and what it would be worth ...
    value = reward.try_swap(3, row)             # ... with another row 3
    reward.commit()                             # keep the swap tried last

What a commit leaves behind is recomputed from the rows, or holds entries of which each was computed once: no
error builds up over swaps.
"""

from __future__ import annotations

from typing import Any

from diffalign.scorers import _distribution as sets
from diffalign.scorers._distribution import Floats


class SetReward:
    """Base of the set rewards; higher is better.

    Subclasses give `__call__`, `_start` (state of a whole set), `_swapped` (its value with one other row) and
    `_accept` (state after that swap, which was the last to be tried).
    """

    name: str
    _rows: Floats
    _trial: tuple[int, Floats] | None = None

    def __call__(self, x: Any) -> float:
        """Returns the reward of a set [n, d]; what was started stays as it is."""
        raise NotImplementedError

    def start(self, x: Any) -> float:
        """Takes a set [n, d] to swap rows of; returns its reward."""
        self._rows = sets.as_features(x, "features").copy()
        self._trial = None
        return self._start()

    def try_swap(self, i: int, row: Any) -> float:
        """Returns the reward of the set with `row` [d] in the place of its row i; the set stays as it is."""
        fresh = self._checked(row)
        self._trial = (i, fresh)
        return self._swapped(i, fresh)

    def commit(self) -> None:
        """Makes the swap that was tried last part of the set."""
        if self._trial is None:
            raise RuntimeError("commit() before a try_swap()")
        i, row = self._trial
        self._rows[i] = row
        self._trial = None
        self._accept(i)

    def _checked(self, row: Any) -> Floats:
        """Returns a row [d] as the set's own are."""
        return sets.two_sets(row[None], self._rows[:1])[0][0]

    def _start(self) -> float:
        raise NotImplementedError

    def _swapped(self, i: int, row: Floats) -> float:
        raise NotImplementedError

    def _accept(self, i: int) -> None:
        raise NotImplementedError
