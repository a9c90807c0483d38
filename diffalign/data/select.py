"""Which records can be trained on as groups of an objective's unit, and the tally of those that cannot.

Nothing here stops at a bad row: a row is dropped, counted and named. Only when the pass is over, and too many
rows were bad, the run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffalign.common.errors import UserError
from diffalign.data.pictures import BadImage
from diffalign.data.records import BadLabel, Candidate, Record

__all__ = [
    "BAD_REASONS",
    "MIN_SIDE",
    "TIES",
    "UNITS",
    "Group",
    "OneScale",
    "ScoreFacts",
    "Tally",
    "UsableGroups",
    "check_share",
    "check_ties",
]

MIN_SIDE = 8
"""Pictures with a side below this many pixels are no pictures: 8 is one latent cell of the usual VAEs."""

TIES = ("drop", "soft")

UNITS = ("pair", "list", "single")
"""What an objective trains on: two images of which one is preferred, k rated images, or single images."""

BAD_REASONS = (
    "bad_text",
    "not_a_pair",
    "not_a_list",
    "bad_label",
    "missing_image",
    "corrupt_image",
    "tiny_image",
)
"""Drop reasons that speak against the data; `tie` and `unlabelled` are normal."""

HINTS = {
    "tie": "data.ties=soft trains ties too, where the objective can",
    "unlabelled": "give labelled rows, or make pairs with diffalign pair",
    "no_score": "score the pictures with the scorer that the objective reads, then pair them again",
    "equal_scores": "use a finer scorer, or pictures that differ more",
    "single_picture": "draw several pictures a prompt, then pair how=lists",
    "not_a_pair": "make pairs with diffalign pair how=all_pairs",
    "not_a_list": "make lists with diffalign pair how=lists",
    "missing_image": "the paths of the rows start from the data's own folder",
}
"""What helps when most of the dropped records are dropped for one reason."""

NAMED_IN_MESSAGES = 3


def _hint(dropped: Mapping[str, list[str]]) -> str:
    """What helps against the reason that most of the dropped records have; "" where nothing is known."""
    most = max(dropped, key=lambda reason: len(dropped[reason]), default="")
    return HINTS.get(most, "")


@dataclass(frozen=True)
class ScoreFacts:
    """What is known of one scorer's numbers in a data set: their scale and range, higher being better.

    Attributes:
        scale: the scorer's name for its scale.
        version: of the scorer's code and weights.
        low: the smallest score.
        high: the largest score.
    """

    scale: str
    version: str
    low: float
    high: float


class OneScale:
    """Refuses scores of one scorer that stand on two scales or come from two versions.

    Args:
        known: scale and version by scorer's name, where they are known beforehand; None: any, but one.
    """

    def __init__(self, known: Mapping[str, tuple[str | None, str | None]]) -> None:
        self._known = dict(known)

    def check(self, record: Record, names: Collection[str] | None = None) -> None:
        """Looks at the scores by `names` (None: by all) of a record's candidates.

        Raises:
            UserError: naming the record.
        """
        for candidate in record.candidates:
            for name, score in candidate.scores.items():
                if names is None or name in names:
                    self._check(record, name, (score.scale, score.version))

    def _check(self, record: Record, name: str, found: tuple[str, str]) -> None:
        pairs = zip(self._known.get(name, (None, None)), found, strict=True)
        scale, version = (new if old is None else old for old, new in pairs)
        self._known[name] = (scale, version)
        if found == (scale, version):
            return
        what = f"on the scale {found[0] or '(none)'}, expected {scale or '(none)'}"
        if found[0] == scale:
            what = f"of version {found[1] or '(none)'}, expected {version or '(none)'}"
        raise UserError(f"record {record.id}: its '{name}' score is {what}: score all pictures alike")


@dataclass(frozen=True)
class Group:
    """A usable group, its pictures decoded.

    Attributes:
        id: names the group; that of the record, with the candidate's number where a record gives several.
        record: where it comes from.
        candidates: its candidates, in the record's order.
        images: their pictures (mode RGB).
        target: of a pair, P(first preferred) in [0, 1]; of a single image 1 when it is desirable, 0 when it
            is not; None for a list.
    """

    id: str
    record: Record
    candidates: tuple[Candidate, ...]
    images: tuple[Image.Image, ...]
    target: float | None


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
        if self.used:
            return
        hint = _hint(self.dropped)
        hint = hint and f": {hint}"
        raise UserError(f"{self.what}: none of {self.asked} rows is usable ({self.reasons()}){hint}")

    def refuse_if_too_many(self, max_share: float) -> None:
        """Raises UserError when the share of bad records is above `max_share` (in [0, 1])."""
        share = self.bad_share
        if share <= max_share:
            return
        groups = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.bad.items()]
        raise UserError(
            f"{self.what}: {share:.1%} of the rows that could be used are bad, "
            f"more than max_bad_share={max_share:g}: "
            f"{', '.join(groups)}; {_hint(self.bad) or 'repair the data'} or raise data.max_bad_share"
        )


class UsableGroups:
    """The usable groups of `records`, in order: iterate once, read `tally` at any time.

    Iterating raises UserError at the end of the pass, when too many records were bad or none was usable.

    Args:
        records: every row, good or bad.
        unit: one of UNITS. A pair gives the preferred image as a single one, and a list of two.
        undesirable: with unit "single", the images that are not preferred are groups too.
        reject: says why an objective has no use for a record, None when it has.
        unlabelled: take pairs without a label too, with target 0.5.
        ties: `drop` leaves pairs with target 0.5 out, `soft` yields them with target 0.5. Other soft
            targets (0.7 from votes) are no ties and are yielded as they are.
        max_bad_share: refuse beyond this share of bad rows.
        limit: stop after so many usable records.
        min_side: smallest side in pixels of a picture.
        what: what messages call the data.
    """

    def __init__(
        self,
        records: Iterable[Record],
        *,
        unit: str = "pair",
        undesirable: bool = False,
        reject: Callable[[Record], str | None] | None = None,
        unlabelled: bool = False,
        ties: str = "drop",
        max_bad_share: float = 0.05,
        limit: int | None = None,
        min_side: int = MIN_SIDE,
        what: str = "data",
    ) -> None:
        check_ties(ties)
        check_share(max_bad_share)
        if ties == "soft" and unit != "pair":
            raise UserError(f"data.ties=soft needs pairs, the objective trains on {unit} images: use drop")
        self.tally = Tally(what=what)
        self._records = records
        self._unit = unit
        self._undesirable = undesirable
        self._reject = reject
        self._unlabelled = unlabelled
        self._ties = ties
        self._max_bad_share = max_bad_share
        self._limit = limit
        self._min_side = min_side

    def __iter__(self) -> Iterator[Group]:
        if self._limit is None or self.tally.used < self._limit:
            for record in self._records:
                self.tally.asked += 1
                try:
                    groups = self._usable(record)
                except _Dropped as dropped:
                    self.tally.drop(dropped.reason, record.id)
                    continue
                self.tally.used += 1
                yield from groups
                if self._limit is not None and self.tally.used >= self._limit:
                    break
        # First the share: with nothing usable it says more about why.
        self.tally.refuse_if_too_many(self._max_bad_share)
        self.tally.refuse_if_empty()

    def _usable(self, record: Record) -> list[Group]:
        """The groups of a record; raises _Dropped. Pictures come last: decoding costs time."""
        if record.problem is not None:
            raise _Dropped(record.problem)
        chosen = self._chosen(record)
        reason = None if self._reject is None else self._reject(record)
        if reason is not None:
            raise _Dropped(reason)
        return [
            Group(name, record, candidates, tuple(map(self._open, candidates)), target)
            for name, candidates, target in chosen
        ]

    def _chosen(self, record: Record) -> list[tuple[str, tuple[Candidate, ...], float | None]]:
        """`(id, candidates, target)` of each group that the record gives."""
        candidates = tuple(record.candidates)
        if self._unit == "list":
            if len(candidates) < 2:
                raise _Dropped("not_a_list")
            return [(record.id, candidates, None)]
        if self._unit == "single" and len(candidates) == 1:
            return self._kept_singles(record, [_desirability(record)])
        if len(candidates) != 2:
            raise _Dropped("not_a_pair")
        target = self._pair_target(record)
        if self._unit == "pair":
            return [(record.id, candidates, target)]
        return self._kept_singles(record, [float(target > 0.5), float(target < 0.5)])

    def _kept_singles(
        self, record: Record, desirable: list[float]
    ) -> list[tuple[str, tuple[Candidate, ...], float | None]]:
        kept = [side for side, value in enumerate(desirable) if value or self._undesirable]
        if not kept:
            raise _Dropped("not_preferred")
        return [
            (
                record.id if len(kept) == 1 else f"{record.id}:{side}",
                (record.candidates[side],),
                desirable[side],
            )
            for side in kept
        ]

    def _pair_target(self, record: Record) -> float:
        try:
            target = record.pair_target()
        except BadLabel as error:
            raise _Dropped("bad_label") from error
        if target is None and self._unlabelled:
            return 0.5
        if target is None:
            raise _Dropped("unlabelled")
        if target == 0.5 and self._ties == "drop":
            raise _Dropped("tie")
        return float(target)

    def _open(self, candidate: Candidate) -> Image.Image:
        try:
            return candidate.image.open(min_side=self._min_side)
        except BadImage as error:
            raise _Dropped(error.reason) from error


class _Dropped(Exception):
    """A record that is left out, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _desirability(record: Record) -> float:
    """1 or 0 of a record with one candidate; raises _Dropped where its label is none or between."""
    label = record.candidates[0].label
    if label is None:
        raise _Dropped("unlabelled")
    if label not in (0.0, 1.0):
        raise _Dropped("bad_label")
    return float(label)


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
