"""Which records can be trained on as groups of an objective's unit, and the tally of those that cannot.

Nothing here stops at a bad row: a row is dropped, counted and named. Only when the pass is over, and too many
rows were bad, the run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

from PIL import Image

from diffalign.common.ahead import ordered
from diffalign.common.errors import UserError
from diffalign.data.pictures import BadImage
from diffalign.data.records import BadLabel, Candidate, Record
from diffalign.data.tally import BAD_REASONS, Tally

__all__ = [
    "BAD_REASONS",
    "MIN_SIDE",
    "TIES",
    "UNITS",
    "Group",
    "OneScale",
    "ScoreFacts",
    "Tally",
    "Unusable",
    "UsableGroups",
    "check_share",
    "check_ties",
]

MIN_SIDE = 8
"""Pictures with a side below this many pixels are no pictures: 8 is one latent cell of the usual VAEs."""

TIES = ("drop", "soft")

UNITS = ("pair", "list", "single", "any")
"""What an objective trains on: two images of which one is preferred, k rated images, or single images.

"any" is what a cache keeps for all of them: whole records that some objective can use.
"""

Chosen = tuple[str, tuple[Candidate, ...], float | None]
"""Id, candidates and target of a group whose pictures are not opened yet."""


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


Made = TypeVar("Made")


class UsableGroups:
    """The usable groups of `records`, in order: iterate once, read `tally` at any time.

    Pictures are decoded in threads, ahead of the caller (PIL works outside the interpreter's lock).

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
        opens: whether pictures are decoded; otherwise groups have none.
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
        opens: bool = True,
    ) -> None:
        check_ties(ties)
        check_share(max_bad_share)
        if ties == "soft" and unit not in ("pair", "any"):
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
        self._opens = opens

    def __iter__(self) -> Iterator[Group]:
        return self.made(lambda group: group)

    def made(self, make: Callable[[Group], Made]) -> Iterator[Made]:
        """Yields `make(group)` of each group, made in the threads that decode.

        `make` may raise Unusable: then the whole record is dropped for that reason.
        """
        if self._limit is None or self.tally.used < self._limit:
            with closing(self.outcomes(make)) as results:
                for record, outcome in results:
                    self.tally.asked += 1
                    if isinstance(outcome, Unusable):
                        self.tally.drop(outcome.reason, record.id)
                        continue
                    self.tally.used += 1
                    yield from outcome
                    if self._limit is not None and self.tally.used >= self._limit:
                        break
        # First the share: with nothing usable it says more about why.
        self.tally.refuse_if_too_many(self._max_bad_share)
        self.tally.refuse_if_empty()

    def outcomes(
        self, make: Callable[[Group], Made]
    ) -> Generator[tuple[Record, list[Made] | Unusable], None, None]:
        """Yields each record with what was made of its groups, or why it is not usable; tallies nothing."""
        work = self._opened(make)
        if self._opens:
            yield from ordered(self._records, self._usable, work)
        else:
            for record in self._records:
                yield record, work(record, self._usable(record))

    def _usable(self, record: Record) -> list[Chosen] | Unusable:
        """The groups of a record without their pictures; in order, since `reject` may compare records."""
        try:
            if record.problem is not None:
                raise Unusable(record.problem)
            chosen = self._chosen(record)
            reason = None if self._reject is None else self._reject(record)
            if reason is not None:
                raise Unusable(reason)
        except Unusable as unusable:
            return unusable
        return chosen

    def _opened(
        self, make: Callable[[Group], Made]
    ) -> Callable[[Record, list[Chosen] | Unusable], list[Made] | Unusable]:
        """What the threads do with a record: decode its pictures, which costs most, and `make`."""

        def work(record: Record, chosen: list[Chosen] | Unusable) -> list[Made] | Unusable:
            if isinstance(chosen, Unusable):
                return chosen
            try:
                return [
                    make(Group(name, record, candidates, self._images(candidates), target))
                    for name, candidates, target in chosen
                ]
            except Unusable as unusable:
                return unusable

        return work

    def _chosen(self, record: Record) -> list[Chosen]:
        """`(id, candidates, target)` of each group that the record gives."""
        candidates = tuple(record.candidates)
        if self._unit == "any" and len(candidates) != 2:
            if not any(map(has_worth, candidates)):
                raise Unusable("unlabelled")
            if any(candidate.label is not None and not isfinite(candidate.label) for candidate in candidates):
                raise Unusable("bad_label")
            return [(record.id, candidates, None)]
        if self._unit == "list":
            if len(candidates) < 2:
                raise Unusable("not_a_list")
            return [(record.id, candidates, None)]
        if self._unit == "single" and len(candidates) == 1:
            return self._kept_singles(record, [_desirability(record)])
        if len(candidates) != 2:
            raise Unusable("not_a_pair")
        target = self._pair_target(record)
        if self._unit in ("pair", "any"):
            return [(record.id, candidates, target)]
        return self._kept_singles(record, [float(target > 0.5), float(target < 0.5)])

    def _kept_singles(self, record: Record, desirable: list[float]) -> list[Chosen]:
        kept = [side for side, value in enumerate(desirable) if value or self._undesirable]
        if not kept:
            raise Unusable("not_preferred")
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
            raise Unusable("bad_label") from error
        if target is None and (
            self._unlabelled or (self._unit == "any" and any(map(has_worth, record.candidates)))
        ):
            return 0.5
        if target is None:
            raise Unusable("unlabelled")
        if target == 0.5 and self._ties == "drop":
            raise Unusable("tie")
        return float(target)

    def _images(self, candidates: tuple[Candidate, ...]) -> tuple[Image.Image, ...]:
        return tuple(map(self._open, candidates)) if self._opens else ()

    def _open(self, candidate: Candidate) -> Image.Image:
        try:
            return candidate.image.open(min_side=self._min_side)
        except BadImage as error:
            raise Unusable(error.reason) from error


class Unusable(Exception):
    """A record that is left out, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def has_worth(candidate: Candidate) -> bool:
    """Whether something says how good a picture is: a label, a rank, votes or a score."""
    return bool(candidate.scores) or any(
        value is not None for value in (candidate.label, candidate.rank, candidate.votes)
    )


def _desirability(record: Record) -> float:
    """1 or 0 of a record with one candidate; raises Unusable where its label is none or between."""
    label = record.candidates[0].label
    if label is None:
        raise Unusable("unlabelled")
    if label not in (0.0, 1.0):
        raise Unusable("bad_label")
    return float(label)


def check_ties(ties: str) -> None:
    """Raises UserError when `ties` is no known policy."""
    if ties not in TIES:
        raise UserError(f"ties={ties!r}: choose drop (leave ties out) or soft (train them with target 0.5)")


def check_share(max_bad_share: float) -> None:
    """Raises UserError when `max_bad_share` is no share."""
    if not 0.0 <= max_bad_share <= 1.0:
        raise UserError(f"max_bad_share={max_bad_share}: give a share between 0 and 1")
