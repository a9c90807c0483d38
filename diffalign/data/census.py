"""A census of preference records, in one pass: what is in them, and the ids of the rows that are no use."""

from __future__ import annotations

import heapq
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.common.ahead import ordered
from diffalign.common.statistics import share_interval
from diffalign.data import votes
from diffalign.data.filters import Sieve
from diffalign.data.near import PictureTable, perceptual_hash
from diffalign.data.pictures import BadImage, digest
from diffalign.data.records import LABEL_TOLERANCE, BadLabel, Record
from diffalign.data.select import BAD_REASONS, MIN_SIDE, has_worth
from diffalign.data.words import normalised, nsfw_words

__all__ = ["LONG_CAPTION", "Census", "Finding", "clip_pieces", "findings", "inspect"]

LONG_CAPTION = 75
"""CLIP reads 77 tokens, of which two mark start and end."""

LONGEST = 5
NAMED_GROUPS, NAMED_MEMBERS = 1000, 16
"""So many groups of look-alikes are named, and so many pictures of each; all are counted."""

# CLIP splits a caption into these pieces before it splits them further: the count is a lower bound of the
# tokens.
_CLIP_PIECE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """What one row holds: cheap to keep, unlike its pictures.

    Attributes:
        verdict: of pairs decided, tie, unlabelled or bad_label; rated, of lists, single pictures and pairs
            without a label whose pictures have ranks, votes, scores or labels; not_a_pair, of others; or why
            the row could not be read (bad_text).
        target: P(first preferred) of a decided pair or tie.
        digests: identity of each picture's bytes (None: no bytes).
        sizes: (width, height) of each picture that decodes.
        hashes: perceptual hash of each picture that decodes and is not flat.
        problems: the distinct picture problems, in the order of the candidates.
        user: who voted, where that is known.
        votes: of people for each candidate, where both of a pair have a count.
        refused: why the sieve leaves the row out, None where it passes.
    """

    id: str
    prompt: str
    verdict: str
    target: float | None
    digests: tuple[bytes | None, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    hashes: tuple[int | None, ...]
    problems: tuple[str, ...]
    user: str | None = None
    votes: tuple[int, int] | None = None
    refused: str | None = None


def inspect(record: Record, sieve: Sieve | None = None) -> Finding:
    """Returns the finding for one record; every picture is decoded completely."""
    digests: list[bytes | None] = []
    sizes: list[tuple[int, int] | None] = []
    hashes: list[int | None] = []
    problems: dict[str, None] = {}
    for candidate in record.candidates:
        identity, size, perceptual = None, None, None
        try:
            content = candidate.image.read()
            identity = digest(content)
            picture = candidate.image.decode(content, min_side=MIN_SIDE)
            size, perceptual = picture.size, perceptual_hash(picture)
        except BadImage as error:
            problems[error.reason] = None
        digests.append(identity)
        sizes.append(size)
        hashes.append(perceptual)
    verdict, target = _verdict(record)
    whole = [size for size in sizes if size is not None]
    return Finding(
        record.id,
        record.prompt,
        verdict,
        target,
        tuple(digests),
        tuple(sizes),
        tuple(hashes),
        tuple(problems),
        record.user,
        _votes(record),
        None if sieve is None else sieve.reason(record, verdict, whole, tuple(problems)),
    )


@dataclass
class Census:
    """The running totals over findings: about 800 bytes a row (ids, digests, hashes), not the rows.

    Attributes that hold one entry a row, in order: `ids`; `refused`, as the sieve says; `row_keys`, 16 bytes
    that are equal for the same prompt and pictures; `prompt_keys`, equal for the same normalised prompt;
    `starts`, the row's first place in the table of pictures (and one entry more, the end of the last).
    """

    evaluation: frozenset[str] = frozenset()
    labelled: int = 0
    usable: int = 0
    first_preferred: int = 0
    pairs_of_two_sizes: int = 0
    non_ascii_captions: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    empty_captions: list[str] = field(default_factory=list)
    long_captions: list[str] = field(default_factory=list)
    nsfw: list[str] = field(default_factory=list)
    overlap: list[str] = field(default_factory=list)
    same_picture_twice: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    conflicting: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    refused: list[str | None] = field(default_factory=list)
    row_keys: bytearray = field(default_factory=bytearray)
    prompt_keys: array[int] = field(default_factory=lambda: array("Q"))
    starts: array[int] = field(default_factory=lambda: array("Q", [0]))
    _voters: array[int] = field(default_factory=lambda: array("Q"))
    _targets: array[float] = field(default_factory=lambda: array("d"))
    _pictures: PictureTable = field(default_factory=PictureTable)
    _prompts: set[bytes] = field(default_factory=set)
    _shared: set[str] = field(default_factory=set)
    _longest: list[tuple[int, int, str]] = field(default_factory=list)
    _first: dict[bytes, tuple[str, float | None, str | None]] = field(default_factory=dict)
    _opinions: dict[bytes, dict[str, float]] = field(default_factory=dict)
    _ballots: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, finding: Finding, *, ties: str) -> None:
        """Counts one row; `ties` decides whether a tie is usable."""
        self.ids.append(finding.id)
        self.refused.append(finding.refused)
        self.verdicts[finding.verdict] += 1
        self.first_preferred += finding.verdict == "decided" and (finding.target or 0.0) > 0.5
        labelled = finding.verdict == "decided" or (finding.verdict == "tie" and ties == "soft")
        self.labelled += labelled
        self.usable += labelled and not finding.problems
        reasons = [] if finding.verdict in ("decided", "tie", "rated") else [finding.verdict]
        for reason in (*reasons, *finding.problems):
            self.problems.setdefault(reason, []).append(finding.id)
        self._add_caption(finding)
        self._add_pictures(finding)

    def _add_caption(self, finding: Finding) -> None:
        self._prompts.add(digest(_bytes(finding.prompt)))
        if not finding.prompt.strip():
            self.empty_captions.append(finding.id)
        if finding.verdict != "bad_text":
            pieces = clip_pieces(finding.prompt)
            if pieces > LONG_CAPTION:
                self.long_captions.append(finding.id)
            entry = (pieces, -len(self.ids), finding.id)  # of equally long ones the first
            (heapq.heappush if len(self._longest) < LONGEST else heapq.heappushpop)(self._longest, entry)
        self.non_ascii_captions += not finding.prompt.isascii()
        if nsfw_words(finding.prompt):
            self.nsfw.append(finding.id)
        text = normalised(finding.prompt)
        self.prompt_keys.append(_short(_bytes(text)))
        if text in self.evaluation:
            self.overlap.append(finding.id)
            self._shared.add(text)

    def _add_pictures(self, finding: Finding) -> None:
        for identity, perceptual in zip(finding.digests, finding.hashes, strict=True):
            self._pictures.add(identity, perceptual)
        self.starts.append(len(self._pictures))
        present = [identity for identity in finding.digests if identity is not None]
        sizes = [size for size in finding.sizes if size is not None]
        self.sizes.update(sizes)
        key = digest(b"".join(sorted(present)) + _bytes(finding.prompt))
        self.row_keys += key
        pair = len(finding.digests) == len(present) == 2
        decided = pair and finding.verdict == "decided" and present[0] != present[1]
        self._targets.append(finding.target if decided and finding.target is not None else np.nan)
        self._voters.append(_short(repr((finding.prompt, finding.user)).encode()) if decided else 0)
        if not pair:
            return
        self.pairs_of_two_sizes += len(set(sizes)) == 2
        if present[0] == present[1]:
            self.same_picture_twice.append(finding.id)
        self._add_pair(finding, key, swapped=present[1] < present[0])

    def _add_pair(self, finding: Finding, key: bytes, *, swapped: bool) -> None:
        """Counts a pair among those of the same prompt and pictures.

        The same pair in the other order is the same pair: all are compared in one order, with the target
        turned along.
        """
        target = 1.0 - finding.target if swapped and finding.target is not None else finding.target
        user = None if finding.user is None else sys.intern(finding.user)
        if finding.votes is not None and key not in self._ballots:
            first, second = finding.votes
            self._ballots[key] = (second, first, 0) if swapped else (first, second, 0)
        first_row, first_target, first_user = self._first.setdefault(key, (finding.id, target, user))
        if first_row == finding.id:
            return
        self.duplicates.append((finding.id, first_row))
        if target is None or first_target is None:
            return
        if abs(target - first_target) > LABEL_TOLERANCE:  # 1 - 1/3 is not 2/3
            self.conflicting.append((finding.id, first_row))
        if user is not None and first_user is not None:
            self._opinions.setdefault(key, {first_user: first_target}).setdefault(user, target)

    @property
    def bad_share(self) -> float:
        """The share that training compares with `max_bad_share` (`Tally.bad_share`), in [0, 1]."""
        unread = sum(self.verdicts[reason] for reason in BAD_REASONS)
        broken = unread + self.labelled - self.usable
        return broken / (broken + self.usable) if broken else 0.0

    def groups(self, distance: int) -> NDArray[np.intp]:
        """Returns `[places]` the place that leads each picture's group of look-alikes (`PictureTable`)."""
        return self._pictures.groups(distance)

    def agreement(self) -> votes.Agreement | None:
        """Returns how well people agree on pairs that several voted on: counted votes, else known users."""
        ballots = dict(self._ballots)
        for key, opinions in self._opinions.items():
            targets = list(opinions.values())
            firsts, seconds = sum(t > 0.5 for t in targets), sum(t < 0.5 for t in targets)
            ballots.setdefault(key, (firsts, seconds, len(targets) - firsts - seconds))
        return votes.agreement(list(ballots.values()))

    def circles(self, numbers: NDArray[np.intp]) -> list[list[str]]:
        """Returns the ids of the rows on each circle of one user's votes on one prompt.

        Votes without a user count as one person's. `numbers` are those of the table of pictures.
        """
        targets = np.frombuffer(self._targets, dtype=np.float64)
        rows = np.flatnonzero(~np.isnan(targets))
        first = np.frombuffer(self.starts, dtype=np.uint64)[rows].astype(np.intp)
        ahead = targets[rows] > 0.5
        one, other = numbers[first], numbers[first + 1]
        found = votes.cycles(
            np.frombuffer(self._voters, dtype=np.uint64)[rows],
            np.where(ahead, one, other),
            np.where(ahead, other, one),
        )
        return [[self.ids[rows[vote]] for vote in circle] for circle in found]

    def look_alikes(self, distance: int, numbers: NDArray[np.intp]) -> dict[str, Any]:
        """Returns how many distinct pictures look like another one, and names their groups.

        A picture is named by the row where it comes first and its number in it: "a.parquet:3[0]".
        """
        groups = self._pictures.groups(distance, numbers)
        starts = np.frombuffer(self.starts, dtype=np.uint64).astype(np.intp)
        distinct = np.flatnonzero((numbers == np.arange(len(numbers))) & (numbers >= 0))
        alike = distinct[np.bincount(groups[distinct], minlength=1)[groups[distinct]] > 1]
        members = alike[np.argsort(groups[alike], kind="stable")]
        parts = np.split(members, np.flatnonzero(np.diff(groups[members])) + 1) if members.size else []
        sides = np.flatnonzero(np.diff(starts) == 2)
        one, other = starts[sides], starts[sides] + 1
        both = (groups[one] == groups[other]) & (numbers[one] != numbers[other])
        return {
            "distance": distance,
            "pictures": len(members),
            "groups": len(parts),
            "named": [self._names(part[:NAMED_MEMBERS], starts) for part in parts[:NAMED_GROUPS]],
            "within_pair": [self.ids[row] for row in sides[both]],
        }

    def _names(self, places: NDArray[np.intp], starts: NDArray[np.intp]) -> list[str]:
        rows = np.searchsorted(starts, places, side="right") - 1
        return [f"{self.ids[row]}[{place - starts[row]}]" for row, place in zip(rows, places, strict=True)]

    def report(self, *, near_distance: int = 4, **head: Any) -> dict[str, Any]:
        """Returns the totals as plain data, after the entries of `head`."""
        numbers = self._pictures.numbers()
        decided = self.verdicts["decided"]
        agreed = self.agreement()
        histogram = {f"{width}x{height}": count for (width, height), count in self.sizes.most_common()}
        return {
            **head,
            "rows": len(self.ids),
            "prompts": len(self._prompts),
            "images": int((numbers >= 0).sum()),
            "distinct_images": int((numbers == np.arange(len(numbers))).sum()),
            "decided": decided,
            "first_preferred": self.first_preferred,
            "first_preferred_share": share_interval(self.first_preferred, decided).as_dict()
            if decided
            else None,
            "ties": self.verdicts["tie"],
            "unlabelled": self.verdicts["unlabelled"],
            "rated": self.verdicts["rated"],
            "usable": self.usable,
            "bad_share": self.bad_share,
            "problems": self.problems,
            "duplicates": [{"row": row, "same_as": first} for row, first in self.duplicates],
            "conflicting_duplicates": [{"row": row, "same_as": first} for row, first in self.conflicting],
            "same_picture_twice": self.same_picture_twice,
            "near_duplicates": self.look_alikes(near_distance, numbers),
            "agreement": None if agreed is None else asdict(agreed),
            "circular_votes": self.circles(numbers),
            "sizes": histogram,
            "pairs_of_two_sizes": self.pairs_of_two_sizes,
            "empty_captions": self.empty_captions,
            "long_captions": self.long_captions,
            "longest_captions": [
                {"row": name, "tokens_at_least": pieces}
                for pieces, _, name in sorted(self._longest, reverse=True)
            ],
            "non_ascii_captions": self.non_ascii_captions,
            "nsfw_words": self.nsfw,
            "overlap": {"prompts": len(self._shared), "rows": self.overlap} if self.evaluation else None,
        }


def clip_pieces(caption: str) -> int:
    """Returns into how many pieces CLIP splits a caption before byte pairs: at least so many tokens."""
    return len(_CLIP_PIECE.findall(caption))


def findings(records: Iterable[Record], sieve: Sieve | None = None) -> Iterator[Finding]:
    """Yields the findings in order; decoding runs in threads (PIL works outside the interpreter's lock)."""
    with closing(ordered(records, lambda record: sieve, inspect)) as found:
        for _, finding in found:
            yield finding


def _verdict(record: Record) -> tuple[str, float | None]:
    if record.problem is not None:
        return record.problem, None
    rated = any(map(has_worth, record.candidates))
    if len(record.candidates) != 2:
        return "rated" if rated else "not_a_pair", None
    try:
        target = record.pair_target()
    except BadLabel:
        return "bad_label", None
    if target is None:
        return "rated" if rated else "unlabelled", None
    return ("tie" if target == 0.5 else "decided"), target


def _votes(record: Record) -> tuple[int, int] | None:
    """The votes of people on a pair, whose candidates both have a count."""
    if record.labelled_by_scorers:
        return None
    counts = [candidate.votes for candidate in record.candidates]
    if len(counts) != 2 or counts[0] is None or counts[1] is None or min(counts[0], counts[1]) < 0:
        return None
    return counts[0], counts[1]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _short(content: bytes) -> int:
    """8 bytes of a digest as a number: of a million texts two are equal with a chance of 3e-8."""
    return int.from_bytes(digest(content)[:8], "little")
