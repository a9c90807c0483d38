"""Which records can be trained on as pairs, and the tally of those that cannot.

Nothing here stops at a bad row: a row is dropped, counted and named. Only when the pass is over, and too many
rows were bad, the run is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffalign.common.errors import UserError
from diffalign.data.records import BadImage, BadLabel, Record

__all__ = [
    "BAD_REASONS",
    "MIN_SIDE",
    "TIES",
    "Pair",
    "Tally",
    "UsablePairs",
    "check_share",
    "check_ties",
]

MIN_SIDE = 8
"""Pictures with a side below this many pixels are no pictures: 8 is one latent cell of the usual VAEs."""

TIES = ("drop", "soft")

BAD_REASONS = ("bad_text", "not_a_pair", "bad_label", "missing_image", "corrupt_image", "tiny_image")
"""Drop reasons that speak against the data; `tie` and `unlabelled` are normal."""

NAMED_IN_MESSAGES = 3


@dataclass(frozen=True)
class Pair:
    """A usable pair, its pictures decoded.

    Attributes:
        record: where it comes from.
        images: the two pictures (mode RGB), in the order of the record's candidates.
        target: P(first preferred) in [0, 1].
    """

    record: Record
    images: tuple[Image.Image, Image.Image]
    target: float


@dataclass
class Tally:
    """How many records were asked for, used, and dropped for which reason (with their ids)."""

    what: str = "data"
    asked: int = 0
    used: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Counts the record `name` as dropped."""
        self.dropped.setdefault(reason, []).append(name)

    @property
    def bad(self) -> dict[str, list[str]]:
        """The dropped records that speak against the data, by reason."""
        return {reason: self.dropped[reason] for reason in BAD_REASONS if reason in self.dropped}

    @property
    def bad_share(self) -> float:
        """Bad records / (bad + used), in [0, 1]: ties and unlabelled rows count on neither side."""
        bad = sum(map(len, self.bad.values()))
        return bad / (bad + self.used) if bad else 0.0

    def counts(self) -> dict[str, Any]:
        """Returns `{"asked": n, "used": n, "dropped": {reason: n}}`, for manifests."""
        return {
            "asked": self.asked,
            "used": self.used,
            "dropped": {reason: len(names) for reason, names in self.dropped.items()},
        }

    def reasons(self) -> str:
        """Returns the drop counts in words ("152 tie, 13 corrupt_image"), or "none dropped"."""
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.dropped.items()) or "none dropped"

    def refuse_if_empty(self) -> None:
        """Raises UserError when no record was usable."""
        if not self.used:
            raise UserError(f"{self.what}: none of {self.asked} rows is a usable pair ({self.reasons()})")

    def refuse_if_too_many(self, max_share: float) -> None:
        """Raises UserError when the share of bad records is above `max_share` (in [0, 1])."""
        share = self.bad_share
        if share <= max_share:
            return
        groups = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.bad.items()]
        raise UserError(
            f"{self.what}: {share:.1%} of the rows that could be pairs are bad, "
            f"more than max_bad_share={max_share:g}: "
            f"{', '.join(groups)}; repair the data or raise data.max_bad_share"
        )


class UsablePairs:
    """The usable pairs of `records`, in order: iterate once, read `tally` at any time.

    Iterating raises UserError at the end of the pass, when too many records were bad or none was usable.

    Args:
        records: every row, good or bad.
        ties: `drop` leaves pairs with target 0.5 out, `soft` yields them with target 0.5. Other soft
            targets (0.7 from votes) are no ties and are yielded as they are.
        max_bad_share: refuse beyond this share of bad rows.
        limit: stop after so many usable pairs.
        min_side: smallest side in pixels of a picture.
        what: what messages call the data.
    """

    def __init__(
        self,
        records: Iterable[Record],
        *,
        ties: str = "drop",
        max_bad_share: float = 0.05,
        limit: int | None = None,
        min_side: int = MIN_SIDE,
        what: str = "data",
    ) -> None:
        check_ties(ties)
        check_share(max_bad_share)
        self.tally = Tally(what=what)
        self._records = records
        self._ties = ties
        self._max_bad_share = max_bad_share
        self._limit = limit
        self._min_side = min_side

    def __iter__(self) -> Iterator[Pair]:
        if self._limit is None or self.tally.used < self._limit:
            for record in self._records:
                self.tally.asked += 1
                pair = self._usable(record)
                if pair is None:
                    continue
                self.tally.used += 1
                yield pair
                if self._limit is not None and self.tally.used >= self._limit:
                    break
        # First the share: with nothing usable it says more about why.
        self.tally.refuse_if_too_many(self._max_bad_share)
        self.tally.refuse_if_empty()

    def _usable(self, record: Record) -> Pair | None:
        """Returns the pair, or None after counting why not. Labels come first: decoding costs time."""
        if record.problem is not None:
            self.tally.drop(record.problem, record.id)
            return None
        if len(record.candidates) != 2:
            self.tally.drop("not_a_pair", record.id)
            return None
        try:
            target = record.pair_target()
        except BadLabel:
            self.tally.drop("bad_label", record.id)
            return None
        if target is None:
            self.tally.drop("unlabelled", record.id)
            return None
        if target == 0.5 and self._ties == "drop":
            self.tally.drop("tie", record.id)
            return None
        first, second = record.candidates
        try:
            images = (first.image.open(min_side=self._min_side), second.image.open(min_side=self._min_side))
        except BadImage as error:
            self.tally.drop(error.reason, record.id)
            return None
        return Pair(record, images, float(target))


def check_ties(ties: str) -> None:
    """Raises UserError when `ties` is no known policy."""
    if ties not in TIES:
        raise UserError(f"ties={ties!r}: choose drop (leave ties out) or soft (train them with target 0.5)")


def check_share(max_bad_share: float) -> None:
    """Raises UserError when `max_bad_share` is no share."""
    if not 0.0 <= max_bad_share <= 1.0:
        raise UserError(f"max_bad_share={max_bad_share}: give a share between 0 and 1")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED_IN_MESSAGES])
    return f"{shown}, ..." if len(names) > NAMED_IN_MESSAGES else shown
